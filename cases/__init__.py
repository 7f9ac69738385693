"""Problems, arrays to run them on and the calls that take them, for tests and benchmarks alike.

Tests and benchmarks read this folder; it imports neither.
"""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from .table import CASES, CUDA_CASES, FEW, Case


@dataclass(frozen=True)
class Dtypes:
    """A legal pair: the dtype of features, output and grad_output; that of masks and logits."""

    features: str
    masks: str

    def __str__(self) -> str:  # noqa: D105
        short = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        names = [short[self.features], short[self.masks]]
        return names[0] if names[0] == names[1] else "_".join(names)


DTYPES = [
    Dtypes("float32", "float32"),
    Dtypes("float64", "float64"),
    Dtypes("float16", "float16"),
    Dtypes("bfloat16", "bfloat16"),
    Dtypes("float16", "float32"),
    Dtypes("bfloat16", "float32"),
]


def numpy_dtype(name: str) -> np.dtype:
    """Return the dtype of this name; ml_dtypes has bfloat16."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def double(array) -> np.ndarray:
    """Return the array in float64."""
    return np.asarray(array).astype(np.float64)


# Values. Small integers make every sum exact in float32, in any order: the largest of the forward
# pass is 4*2*31*31 = 7688. A result is rounded once, if its dtype has 8 or 11 bits.


def integers(rng: np.random.Generator, shape, limit: int, dtype: str = "float32") -> np.ndarray:
    """Return random integers in -limit..limit."""
    return rng.integers(-limit, limit, shape, endpoint=True).astype(numpy_dtype(dtype))


def normal(rng: np.random.Generator, shape, dtype: str = "float32") -> np.ndarray:
    """Return normally distributed numbers, of mean 0 and variance 1."""
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def _arrays(case: Case, dtypes: Dtypes, small: Callable, large: Callable) -> SimpleNamespace:
    """Return every array that the functions take for this problem: read-only, because shared."""
    arrays = {
        "features": large(case.features_shape, dtypes.features),
        "masks": small(case.masks_shape, dtypes.masks),
        "logits": small(case.logits_shape, dtypes.masks),
        "grad_output": large(case.output_shape, dtypes.features),
        "grad_masks": large(case.masks_shape, dtypes.masks),
    }
    for array in arrays.values():
        array.flags.writeable = False
    return SimpleNamespace(**arrays)


def _seeded(case: Case) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(case.name.encode()))


@functools.lru_cache(maxsize=64)
def integer_arrays(case: Case, dtypes: Dtypes) -> SimpleNamespace:
    """Return arrays of small integers: the same values for all dtypes."""
    draw = functools.partial(integers, _seeded(case))
    return _arrays(
        case,
        dtypes,
        small=lambda shape, dtype: draw(shape, 2, dtype),
        large=lambda shape, dtype: draw(shape, 4, dtype),
    )


@functools.lru_cache(maxsize=64)
def random_arrays(case: Case, dtypes: Dtypes) -> SimpleNamespace:
    """Return normally distributed arrays, rounded to their dtypes."""
    draw = functools.partial(normal, _seeded(case))
    return _arrays(case, dtypes, small=draw, large=draw)


# Memory layouts of a four-dimensional array. Each function takes a shape and a dtype, and returns a
# buffer and its view of that shape. The buffer is larger than the view if the layout leaves gaps.


def _contiguous(shape, dtype):
    buffer = np.empty(shape, dtype)
    return buffer, buffer


def _nhwc(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, h, w, c), dtype)
    return buffer, buffer.transpose(0, 3, 1, 2)


def _fortran(shape, dtype):
    buffer = np.empty(shape[::-1], dtype)
    return buffer, buffer.T


def _offset(shape, dtype):
    """One element past the alignment of a vector."""
    buffer = np.empty(math.prod(shape) + 1, dtype)
    return buffer, buffer[1:].reshape(shape)


def _channel_slice(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, c + 3, h, w), dtype)
    return buffer, buffer[:, 1 : c + 1]


def _every_other_channel(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, 2 * c, h, w), dtype)
    return buffer, buffer[:, 1::2]


def _nhwc_channel_slice(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, h, w, c + 3), dtype)
    return buffer, buffer[..., 2 : c + 2].transpose(0, 3, 1, 2)


def _window(shape, dtype):
    """Return a crop of a larger picture."""
    n, c, h, w = shape
    buffer = np.empty((n, c, h + 2, w + 3), dtype)
    return buffer, buffer[:, :, 1 : h + 1, 2 : w + 2]


def _every_other_row(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, c, 2 * h, w), dtype)
    return buffer, buffer[:, :, ::2]


def _every_third_column(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, c, h, 3 * w), dtype)
    return buffer, buffer[..., 1::3]


def _flipped(shape, dtype):
    """Negative strides along every axis."""
    buffer = np.empty(shape, dtype)
    return buffer, buffer[::-1, ::-1, ::-1, ::-1]


def _flipped_columns(shape, dtype):
    buffer = np.empty(shape, dtype)
    return buffer, buffer[..., ::-1]


def _flipped_nhwc(shape, dtype):
    buffer, view = _nhwc(shape, dtype)
    return buffer, view[:, ::-1, ::-1, ::-1]


def _transposed_picture(shape, dtype):
    n, c, h, w = shape
    buffer = np.empty((n, c, w, h), dtype)
    return buffer, buffer.transpose(0, 1, 3, 2)


def _odd_unit_strides(shape, dtype):
    """Axes of one element may have any stride: it is never taken."""
    buffer = np.empty(shape, dtype)
    strides = [
        stride if extent != 1 else 12345 * buffer.itemsize
        for extent, stride in zip(shape, buffer.strides, strict=True)
    ]
    return buffer, np.lib.stride_tricks.as_strided(buffer, shape, strides)


LAYOUTS: dict[str, Callable] = {
    "contiguous": _contiguous,
    "nhwc": _nhwc,
    "fortran": _fortran,
    "offset": _offset,
    "channel_slice": _channel_slice,
    "every_other_channel": _every_other_channel,
    "nhwc_channel_slice": _nhwc_channel_slice,
    "window": _window,
    "every_other_row": _every_other_row,
    "every_third_column": _every_third_column,
    "flipped": _flipped,
    "flipped_columns": _flipped_columns,
    "flipped_nhwc": _flipped_nhwc,
    "transposed_picture": _transposed_picture,
    "odd_unit_strides": _odd_unit_strides,
}

# Layouts of inputs alone: elements that share memory.
BROADCAST_AXES = {
    "batch": (0,),
    "channels": (1,),
    "rows": (2,),
    "columns": (3,),
    "all": (0, 1, 2, 3),
}


def place(array: np.ndarray, layout: str) -> np.ndarray:
    """Return a copy of the array in this layout."""
    buffer, view = LAYOUTS[layout](array.shape, array.dtype)
    buffer[...] = 0
    view[...] = array
    return view


def broadcast(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the array's first slice along each of the axes, repeated with stride 0."""
    first = array[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))]
    return np.broadcast_to(first, array.shape)
