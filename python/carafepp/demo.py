# SPDX-License-Identifier: Apache-2.0
"""`python -m carafepp demo`: content-aware reassembly on real data, in both directions.

Up: a disparity map is shrunk 8 times and upsampled again, guided by the photograph.
Down: a photograph is shrunk 4 times by masks that keep its thin structures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import carafepp

MISSING: ImportError | None = None
try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image
    from scipy import ndimage
    from skimage import color, data

    from .guided import KERNEL_SIZE, logits_from_guide, split_into_blocks
    from .pictures import (
        Shades,
        check_picture,
        colours,
        make_folder,
        new_file,
        read_picture,
        sentence,
        shades_of,
        tiles,
        told,
        with_bar,
    )
except ImportError as error:
    MISSING = error

Array = NDArray[Any]
Panel = tuple[str, Array]  # a title and a picture [H, W, 3] in 0..1
Region = tuple[slice, slice]  # rows and columns of a picture

UP = 8

# Downsampling.
DOWN = 4
DOWN_KERNEL = 2 * DOWN - 1  # the smallest window around a block's first pixel with the block
AROUND = 0.7  # blocks; a block counts about as much as its two neighbours
REACH = 3  # blocks around a block that count
TILE = 256  # rows and columns of blocks
NOISE = 2.0  # CIELAB units; smaller differences are averaged away

# Drawing, in pixels (and a disparity error).
GAP, STRIP, DPI = 14, 38, 100
WORST = 5.0  # the brightest error
CELL = 8  # the side of a pixel of a shrunk picture
LARGE = 3000  # rows or columns; a larger photograph is drawn from its area average
CALLS = 5  # of which the fastest is told
CONTRAST = "Contrast: how far pixels are from the mean of the 3x3 around them (standard deviation)."


class Scores(NamedTuple):
    """The error of an upsampled disparity over the known pixels, and the time of the operator."""

    rmse: float
    mae: float
    bad: float  # share of the pixels with an error above 1
    seconds: float


class Look(NamedTuple):
    """The brightness and the contrast of a shrunk picture, in grey levels of 0..255."""

    brightness: float  # area averaging keeps the photograph's
    contrast: float  # standard deviation of the pixels from the mean of the 3x3 around them


# -------------------------------------------------------------------------------------------- up


def load_scene() -> tuple[Array, Array]:
    """Return a photograph [H, W, 3] in 0..1 and its disparity [H, W], NaN where unknown."""
    photo, _, disparity = data.stereo_motorcycle()
    height, width = (size // UP * UP for size in disparity.shape)
    disparity = np.where(np.isfinite(disparity) & (disparity > 0), disparity, np.nan)
    return photo[:height, :width].astype(np.float32) / 255, disparity[:height, :width]


def shrink_disparity(disparity: Array) -> Array:
    """[H, W] -> [H/8, W/8]: mean of a block's known pixels; if it has none, the nearest block's."""
    blocks = split_into_blocks(disparity[..., None], UP)[..., 0]
    known = np.isfinite(blocks)
    mean = np.where(known, blocks, 0).sum(2) / np.maximum(known.sum(2), 1)
    nearest = ndimage.distance_transform_edt(
        ~known.any(2), return_distances=False, return_indices=True
    )
    lowres: Array = mean[tuple(nearest)].astype(np.float32)
    return lowres


def upsample_with_logits(lowres: Array, logits: Array) -> Array:
    """[H/8, W/8] and [1, K*K*8*8, H/8, W/8] -> [H, W]."""
    upsampled: Array = carafepp.reassemble_with_logits(
        lowres[None, None], logits, up=UP, kernel_size=KERNEL_SIZE, normalizer="softmax"
    )
    return upsampled.squeeze((0, 1))


def resize(lowres: Array, method: Image.Resampling) -> Array:
    """[H/8, W/8] -> [H, W]; Pillow too puts the centres of pixels at halves."""
    height, width = lowres.shape
    return np.asarray(Image.fromarray(lowres).resize((width * UP, height * UP), method))


def score(upsampled: Array, disparity: Array, seconds: float) -> Scores:
    """Compare [H, W] with the measured [H, W]."""
    error = np.abs(upsampled - disparity)[np.isfinite(disparity)]
    rmse, mae, bad = np.sqrt((error**2).mean()), error.mean(), (error > 1).mean()
    return Scores(float(rmse), float(mae), float(bad), seconds)


def timed(call: Callable[[], Array], calls: int = CALLS) -> tuple[Array, float]:
    """Return the result and the seconds of the fastest of some calls."""
    seconds = np.inf
    for _ in range(calls):
        start = time.perf_counter()
        result = call()
        seconds = min(seconds, time.perf_counter() - start)
    return result, float(seconds)


def upsampling_demo(path: Path) -> tuple[dict[str, Scores], float]:
    """Upsample the shrunk disparity in four ways; the pictures go to `path`.

    Return the scores, and the seconds that the logits take.
    """
    photo, disparity = load_scene()
    lowres = shrink_disparity(disparity)
    logits, seconds_of_logits = timed(lambda: logits_from_guide(photo, UP), calls=1)
    methods: dict[str, Callable[[], Array]] = {
        "nearest": lambda: resize(lowres, Image.Resampling.NEAREST),
        "bilinear": lambda: resize(lowres, Image.Resampling.BILINEAR),
        "bicubic": lambda: resize(lowres, Image.Resampling.BICUBIC),
        "carafepp": lambda: upsample_with_logits(lowres, logits),
    }
    results: dict[str, Array] = {}
    scores: dict[str, Scores] = {}
    for name, method in methods.items():
        results[name], seconds = timed(method)
        scores[name] = score(results[name], disparity, seconds)
    draw_upsampling(path, photo, disparity, results, scores)
    return scores, seconds_of_logits


def draw_upsampling(
    path: Path, photo: Array, disparity: Array, results: dict[str, Array], scores: dict[str, Scores]
) -> None:
    """Draw three rows: five pictures, a detail of each, the measurement and four error maps."""
    least, most = np.nanmin(disparity), np.nanmax(disparity)

    def depth(values: Array) -> Array:
        return paint((values - least) / (most - least), "turbo")

    pictures = {"photograph": photo} | {name: depth(result) for name, result in results.items()}
    bench = np.s_[90:214, 30:214]  # its slats and cross are about as thin as a block
    errors = [
        (
            f"error: mean {scores[name].mae:.2f}, RMSE {scores[name].rmse:.2f}, "
            f"{scores[name].bad:.1%} > 1",
            paint(np.abs(result - disparity) / WORST, "inferno"),
        )
        for name, result in results.items()
    ]
    write_sheet(
        path,
        f"Disparity upsampled {UP}x from one small map. "
        f"Errors: black is 0, the brightest {WORST:g} or more; grey was not measured.",
        [
            list(pictures.items()),
            [("in the frame", picture[bench]) for picture in pictures.values()],
            [("measured disparity", depth(disparity)), *errors],
        ],
        panel=(photo.shape[1] // 2, photo.shape[0] // 2),
        frame=bench,
    )


# ------------------------------------------------------------------------------------------ down


def downsampling_logits(photo: Array, halo: Any) -> Array:
    """[H, W, 3] -> [1, K*K, ceil(H/4), ceil(W/4)]: how much a pixel of a block stands out.

    The weight of a pixel is the squared difference of its colour from the block's surroundings.
    This follows detail-preserving image downscaling (Weber et al. 2016): thin lines keep their
    colour. A tile of a larger photograph has a halo of blocks: ((top, bottom), (left, right)).
    They get no logits.
    """
    k, first = DOWN_KERNEL, DOWN_KERNEL // 2
    pixels = planes(color.rgb2lab(photo))  # [3, 16, ceil(H/4), ceil(W/4)]
    surroundings = ndimage.gaussian_filter(means(pixels), (0, AROUND, AROUND), radius=REACH)
    (top, bottom), (left, right) = halo
    inner = np.s_[..., top : pixels.shape[2] - bottom, left : pixels.shape[3] - right]
    difference2 = ((pixels[inner] - surroundings[:, None][inner]) ** 2).sum(0)
    logit = np.where(np.isnan(difference2), -np.inf, np.log(difference2 + NOISE**2))

    # A window is centred on the first pixel of its block, so the block is its lower right part.
    # All other taps have weight 0, so the result does not shift against the photograph.
    rows, cols = logit.shape[1:]
    logits = np.full((k, k, rows, cols), -np.inf, np.float32)
    logits[first:, first:] = logit.reshape(DOWN, DOWN, rows, cols)
    return logits.reshape(1, k * k, rows, cols)


def planes(picture: Array) -> Array:
    """[H, W, 3] -> [3, 16, ceil(H/4), ceil(W/4)], NaN outside: sums over blocks are fast."""
    blocks = split_into_blocks(picture.astype(np.float32, copy=False), DOWN)
    return np.ascontiguousarray(blocks.transpose(3, 2, 0, 1))


def means(pixels: Array) -> Array:
    """[3, 16, H, W] -> [3, H, W]: of the pixels within the picture."""
    mean: Array = pixels.mean(1)
    return np.nanmean(pixels, 1) if np.isnan(mean).any() else mean


def downsample_with_masks(photo: Array, halo: Any) -> Array:
    """[H, W, 3] -> [ceil(H/4), ceil(W/4), 3], without the halo."""
    logits = downsampling_logits(photo, halo)
    rows, cols = logits.shape[2:]
    (top, _), (left, _) = halo
    photo = photo[DOWN * top :, DOWN * left :][: DOWN * rows, : DOWN * cols]
    features = np.ascontiguousarray(photo.transpose(2, 0, 1))[None]
    masks = carafepp.normalize_masks(logits, kernel_size=DOWN_KERNEL, normalizer="softmax")
    shrunk: Array = carafepp.reassemble(features, masks, down=DOWN)
    return shrunk.squeeze(0).transpose(1, 2, 0)


def shrink(pixels: Array, shades: Shades) -> dict[str, Array]:
    """Shrink a picture in three ways, tile by tile: [ceil(H/4), ceil(W/4), 3] in 0..1 each."""
    size = [-(-length // DOWN) for length in pixels.shape[:2]]
    names = ("area averaging", "max pooling", "carafepp")
    results = {name: np.empty((*size, 3), np.float32) for name in names}
    for row, column in with_bar(tiles(size, TILE, REACH), "shrinking"):
        halo = (row[2:], column[2:])
        photo = colours(pixels[row.pixels(DOWN), column.pixels(DOWN)], shades)
        there = np.s_[row.first : row.last, column.first : column.last]
        results["carafepp"][there] = downsample_with_masks(photo, halo)
        inner = pixels[DOWN * row.first : DOWN * row.last, DOWN * column.first : DOWN * column.last]
        blocks = planes(colours(inner, shades))
        results["area averaging"][there] = means(blocks).transpose(1, 2, 0)
        results["max pooling"][there] = np.fmax.reduce(blocks, 1).transpose(1, 2, 0)
    return results


def look_at(picture: Array) -> Look:
    """Measure [H, W, 3]."""
    grey = 255 * color.rgb2gray(picture)
    return Look(float(grey.mean()), float(np.std(grey - ndimage.uniform_filter(grey, 3))))


def downsampling_demo(sheet: Path, shrunk: Path, pixels: Array, shades: Shades) -> dict[str, Look]:
    """Shrink a picture in three ways; the pictures go to `sheet`, carafepp's to `shrunk` too."""
    results = shrink(pixels, shades)
    looks = {name: look_at(result) for name, result in results.items()}
    if max(pixels.shape[:2]) > LARGE:
        draw_downsampling(sheet, results["area averaging"], 1, results, looks)
    else:
        draw_downsampling(sheet, colours(pixels, shades), DOWN, results, looks)
    with new_file(shrunk) as part:
        Image.fromarray(np.rint(255 * results["carafepp"].clip(0, 1)).astype(np.uint8)).save(part)
    return looks


