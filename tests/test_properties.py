"""Properties that need no reference: adjointness, linearity, and what may not influence what."""

import numpy as np
import pytest

import carafepp
from cases import CASES, DTYPES, FEW, double, integer_arrays, integers, random_arrays
from products import product

F32, F64 = DTYPES[:2]
cases = product(case=CASES, by_default={"case": FEW})


def inner(a, b) -> float:
    return float((double(a) * double(b)).sum())


def forward(case, features, masks):
    return carafepp.reassemble(features, masks, **case.factors, **case.crop)


@cases
def test_adjoint_exactly_on_small_integers(case):
    """<grad_output, output> = <grad_features, features> = <grad_masks, masks>."""
    a = integer_arrays(case, F32)
    gx, gm = carafepp.reassemble_backward(a.grad_output, a.features, a.masks, **case.factors)
    expected = inner(a.grad_output, forward(case, a.features, a.masks))
    assert inner(gx, a.features) == expected
    assert inner(gm, a.masks) == expected


@cases
def test_adjoint_to_rounding_on_random_numbers(case):
    a = random_arrays(case, F64)
    gx, gm = carafepp.reassemble_backward(a.grad_output, a.features, a.masks, **case.factors)
    products = forward(case, abs(a.features), abs(a.masks))
    bound = 32 * np.finfo(np.float64).eps * inner(abs(a.grad_output), products)
    expected = inner(a.grad_output, forward(case, a.features, a.masks))
    assert abs(inner(gx, a.features) - expected) <= bound
    assert abs(inner(gm, a.masks) - expected) <= bound


@cases
def test_adjoint_through_the_logits_without_a_normalizer(case):
    a = integer_arrays(case, F32)
    options = {**case.factors, "kernel_size": case.kernel_size, "normalizer": "none"}
    output = carafepp.reassemble_with_logits(a.features, a.logits, **options, **case.crop)
    gx, gl = carafepp.reassemble_with_logits_backward(
        a.grad_output, a.features, a.logits, **options
    )
    expected = inner(a.grad_output, output)
    assert inner(gx, a.features) == expected
    assert inner(gl, a.logits) == expected


@cases
def test_linear_in_the_features(case, rng):
    a = integer_arrays(case, F32)
    other = integers(rng, case.features_shape, 4)
    combined = forward(case, 2 * a.features - 3 * other, a.masks)
    separate = 2 * forward(case, a.features, a.masks) - 3 * forward(case, other, a.masks)
    np.testing.assert_array_equal(combined, separate)


@cases
def test_linear_in_the_masks(case, rng):
    a = integer_arrays(case, F32)
    other = integers(rng, case.masks_shape, 2)
    combined = forward(case, a.features, 2 * a.masks - 3 * other)
    separate = 2 * forward(case, a.features, a.masks) - 3 * forward(case, a.features, other)
    np.testing.assert_array_equal(combined, separate)


@cases
def test_gradients_are_linear_in_grad_output(case, rng):
    a = integer_arrays(case, F32)
    other = integers(rng, case.output_shape, 4)

    def backward(grad_output):
        return carafepp.reassemble_backward(grad_output, a.features, a.masks, **case.factors)

    combined, first, second = (backward(d) for d in (a.grad_output + other, a.grad_output, other))
    np.testing.assert_array_equal(combined[0], first[0] + second[0])
    np.testing.assert_array_equal(combined[1], first[1] + second[1])


@cases
def test_second_derivatives_are_the_same_functions(case, rng):
    """<V, grad_features(D, M)> = <D, reassemble(V, M)>: differentiating a gradient is a forward."""
    a = integer_arrays(case, F32)
    v, u = integers(rng, case.features_shape, 4), integers(rng, case.masks_shape, 2)
    gx, _ = carafepp.reassemble_backward(a.grad_output, a.features, a.masks, **case.factors)
    assert inner(v, gx) == inner(a.grad_output, forward(case, v, a.masks))
    _, gm = carafepp.reassemble_backward(a.grad_output, a.features, a.masks, **case.factors)
    assert inner(u, gm) == inner(a.grad_output, forward(case, a.features, u))


@product(case=CASES, by_default={"case": FEW}, turns={"dtypes": [F32, DTYPES[2]]})
def test_a_crop_is_the_corner_of_the_whole(case, dtypes, rng):
    a = integer_arrays(case, dtypes)
    shape = (*case.masks_shape[:2], *case.natural_size)
    masks = integers(rng, shape, 2, dtypes.masks)
    whole = carafepp.reassemble(a.features, masks, **case.factors)
    h, w = (max(0, extent - 1) for extent in case.natural_size)
    crop = carafepp.reassemble(a.features, masks[:, :, :h, :w], **case.factors, size=(h, w))
    np.testing.assert_array_equal(double(crop), double(whole[:, :, :h, :w]))


@pytest.mark.parametrize("name", ["up2", "down2", "ratio_3_2", "groups_2", "crop_up"])
def test_images_of_a_batch_do_not_mix(name):
    case = CASES[name]
    a = integer_arrays(case, F32)
    whole = forward(case, a.features, a.masks)
    alone = forward(case, a.features[1:], a.masks[1:])
    np.testing.assert_array_equal(whole[1:], alone)


@pytest.mark.parametrize("name", ["groups_2", "groups_3_of_7", "groups_eq_c", "groups_down"])
def test_a_group_depends_on_its_own_channels_and_masks_alone(name):
    case = CASES[name]
    a = integer_arrays(case, F32)
    whole = forward(case, a.features, a.masks)
    channels, taps = case.c // case.groups, case.kernel_size**2
    alone = carafepp.reassemble(
        a.features[:, -channels:], a.masks[:, -taps:], up=case.up, down=case.down
    )
    np.testing.assert_array_equal(whole[:, -channels:], alone)


def test_masks_of_one_third_keep_a_constant_to_rounding():
    masks = np.full((1, 9, 8, 8), 1 / 9, np.float32)
    output = carafepp.reassemble(np.full((1, 2, 4, 4), 7, np.float32), masks, up=2)
    np.testing.assert_allclose(output[:, :, 2:-2, 2:-2], 7, rtol=1e-6)
