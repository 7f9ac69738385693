# SPDX-License-Identifier: Apache-2.0
"""Pictures of every kind: read, shown in colours, worked on in tiles, written."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from tifffile import TiffFile, TiffFileError

Array = NDArray[Any]
Item = TypeVar("Item")

TIFF = (".tif", ".tiff")
WHITE = (1, 255, 1023, 4095, 16383, 65535)  # of 1, 8, 10, 12, 14 and 16 bits
WHITE_SIGNED = (*WHITE[:-1], 32767)
STRIP = 256  # rows that are looked at together
# Tags of TIFF: bits of a sample, photometric interpretation, orientation, sample format.
TAG_BITS, TAG_WHITE, TAG_ORIENTATION, TAG_SIGN = 258, 262, 274, 339
SIGNS = {("I", 1): np.uint32, ("L", 2): np.int8}  # where Pillow knows the other sign alone

# How rows and columns are turned upright, by the orientation in the file.
TURNS: dict[int, Any] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels.swapaxes(0, 1), 2),
    8: np.rot90,
}


class Picture(NamedTuple):
    """Pixels [H, W] or [H, W, channels], the palette of indices, and how many frames there are."""

    pixels: Any  # of shape and dtype; slices of it are arrays
    palette: Any = None
    frames: int = 1

    @property
    def size(self) -> str:
        """Return the size in words."""
        return f"{self.pixels.shape[1]} x {self.pixels.shape[0]} pixels"


class Shades(NamedTuple):
    """The values that are shown black and white: of colours, and of the opacity."""

    colour: tuple[float, float]
    opacity: tuple[float, float]


# ------------------------------------------------------------------------------------------ errors


def unreadable(name: str, path: Path, error: Exception) -> OSError:
    """Return the error for a file that cannot be read; `name` is that of the argument."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError | TiffFileError):
        reason = "its content is no picture of a known kind"
    return OSError(f"{name} must be a file that can be read; got {path}: {reason}")


def sentence(error: BaseException) -> str:
    """Return what an error says, without the number of the system's errors."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or "not enough memory"


# --------------------------------------------------------------------------------------------- read


def read_picture(name: str, path: Path, keep_palette: bool = False) -> Picture:
    """Read the first frame of a picture, upright.

    Pixels are bool, integers or floats, as in the file. PNG's 16 bits of a colour become 8.

    Parameters
    ----------
    name : str
        The argument, for errors.
    path : Path
    keep_palette : bool
        Pixels of a picture with a palette stay indices.

    Raises
    ------
    OSError
        The file is no picture, or only a part of one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow refuses only what is twice as large
            return _read_by_pillow(path, keep_palette)
    except UnidentifiedImageError as error:
        if path.suffix.lower() not in TIFF:
            raise unreadable(name, path, error) from error
    # Pillow raises many kinds of errors for a broken file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(name, path, error) from error
    try:
        return _read_by_tifffile(path)
    except Exception as error:  # so does tifffile
        raise unreadable(name, path, error) from error


def _read_by_pillow(path: Path, keep_palette: bool) -> Picture:
    with Image.open(path) as file:
        picture: Image.Image = file
        kind, frames, tags = file.format, getattr(file, "n_frames", 1), getattr(file, "tag_v2", {})
        if file.mode.startswith("RGB") and max(tags.get(TAG_BITS, (8,))) > 8:
            with suppress(Exception):  # Pillow decompresses more, but to 8 bits
                return _read_by_tifffile(path)
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode == "P" and keep_palette:
            return Picture(np.asarray(picture), picture.getpalette(), frames)
        if picture.mode[0] not in "IF":
            clear = "transparency" in picture.info or picture.mode[-1] in "Aa"
            if clear or picture.mode not in ("1", "L", "RGB"):
                picture = picture.convert("RGBA" if clear else "RGB")
        pixels = np.asarray(picture)
    sign = tags.get(TAG_SIGN, (1,))[0]  # 1: none; 2: signed
    if kind == "TIFF" and (picture.mode, sign) in SIGNS:
        pixels = pixels.view(SIGNS[picture.mode, sign])
    elif kind != "TIFF" and picture.mode == "I":
        pixels = pixels.astype(np.uint16)
    if kind == "TIFF" and picture.mode[0] == "I" and tags.get(TAG_WHITE) == 0:
        pixels = ~pixels
    return Picture(pixels, None, frames)


def _read_by_tifffile(path: Path) -> Picture:
    """Read what Pillow does not know: float16, channels of floats, 64 bits."""
    with TiffFile(path) as file:
        page: Any = file.pages[0]
        pixels = page.asarray()
        if page.axes.startswith("S"):
            pixels = np.moveaxis(pixels, 0, -1)
        if page.tags.valueof(TAG_WHITE) == 0 and pixels.dtype.kind in "bui":
            pixels = ~pixels
        turn = TURNS.get(page.tags.valueof(TAG_ORIENTATION, 1), lambda pixels: pixels)
        return Picture(turn(pixels), None, len(file.pages))