def draw_downsampling(
    path: Path, photo: Array, scale: int, results: dict[str, Array], looks: dict[str, Look]
) -> None:
    """Draw two rows of two: the photograph, and the centre of each result, enlarged.

    The photograph has `scale` times the rows and columns of a result.
    """
    width = 736  # of a panel: that of the scene
    height = width * photo.shape[0] // photo.shape[1]
    height = min(max(height, width // 3), width)  # a banner would leave no room for text
    rows, cols = results["carafepp"].shape[:2]
    high, wide = min(height // CELL, rows), min(width // CELL, cols)
    top, left = (rows - high) // 2, (cols - wide) // 2
    middles = [result[top : top + high, left : left + wide] for result in results.values()]
    panels = [("photograph", photo)] + [
        (f"{name}: brightness {look.brightness:.0f}, contrast {look.contrast:.0f}", middle)
        for (name, look), middle in zip(looks.items(), middles, strict=True)
    ]
    write_sheet(
        path,
        f"A photograph shrunk {DOWN}x in three ways: what is in the frame.\n{CONTRAST}",
        [panels[:2], panels[2:]],
        panel=(width, height),
        frame=np.s_[scale * top : scale * (top + high), scale * left : scale * (left + wide)],
    )


# ---------------------------------------------------------------------------- pictures and words


def paint(values: Array, colours: str) -> Array:
    """[H, W] -> [H, W, 3]: 0..1 in the colours of a matplotlib map, NaN in grey."""
    colormap = matplotlib.colormaps[colours].with_extremes(bad="0.5")
    painted: Array = colormap(np.ma.masked_invalid(values))
    return painted[..., :3]


def write_sheet(
    path: Path, heading: str, rows: Sequence[Sequence[Panel]], panel: tuple[int, int], frame: Region
) -> None:
    """Write rows of panels of (wide, high) pixels each, the first one with a frame in it."""
    wide, high = panel
    width = len(rows[0]) * (wide + GAP) + GAP
    top = STRIP * (1 + heading.count("\n"))
    height = top + len(rows) * (STRIP + high) + GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(GAP / width, 1 - top / height, heading, fontsize=15, va="bottom")
    for i, row in enumerate(rows):
        for j, (title, picture) in enumerate(row):
            left, bottom = GAP + j * (wide + GAP), GAP + (len(rows) - 1 - i) * (STRIP + high)
            axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
            axes.imshow(np.clip(picture, 0, 1))
            axes.set_title(title, fontsize=13, loc="left")
            axes.set_axis_off()
    (first, last), (left, right) = ((part.start, part.stop) for part in frame)
    size = right - left, last - first
    figure.axes[0].add_patch(Rectangle((left, first), *size, fill=False, edgecolor="white", lw=2))
    with new_file(path) as part:
        figure.savefig(part)


def print_scores(scores: dict[str, Scores], seconds_of_logits: float) -> None:
    """Print the table of the upsampling."""
    print(f"Disparity upsampled {UP}x, against the measured one:\n")
    print("               RMSE   mean error   off by > 1      time")
    for name, (rmse, mae, bad, seconds) in scores.items():
        print(f"  {name:<10} {rmse:6.3f} {mae:12.3f} {bad:12.1%} {1000 * seconds:6.1f} ms")
    print(
        f"\n  The logits, which carafepp takes too, were made in NumPy from the photograph in "
        f"{1000 * seconds_of_logits:.0f} ms.\n"
    )


def print_looks(looks: dict[str, Look]) -> None:
    """Print the table of the downsampling."""
    print(f"Photograph shrunk {DOWN}x, in grey levels of 0..255:\n")
    print("                 brightness   contrast")
    for name, (brightness, contrast) in looks.items():
        print(f"  {name:<14} {brightness:10.1f} {contrast:10.1f}")
    print(f"\n  Brightness: the mean of all pixels.\n  {CONTRAST}\n")


def run(image: Path | None, out: Path) -> None:
    """Run both directions on the scene, or the second one on the user's picture."""
    if image is None:
        pixels, shades, name = 255 * load_scene()[0], Shades((0, 255), (0, 1)), "photograph"
    else:
        picture = read_picture("IMAGE", image)
        check_picture("IMAGE", image, picture)
        pixels, name = picture.pixels, image.name
        if min(pixels.shape[:2]) < DOWN:
            raise OSError(
                f"IMAGE must have {DOWN} rows and columns or more, since it is shrunk {DOWN} "
                f"times; got {picture.size} in {image}"
            )
        shades = shades_of("IMAGE", pixels)
        print(*told("IMAGE", picture, shades), f"{image}: {picture.size}", "", sep="\n")
    make_folder(out)
    sheet, shrunk = out / f"carafepp-{name}.png", out / f"carafepp-{name}-shrunk.png"
    written = [sheet, shrunk]
    if image is None:
        written.insert(0, out / "carafepp-disparity.png")
        print_scores(*upsampling_demo(written[0]))
    print_looks(downsampling_demo(sheet, shrunk, pixels, shades))
    print("Written:", *written, sep="\n  ")


def main(argv: list[str]) -> int:
    """Run the demo. If it cannot run, return 2 and print the reason to stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m carafepp demo",
        description="Without IMAGE: upsample a disparity map 8 times, guided by its photograph; "
        "shrink the photograph 4 times; both beside the usual ways. With IMAGE: shrink that one.",
        epilog="It prints scores and writes PNG files: carafepp-NAME.png shows the ways side by "
        "side, carafepp-NAME-shrunk.png is the small picture.",
    )
    parser.add_argument(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="a picture of yours: JPEG, PNG, TIFF or what else Pillow reads, of any dtype",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the folder of the PNG files; default: the current one",
    )
    arguments = parser.parse_args(argv)
    if MISSING is not None:
        needed = 'the demo needs: pip install "carafepp[demo]"'
        print(f"{parser.prog}: {MISSING}; {needed}", file=sys.stderr)
        return 2
    try:
        run(arguments.image, arguments.out)
    except (OSError, MemoryError) as error:
        print(f"{parser.prog}: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    return 0
