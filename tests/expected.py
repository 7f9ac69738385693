"""What each of the six functions must return, by the definition, and how near to it."""

import functools

import numpy as np

import reference as ref
from cases import DTYPES, Case, Dtypes, integer_arrays, random_arrays
from cases.calls import RESULTS
from tolerances import assert_exact, assert_within_bound


def _expected(function: str, case: Case, arrays, normalizer: str) -> list:
    """(quantity, expected, magnitude of its terms) of every result."""
    a, factors, size = arrays, case.factors, (case.h, case.w)
    params = {"up": case.up, "groups": case.groups, "normalizer": normalizer}
    masks, suffix = a.masks, ""
    if "logits" in function or function == "normalize_masks":
        masks = ref.normalize(a.logits, size=case.output_size, **params)
        suffix = "_from_logits"
    if function == "normalize_masks":
        return [("normalized_masks", masks, np.abs(masks))]
    if function == "normalize_masks_backward":
        gl = ref.normalize_backward(a.grad_masks, a.logits, **params)
        magnitude = ref.normalize_backward_magnitude(a.grad_masks, a.logits, **params)
        return [("normalized_masks_backward", gl, magnitude)]
    if not function.endswith("backward"):
        y = ref.reassemble(a.features, masks, **factors)
        return [("output" + suffix, y, ref.reassemble_magnitude(a.features, masks, **factors))]
    gx = ref.grad_features(a.grad_output, masks, size, **factors)
    gx_magnitude = ref.grad_features_magnitude(a.grad_output, masks, size, **factors)
    gm = ref.grad_masks(a.grad_output, a.features, case.kernel_size, **factors)
    gm_magnitude = ref.grad_masks_magnitude(a.grad_output, a.features, case.kernel_size, **factors)
    for_features = ("grad_features" + suffix, gx, gx_magnitude)
    if not suffix:
        return [for_features, ("grad_masks", gm, gm_magnitude)]
    gl = ref.normalize_backward(gm, a.logits, **params)
    gl_magnitude = ref.normalize_backward_magnitude(gm_magnitude, a.logits, **params)
    return [for_features, ("grad_logits", gl, gl_magnitude)]


@functools.lru_cache(maxsize=64)
def exact_results(function: str, case: Case) -> tuple:
    """For integer_arrays of any dtypes and the normaliser none."""
    arrays = integer_arrays(case, DTYPES[0])
    return tuple(result for _, result, _ in _expected(function, case, arrays, "none"))


@functools.lru_cache(maxsize=64)
def random_results(function: str, case: Case, dtypes: Dtypes, normalizer: str) -> list:
    return _expected(function, case, random_arrays(case, dtypes), normalizer)


def dtypes_of_results(function: str, dtypes: Dtypes) -> list[str]:
    of_features = ("output", "features")
    return [dtypes.features if r in of_features else dtypes.masks for r in RESULTS[function]]


def assert_exact_results(function: str, case: Case, dtypes: Dtypes, results) -> None:
    """Check what integer_arrays and the normaliser none gave."""
    names = dtypes_of_results(function, dtypes)
    for result, exact, dtype in zip(results, exact_results(function, case), names, strict=True):
        assert_exact(result, exact, dtype)


def assert_random_results(
    function: str, case: Case, dtypes: Dtypes, results, normalizer: str = "softmax"
) -> None:
    """Check what random_arrays gave."""
    expected = random_results(function, case, dtypes, normalizer)
    names = dtypes_of_results(function, dtypes)
    for result, (quantity, exact, magnitude), dtype in zip(results, expected, names, strict=True):
        if quantity == "grad_logits":  # which sums products of features
            dtype = dtypes.features
        assert_within_bound(quantity, dtype, case.kernel_size, result, exact, magnitude)
