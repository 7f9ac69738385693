"""reassemble_with_logits, normalize_masks and their backwards: what they return and read."""

from types import SimpleNamespace

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, FEW, integer_arrays, numpy_dtype, random_arrays
from functions import ISAS, LAYOUTS_OF_KERNELS, each_kernel, run, takes
from products import product
from tolerances import assert_exact, assert_within_bound

normalizers = pytest.mark.parametrize("normalizer", ref.NORMALIZERS)


# reassemble_with_logits


@product(case=FEW, turns={"dtypes": DTYPES})
def test_output_is_a_new_c_ordered_array_of_the_features_dtype(case, dtypes):
    arrays = integer_arrays(case, dtypes)
    output = carafepp.reassemble_with_logits(
        arrays.features, arrays.logits, **case.factors, **case.crop, kernel_size=case.kernel_size
    )
    assert type(output) is np.ndarray
    assert output.shape == case.output_shape
    assert output.dtype == numpy_dtype(dtypes.features)
    assert output.flags.c_contiguous


def test_defaults_are_a_kernel_of_5_and_softmax(rng):
    features = rng.standard_normal((1, 2, 4, 4)).astype(np.float32)
    logits = rng.standard_normal((1, 25, 4, 4)).astype(np.float32)
    explicit = carafepp.reassemble_with_logits(
        features, logits, kernel_size=5, normalizer="softmax", up=1, down=1, groups=1
    )
    np.testing.assert_array_equal(carafepp.reassemble_with_logits(features, logits), explicit)


# reassemble_with_logits_backward


def exact_gradients(case):
    """Return the gradients of integer_arrays, by the definition and without a normalizer."""
    a = integer_arrays(case, DTYPES[0])
    inputs = a.grad_output, a.features, a.logits
    return ref.reassemble_with_logits_backward(*inputs, **case.factors, normalizer="none")


@product(case=FEW, turns={"dtypes": DTYPES})
def test_gradients_are_new_c_ordered_arrays_like_their_arguments(case, dtypes):
    a = integer_arrays(case, dtypes)
    gx, gl = carafepp.reassemble_with_logits_backward(
        a.grad_output, a.features, a.logits, **case.factors, kernel_size=case.kernel_size
    )
    assert type(gx) is type(gl) is np.ndarray
    assert (gx.shape, gl.shape) == (case.features_shape, case.logits_shape)
    assert gx.dtype == numpy_dtype(dtypes.features)
    assert gl.dtype == numpy_dtype(dtypes.masks)
    assert gx.flags.c_contiguous
    assert gl.flags.c_contiguous


@pytest.mark.parametrize("need_logits", [True, False])
@pytest.mark.parametrize("need_features", [True, False])
def test_only_the_gradients_asked_for_are_returned(need_features, need_logits):
    case = CASES["ratio_3_2"]
    a = integer_arrays(case, DTYPES[0])
    gradients = carafepp.reassemble_with_logits_backward(
        a.grad_output,
        a.features,
        a.logits,
        **case.factors,
        kernel_size=case.kernel_size,
        normalizer="none",
        need_features=need_features,
        need_logits=need_logits,
    )
    for gradient, needed, exact in zip(
        gradients, (need_features, need_logits), exact_gradients(case), strict=True
    ):
        if needed:
            assert_exact(gradient, exact, "float32")
        else:
            assert gradient is None


# Logits that no output uses: what the crop cuts off, and everything if there is no output


