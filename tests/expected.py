"""The results of the six functions by the definition, and how near a kernel must come."""

import functools

import numpy as np

import reference as ref
from cases import DTYPES, Case, Dtypes, integer_arrays, numpy_dtype, random_arrays
from cases.calls import RESULTS
from tolerances import assert_exact, assert_within_bound


def _expected(function: str, result: str, case: Case, arrays, normalizer: str) -> tuple:
    """Return (quantity, expected, a function that gives the magnitude of its terms)."""
    a, factors, size, k = arrays, case.factors, (case.h, case.w), case.kernel_size
    params = {"up": case.up, "groups": case.groups, "normalizer": normalizer}
    if function == "normalize_masks_backward":
        magnitude = functools.partial(ref.normalize_backward_magnitude, a.grad_masks, a.logits)
        expected = ref.normalize_backward(a.grad_masks, a.logits, **params)
        return "normalized_masks_backward", expected, functools.partial(magnitude, **params)
    masks, suffix = a.masks, ""
    if "logits" in function or function == "normalize_masks":
        masks = ref.normalize(a.logits, size=case.output_size, **params)
        suffix = "_from_logits"
    if function == "normalize_masks":
        return "normalized_masks", masks, lambda: np.abs(masks)
    if result == "output":
        name, inputs = "reassemble", (a.features, masks)
    elif result == "features":
        name, inputs = "grad_features", (a.grad_output, masks, size)
    else:
        name, inputs = "grad_masks", (a.grad_output, a.features, k)
    expected = getattr(ref, name)(*inputs, **factors)
    magnitude = functools.partial(getattr(ref, f"{name}_magnitude"), *inputs, **factors)
    if result == "logits":
        expected = ref.normalize_backward(expected, a.logits, **params)
        terms = magnitude
        return (
            "grad_logits",
            expected,
            lambda: ref.normalize_backward_magnitude(terms(), a.logits, **params),
        )
    if result == "masks":
        return "grad_masks", expected, magnitude
    return {"output": "output", "features": "grad_features"}[result] + suffix, expected, magnitude


@functools.lru_cache(maxsize=64)
def _exact(function: str, result: str, case: Case):
    """For integer_arrays of any dtypes and the normaliser none."""
    return _expected(function, result, case, integer_arrays(case, DTYPES[0]), "none")[1]


@functools.lru_cache(maxsize=64)
def random_result(
    function: str, result: str, case: Case, dtypes: Dtypes, normalizer: str
) -> tuple[str, np.ndarray, np.ndarray]:
    """Return (quantity, expected of random_arrays, magnitude of its terms)."""
    arrays = random_arrays(case, dtypes)
    quantity, expected, magnitude = _expected(function, result, case, arrays, normalizer)
    return quantity, expected, magnitude()


def dtype_of(result: str, dtypes: Dtypes) -> str:
    """Return the dtype of a result of this name."""
    return dtypes.features if result in ("output", "features") else dtypes.masks


def assert_result(
    function: str, result: str, case: Case, dtypes: Dtypes, actual, normalizer: str | None
) -> None:
    """Check a result of integer_arrays, if the normaliser is None, or of random_arrays."""
    dtype = dtype_of(result, dtypes)
    assert actual.dtype == numpy_dtype(dtype)
    if normalizer is None:
        assert_exact(actual, _exact(function, result, case), dtype)
        return
    quantity, expected, magnitude = random_result(function, result, case, dtypes, normalizer)
    assert actual.shape == expected.shape
    if quantity == "grad_logits":  # a sum of products of features
        dtype = dtypes.features
    assert_within_bound(quantity, dtype, case.kernel_size, actual, expected, magnitude)


def assert_results(function: str, case: Case, dtypes: Dtypes, results, normalizer) -> None:
    """Check all results of a function."""
    for result, actual in zip(RESULTS[function], results, strict=True):
        assert_result(function, result, case, dtypes, actual, normalizer)
