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


@dataclass(frozen=True)
class Case:
    """One problem: sizes and parameters, without dtype, memory layout or values."""

    name: str
    reason: str
    n: int
    c: int
    h: int
    w: int
    up: int = 1
    down: int = 1
    kernel_size: int = 3
    groups: int = 1
    size: tuple[int, int] | None = None  # a crop of the natural output size

    @property
    def natural_size(self) -> tuple[int, int]:
        """Return (H', W') without a crop."""
        return -(-self.h * self.up // self.down), -(-self.w * self.up // self.down)

    @property
    def output_size(self) -> tuple[int, int]:
        """Return (H', W')."""
        return self.natural_size if self.size is None else self.size

    @property
    def features_shape(self) -> tuple[int, int, int, int]:
        """Return (N, C, H, W)."""
        return self.n, self.c, self.h, self.w

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Return (N, C, H', W')."""
        return self.n, self.c, *self.output_size

    @property
    def masks_shape(self) -> tuple[int, int, int, int]:
        """Return (N, groups*K*K, H', W')."""
        return self.n, self.groups * self.kernel_size**2, *self.output_size

    @property
    def logits_shape(self) -> tuple[int, int, int, int]:
        """Return (N, groups*K*K*up*up, ceil(H/down), ceil(W/down))."""
        channels = self.groups * self.kernel_size**2 * self.up**2
        return self.n, channels, -(-self.h // self.down), -(-self.w // self.down)

    @property
    def factors(self) -> dict[str, int]:
        """Parameters of reassemble and its backward, in carafepp and in reference.py."""
        return {"up": self.up, "down": self.down, "groups": self.groups}

    @property
    def crop(self) -> dict[str, tuple[int, int]]:
        """`size=` for the functions that take one: only where it is not the natural one."""
        return {} if self.size is None else {"size": self.size}

    @property
    def terms(self) -> int:
        """Multiplications of one forward pass."""
        return math.prod(self.output_shape) * self.kernel_size**2


_TABLE = [
    # The three uses of the operator
    Case("up2", "upsampling, the paper's setting", 2, 10, 5, 7, up=2, kernel_size=5),
    Case("down2", "downsampling, the paper's setting", 2, 10, 8, 10, down=2, kernel_size=5),
    Case("same_size", "a content-aware filter: up = down = 1", 2, 9, 6, 7),
    # Kernel sizes
    Case("k1", "one tap: no border at all", 2, 4, 5, 6, up=2, kernel_size=1),
    Case("k3", "the smallest kernel with a border", 1, 9, 5, 6, up=2, kernel_size=3),
    Case("k7", "a kernel beyond the usual 5", 1, 9, 9, 8, up=2, kernel_size=7),
    Case("k9_down", "a wide kernel, downsampling", 1, 9, 13, 12, down=2, kernel_size=9),
    Case("k31", "the largest kernel; its window leaves the map", 1, 9, 9, 10, kernel_size=31),
    Case("k31_inside", "the largest kernel, some windows inside", 1, 1, 33, 34, kernel_size=31),
    Case("k31_up2", "the largest kernel, upsampling", 1, 9, 5, 21, up=2, kernel_size=31),
    Case("k31_up3", "a cell's masks take more than a cache", 1, 5, 4, 19, up=3, kernel_size=31),
    Case("k31_down2", "the largest kernel, downsampling", 1, 9, 7, 33, down=2, kernel_size=31),
    Case("border_only", "the kernel is larger than the map", 2, 9, 2, 3, up=2, kernel_size=7),
    Case("border_only_rows", "K larger than H, smaller than W", 1, 9, 2, 19, up=2, kernel_size=5),
    # Groups
    Case("groups_2", "two groups of channels", 2, 18, 4, 5, up=2, groups=2),
    Case("groups_3_of_7", "groups of a prime number of channels", 1, 21, 4, 5, up=2, groups=3),
    Case("groups_eq_c", "one mask per channel", 2, 6, 4, 5, up=2, groups=6),
    Case("groups_down", "groups, downsampling", 2, 8, 7, 6, down=2, kernel_size=5, groups=4),
    # Sizes of the map
    Case("odd_hw", "odd height and width, upsampling", 2, 9, 7, 5, up=2),
    Case("odd_hw_down", "odd height and width: H' = (H+1)/2", 2, 9, 7, 5, down=2, kernel_size=5),
    Case("one_pixel", "a single pixel", 1, 1, 1, 1),
    Case("one_pixel_up4", "a single pixel becomes 4x4", 1, 5, 1, 1, up=4, kernel_size=5),
    Case("one_pixel_down4", "a single pixel stays one", 1, 5, 1, 1, down=4, kernel_size=5),
    Case("one_row", "height 1", 2, 9, 1, 37, up=2, kernel_size=5),
    Case("one_column", "width 1", 2, 5, 37, 1, up=2, kernel_size=5),
    Case("wide_row", "rows wider than a tile", 1, 2, 1, 4500, up=2),
    Case("wide_row_k7", "rows wider than a tile, of many taps", 1, 2, 2, 1030, up=2, kernel_size=7),
    Case("wide_row_down", "rows wider than a tile, downsampling", 1, 2, 1, 9001, down=2),
    Case("wide_and_deep", "several blocks of channels and of columns", 1, 37, 1, 1100),
    Case("tall_column", "columns taller than a tile", 1, 2, 517, 3, up=2),
    Case("many_images", "batch larger than everything else", 37, 2, 2, 3, up=2),
    Case("many_pixels", "enough work for several threads", 2, 16, 24, 22, up=2, kernel_size=5),
    # Widths around the vectors of the instruction sets
    *(
        Case(f"w{w}", f"width {w}: around a vector", 1, 9, 4, w, up=2, kernel_size=5)
        for w in (7, 8, 9, 15, 16, 17, 31, 32, 33)
    ),
    *(
        Case(f"w{w}_down", f"width {w}, downsampling: around a vector", 1, 9, 5, w, down=2)
        for w in (15, 16, 17, 32, 33)
    ),
    # Channels around the vectors of the instruction sets
    *(
        Case(f"c{c}", f"{c} channels: around a vector", 2, c, 3, 4, up=2)
        for c in (1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65)
    ),
    *(
        Case(f"c{c}_down", f"{c} channels, downsampling: around a vector", 2, c, 5, 4, down=2)
        for c in (1, 15, 16, 17, 33)
    ),
    Case("c_per_group_17", "an odd number of channels in each group", 1, 34, 3, 4, up=2, groups=2),
    Case("picture", "three channels of wide rows", 2, 3, 5, 37, up=2, kernel_size=5),
    Case("picture_down3", "three channels, every third column", 2, 3, 8, 100, down=3),
    # Factors
    Case("up3", "an odd factor", 1, 9, 4, 5, up=3, kernel_size=5),
    Case("up4", "upsampling by 4", 1, 9, 3, 4, up=4, kernel_size=5),
    Case("down3", "an odd factor, downsampling", 1, 9, 10, 11, down=3, kernel_size=5),
    Case("down4", "downsampling by 4", 1, 9, 11, 9, down=4, kernel_size=5),
    Case("ratio_3_2", "upsampling by a fraction", 2, 9, 5, 6, up=3, down=2),
    Case("ratio_2_3", "downsampling by a fraction", 2, 9, 7, 8, up=2, down=3),
    Case("ratio_4_6", "a fraction that is not reduced", 2, 9, 7, 8, up=4, down=6),
    Case("ratio_2_2", "1, not reduced: half of the logits are cropped", 2, 9, 5, 7, up=2, down=2),
    Case("ratio_7_5", "a fraction of larger numbers", 1, 9, 6, 11, up=7, down=5, kernel_size=5),
    Case("many_phases", "more phases than there are taps", 1, 2, 2, 3, up=13),
    Case("down_to_one", "a factor beyond the map: one output", 2, 3, 5, 6, down=1000),
    Case("skips_features", "down > K: features that no tap reaches", 2, 5, 15, 16, down=7),
    Case("k1_wide", "one tap, several vectors of columns", 1, 9, 5, 37, up=2, kernel_size=1),
    Case(
        "skips_features_k1", "only every fourth feature is read", 2, 3, 9, 10, down=4, kernel_size=1
    ),
    Case("skips_at_a_ratio", "down/up > K: gaps of changing width", 1, 5, 19, 23, up=2, down=9),
    Case("ratio_7_2", "phases of a row are 3 or 4", 1, 3, 40, 40, up=7, down=2, kernel_size=7),
    # Several vectors of columns, where a row of one is another path
    Case("up3_wide", "three phases of several vectors", 1, 9, 5, 37, up=3),
    Case("up4_wide", "four phases of several vectors", 1, 5, 3, 21, up=4),
    Case("down3_wide", "every third of several vectors", 1, 9, 7, 101, down=3, kernel_size=5),
    Case("down4_wide", "every fourth of several vectors", 1, 9, 9, 90, down=4),
    Case("down5_wide", "every fifth of several vectors", 1, 9, 9, 96, down=5, kernel_size=7),
    Case("ratio_3_2_wide", "phases of two source columns", 1, 9, 5, 42, up=3, down=2),
    Case("ratio_2_3_wide", "a fraction below 1", 1, 9, 7, 62, up=2, down=3, kernel_size=5),
    Case("ratio_7_5_wide", "seven phases of five source columns", 1, 4, 6, 52, up=7, down=5),
    Case("up13_wide", "thirteen phases of several vectors", 1, 4, 3, 19, up=13),
    Case("down13_wide", "every thirteenth of several vectors", 1, 9, 14, 235, down=13),
    Case("past_caches", "a result that is written past the caches", 1, 33, 101, 173, up=2),
    Case("features_past_caches", "so is a gradient of 16 bits", 1, 33, 260, 270, down=2),
    Case("images_past_caches", "the same, image by image in two parts", 8, 130, 30, 37),
    # Crops
    Case("crop_up", "a skip connection of odd size", 2, 9, 4, 5, up=2, kernel_size=5, size=(7, 9)),
    Case("crop_down", "a crop, downsampling", 2, 9, 9, 11, down=2, kernel_size=5, size=(4, 5)),
    Case("crop_ratio", "a crop at a fraction", 1, 9, 5, 6, up=3, down=2, size=(7, 8)),
    Case("crop_to_one", "a single output of many", 2, 9, 4, 5, up=2, size=(1, 1)),
    Case("crop_rows", "features below the crop get no gradient", 1, 9, 9, 4, up=2, size=(2, 8)),
    Case("up_beyond_crop", "a factor larger than the output", 1, 2, 2, 3, up=40, size=(3, 50)),
    Case("natural_size_given", "size= equal to the natural one", 1, 3, 4, 5, up=2, size=(8, 10)),
    # Nothing to do
    Case("empty_batch", "no images", 0, 4, 5, 6, up=2),
    Case("zero_channels", "no channels: the gradient of the masks is 0", 2, 0, 4, 5, up=2),
    Case("zero_channels_groups", "no channels in each of two groups", 2, 0, 4, 5, up=2, groups=2),
    Case("zero_height", "no rows", 2, 3, 0, 5, up=2),
    Case("zero_width", "no columns", 2, 3, 5, 0, down=2),
    Case(
        "empty_crop", "no output: the gradient of the features is 0", 2, 3, 4, 5, up=2, size=(0, 0)
    ),
    Case("empty_crop_rows", "no output rows", 2, 3, 4, 5, up=2, size=(0, 10)),
]
CASES = {case.name: case for case in _TABLE}
# One of each kind, for properties that do not depend on the sizes
FEW = [
    CASES[name]
    for name in (
        *("up2", "down2", "ratio_3_2", "groups_2", "one_pixel", "w17", "crop_up", "skips_features"),
        *("empty_batch", "zero_channels", "zero_height", "zero_width", "empty_crop"),
    )
]
assert len(CASES) == len(_TABLE), "two cases have the same name"


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


# Values. Small integers make every sum exact in float32 in any order (the largest of the forward
# pass is 4*2*31*31 = 7688); the result is rounded once, if its dtype has 8 or 11 bits.


def integers(rng: np.random.Generator, shape, limit: int, dtype: str = "float32") -> np.ndarray:
    """Integers in -limit..limit."""
    return rng.integers(-limit, limit, shape, endpoint=True).astype(numpy_dtype(dtype))


def normal(rng: np.random.Generator, shape, dtype: str = "float32") -> np.ndarray:
    """Of mean 0 and variance 1."""
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def _arrays(case: Case, dtypes: Dtypes, small: Callable, large: Callable) -> SimpleNamespace:
    """Every array that the functions take for this problem; read-only, because shared."""
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
    """Small integers: the same values for all dtypes."""
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


# Memory layouts of a four-dimensional array: functions from a shape and a dtype to a buffer and its
# view of that shape. The buffer is larger than the view where the layout leaves gaps.


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