def check_picture(name: str, path: Path, picture: Picture, most: int | None = 4) -> None:
    """Refuse pixels without colours: complex ones, or more than `most` channels."""
    shape, dtype = tuple(picture.pixels.shape), picture.pixels.dtype
    many = most and len(shape) == 3 and shape[2] > most
    if len(shape) not in (2, 3) or 0 in shape or many:
        channels = f"1 to {most} channels" if most else "perhaps channels"
        raise OSError(
            f"{name} must have rows, columns and {channels}; got the shape {shape} in {path}"
        )
    if dtype.kind not in "buif":
        raise OSError(f"{name} must have real numbers; got {dtype} in {path}")


# ------------------------------------------------------------------------------------------ colours


def shades_of(name: str, pixels: Any) -> Shades:
    """Tell which values are black and white.

    They are 0 and the most of a bool, of uint8, or of the fewest of 1, 8, 10, 12, 14 and 16 bits
    that hold all values. Other values are shown from the least to the most.
    """
    opaque = len(pixels.shape) == 2 or pixels.shape[2] in (1, 3)
    limits = [
        _limits(name, pixels, channels)
        for channels in ([...] if opaque else [np.s_[..., :-1], np.s_[..., -1:]])
    ]
    return Shades(limits[0], limits[-1])


def _limits(name: str, pixels: Any, channels: Any) -> tuple[float, float]:
    if pixels.dtype.kind == "b" or pixels.dtype == np.uint8:
        return 0, 1 if pixels.dtype.kind == "b" else 255
    least, most = np.inf, -np.inf
    for first in range(0, pixels.shape[0], STRIP):
        values = np.asarray(pixels[first : first + STRIP])[channels]
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        if values.size:
            least, most = min(least, float(values.min())), max(most, float(values.max()))
    if least > most:
        raise OSError(f"{name} must have a finite pixel; got none")
    known = WHITE_SIGNED if pixels.dtype.kind == "i" else WHITE
    white = next((white for white in known if least >= 0 and most <= white), None)
    if white == 1 or (white and 4 * most >= white):
        return 0, white
    return least, most


def told(name: str, picture: Picture, shades: Shades | None = None) -> list[str]:
    """Return the sentences on what a user may not expect."""
    dtype, sentences = picture.pixels.dtype, []
    if picture.frames > 1:
        sentences.append(f"{name} has {picture.frames} frames: the first one is taken.")
    if shades and shades.colour != (0, {"uint8": 255, "uint16": 65535}.get(dtype.name, 1)):
        black, white = shades.colour
        sentences.append(f"{name} has {dtype} values: {black:g} is black, {white:g} is white.")
    return sentences


def colours(pixels: Array, shades: Shades | None = None) -> Array:
    """[H, W] or [H, W, 1 to 4] -> [H, W, 3] in 0..1, on white where transparent.

    Pixels that are not finite are black. Without `shades`, those of these pixels are taken.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    colour, opacity = shades or shades_of("pixels", pixels)
    if pixels.shape[2] in (2, 4):
        alpha = _scaled(pixels[..., -1:], opacity)
        values = _scaled(pixels[..., :-1], colour) * alpha + (1 - alpha)
    else:
        values = _scaled(pixels, colour)
    return np.broadcast_to(values, (*values.shape[:2], 3))


def _scaled(pixels: Array, limits: tuple[float, float]) -> Array:
    black, white = limits
    small = pixels.dtype.itemsize <= 2 and pixels.dtype.kind != "i"
    values: Array = pixels.astype(np.float32 if small else np.float64)
    if pixels.dtype.kind == "f":
        values[~np.isfinite(values)] = black
    if not np.isfinite(white - black):
        values, black, white = values / 2, black / 2, white / 2
    if black:
        values -= black
    values /= values.dtype.type(white - black or 1)
    return values.astype(np.float32, copy=False)


# -------------------------------------------------------------------------------------------- tiles


class Span(NamedTuple):
    """Blocks of a tile along an axis, and how many blocks around it are its halo."""

    first: int
    last: int
    before: int
    after: int

    def pixels(self, size: int) -> slice:
        """Return the pixels of the blocks, of `size` each, with the halo."""
        return slice((self.first - self.before) * size, (self.last + self.after) * size)


def tiles(shape: Sequence[int], side: int, reach: int) -> list[tuple[Span, Span]]:
    """Cut rows and columns of blocks into tiles of `side` blocks with a halo of `reach`."""
    rows, columns = (
        [
            Span(first, last, min(reach, first), min(reach, length - last))
            for first in range(0, length, side)
            for last in [min(first + side, length)]
        ]
        for length in shape[:2]
    )
    return [(row, column) for row in rows for column in columns]


def with_bar(todo: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield each item. On a terminal a bar shows how many are done."""
    console = Console(stderr=True)
    yield from track(
        todo, description=what, console=console, transient=True, disable=not console.is_terminal
    )


# -------------------------------------------------------------------------------------------- write


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside this one. It becomes this one at the end, and is deleted on an error."""
    part = path.with_name(f".{os.getpid()}{path.suffix}")  # short: any name of a file fits
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if str(error.filename) == str(part):
            error.filename = str(path)
        raise
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def make_folder(out: Path) -> None:
    """Make the folder of `--out`, or tell why it cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = "a file" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"--out must be a folder to write into; got {out}: {reason}") from error
