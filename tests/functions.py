"""The six functions: their arguments, results and implementations, to parametrize tests with."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

import carafepp
from cases import CASES, DTYPES, Case, integer_arrays

# The inputs of each function, in the order of its signature, and what its results are shaped like.
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


def _each(table):
    return pytest.mark.parametrize(
        ("function", "index"),
        [
            pytest.param(function, index, id=f"{function}-{name}")
            for function, names in table.items()
            for index, name in enumerate(names)
        ],
    )


each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_input = _each(INPUTS)
each_result = _each(RESULTS)


def arguments(function: str, case: Case, arrays, normalizer: str = "softmax"):
    """Return the inputs and the parameters of a call of this function for this problem."""
    logits_params = {**case.factors, "kernel_size": case.kernel_size, "normalizer": normalizer}
    without_down = {key: value for key, value in logits_params.items() if key != "down"}
    params = {
        "reassemble": {**case.factors, **case.crop},
        "reassemble_backward": case.factors,
        "reassemble_with_logits": {**logits_params, **case.crop},
        "reassemble_with_logits_backward": logits_params,
        "normalize_masks": {**without_down, "size": case.output_size},
        "normalize_masks_backward": without_down,
    }[function]
    return tuple(getattr(arrays, name) for name in INPUTS[function]), dict(params)


def call(function: str, inputs, params) -> tuple:
    """Return the result or results, always as a tuple."""
    results = getattr(carafepp, function)(*inputs, **params)
    return results if isinstance(results, tuple) else (results,)


def call_into(function: str, inputs, params, outs) -> None:
    """Call with `out=`, and check that what is returned are the outs themselves."""
    results = call(function, inputs, {**params, "out": tuple(outs) if len(outs) == 2 else outs[0]})
    for given, returned in zip(outs, results, strict=True):
        assert returned is given


def names(function: str) -> list[str]:
    """All implementations of the function in this build, whatever problems they accept."""
    case, dtypes = CASES["up2"], DTYPES[0]
    arrays, params = arguments(function, case, integer_arrays(case, dtypes))
    return [name for name, _ in carafepp.list_implementations(function, *arrays, **params)]


def layout_of(implementation: str) -> str:
    """Return the layout that an implementation is for: NCHW for one that takes any."""
    return "NHWC" if "_nhwc_" in implementation else "NCHW"


def in_layout(arrays, layout: str) -> tuple:
    """Return C-ordered copies of NCHW arrays in the axes of this layout."""
    return tuple(
        np.ascontiguousarray(np.moveaxis(a, 1, -1)) if layout == "NHWC" else a for a in arrays
    )


def from_layout(results: tuple, layout: str) -> tuple:
    """Return views of results with the axes N, C, H, W."""
    return tuple(np.moveaxis(a, -1, 1) if layout == "NHWC" else a for a in results)


@contextlib.contextmanager
def forced(implementation: str, function: str, arrays, params) -> Iterator[None]:
    """Run the function by this implementation; skip, with its reason, if it declines."""
    reasons = dict(carafepp.list_implementations(function, *arrays, **params))
    if reasons[implementation] is not None:
        pytest.skip(f"{implementation} declines: {reasons[implementation]}")
    with carafepp.force_implementation(implementation):
        yield


@contextlib.contextmanager
def one_that_accepts(choice: int, function: str, arrays, params, out=None) -> Iterator[None]:
    """Run the function by any implementation that accepts the problem, chosen by a number."""
    if out is None:
        out = getattr(carafepp, function)(*arrays, **params)
    entries = carafepp.list_implementations(function, *arrays, **params, out=out)
    accepting = [name for name, reason in entries if reason is None]
    with carafepp.force_implementation(accepting[choice % len(accepting)]):
        yield


def run(implementation: str, function: str, case: Case, arrays, **options):
    """The result of one implementation. `options` are normalizer or parameters of the call."""
    layout = layout_of(implementation)
    normalizer = options.pop("normalizer", "softmax")
    inputs, params = arguments(function, case, arrays, normalizer)
    inputs, params = in_layout(inputs, layout), {**params, **options, "layout": layout}
    with forced(implementation, function, inputs, params):
        results = from_layout(call(function, inputs, params), layout)
    return results if len(results) > 1 else results[0]
