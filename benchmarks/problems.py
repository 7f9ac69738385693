"""The problems that are timed, and arrays to run them on."""

import zlib

import numpy as np

from cases import Case, numpy_dtype
from cases.networks import LAYERS

from .passes import MIXED, as_nchw, in_layout, shape

CACHE_LINE = 64  # bytes

_TABLE = [
    # The paper's networks
    LAYERS["fpn1"],
    LAYERS["fpn2"],
    Case("roi", "the mask head in training", 64, 256, 14, 14, up=2, kernel_size=5),
    Case("stem", "the pooling of a ResNet stem", 8, 64, 112, 112, down=2, kernel_size=5),
    Case("s2", "a stride-2 stage of a ResNet", 8, 256, 56, 56, down=2, kernel_size=5),
    Case("s3", "a deep stage, one image", 1, 512, 28, 28, down=2, kernel_size=5),
    # Inference
    Case("fpn_p5", "FPN of an 800x1333 image, p5 to p4", 1, 256, 25, 42, up=2, kernel_size=5),
    Case(
        "fpn_p4",
        "FPN of an 800x1333 image, p4 to p3: cropped to an odd width",
        *(1, 256, 50, 84),
        up=2,
        kernel_size=5,
        size=(100, 167),
    ),
    Case("fpn_p3", "FPN of an 800x1333 image, p3 to p2", 1, 256, 100, 167, up=2, kernel_size=5),
    Case("mask_head", "the mask head on 100 RoIs", 100, 256, 14, 14, up=2, kernel_size=5),
    Case("picture_4k", "a 4K picture: three channels", 1, 3, 2160, 3840, down=2, kernel_size=5),
    Case("tiny", "one tiny map", 1, 16, 8, 8, up=2, kernel_size=5),
    # Almost only arithmetic
    Case("cached_up", "full vectors, in the caches", 2, 256, 10, 16, up=2, kernel_size=5),
    Case("cached_down", "full vectors, in the caches", 2, 256, 20, 32, down=2, kernel_size=5),
]
PROBLEMS = {case.name: case for case in _TABLE}

# Operators of other papers, and other factors and kernel sizes: `python -m benchmarks.relatives`.
_CONVEX = [
    Case("convex_flow", "RAFT's upsampling of flow", 1, 2, 55, 128, up=8),
    Case("convex_disparity", "RAFT-Stereo's upsampling of disparity", 1, 1, 120, 184, up=4),
    Case("convex_small", "RAFT's upsampling of flow, a small image", 1, 2, 46, 62, up=8),
]
_ROOFLINE = [
    Case("involution", "RedNet's third stage", 1, 256, 28, 28, kernel_size=7, groups=16),
    Case("involution_s2", "a stride", 1, 256, 28, 28, down=2, kernel_size=7, groups=16),
    Case("adaptive_conv", "FeatUp's filter", 1, 384, 62, 62, kernel_size=7, padding=(0, 0)),
    Case("depthwise", "a kernel for every channel", 1, 32, 100, 152, kernel_size=5, groups=32),
    Case("depthwise_up2", "the same, up", 1, 32, 100, 152, up=2, kernel_size=5, groups=32),
]
_FPN, _PICTURE = (1, 256, 50, 76), (1, 64, 100, 152)
_FACTORS = [
    Case("up2", "the bar of this map", *_FPN, up=2, kernel_size=5),
    Case("up2_k3", "a small kernel", *_FPN, up=2, kernel_size=3),
    Case("up2_k7", "a large kernel", *_FPN, up=2, kernel_size=7),
    Case("up3", "a larger factor", *_FPN, up=3, kernel_size=5),
    Case("up4", "a larger factor", *_FPN, up=4, kernel_size=5),
    Case("same_k3", "a filter, a small kernel", *_FPN, kernel_size=3),
    Case("same", "a filter", *_FPN, kernel_size=5),
    Case("same_k7", "a filter, a large kernel", *_FPN, kernel_size=7),
    Case("down3", "a larger factor, down", *_FPN, down=3, kernel_size=5),
    Case("down4", "a larger factor, down", *_FPN, down=4, kernel_size=5),
    Case("ratio_3_2", "a fraction", *_FPN, up=3, down=2, kernel_size=5),
    Case("ratio_4_3", "a fraction", *_FPN, up=4, down=3, kernel_size=5),
    Case("large_up2", "the bar of this map", *_PICTURE, up=2, kernel_size=5),
    Case("large_ratio_3_2", "a fraction", *_PICTURE, up=3, down=2, kernel_size=5),
]
CONVEX, ROOFLINE, FACTORS = (
    {case.name: case for case in table} for table in (_CONVEX, _ROOFLINE, _FACTORS)
)


class Arrays:
    """Arrays of one problem and dtype, contiguous in either layout, each made once.

    They begin at a cache line, as those of PyTorch, CuPy and JAX do.

    MIXED has NCHW's axes: its masks and logits are views of NHWC's memory.

    Inputs (features, masks, logits, grad_output) are normally distributed; both layouts have the
    same values. Results (output, grad_features, grad_masks, grad_logits) are NaN.

    Parameters
    ----------
    case : Case
    dtype : str
    constant : bool, default False
        Fill inputs with 0.5, which is quick.
    """

    def __init__(self, case: Case, dtype: str, constant: bool = False):
        self.case, self.dtype, self.constant = case, dtype, constant
        self._made: dict[tuple[str, str], np.ndarray] = {}

    def __call__(self, name: str, layout: str) -> np.ndarray:
        """Return an array by its name."""
        key = name, layout
        if layout == MIXED:
            by_taps = name.removeprefix("grad_") in ("masks", "logits")
            return as_nchw(self(name, "NHWC"), "NHWC") if by_taps else self(name, "NCHW")
        if key not in self._made:
            values = in_layout(self._values(name), layout)
            self._made[key] = aligned(np.ascontiguousarray(values, numpy_dtype(self.dtype)))
        return self._made[key]

    def _values(self, name: str) -> np.ndarray:
        if name not in ("features", "masks", "logits", "grad_output"):
            return np.full(shape(self.case, name), np.nan, np.float32)
        if self.constant:
            return np.full(shape(self.case, name), 0.5, np.float32)
        rng = np.random.default_rng(zlib.crc32(f"{self.case.name} {name}".encode()))
        return rng.standard_normal(shape(self.case, name), np.float32)


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy that begins at a cache line."""
    memory = np.empty(array.nbytes + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