def outside_the_crop(case):
    """True for the logits that no output uses."""
    used = np.zeros((case.n, case.logits_shape[1] // case.up**2, *case.logits_shape[2:]), bool)
    used = used.repeat(case.up, axis=2).repeat(case.up, axis=3)
    used[:, :, : case.output_size[0], : case.output_size[1]] = True
    return ~ref.pixel_unshuffle(used, case.up)


def with_nan_logits(arrays, where):
    logits = np.where(where, np.float32(np.nan), arrays.logits)
    return SimpleNamespace(**{**vars(arrays), "logits": logits})


NORMALIZERS = {"normalizer": ref.NORMALIZERS}
CROPPED = [case for case in CASES.values() if outside_the_crop(case).any()]


@each_kernel("reassemble_with_logits_backward", "logits", CROPPED, turns=NORMALIZERS)
def test_logits_outside_the_crop_get_exactly_zero(case, layout, isa, normalizer):
    """Also if they are NaN."""
    outside = outside_the_crop(case)
    a = with_nan_logits(random_arrays(case, DTYPES[0]), outside)
    kernel = "logits", layout, isa
    gl = run("reassemble_with_logits_backward", *kernel, case, a, normalizer)
    assert not gl[outside].any()
    assert np.isfinite(gl).all()


@each_kernel("reassemble_with_logits_backward", "features", CROPPED, turns=NORMALIZERS)
def test_logits_outside_the_crop_do_not_reach_grad_features(case, layout, isa, normalizer):
    a = with_nan_logits(random_arrays(case, DTYPES[0]), outside_the_crop(case))
    kernel = "features", layout, isa
    gx = run("reassemble_with_logits_backward", *kernel, case, a, normalizer)
    assert np.isfinite(gx).all()


@each_kernel("normalize_masks_backward", "logits", CROPPED, ["any"], turns=NORMALIZERS)
def test_normalize_masks_backward_gives_zero_outside_the_crop(case, layout, isa, normalizer):
    outside = outside_the_crop(case)
    a = with_nan_logits(random_arrays(case, DTYPES[0]), outside)
    gl = run("normalize_masks_backward", "logits", layout, isa, case, a, normalizer)
    assert not gl[outside].any()
    assert np.isfinite(gl).all()


@product(case=CROPPED, turns=NORMALIZERS)
def test_logits_outside_the_crop_are_not_read(case, normalizer):
    a = with_nan_logits(random_arrays(case, DTYPES[0]), outside_the_crop(case))
    output = carafepp.reassemble_with_logits(
        a.features,
        a.logits,
        **case.factors,
        **case.crop,
        kernel_size=case.kernel_size,
        normalizer=normalizer,
    )
    assert np.isfinite(output).all()


# normalize_masks


@product(
    case=FEW,
    isa=ISAS,
    turns={"dtypes": DTYPES[:4]},
    valid=lambda case, isa: takes("normalize_masks", "masks")(case, "any", isa),
)
def test_normalizer_none_is_a_pixel_shuffle(case, isa, dtypes):
    a = random_arrays(case, dtypes)
    masks = run("normalize_masks", "masks", "any", isa, case, a, "none")
    h, w = case.output_size
    np.testing.assert_array_equal(masks, ref.pixel_shuffle(a.logits, case.up)[:, :, :h, :w])


def test_size_of_masks_by_default_is_that_of_all_logits(rng):
    logits = rng.standard_normal((2, 9 * 9, 4, 5)).astype(np.float32)
    masks = carafepp.normalize_masks(logits, up=3, kernel_size=3)
    assert masks.shape == (2, 9, 12, 15)


SAME_SIZE = CASES["same_size"]


@product(
    layout=LAYOUTS_OF_KERNELS,
    isa=ISAS,
    normalizer=["softmax", "sigmoid_normalized", "sigmoid"],
    turns={"dtypes": DTYPES},
    valid=lambda layout, isa, _: takes("reassemble_with_logits", "output")(SAME_SIZE, layout, isa),
)
def test_logits_that_select_taps_give_exact_means(layout, isa, normalizer, dtypes, rng):
    """Huge logits on 4 of 9 taps: masks of exactly 1/4 (sigmoid: 1) on them, and 0 elsewhere."""
    chosen = rng.permuted(np.arange(9)[:, None, None] + np.zeros((2, 1, 6, 7)), axis=1) < 4
    logits = np.where(chosen, 100.0, -30000.0).astype(numpy_dtype(dtypes.masks))
    a = SimpleNamespace(**{**vars(integer_arrays(SAME_SIZE, dtypes)), "logits": logits})
    kernel = "output", layout, isa
    output = run("reassemble_with_logits", *kernel, SAME_SIZE, a, normalizer)
    weight = 1.0 if normalizer == "sigmoid" else 0.25
    assert_exact(output, ref.reassemble(a.features, weight * chosen), dtypes.features)


@product(case=CASES, by_default={"case": FEW}, turns={"normalizer": ref.NORMALIZERS})
def test_fused_and_two_step_results_agree(case, normalizer):
    a = random_arrays(case, DTYPES[1])
    options = {"kernel_size": case.kernel_size, "normalizer": normalizer}
    fused = carafepp.reassemble_with_logits(
        a.features, a.logits, **case.factors, **case.crop, **options
    )
    masks = carafepp.normalize_masks(
        a.logits, up=case.up, groups=case.groups, size=case.output_size, **options
    )
    two_step = carafepp.reassemble(a.features, masks, **case.factors, **case.crop)
    magnitude = ref.reassemble_magnitude(a.features, masks, **case.factors)
    assert_within_bound(
        "output_from_logits", "float64", case.kernel_size, fused, two_step, magnitude
    )
