"""The problems that are timed, what they cost at least, and arrays to run them on."""

import math
import zlib

import numpy as np

from cases import Case, numpy_dtype

_TABLE = [
    # The paper's networks
    Case("fpn1", "a small level of an FPN", 2, 256, 50, 76, up=2, kernel_size=5),
    Case("fpn2", "a large level of an FPN", 2, 256, 100, 152, up=2, kernel_size=5),
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
    # Arithmetic alone, or nearly
    Case("cached_up", "full vectors, in the caches", 2, 256, 10, 16, up=2, kernel_size=5),
    Case("cached_down", "full vectors, in the caches", 2, 256, 20, 32, down=2, kernel_size=5),
]
PROBLEMS = {case.name: case for case in _TABLE}

FLOPS = "2 K^2 N C H' W' for the output and for each gradient, taps beyond the border included"
BYTES = "every input and result of a pass once; forward+backward: the sum of the two passes"

# Arrays that a pass reads and writes, each once; weights are masks or logits.
_FORWARD = ("features", "weights", "output")
_TRAFFIC = {
    "forward": _FORWARD,
    "grad_features": ("output", "weights", "features"),
    "grad_masks": ("output", "features", "weights"),
    "grad_logits": ("output", "features", "weights", "weights"),
    "forward+backward": (*_FORWARD, "output", "features", "weights", "features", "weights"),
}


def flops(case: Case, pass_: str) -> int:
    """Return the operations of a pass: see FLOPS."""
    return 2 * case.terms * (3 if pass_ == "forward+backward" else 1)


def touched_bytes(case: Case, pass_: str, source: str, dtype: str) -> int:
    """Return the bytes that a pass has to move: see BYTES."""
    shapes = {
        "features": case.features_shape,
        "weights": case.masks_shape if source == "masks" else case.logits_shape,
        "output": case.output_shape,
    }
    elements = sum(math.prod(shapes[name]) for name in _TRAFFIC[pass_])
    return elements * numpy_dtype(dtype).itemsize


class Arrays:
    """Arrays of one problem and dtype, contiguous in either layout, each made once.

    Inputs (features, masks, logits, grad_output) are normally distributed, with the same values in
    both layouts. Results (output, grad_features, grad_masks, grad_logits) are NaN.

    Parameters
    ----------
    case : Case
    dtype : str
    constant : bool, default False
        Inputs are 0.5 everywhere, which is quick.
    """

    def __init__(self, case: Case, dtype: str, constant: bool = False):
        self.case, self.dtype, self.constant = case, dtype, constant
        self._made: dict[tuple[str, str], np.ndarray] = {}

    def __call__(self, name: str, layout: str) -> np.ndarray:
        """Return an array by its name."""
        key = name, layout
        if key not in self._made:
            of = "output" if name == "grad_output" else name.removeprefix("grad_")
            shape = getattr(self.case, f"{of}_shape")
            array = np.ascontiguousarray(self._values(name, shape), numpy_dtype(self.dtype))
            self._made[key] = array if layout == "NCHW" else as_nhwc(array)
        return self._made[key]

    def _values(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in ("features", "masks", "logits", "grad_output"):
            return np.full(shape, np.nan, np.float32)
        if self.constant:
            return np.full(shape, 0.5, np.float32)
        rng = np.random.default_rng(zlib.crc32(f"{self.case.name} {name}".encode()))
        return rng.standard_normal(shape, np.float32)


def as_nhwc(array: np.ndarray) -> np.ndarray:
    """Return a contiguous array N, H, W, C of one N, C, H, W."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def as_nchw(array: np.ndarray, layout: str) -> np.ndarray:
    """Return a view with the axes N, C, H, W of an array in the layout."""
    return array if layout == "NCHW" else array.transpose(0, 3, 1, 2)
