"""The table of cases, for the tests in Python and in C++.

    python cases/table.py    # prints the rows for C++; CMake writes them to cases.inc

It needs no packages, so that the core's tests build without NumPy.
"""

import math
from dataclasses import dataclass
from typing import Any


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
    padding: tuple[int, int] | None = None  # rows, columns; kernel_size // 2 by default

    @property
    def centres(self) -> tuple[int, int]:
        """Return how many rows and columns windows can be centred on: (H, W) by default."""
        radius = self.kernel_size // 2
        pads = (radius, radius) if self.padding is None else self.padding
        return max(0, self.h + 2 * (pads[0] - radius)), max(0, self.w + 2 * (pads[1] - radius))

    @property
    def natural_size(self) -> tuple[int, int]:
        """Return (H', W') without a crop."""
        h, w = self.centres
        return -(-h * self.up // self.down), -(-w * self.up // self.down)

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
        """Return (N, groups*K*K*up*up, ceil(h/down), ceil(w/down)) with h and w of `centres`."""
        channels = self.groups * self.kernel_size**2 * self.up**2
        h, w = self.centres
        return self.n, channels, -(-h // self.down), -(-w // self.down)

    @property
    def factors(self) -> dict[str, Any]:
        """Return the parameters of reassemble and its backward, in carafepp and in reference.py."""
        padding = {} if self.padding is None else {"padding": self.padding}
        return {"up": self.up, "down": self.down, "groups": self.groups, **padding}

    @property
    def crop(self) -> dict[str, tuple[int, int]]:
        """Return `size=` for the functions that take one, if it is not the natural one."""
        return {} if self.size is None else {"size": self.size}

    @property
    def terms(self) -> int:
        """Return the number of multiplications of one forward pass."""
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
    Case("wide_3_2", "blocks of columns, a rational factor", 1, 4, 3, 1030, up=3, down=2, groups=2),
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
    Case("ratio_2_2", "1, not reduced: some of the logits are cropped", 2, 9, 5, 7, up=2, down=2),
    Case("ratio_7_5", "a fraction of larger numbers", 1, 9, 6, 11, up=7, down=5, kernel_size=5),
    Case("many_phases", "more phases than there are taps", 1, 2, 2, 3, up=13),
    Case("down_to_one", "a factor beyond the map: one output", 2, 3, 5, 6, down=1000),
    Case("skips_features", "down > K: features that no tap reaches", 2, 5, 15, 16, down=7),
    Case("k1_wide", "one tap, several vectors of columns", 1, 9, 5, 37, up=2, kernel_size=1),
    Case(
        "skips_features_k1", "only every fourth feature is read", 2, 3, 9, 10, down=4, kernel_size=1
    ),
    Case("skips_at_a_ratio", "down/up > K: gaps of changing width", 1, 5, 19, 23, up=2, down=9),
    Case("ratio_7_2", "3 or 4 phases on a source", 1, 3, 40, 40, up=7, down=2, kernel_size=7),
    # Several vectors of columns; a single one takes another path
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
    Case("non_temporal", "a result written by non-temporal stores", 1, 33, 101, 173, up=2),
    Case("non_temporal_gradient", "so is a gradient of 16 bits", 1, 33, 260, 270, down=2),
    Case("non_temporal_images", "the same, image by image in two parts", 8, 130, 30, 37),
    # Convex upsampling of other papers
    Case("convex_up8", "optical flow: two channels, 64 outputs in a cell", 1, 2, 4, 9, up=8),
    Case("convex_up4", "disparity: one channel, rows of several slices", 2, 1, 2, 37, up=4),
    Case("convex_crop", "three channels", 1, 3, 6, 6, up=4, size=(14, 13), padding=(0, 1)),
    Case("convex_up12", "25 taps", 1, 4, 2, 3, up=12, kernel_size=5, size=(20, 36)),
    # Involution and adaptive convolution of other papers
    Case("involution", "runs of 6 and 4 outputs", 2, 64, 9, 15, kernel_size=7, groups=2),
    Case("involution_down2", "an odd row", 1, 32, 15, 21, down=2, kernel_size=7, groups=2),
    Case("involution_narrow", "no window inside", 1, 16, 8, 5, kernel_size=7, padding=(1, 3)),
    Case("adaptive_conv", "a crop", 1, 32, 13, 18, kernel_size=7, size=(6, 11), padding=(0, 0)),
    Case("runs_down2", "runs of 6 and 4, K=5", 1, 16, 5, 19, down=2, kernel_size=5),
    Case("runs_narrow", "runs of K=5 overlap", 1, 16, 6, 11, kernel_size=5, padding=(1, 0)),
    # Crops
    Case("crop_up", "a skip connection of odd size", 2, 9, 4, 5, up=2, kernel_size=5, size=(7, 9)),
    Case("crop_down", "a crop, downsampling", 2, 9, 9, 11, down=2, kernel_size=5, size=(4, 5)),
    Case("crop_ratio", "a crop at a fraction", 1, 9, 5, 6, up=3, down=2, size=(7, 8)),
    Case("crop_to_one", "a single output of many", 2, 9, 4, 5, up=2, size=(1, 1)),
    Case("crop_rows", "features below the crop get no gradient", 1, 9, 9, 4, up=2, size=(2, 8)),
    Case("up_beyond_crop", "a factor larger than the output", 1, 2, 2, 3, up=40, size=(3, 50)),
    Case("natural_size_given", "size= equal to the natural one", 1, 3, 4, 5, up=2, size=(8, 10)),
    # Padding
    Case("valid", "the caller pads", 2, 9, 8, 9, kernel_size=5, padding=(0, 0)),
    Case("valid_up2", "the same, upsampling", 2, 9, 7, 8, up=2, kernel_size=5, padding=(0, 0)),
    Case("valid_down2", "the same, downsampling", 2, 9, 13, 12, down=2, padding=(0, 0)),
    Case("valid_k1", "one tap needs no padding", 1, 9, 5, 6, up=2, kernel_size=1, padding=(0, 0)),
    Case("full_padding", "the default, given", 1, 9, 5, 6, up=2, kernel_size=5, padding=(2, 2)),
    Case("padded_rows", "rows alone are padded", 1, 9, 5, 21, up=2, padding=(1, 0)),
    Case("padded_columns", "columns alone are padded", 1, 9, 9, 37, down=2, padding=(0, 1)),
    Case("padding_half", "half of the default", 1, 9, 8, 40, kernel_size=5, padding=(1, 1)),
    Case("padding_k31", "the largest kernel", 1, 5, 19, 37, kernel_size=31, padding=(7, 14)),
    Case("padding_ratio", "fraction, groups", 2, 9, 9, 25, up=3, down=2, groups=3, padding=(1, 0)),
    Case("padding_down3", "an odd factor", 1, 9, 14, 50, down=3, kernel_size=7, padding=(2, 0)),
    Case("padding_up4", "phases, groups", 1, 8, 6, 13, up=4, groups=4, padding=(0, 0)),
    Case("padding_skips", "features that no tap reaches", 1, 9, 17, 37, down=5, padding=(1, 0)),
    Case("padding_crop", "a crop", 2, 9, 6, 10, up=2, size=(7, 17), padding=(0, 1)),
    Case("padding_picture", "three channels", 2, 3, 9, 41, kernel_size=7, padding=(0, 1)),
    Case("padding_one", "one window, the whole map", 2, 9, 5, 5, kernel_size=5, padding=(0, 0)),
    Case("padding_of_too_few", "no window fits", 2, 9, 4, 6, kernel_size=5, padding=(0, 1)),
    Case("padding_of_far_too_few", "fewer still", 1, 9, 2, 3, up=2, kernel_size=7, padding=(0, 0)),
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
# Shapes around the warps, tiles, vectors and halos of CUDA kernels. An emulation runs them: all are
# small. Python runs them with -m exhaustive alone.
_CUDA_TABLE = [
    Case("up2_c32", "as many channels as a warp has lanes", 1, 32, 5, 7, up=2, kernel_size=5),
    Case("up2_c17", "an odd number of channels", 2, 17, 3, 4, up=2, kernel_size=5),
    Case("up2_k3_c8", "few channels, an odd width", 2, 8, 3, 11, up=2),
    Case("down2_c16", "half a warp of channels", 1, 16, 8, 9, down=2, kernel_size=5),
    Case("down2_c17", "an odd number of channels", 2, 17, 6, 5, down=2, kernel_size=5),
    Case("down2_even", "pairs of columns, wider than a tile", 2, 12, 9, 70, down=2, kernel_size=5),
    Case("down2_even_k3", "pairs of columns, two groups", 1, 20, 7, 12, down=2, groups=2),
    Case("down2_c136", "more channels than a block takes at a time", 1, 136, 3, 4, down=2),
    Case("down2_fours", "fours of columns, in two halves", 1, 17, 2, 40, down=2, kernel_size=5),
    Case("down2_tall", "taller than a tile", 1, 4, 35, 18, down=2, kernel_size=5),
    Case("down2_slices", "two tiles, more than a slice", 1, 40, 10, 18, down=2, kernel_size=5),
    Case("same_size_c32", "any factor, a warp of channels", 1, 32, 6, 7),
    Case("up3_c3", "any factor, three channels", 1, 3, 4, 5, up=3, kernel_size=5),
    Case("down3_c17", "any factor, 17 channels", 1, 17, 10, 11, down=3, kernel_size=5),
    Case("up4_c3", "a larger factor, three channels", 1, 3, 3, 4, up=4, kernel_size=5),
    Case("up5", "25 outputs in a cell", 1, 3, 3, 3, up=5),
    Case("up9", "more outputs in a cell than a warp has lanes", 1, 1, 2, 3, up=9),
    Case("down9", "gaps between windows", 1, 3, 20, 19, down=9),
    Case("down9_k13", "windows that overlap a little", 1, 1, 20, 19, down=9, kernel_size=13),
    Case("k7_c3", "a halo of three", 1, 3, 5, 8, up=2, kernel_size=7),
    Case("k7_down2", "a halo of three, downsampling", 1, 3, 9, 8, down=2, kernel_size=7),
    Case("k13", "more taps than a block keeps at a time", 1, 3, 3, 16, kernel_size=13),
    Case("k31_small", "the largest kernel", 1, 2, 3, 4, kernel_size=31),
    Case("k31_up2_row", "the largest kernel, upsampling", 1, 1, 1, 9, up=2, kernel_size=31),
    Case("k31_down2_row", "the largest kernel, downsampling", 1, 1, 1, 33, down=2, kernel_size=31),
    Case("groups_2_c16", "16 channels in each group", 1, 32, 4, 5, up=2, groups=2),
    Case("groups_2_k5", "the same, 25 taps", 1, 32, 3, 9, up=2, kernel_size=5, groups=2),
    Case("vectors", "vectors of 4 channels", 1, 20, 3, 19, up=2, kernel_size=5),
    Case("vectors_k3", "the same, 9 taps", 2, 72, 2, 9, up=2),
    Case("vectors_k7", "the same, 49 taps", 1, 8, 9, 11, up=2, kernel_size=7),
    Case("pairs", "pairs of columns", 1, 20, 5, 38, up=2, kernel_size=5, groups=2),
    Case("pairs_k3", "the same, an odd number of channels", 2, 19, 3, 10, up=2),
    Case("vectors_crop", "a crop", 1, 24, 5, 18, up=2, kernel_size=5, groups=2, size=(9, 33)),
    Case("up2_slices", "several tiles of sources and slices", 1, 40, 6, 20, up=2, kernel_size=5),
    Case(
        "vectors_crop_rows", "a crop of one row", 1, 136, 3, 14, up=2, kernel_size=5, size=(5, 28)
    ),
    Case("groups_3_of_17", "three groups of 17 channels", 1, 51, 2, 3, up=2, groups=3),
    Case("groups_2_of_17", "two groups of 17, downsampling", 1, 34, 5, 6, down=2, groups=2),
    Case("one_channel", "a single channel", 2, 1, 4, 5, up=2, kernel_size=5),
    Case("up2_c33", "a channel more than a warp has lanes", 1, 33, 3, 4, up=2),
    Case("up2_c40", "vectors of 8 channels", 1, 40, 2, 6, up=2, kernel_size=5),
    Case("down2_c64", "two warps of channels", 1, 64, 5, 6, down=2),
    Case("up2_c264", "more channels than a block has threads", 1, 264, 1, 3, up=2),
    Case("one_pixel_up2", "a halo all around", 1, 17, 1, 1, up=2, kernel_size=5),
    Case("one_row_c8", "height 1", 1, 8, 1, 21, up=2, kernel_size=5),
    Case("one_column_c8", "width 1", 1, 8, 11, 1, up=2, kernel_size=5),
    Case("wide", "wider than a tile", 1, 4, 1, 139, up=2),
    Case("wide_down2", "wider than a tile, downsampling", 1, 4, 2, 139, down=2),
    Case("tall", "taller than a tile", 1, 2, 35, 2),
    Case("tall_up2", "taller than a tile, upsampling", 1, 4, 35, 3, up=2, kernel_size=5),
    Case("crop_up2", "a crop of one row and column", 2, 16, 4, 5, up=2, kernel_size=5, size=(7, 9)),
    Case("crop_down2_rows", "one row of two", 1, 4, 3, 4, down=2, size=(1, 2)),
    Case("crop_down2_even", "pairs, cropped", 1, 8, 9, 12, down=2, kernel_size=5, size=(4, 5)),
    Case("crop_rows_c17", "blocks below the crop", 1, 17, 9, 4, up=2, size=(2, 8)),
    Case("crop_to_one_c4", "a single output", 2, 4, 4, 5, up=2, size=(1, 1)),
    Case("crop_of_up13", "phases beyond the crop", 1, 2, 2, 3, up=13, size=(3, 17)),
    Case("up2_tiles", "tiles in rows and columns", 1, 8, 11, 18, up=2, kernel_size=5),
    Case("up2_wide", "warps of one row or two", 1, 4, 5, 9, up=2, kernel_size=5),
    Case("up2_small_map", "a wide tile, and one of a row", 1, 1, 9, 10, up=2, kernel_size=5),
    Case("up4_c24", "slices, 16 outputs of a source", 1, 24, 3, 10, up=4, kernel_size=5),
    Case("up4_k7", "49 taps, 16 outputs of a source", 1, 12, 3, 3, up=4, kernel_size=7),
    Case("up6_c12", "two quads of three in a source", 1, 12, 2, 3, up=6),
    Case("up8_c12", "two quads of four in a source", 1, 12, 2, 2, up=8, kernel_size=5),
    Case("up2_k7", "tiles and slices, a crop", 1, 36, 2, 18, up=2, kernel_size=7, size=(3, 36)),
    Case("up2_k9", "81 taps, two quads of a thread", 1, 8, 4, 4, up=2, kernel_size=9),
    Case("up41_pixel", "several bands of the outputs of one source", 1, 4, 1, 1, up=41),
    Case("same_c40", "slices, rows of patches", 1, 40, 9, 34, kernel_size=5),
    Case("same_c8_w12", "half a slice, quads of columns", 1, 16, 2, 12, kernel_size=5, groups=2),
    Case("k7_groups_c16", "49 taps, groups of 16", 1, 32, 9, 10, kernel_size=7, groups=2),
    Case("few_up8", "quads of outputs of a source", 1, 2, 2, 3, up=8),
    Case("few_up4_wide", "two tiles of columns", 1, 1, 1, 35, up=4),
    Case("few_up4_tall", "tiles of rows", 1, 1, 17, 2, up=4),
    Case(
        "few_up4_crop", "quads beyond it", 1, 6, 3, 6, up=4, groups=2, size=(9, 15), padding=(1, 0)
    ),
    Case("same_crop", "a crop", 1, 8, 9, 7, kernel_size=5, size=(5, 4), padding=(1, 1)),
    Case("ratio_c40", "a fraction", 1, 40, 9, 16, up=3, down=2, kernel_size=5, padding=(1, 0)),
    Case("down3_k9_c8", "81 taps, windows of 18 x 18", 1, 8, 7, 13, down=3, kernel_size=9),
    Case("down3_groups", "cells of nine sources", 2, 16, 7, 8, down=3, kernel_size=5, groups=2),
    Case("down3_c8_wide", "two tiles of cells and of fours of columns", 1, 8, 4, 101, down=3),
    Case("down3_crop", "a crop", 1, 8, 10, 16, down=3, kernel_size=5, size=(2, 4)),
    Case("down4_k7", "49 taps", 1, 8, 11, 14, down=4, kernel_size=7, padding=(2, 1)),
    Case("down4_c8_tall", "sources that no tap reaches", 1, 8, 38, 12, down=4),
    Case("down_far", "a halo of 2^31 pixels", 1, 8, 2, 2, up=2, down=60000, kernel_size=1),
]
CASES = {case.name: case for case in _TABLE}
CUDA_CASES = {case.name: case for case in _CUDA_TABLE}
# One of each kind, for properties that do not depend on the sizes
FEW = [
    CASES[name]
    for name in (
        *(
            "up2",
            "down2",
            "ratio_3_2",
            "ratio_2_3",
            "groups_2",
            "one_pixel",
            "w17",
            "crop_up",
            "skips_features",
        ),
        *("valid_up2", "padding_ratio", "padding_of_too_few"),
        *("empty_batch", "zero_channels", "zero_height", "zero_width", "empty_crop"),
    )
]
assert len(CASES | CUDA_CASES) == len(_TABLE + _CUDA_TABLE), "two cases have the same name"


def _row_for_cpp(case: Case) -> str:
    sizes = [case.n, case.c, case.h, case.w, case.up, case.down, case.kernel_size, case.groups]
    crop = (-1, -1) if case.size is None else case.size
    for_cuda = str(case.name in CUDA_CASES).lower()
    padding = "" if case.padding is None else "".join(f", {number}" for number in case.padding)
    return f'{{"{case.name}", {", ".join(map(str, [*sizes, *crop]))}, {for_cuda}{padding}}},'


if __name__ == "__main__":
    for case in _TABLE + _CUDA_TABLE:
        print(_row_for_cpp(case))
