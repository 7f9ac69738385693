"""reassemble_backward: every implementation against the definition, on every case and dtype."""

import functools

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, FEW, integer_arrays, numpy_dtype, random_arrays
from functions import names, run
from tolerances import assert_exact, assert_within_bound

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
few_cases = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
all_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
implementations = pytest.mark.parametrize("implementation", names("reassemble_backward"))


def expected_gradients(case, arrays, suffix=""):
    """(grad_features, grad_masks) by the definition; with suffix "_magnitude" of the magnitudes."""
    grad_features = getattr(ref, f"grad_features{suffix}")
    grad_masks = getattr(ref, f"grad_masks{suffix}")
    return (
        grad_features(arrays.grad_output, arrays.masks, (case.h, case.w), **case.factors),
        grad_masks(arrays.grad_output, arrays.features, case.kernel_size, **case.factors),
    )


@functools.cache
def exact_gradients(case):
    return expected_gradients(case, integer_arrays(case, DTYPES[0]))


@implementations
@all_dtypes
@cases
def test_small_integers_give_the_exact_gradients(case, dtypes, implementation):
    gx, gm = run(implementation, "reassemble_backward", case, integer_arrays(case, dtypes))
    expected_gx, expected_gm = exact_gradients(case)
    assert_exact(gx, expected_gx, dtypes.features)
    assert_exact(gm, expected_gm, dtypes.masks)


@functools.lru_cache(maxsize=8)  # for all implementations, which are run one after the other
def random_gradients(case, dtypes, suffix=""):
    return expected_gradients(case, random_arrays(case, dtypes), suffix)


@implementations
@all_dtypes
@cases
def test_random_numbers_stay_within_the_rounding_bound(case, dtypes, implementation):
    gx, gm = run(implementation, "reassemble_backward", case, random_arrays(case, dtypes))
    expected_gx, expected_gm = random_gradients(case, dtypes)
    magnitude_gx, magnitude_gm = random_gradients(case, dtypes, "_magnitude")
    assert_within_bound(
        "grad_features", dtypes.features, case.kernel_size, gx, expected_gx, magnitude_gx
    )
    assert_within_bound("grad_masks", dtypes.masks, case.kernel_size, gm, expected_gm, magnitude_gm)


@all_dtypes
@few_cases
def test_gradients_are_new_c_ordered_arrays_like_their_arguments(case, dtypes):
    arrays = integer_arrays(case, dtypes)
    gx, gm = carafepp.reassemble_backward(
        arrays.grad_output, arrays.features, arrays.masks, **case.factors
    )
    assert type(gx) is type(gm) is np.ndarray
    assert (gx.shape, gm.shape) == (case.features_shape, case.masks_shape)
    assert gx.dtype == numpy_dtype(dtypes.features)
    assert gm.dtype == numpy_dtype(dtypes.masks)
    assert gx.flags.c_contiguous
    assert gm.flags.c_contiguous


@pytest.mark.parametrize("need_masks", [True, False])
@pytest.mark.parametrize("need_features", [True, False])
def test_only_the_gradients_asked_for_are_returned(need_features, need_masks):
    case = CASES["ratio_3_2"]
    arrays = integer_arrays(case, DTYPES[0])
    gradients = carafepp.reassemble_backward(
        arrays.grad_output,
        arrays.features,
        arrays.masks,
        **case.factors,
        need_features=need_features,
        need_masks=need_masks,
    )
    assert isinstance(gradients, tuple)
    for gradient, needed, exact in zip(
        gradients, (need_features, need_masks), exact_gradients(case), strict=True
    ):
        if needed:
            assert_exact(gradient, exact, "float32")
        else:
            assert gradient is None


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.terms == 0], ids=lambda c: c.name)
def test_without_any_term_the_gradients_are_written_as_zeros(case):
    arrays = integer_arrays(case, DTYPES[0])
    out = (
        np.full(case.features_shape, np.nan, np.float32),
        np.full(case.masks_shape, np.nan, np.float32),
    )
    carafepp.reassemble_backward(
        arrays.grad_output, arrays.features, arrays.masks, **case.factors, out=out
    )
    assert not out[0].any()
    assert not out[1].any()


@pytest.mark.parametrize("name", ["skips_features", "skips_features_k1", "skips_at_a_ratio"])
def test_features_that_no_tap_reaches_get_exactly_zero(name):
    """Even if everything that could be multiplied by them is NaN."""
    case = CASES[name]
    arrays = integer_arrays(case, DTYPES[0])
    reached = ref.grad_features(
        np.ones(case.output_shape), np.ones(case.masks_shape), (case.h, case.w), **case.factors
    )
    gx, _ = carafepp.reassemble_backward(
        np.full(case.output_shape, np.nan, np.float32),
        arrays.features,
        arrays.masks,
        **case.factors,
    )
    assert (reached == 0).any()
    np.testing.assert_array_equal(np.isnan(gx), reached > 0)
    assert not gx[reached == 0].any()


def test_sums_over_many_channels_are_exact_in_32_bits():
    """2049 products of 1: in float16 the sum would stop at 2048."""
    features = np.ones((1, 2049, 1, 1), np.float16)
    masks = np.ones((1, 1, 1, 1), np.float32)
    _, gm = carafepp.reassemble_backward(features, features, masks)
    assert gm.item() == 2049
