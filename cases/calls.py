"""The six functions: their inputs, results and parameters for a case, and the call itself."""

import numpy as np

import carafepp

from . import Case

# The inputs of each function, in the order of its signature, and its results by the names of arrays
# of the same shape.
INPUTS = {
    "reassemble": ("features", "masks"),
    "reassemble_backward": ("grad_output", "features", "masks"),
    "reassemble_with_logits": ("features", "logits"),
    "reassemble_with_logits_backward": ("grad_output", "features", "logits"),
    "normalize_masks": ("logits",),
    "normalize_masks_backward": ("grad_masks", "logits"),
}
RESULTS = {
    "reassemble": ("output",),
    "reassemble_backward": ("features", "masks"),
    "reassemble_with_logits": ("output",),
    "reassemble_with_logits_backward": ("features", "logits"),
    "normalize_masks": ("masks",),
    "normalize_masks_backward": ("logits",),
}
FUNCTIONS = tuple(INPUTS)


def arguments(function: str, case: Case, arrays, normalizer: str = "softmax"):
    """Return the inputs and the parameters of a call of this function for this problem."""
    logits_params = {**case.factors, "kernel_size": case.kernel_size, "normalizer": normalizer}
    masks_params = {
        key: value for key, value in logits_params.items() if key not in ("down", "padding")
    }
    params = {
        "reassemble": {**case.factors, **case.crop},
        "reassemble_backward": case.factors,
        "reassemble_with_logits": {**logits_params, **case.crop},
        "reassemble_with_logits_backward": logits_params,
        "normalize_masks": {**masks_params, "size": case.output_size},
        "normalize_masks_backward": masks_params,
    }[function]
    return tuple(getattr(arrays, name) for name in INPUTS[function]), dict(params)


def is_generic(name: str) -> bool:
    """Return whether an implementation for CUDA runs every problem."""
    return "_any_" in name and "_few_" not in name


def call(function: str, inputs, params) -> tuple:
    """Return the result or results, always as a tuple."""
    results = getattr(carafepp, function)(*inputs, **params)
    return results if isinstance(results, tuple) else (results,)


def in_layout(arrays, layout: str) -> tuple:
    """Return C-ordered copies of NCHW arrays in the axes of this layout."""
    return tuple(
        np.ascontiguousarray(np.moveaxis(a, 1, -1)) if layout == "NHWC" else a for a in arrays
    )


def from_layout(results: tuple, layout: str) -> tuple:
    """Return views of results with the axes N, C, H, W."""
    return tuple(np.moveaxis(a, -1, 1) if layout == "NHWC" else a for a in results)
