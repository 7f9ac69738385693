"""The problems that are timed, and arrays to run them on."""

import zlib

import numpy as np

from cases import Case, numpy_dtype

from .passes import in_layout, shape

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
    # Almost only arithmetic
    Case("cached_up", "full vectors, in the caches", 2, 256, 10, 16, up=2, kernel_size=5),
    Case("cached_down", "full vectors, in the caches", 2, 256, 20, 32, down=2, kernel_size=5),
]
PROBLEMS = {case.name: case for case in _TABLE}


class Arrays:
    """Arrays of one problem and dtype, contiguous in either layout, each made once.

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
        if key not in self._made:
            values = in_layout(self._values(name), layout)
            self._made[key] = np.ascontiguousarray(values, numpy_dtype(self.dtype))
        return self._made[key]

    def _values(self, name: str) -> np.ndarray:
        if name not in ("features", "masks", "logits", "grad_output"):
            return np.full(shape(self.case, name), np.nan, np.float32)
        if self.constant:
            return np.full(shape(self.case, name), 0.5, np.float32)
        rng = np.random.default_rng(zlib.crc32(f"{self.case.name} {name}".encode()))
        return rng.standard_normal(shape(self.case, name), np.float32)
