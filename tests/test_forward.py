"""reassemble: what it returns, its size, and the precision of its sums."""

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, FEW, integer_arrays, integers, numpy_dtype
from products import product

all_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


@product(case=FEW, turns={"dtypes": DTYPES})
def test_output_is_a_new_c_ordered_array_of_the_features_dtype(case, dtypes):
    arrays = integer_arrays(case, dtypes)
    output = carafepp.reassemble(arrays.features, arrays.masks, **case.factors, **case.crop)
    assert type(output) is np.ndarray
    assert output.shape == case.output_shape
    assert output.dtype == numpy_dtype(dtypes.features)
    assert output.flags.c_contiguous
    assert output.flags.writeable


def test_output_size_is_the_natural_one():
    for case in CASES.values():
        factors = case.up, case.down, case.kernel_size, case.padding
        size = carafepp.output_size((case.h, case.w), *factors)
        assert tuple(size) == case.natural_size
        assert tuple(size) == ref.output_size(case.h, case.w, *factors)


def test_output_size_by_default_is_that_of_the_map():
    assert tuple(carafepp.output_size((5, 7))) == (5, 7)


def test_output_size_is_computed_in_64_bits():
    assert tuple(carafepp.output_size((2**40, 3), up=3, down=2)) == (3 * 2**39, 5)
    padded = {"kernel_size": 3, "padding": (1, 0)}
    assert tuple(carafepp.output_size((2**40, 3), up=3, down=2, **padded)) == (3 * 2**39, 2)


@pytest.mark.parametrize(
    ("up", "down", "kernel_size"),
    [
        (2**31 - 1, 1, 1),
        (2**31 - 1, 2**31 - 2, 1),
        (2**31 - 2, 2**31 - 1, 1),
        (2**29, 3, 5),
        (2**29, 2**29, 5),
        (3, 2**31 - 1, 5),
        (1, 2**31 - 1, 31),
    ],
)
def test_factors_may_be_huge(up, down, kernel_size, rng):
    """A call costs by the size of its result: here a crop of at most 4x5."""
    features = integers(rng, (2, 3, 5, 6), 4)
    size = tuple(min(a, b) for a, b in zip((4, 5), ref.output_size(5, 6, up, down), strict=True))
    masks = integers(rng, (2, kernel_size**2, *size), 2)
    factors = {"up": up, "down": down}
    output = carafepp.reassemble(features, masks, **factors, size=size)
    np.testing.assert_array_equal(output, ref.reassemble(features, masks, **factors))
    gx, gm = carafepp.reassemble_backward(output, features, masks, **factors)
    np.testing.assert_array_equal(gx, ref.grad_features(output, masks, (5, 6), **factors))
    np.testing.assert_array_equal(gm, ref.grad_masks(output, features, kernel_size, **factors))


@all_dtypes
def test_sums_of_16_bit_features_are_kept_in_32_bits(dtypes):
    """2048 + 1 - 2048: lost in float16 and bfloat16, were the partial sum rounded to them."""
    features = np.zeros((1, 1, 1, 3), numpy_dtype(dtypes.features))
    features[..., :] = [2048, 1, -2048]
    masks = np.zeros((1, 9, 1, 3), numpy_dtype(dtypes.masks))
    masks[0, 3:6, 0, 1] = 1
    assert carafepp.reassemble(features, masks).ravel().tolist() == [0, 1, 0]


def test_kernel_size_follows_from_the_masks_and_groups():
    features = np.ones((1, 4, 3, 3), np.float32)
    masks = np.ones((1, 36, 3, 3), np.float32)
    centre_of_groups_4 = carafepp.reassemble(features, masks, groups=4)[0, 0, 1, 1]
    assert centre_of_groups_4 == 9  # K = 3; with groups=1 it would be an even K = 6
