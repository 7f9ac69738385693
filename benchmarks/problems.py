"""The problems that are timed, what they cost at least, and arrays to run them on."""

import math
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from cases import Case, numpy_dtype

# Those that the bars of speed are stated for.
_STUDIED = [
    Case("fpn1", "a small level of an FPN", 2, 256, 50, 76, up=2, kernel_size=5),
    Case("fpn2", "a large level of an FPN", 2, 256, 100, 152, up=2, kernel_size=5),
    Case("roi", "the mask head in training", 64, 256, 14, 14, up=2, kernel_size=5),
    Case("stem", "the pooling of a ResNet stem", 8, 64, 112, 112, down=2, kernel_size=5),
    Case("s2", "a stride-2 stage of a ResNet", 8, 256, 56, 56, down=2, kernel_size=5),
    Case("s3", "a deep stage, one image", 1, 512, 28, 28, down=2, kernel_size=5),
]
# The stem of a ResNet, which users have too, stands above.
_OF_USERS = [
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
    Case("tiny", "one tiny map: the price of a call", 1, 16, 8, 8, up=2, kernel_size=5),
]
# The kernels' arithmetic alone, or nearly.
_IN_CACHE = [
    Case("cached_up", "full vectors, in the caches", 2, 256, 10, 16, up=2, kernel_size=5),
    Case("cached_down", "full vectors, in the caches", 2, 256, 20, 32, down=2, kernel_size=5),
]
PROBLEMS = {case.name: case for case in (*_STUDIED, *_OF_USERS, *_IN_CACHE)}
STUDIED = {case.name for case in _STUDIED}

FLOPS = "2 K^2 N C H' W' for the output and for each gradient, taps beyond the border included"
BYTES = "every input and result of a pass once; forward+backward: the sum of the two passes"

# What a pass reads and writes, every array once; weights are masks or logits.
_FORWARD = ("features", "weights", "output")
_BACKWARD = ("output", "features", "weights", "features", "weights")
_TRAFFIC = {
    "forward": _FORWARD,
    "grad_features": ("output", "weights", "features"),
    "grad_masks": ("output", "features", "weights"),
    "grad_logits": ("output", "features", "weights", "weights"),
    "backward": _BACKWARD,
    "forward+backward": _FORWARD + _BACKWARD,
}
_SUMS = {"backward": 2, "forward+backward": 3}


def flops(case: Case, pass_: str) -> int:
    """Return the operations of a pass: see FLOPS."""
    return 2 * case.terms * _SUMS.get(pass_, 1)


def touched_bytes(case: Case, pass_: str, source: str, dtype: str) -> int:
    """Return the bytes that a pass has to move: see BYTES."""
    shapes = {
        "features": case.features_shape,
        "weights": case.masks_shape if source == "masks" else case.logits_shape,
        "output": case.output_shape,
    }
    elements = sum(math.prod(shapes[name]) for name in _TRAFFIC[pass_])
    return elements * numpy_dtype(dtype).itemsize


def output_bytes(case: Case, dtype: str) -> int:
    """Return the size of the output."""
    return math.prod(case.output_shape) * numpy_dtype(dtype).itemsize


class Arrays:
    """Inputs of one problem, normally distributed, the same values in every layout; results.

    Parameters
    ----------
    case : Case
    source : "masks" or "logits"
        Which of the two there are.
    constant : bool, default False
        All values 0.5, which takes no memory to draw.
    """

    def __init__(self, case: Case, source: str, constant: bool = False):
        self.case, self.source, self.constant = case, source, constant
        self._made: dict[tuple, np.ndarray] = {}

    def inputs(self, dtype: str, layout: str) -> SimpleNamespace:
        """Return features, weights (masks or logits) and grad_output, contiguous in the layout."""
        return SimpleNamespace(
            features=self._once(self._input, "features", dtype, layout),
            weights=self._once(self._input, self.source, dtype, layout),
            grad_output=self._once(self._input, "grad_output", dtype, layout),
        )

    def result(self, name: str, dtype: str, layout: str) -> np.ndarray:
        """Return memory for a result, shared by all rivals; every page has been touched."""
        return self._once(self._result, name, dtype, layout)

    def _once(self, make: Callable, name: str, dtype: str, layout: str) -> np.ndarray:
        key = make.__name__, name, dtype, layout
        if key not in self._made:
            self._made[key] = make(name, dtype, layout)
        return self._made[key]

    def _input(self, name: str, dtype: str, layout: str) -> np.ndarray:
        if self.constant:
            return np.full(in_layout(self._shape(name), layout), 0.5, numpy_dtype(dtype))
        rng = np.random.default_rng(zlib.crc32(f"{self.case.name} {name}".encode()))
        array = rng.standard_normal(self._shape(name), np.float32)
        if layout == "NHWC":
            array = array.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(array, numpy_dtype(dtype))

    def _result(self, name: str, dtype: str, layout: str) -> np.ndarray:
        return np.full(in_layout(self._shape(name), layout), np.nan, numpy_dtype(dtype))

    def _shape(self, name: str) -> tuple[int, int, int, int]:
        """Return the shape of an array in the order N, C, H, W."""
        name = "output" if name == "grad_output" else name.removeprefix("grad_")
        return getattr(self.case, f"{name}_shape")


def in_layout(shape: tuple[int, int, int, int], layout: str) -> tuple[int, ...]:
    """Return the shape N, C, H, W in the order of the layout."""
    n, c, h, w = shape
    return shape if layout == "NCHW" else (n, h, w, c)


def as_nchw(array: np.ndarray, layout: str) -> np.ndarray:
    """Return a view with the axes N, C, H, W of an array in the layout."""
    return array if layout == "NCHW" else array.transpose(0, 3, 1, 2)
