"""reassemble_with_logits, normalize_masks and their backwards, against the definition."""

import functools
from types import SimpleNamespace

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
MASK_DTYPES = [d for d in DTYPES if d.features == d.masks]  # of the functions without features
mask_dtypes = pytest.mark.parametrize("dtypes", MASK_DTYPES, ids=str)
normalizers = pytest.mark.parametrize("normalizer", ref.NORMALIZERS)


# softmax with all dtypes, the others with two: which one it is changes nothing else
def _normalizers_and_dtypes(all_dtypes):
    return pytest.mark.parametrize(
        ("normalizer", "dtypes"),
        [
            pytest.param(normalizer, dtypes, id=f"{normalizer}-{dtypes}")
            for normalizer in ref.NORMALIZERS
            for dtypes in all_dtypes
            if normalizer == "softmax" or str(dtypes) in ("f32", "f16")
        ],
    )


normalizers_and_dtypes = _normalizers_and_dtypes(DTYPES)
normalizers_and_mask_dtypes = _normalizers_and_dtypes(MASK_DTYPES)


def implementations(function):
    return pytest.mark.parametrize("implementation", names(function))


def reference_params(case, normalizer):
    return {**case.factors, "normalizer": normalizer}


def normalize_params(case, normalizer):
    return {"up": case.up, "groups": case.groups, "normalizer": normalizer}


# reassemble_with_logits


@functools.cache
def exact_output(case):
    a = integer_arrays(case, DTYPES[0])
    params = reference_params(case, "none")
    return ref.reassemble_with_logits(a.features, a.logits, size=case.output_size, **params)


@implementations("reassemble_with_logits")
@all_dtypes
@cases
def test_forward_of_small_integers_is_exact(case, dtypes, implementation):
    arrays = integer_arrays(case, dtypes)
    output = run(implementation, "reassemble_with_logits", case, arrays, normalizer="none")
    assert_exact(output, exact_output(case), dtypes.features)


@functools.lru_cache(maxsize=8)  # for all implementations, which are run one after the other
def random_output(case, dtypes, normalizer):
    """Expected, and the magnitude of its terms."""
    a = random_arrays(case, dtypes)
    masks = ref.normalize(a.logits, size=case.output_size, **normalize_params(case, normalizer))
    return (
        ref.reassemble(a.features, masks, **case.factors),
        ref.reassemble_magnitude(a.features, masks, **case.factors),
    )


@implementations("reassemble_with_logits")
@normalizers_and_dtypes
@cases
def test_forward_stays_within_the_rounding_bound(case, dtypes, normalizer, implementation):
    a = random_arrays(case, dtypes)
    output = run(implementation, "reassemble_with_logits", case, a, normalizer=normalizer)
    expected, magnitude = random_output(case, dtypes, normalizer)
    assert_within_bound(
        "output_from_logits", dtypes.features, case.kernel_size, output, expected, magnitude
    )


@all_dtypes
@few_cases
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


@functools.cache
def exact_gradients(case):
    a = integer_arrays(case, DTYPES[0])
    params = reference_params(case, "none")
    return ref.reassemble_with_logits_backward(a.grad_output, a.features, a.logits, **params)


@implementations("reassemble_with_logits_backward")
@all_dtypes
@cases
def test_gradients_of_small_integers_are_exact(case, dtypes, implementation):
    gx, gl = run(
        implementation,
        "reassemble_with_logits_backward",
        case,
        integer_arrays(case, dtypes),
        normalizer="none",
    )
    expected_gx, expected_gl = exact_gradients(case)
    assert_exact(gx, expected_gx, dtypes.features)
    assert_exact(gl, expected_gl, dtypes.masks)


@functools.lru_cache(maxsize=8)
def random_gradients(case, dtypes, normalizer):
    """For features and for logits: expected, and the magnitude of its terms."""
    a, size, k = random_arrays(case, dtypes), (case.h, case.w), case.kernel_size
    params, d = normalize_params(case, normalizer), a.grad_output
    masks = ref.normalize(a.logits, size=case.output_size, **params)
    gx = ref.grad_features(d, masks, size, **case.factors)
    magnitude_gx = ref.grad_features_magnitude(d, masks, size, **case.factors)
    gm = ref.grad_masks(d, a.features, k, **case.factors)
    magnitude_gm = ref.grad_masks_magnitude(d, a.features, k, **case.factors)
    gl = ref.normalize_backward(gm, a.logits, **params)
    magnitude_gl = ref.normalize_backward_magnitude(magnitude_gm, a.logits, **params)
    return (gx, magnitude_gx), (gl, magnitude_gl)


