"""reassemble_backward: which gradients it returns, and how."""

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, FEW, integer_arrays, numpy_dtype
from products import product
from tolerances import assert_exact


def expected_gradients(case):
    """(grad_features, grad_masks) of integer_arrays by the definition."""
    arrays = integer_arrays(case, DTYPES[0])
    return (
        ref.grad_features(arrays.grad_output, arrays.masks, (case.h, case.w), **case.factors),
        ref.grad_masks(arrays.grad_output, arrays.features, case.kernel_size, **case.factors),
    )


@product(case=FEW, turns={"dtypes": DTYPES})
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
        gradients, (need_features, need_masks), expected_gradients(case), strict=True
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
    """They are 0 even if all other arrays are NaN."""
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
