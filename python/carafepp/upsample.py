# SPDX-License-Identifier: Apache-2.0
"""`python -m carafepp upsample LOW GUIDE --factor 8 --out FILE`: a map follows a picture's edges.

LOW is a depth map, a mask or a heat map, GUIDE a photograph of the same view, `factor` times as
large. Tiles are read, upsampled and written one after the other.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import carafepp

MISSING: ImportError | None = None
try:
    import tifffile
    from PIL import Image

    from .guided import KERNEL_SIZE, RADIUS, logits_from_guide
    from .pictures import (
        Array,
        Picture,
        Shades,
        check_picture,
        colours,
        new_file,
        read_picture,
        sentence,
        shades_of,
        tiles,
        told,
        unreadable,
        with_bar,
    )
except ImportError as error:
    MISSING = error

TILE = 512  # rows and columns of the result, about
NAMES = 16  # labels that are weighed together
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
READ = (*PICTURES, ".tif", ".tiff", ".npy", ".zarr")
WRITTEN = (".png", ".tif", ".tiff", ".npy", ".zarr")
NEEDED = 'upsampling needs: pip install "carafepp[demo]"; .tif and .zarr: "carafepp[demo,dask]"'
HELP = f"""\
LOW keeps its dtype, and its values stay in their range. Integers of at most two
values and pictures with a palette are masks: they stay what they are.
GUIDE is a picture of any dtype.

LOW and GUIDE end in {" ".join(READ)},
FILE in {" ".join(WRITTEN)}.

example:
  python -m carafepp upsample depth.png photo.jpg --factor 8 --out large.png
"""


class Target(NamedTuple):
    """Pixels that take the tiles, and the function that closes their file."""

    pixels: Any
    close: Callable[[], None]


# ------------------------------------------------------------------------------------------- files


def open_raster(name: str, path: Path, files: ExitStack) -> Picture:
    """Open a file, which `files` closes. Only pictures are read as a whole."""
    suffix = path.suffix.lower()
    if suffix not in READ:
        raise OSError(f"{name} must end in one of {' '.join(READ)}; got {path}")
    if suffix in PICTURES:
        return read_picture(name, path, keep_palette=name == "LOW")
    try:
        path.stat()
        return _open_array(suffix, path, files)
    except ImportError:
        raise
    except Exception as error:  # each library has its own
        raise unreadable(name, path, error) from error


def _open_array(suffix: str, path: Path, files: ExitStack) -> Picture:
    if suffix == ".npy":
        return Picture(np.lib.format.open_memmap(path, "r"))
    import zarr

    if suffix == ".zarr":
        return Picture(zarr.open_array(str(path), mode="r"))
    tiff = files.enter_context(tifffile.TiffFile(path))
    page: Any = tiff.pages[0]
    if page.axes not in ("YX", "YXS"):
        raise ValueError(f"its axes are {page.axes}, instead of YX or YXS")
    several = tiff.series[0].axes != page.axes
    pixels = zarr.open_array(page.aszarr(), mode="r")
    return Picture(pixels, None, len(tiff.pages) if several else 1)


def create(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], palette: Any) -> Target:
    """Make a file of this suffix, for pixels of this shape and dtype."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        pixels = np.empty(shape, dtype)

        def save() -> None:
            picture = Image.fromarray(pixels if pixels.shape[2:] != (1,) else pixels[..., 0])
            if palette is not None:
                picture.putpalette(palette)
            picture.save(path)

        return Target(pixels, save)
    if suffix == ".npy":
        written = np.lib.format.open_memmap(path, "w+", dtype, shape)
        return Target(written, written.flush)
    if suffix == ".zarr":
        import zarr

        chunks = (*(min(TILE, length) for length in shape[:2]), *shape[2:])
        stored = zarr.open_array(str(path), mode="w", shape=shape, chunks=chunks, dtype=dtype)
        return Target(stored, lambda: None)
    form: dict[str, Any] = {}
    if math.prod(shape[2:]) > 1:
        form = {"photometric": "rgb" if shape[2] in (3, 4) else "minisblack"}
        form["planarconfig"] = "contig"  # else rows may count as pages
    in_file = shape if form else shape[:2]
    dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype
    mapped = tifffile.memmap(path, shape=in_file, dtype=dtype, **form)
    return Target(mapped.reshape(shape), mapped.flush)