@implementations("reassemble_with_logits_backward")
@normalizers_and_dtypes
@cases
def test_gradients_stay_within_the_rounding_bound(case, dtypes, normalizer, implementation):
    a, k = random_arrays(case, dtypes), case.kernel_size
    gx, gl = run(implementation, "reassemble_with_logits_backward", case, a, normalizer=normalizer)
    for_features, for_logits = random_gradients(case, dtypes, normalizer)
    assert_within_bound("grad_features_from_logits", dtypes.features, k, gx, *for_features)
    assert_within_bound("grad_logits", dtypes.features, k, gl, *for_logits)


@all_dtypes
@few_cases
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


cropped_cases = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if outside_the_crop(c).any()], ids=lambda c: c.name
)


@implementations("reassemble_with_logits_backward")
@normalizers
@cropped_cases
def test_logits_outside_the_crop_get_exactly_zero(case, normalizer, implementation):
    """Also if they are NaN."""
    outside = outside_the_crop(case)
    a = with_nan_logits(random_arrays(case, DTYPES[0]), outside)
    gx, gl = run(implementation, "reassemble_with_logits_backward", case, a, normalizer=normalizer)
    assert np.isfinite(gx).all()
    assert not gl[outside].any()
    assert np.isfinite(gl).all()


@implementations("normalize_masks_backward")
@normalizers
@cropped_cases
def test_normalize_masks_backward_gives_zero_outside_the_crop(case, normalizer, implementation):
    outside = outside_the_crop(case)
    a = with_nan_logits(random_arrays(case, DTYPES[0]), outside)
    gl = run(implementation, "normalize_masks_backward", case, a, normalizer=normalizer)
    assert not gl[outside].any()
    assert np.isfinite(gl).all()


@normalizers
@cropped_cases
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


@implementations("normalize_masks")
@normalizers_and_mask_dtypes
@cases
def test_masks_stay_within_the_rounding_bound(case, dtypes, normalizer, implementation):
    a = random_arrays(case, dtypes)
    masks = run(implementation, "normalize_masks", case, a, normalizer=normalizer)
    expected = ref.normalize(a.logits, size=case.output_size, **normalize_params(case, normalizer))
    assert masks.shape == case.masks_shape
    assert masks.dtype == numpy_dtype(dtypes.masks)
    assert_within_bound(
        "normalized_masks", dtypes.masks, case.kernel_size, masks, expected, np.abs(expected)
    )


@implementations("normalize_masks_backward")
@normalizers_and_mask_dtypes
@cases
def test_gradient_of_masks_stays_within_the_rounding_bound(
    case, dtypes, normalizer, implementation
):
    a = random_arrays(case, dtypes)
    gl = run(implementation, "normalize_masks_backward", case, a, normalizer=normalizer)
    params = normalize_params(case, normalizer)
    expected = ref.normalize_backward(a.grad_masks, a.logits, **params)
    magnitude = ref.normalize_backward_magnitude(a.grad_masks, a.logits, **params)
    assert gl.shape == case.logits_shape
    assert gl.dtype == numpy_dtype(dtypes.masks)
    assert_within_bound(
        "normalized_masks_backward", dtypes.masks, case.kernel_size, gl, expected, magnitude
    )


@implementations("normalize_masks")
@mask_dtypes
@cases
def test_normalizer_none_is_a_pixel_shuffle(case, dtypes, implementation):
    a = random_arrays(case, dtypes)
    masks = run(implementation, "normalize_masks", case, a, normalizer="none")
    h, w = case.output_size
    np.testing.assert_array_equal(masks, ref.pixel_shuffle(a.logits, case.up)[:, :, :h, :w])


def test_size_of_masks_by_default_is_that_of_all_logits(rng):
    logits = rng.standard_normal((2, 9 * 9, 4, 5)).astype(np.float32)
    masks = carafepp.normalize_masks(logits, up=3, kernel_size=3)
    assert masks.shape == (2, 9, 12, 15)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized", "sigmoid"])
@all_dtypes
@implementations("reassemble_with_logits")
def test_logits_that_select_taps_give_exact_means(normalizer, dtypes, implementation, rng):
    """Huge logits on 4 of 9 taps: masks of exactly 1/4 (sigmoid: 1) on them, and 0 elsewhere."""
    case = CASES["same_size"]
    chosen = rng.permuted(np.arange(9)[:, None, None] + np.zeros((2, 1, 6, 7)), axis=1) < 4
    logits = np.where(chosen, 100.0, -30000.0).astype(numpy_dtype(dtypes.masks))
    a = SimpleNamespace(**{**vars(integer_arrays(case, dtypes)), "logits": logits})
    output = run(implementation, "reassemble_with_logits", case, a, normalizer=normalizer)
    weight = 1.0 if normalizer == "sigmoid" else 0.25
    assert_exact(output, ref.reassemble(a.features, weight * chosen), dtypes.features)


@normalizers
@cases
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