def check_out(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse a path that the result cannot be written to, before anything is computed."""
    suffix = path.suffix.lower()
    if suffix not in WRITTEN:
        raise OSError(f"--out must end in one of {' '.join(WRITTEN)}; got {path}")
    try:
        exists = bool(path.stat())
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(f"--out must have a shorter name; got {path}: {error.strerror}") from None
        exists = False
    if exists:
        raise OSError(f"--out must be a new file; got {path}, which exists")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"--out must be in a folder that can be written to; got {path}")
    channels = shape[2] if len(shape) == 3 else 1
    in_png = {"bool": (1,), "uint8": (1, 2, 3, 4), "uint16": (1,)}
    if suffix == ".png" and channels not in in_png.get(dtype.name, ()):
        raise OSError(
            f"--out must end in .tif, .npy or .zarr: a PNG file has no {dtype} of {channels} "
            f"channels; got {path}"
        )


# ------------------------------------------------------------------------------------------ pixels


def pieces(pixels: Any) -> Iterator[Array]:
    """Yield the pixels in pieces that fit into memory."""
    for first in range(0, pixels.shape[0], TILE):
        for left in range(0, pixels.shape[1], TILE):
            yield np.asarray(pixels[first : first + TILE, left : left + TILE])


def is_mask(low: Picture) -> bool:
    """Tell whether pixels are labels: a palette, booleans, or integers of at most two values."""
    if low.palette is not None or low.pixels.dtype.kind == "b":
        return True
    if low.pixels.dtype.kind not in "ui" or len(low.pixels.shape) != 2:
        return False
    values: set[int] = set()
    for piece in pieces(low.pixels):
        values.update(np.unique(piece).tolist())
        if len(values) > 2:
            return False
    return True


def check_range(low: Picture) -> None:
    """Refuse integers that float64 does not hold."""
    if low.pixels.dtype.kind not in "ui" or low.pixels.dtype.itemsize < 8:
        return
    for piece in pieces(low.pixels):
        if not -(2**53) <= piece.min() <= piece.max() <= 2**53:
            raise OSError(
                f"LOW must have integers within 2**53 of 0; got {piece.min()} to {piece.max()}. "
                "--labels takes others, which are then names"
            )


def upsample(low: Array, guide: Array, factor: int, halo: Any, labels: bool) -> Any:
    """Upsample a tile; both arrays have a halo of blocks, `logits_from_guide` tells which.

    The guide is [H, W, 3] in 0..1.
    """
    logits = logits_from_guide(guide, factor, halo)
    margins = [(RADIUS - before, RADIUS - after) for before, after in halo]

    def weigh(channels: Array) -> Any:
        """[C, h, w] -> [C, H, W]. Logits of blocks beyond the border are -inf."""
        features = np.pad(channels, [(0, 0), *margins])[None]
        return carafepp.reassemble_with_logits(
            features,
            logits.astype(features.dtype, copy=False),
            up=factor,
            kernel_size=KERNEL_SIZE,
            padding=0,
        )[0]

    if labels:
        return _largest_shares(low, weigh)

    large = low.dtype.itemsize > (4 if low.dtype.kind == "f" else 2)
    values = low.astype(np.float64 if large else np.float32).reshape(*low.shape[:2], -1)
    values = values.transpose(2, 0, 1)
    known = np.isfinite(values)
    result = weigh(np.where(known, values, 0))
    if not known.all():  # weights of known pixels alone, where they are the most
        share = weigh(known.astype(values.dtype))
        with np.errstate(divide="ignore", invalid="ignore"):
            result = np.where(share >= 0.5, result / share, np.nan)
    least = np.where(known, values, np.inf).min((1, 2), keepdims=True)
    most = np.where(known, values, -np.inf).max((1, 2), keepdims=True)
    result = result.clip(least, most)  # rounding may leave the range
    if low.dtype.kind in "ui":
        result = np.rint(result)
    result = result.astype(low.dtype).transpose(1, 2, 0)
    return result.reshape(*result.shape[:2], *low.shape[2:])


def _largest_shares(low: Array, weigh: Callable[[Array], Any]) -> Any:
    """Return the name with the largest share at each pixel; the smallest one of equal shares."""
    names = np.unique(low)
    most, found = np.asarray(-1, np.float32), names[:1]
    for begin in range(0, len(names), NAMES):
        some = names[begin : begin + NAMES]
        shares = weigh((low == some[:, None, None]).astype(np.float32))
        largest, named = shares.max(0), some[shares.argmax(0)]
        more = largest > most
        most, found = np.where(more, largest, most), np.where(more, named, found)
    return found


def run(
    low: Picture, guide: Picture, shades: Shades, factor: int, target: Any, labels: bool
) -> None:
    """Upsample all tiles. On a terminal a bar shows how many are done."""
    cut = tiles(low.pixels.shape, max(1, TILE // factor), RADIUS)
    for row, column in with_bar(cut, f"{len(cut)} tiles"):
        halo = (row[2:], column[2:])
        picture = colours(
            np.asarray(guide.pixels[row.pixels(factor), column.pixels(factor)]), shades
        )
        tile = np.asarray(low.pixels[row.pixels(1), column.pixels(1)])
        rows, columns = (slice(span.first * factor, span.last * factor) for span in (row, column))
        target[rows, columns] = upsample(tile, picture, factor, halo, labels)


# ---------------------------------------------------------------------------------------- command


def check_guide(low: Picture, guide: Picture, factor: int) -> None:
    """Refuse a guide of another size."""
    rows, columns = low.pixels.shape[:2]
    height, width = guide.pixels.shape[:2]
    if (height, width) != (rows * factor, columns * factor):
        fits = height // rows
        hint = f"; --factor {fits} fits" if (height, width) == (rows * fits, columns * fits) else ""
        raise OSError(
            f"GUIDE must be {factor} times LOW of {low.size}: {columns * factor} x "
            f"{rows * factor} pixels; it has {guide.size}{hint}"
        )


def factor_of(text: str) -> int:
    """Return the factor of the command line."""
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 64; got {text}")
    return int(text)


def main(argv: list[str]) -> int:
    """Run the command. If it cannot run, return 2 and print the reason to stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m carafepp upsample",
        description="Upsample a depth map, a mask or a heat map along the edges of a photograph.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("low", type=Path, metavar="LOW", help="the map: what is upsampled")
    parser.add_argument(
        "guide", type=Path, metavar="GUIDE", help="the photograph: N times as wide and high as LOW"
    )
    parser.add_argument("--factor", type=factor_of, required=True, metavar="N", help="1 to 64")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new file")
    parser.add_argument(
        "--labels", action="store_true", help="values of LOW are names, which are never mixed"
    )
    arguments = parser.parse_args(argv)
    if MISSING is not None:
        print(f"{parser.prog}: {MISSING}; {NEEDED}", file=sys.stderr)
        return 2
    out: Path = arguments.out
    with ExitStack() as files:
        try:
            low = open_raster("LOW", arguments.low, files)
            check_picture("LOW", arguments.low, low, most=None)
            guide = open_raster("GUIDE", arguments.guide, files)
            check_picture("GUIDE", arguments.guide, guide)
            check_guide(low, guide, arguments.factor)
            labels = arguments.labels or is_mask(low)
            if labels and len(low.pixels.shape) == 3:
                raise OSError(
                    "LOW must have rows and columns alone where it is a mask (booleans or "
                    f"--labels); got the shape {tuple(low.pixels.shape)}"
                )
            shape = (*guide.pixels.shape[:2], *low.pixels.shape[2:])
            dtype = np.dtype(low.pixels.dtype).newbyteorder("=")
            check_out(out, shape, dtype)
            if not labels:
                check_range(low)
            shades = shades_of("GUIDE", guide.pixels)
            for line in (*told("LOW", low), *told("GUIDE", guide, shades)):
                print(line)
            with new_file(out) as part:
                target = create(part, shape, dtype, low.palette)
                run(low, guide, shades, arguments.factor, target.pixels, labels)
                target.close()
        except (OSError, ImportError, MemoryError) as error:
            needed = f"; {NEEDED}" if isinstance(error, ImportError) else ""
            print(f"{parser.prog}: {sentence(error)}{needed}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{parser.prog}: stopped; nothing is written", file=sys.stderr)
            return 130
    print(f"{out}: {guide.size}, {dtype}{', a mask' if labels else ''}")
    return 0
