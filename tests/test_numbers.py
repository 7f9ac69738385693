"""NaN, Inf, overflow and denormals: what they touch, and what they must not touch."""

from pathlib import Path

import numpy as np
import pytest

import accuracy
import carafepp
import reference as ref
from accuracy import EXTREME_LOGITS
from cases import CASES, DTYPES, FEW, double, integer_arrays, integers, numpy_dtype
from functions import ISAS, LAYOUTS_OF_KERNELS, each_kernel, run, takes
from products import product
from tolerances import EPS, SMALLEST

ALL_DTYPES = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
SOME_DTYPES = [dtypes for dtypes in DTYPES if str(dtypes) in ("f32", "f16", "bf16_f32")]
SOME_CASES = [
    CASES[name]
    for name in (
        *("up2", "down2", "same_size", "border_only", "groups_2", "ratio_3_2"),
        *("skips_features", "w17", "c33"),
    )
]
SPECIAL = [np.nan, np.inf, -np.inf]


def by_each_kernel(function, result, **turns):
    turns = {"value": SPECIAL, "dtypes": SOME_DTYPES, **turns}
    return each_kernel(function, result, SOME_CASES, turns=turns)


def with_special_values(array, value, rng, count=2):
    """Return a copy with the value at a few random places."""
    array = array.copy()
    array.reshape(-1)[rng.integers(0, array.size, count)] = value
    return array


def changed(arrays, **values):
    return type(arrays)(**{**vars(arrays), **values})


def assert_same_values(actual, expected):
    """NaN where NaN is expected, Inf where Inf is, and every finite element exact."""
    np.testing.assert_array_equal(double(actual), double(expected.astype(np.asarray(actual).dtype)))


# A special value reaches exactly the elements whose formula it enters


@by_each_kernel("reassemble", "output")
def test_a_special_feature_stays_inside_its_windows(case, layout, isa, value, dtypes, rng):
    arrays = integer_arrays(case, dtypes)
    arrays = changed(arrays, features=with_special_values(arrays.features, value, rng))
    expected = ref.reassemble(arrays.features, arrays.masks, **case.factors)
    assert_same_values(run("reassemble", "output", layout, isa, case, arrays), expected)


@by_each_kernel("reassemble", "output")
def test_a_special_mask_stays_at_its_output(case, layout, isa, value, dtypes, rng):
    arrays = integer_arrays(case, dtypes)
    arrays = changed(arrays, masks=with_special_values(arrays.masks, value, rng))
    expected = ref.reassemble(arrays.features, arrays.masks, **case.factors)
    assert_same_values(run("reassemble", "output", layout, isa, case, arrays), expected)


@by_each_kernel("reassemble_backward", "features", where=["grad_output", "features", "masks"])
def test_special_values_reach_grad_features_by_the_formula(
    case, layout, isa, value, dtypes, where, rng
):
    arrays = integer_arrays(case, dtypes)
    arrays = changed(arrays, **{where: with_special_values(getattr(arrays, where), value, rng)})
    size = (case.h, case.w)
    expected = ref.grad_features(arrays.grad_output, arrays.masks, size, **case.factors)
    actual = run("reassemble_backward", "features", layout, isa, case, arrays)
    assert_same_values(actual, expected)


@by_each_kernel("reassemble_backward", "masks", where=["grad_output", "features", "masks"])
def test_special_values_reach_grad_masks_by_the_formula(
    case, layout, isa, value, dtypes, where, rng
):
    arrays = integer_arrays(case, dtypes)
    arrays = changed(arrays, **{where: with_special_values(getattr(arrays, where), value, rng)})
    k = case.kernel_size
    expected = ref.grad_masks(arrays.grad_output, arrays.features, k, **case.factors)
    actual = run("reassemble_backward", "masks", layout, isa, case, arrays)
    assert_same_values(actual, expected)


@pytest.mark.parametrize("channels", [8, 16])
def test_an_infinite_feature_reaches_all_gradients_of_logits_by_the_formula(channels):
    """The gradient is mask * (product - mean): of an infinite mean, -Inf at finite products."""
    features = np.zeros((1, 4, 9, channels), "f4")
    features[0, 1, 4, 0] = np.inf
    arrays = np.ones_like(features), features, np.zeros((1, 4, 9, 9), "f4")
    options = {"kernel_size": 3, "layout": "NHWC"}
    name = "reassemble_with_logits_backward"
    listed = carafepp.list_implementations(name, *arrays, **options)
    expected = np.full(9, -np.inf)
    expected[4] = np.nan
    for implementation, reason in listed:
        if reason is None and implementation.startswith("grad_logits"):
            with carafepp.force_implementation(implementation):
                _, grad_logits = carafepp.reassemble_with_logits_backward(
                    *arrays, **options, need_features=False
                )
            np.testing.assert_array_equal(grad_logits[0, 1, 4], expected, implementation)


# Taps outside the border contribute exactly 0


def taps_outside(case):
    """True for the mask elements whose tap lies outside the map. [N, G*K*K, H', W']."""
    ones = np.ones(case.output_shape), np.ones(case.features_shape)
    return ref.grad_masks(*ones, case.kernel_size, **case.factors) == 0


def with_masks_outside(arrays, case, value):
    masks = arrays.masks.copy()
    masks[taps_outside(case)] = value
    return changed(arrays, masks=masks)


@by_each_kernel("reassemble", "output")
def test_special_masks_outside_the_border_do_nothing(case, layout, isa, value, dtypes):
    arrays = integer_arrays(case, dtypes)
    special = with_masks_outside(arrays, case, value)
    output = run("reassemble", "output", layout, isa, case, special)
    assert_same_values(output, ref.reassemble(arrays.features, arrays.masks, **case.factors))


@by_each_kernel("reassemble_backward", "masks")
def test_masks_outside_the_border_get_exactly_zero_even_of_special_gradients(
    case, layout, isa, value, dtypes
):
    outside = taps_outside(case)
    grad_output = np.full(case.output_shape, value, numpy_dtype(dtypes.features))
    arrays = with_masks_outside(integer_arrays(case, dtypes), case, value)
    arrays = changed(arrays, grad_output=grad_output)
    gm = run("reassemble_backward", "masks", layout, isa, case, arrays)
    assert outside.any()
    assert not gm[outside].any()


@by_each_kernel("reassemble_backward", "features")
def test_features_get_nothing_from_special_masks_outside_the_border(
    case, layout, isa, value, dtypes
):
    arrays = integer_arrays(case, dtypes)
    special = with_masks_outside(arrays, case, value)
    gx = run("reassemble_backward", "features", layout, isa, case, special)
    size = (case.h, case.w)
    assert_same_values(
        gx, ref.grad_features(arrays.grad_output, arrays.masks, size, **case.factors)
    )


# Overflow, denormals


def single(value, dtype):
    return np.full((1, 1, 1, 1), value, numpy_dtype(dtype))


@ALL_DTYPES
def test_overflow_becomes_inf(dtypes):
    largest = {"float16": 65504, "bfloat16": 3e38, "float32": 3e38, "float64": 1.7e308}
    features = single(largest[dtypes.features], dtypes.features)
    output = carafepp.reassemble(features, single(-2, dtypes.masks))
    assert double(output).item() == -np.inf


def test_float16_sums_beyond_its_range_on_the_way_are_finite_in_the_end():
    features = np.full((1, 1, 1, 3), 60000, np.float16)
    masks = np.zeros((1, 9, 1, 3), np.float16)
    masks[0, 3:6, 0, 1] = [2, 2, -3.5]
    assert carafepp.reassemble(features, masks)[0, 0, 0, 1] == np.float16(30000)


def test_float16_results_round_to_nearest_even():
    features = np.array([2049, 2051, 65519, 65520], np.float32).reshape(4, 1, 1, 1)
    scaled = (features / 2**15).astype(np.float32)  # as the masks: float32 beside float16 features
    output = carafepp.reassemble(np.full((4, 1, 1, 1), 2.0**15, np.float16), scaled)
    assert output.ravel().tolist() == [2048, 2052, 65504, np.inf]


HALVES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def all_halves(dtype):
    """Every bit pattern: numbers of both signs, denormals, Inf and NaN."""
    return np.arange(2**16, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(1, 1, 256, 256)


@HALVES
def test_every_16_bit_number_passes_unchanged(dtype):
    features = all_halves(dtype)
    output = carafepp.reassemble(features, np.ones((1, 1, 256, 256), np.float32))
    with np.errstate(invalid="ignore"):  # signalling NaN
        np.testing.assert_array_equal(double(output), double(features))


@HALVES
@pytest.mark.parametrize("side", ["below", "halfway", "above"])
def test_results_round_to_the_nearest_16_bit_number(side, dtype):
    """Ties to even. At, and one float32 beside, the middle of each two neighbours, up to Inf."""
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    finite = double(np.arange(infinity, dtype=np.uint16).view(numpy_dtype(dtype)))
    finite = np.append(finite, 2 * finite[-1] - finite[-2])  # where Inf stands
    middle = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    towards = {"below": np.float32(-np.inf), "halfway": middle, "above": np.float32(np.inf)}
    values = np.nextafter(middle, towards[side])
    values = np.concatenate([values, -values]).reshape(1, 1, 1, -1)
    with np.errstate(over="ignore"):
        expected = values.astype(numpy_dtype(dtype))
    output = carafepp.reassemble(np.ones(values.shape, numpy_dtype(dtype)), values)
    np.testing.assert_array_equal(double(output), double(expected))


@ALL_DTYPES
def test_denormal_features_pass_unchanged(dtypes):
    smallest = single(SMALLEST[dtypes.features], dtypes.features)
    output = carafepp.reassemble(3 * smallest, single(1, dtypes.masks))
    assert double(output).item() == 3 * SMALLEST[dtypes.features]


@ALL_DTYPES
def test_denormal_masks_pass_unchanged(dtypes):
    smallest = single(SMALLEST[dtypes.masks], dtypes.masks)
    _, gm = carafepp.reassemble_backward(
        single(1, dtypes.features), single(1, dtypes.features), smallest
    )
    gx, _ = carafepp.reassemble_backward(
        single(1, dtypes.features), single(1, dtypes.features), smallest
    )
    assert double(gm).item() == 1
    expected = double(smallest.astype(numpy_dtype(dtypes.features)))  # float32 beside float16: 0
    assert double(gx).item() == expected.item()


@ALL_DTYPES
def test_results_below_the_normal_range_are_denormal(dtypes):
    normal = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}
    value = normal.get(dtypes.features, 2.0**-1022)
    output = carafepp.reassemble(single(value, dtypes.features), single(0.5, dtypes.masks))
    assert double(output).item() == value / 2


# Extreme logits


extreme_logits = product(
    logits={name: np.array(v).reshape(1, 9, 1, 1) for name, v in EXTREME_LOGITS.items()},
    turns={
        "normalizer": ref.NORMALIZERS,
        "dtype": ["float32", "float64", "float16", "bfloat16"],
    },
)


def rounded(values, dtype):
    with np.errstate(over="ignore"):  # 1e30 is Inf in float16
        return values.astype(numpy_dtype(dtype))


@extreme_logits
def test_extreme_logits_are_normalized_as_by_torch(logits, normalizer, dtype):
    """All -inf: NaN; one +inf: NaN; +-1e30: 1 and 0. (The definition is tested against torch.)"""
    logits = rounded(logits, dtype)
    masks = carafepp.normalize_masks(logits, kernel_size=3, normalizer=normalizer)
    expected = ref.normalize(logits, normalizer=normalizer)
    np.testing.assert_allclose(double(masks), expected, rtol=16 * EPS[dtype], atol=SMALLEST[dtype])


@extreme_logits
def test_extreme_logits_in_the_backward_follow_the_formula(logits, normalizer, dtype, rng):
    logits = rounded(logits, dtype)
    gm = integers(rng, logits.shape, 4, dtype)
    gl = carafepp.normalize_masks_backward(gm, logits, kernel_size=3, normalizer=normalizer)
    expected = ref.normalize_backward(gm, logits, normalizer=normalizer)
    tolerance = 64 * EPS[dtype]
    np.testing.assert_allclose(double(gl), expected, rtol=tolerance, atol=tolerance)


@extreme_logits
def test_extreme_logits_in_the_fused_forward_follow_the_formula(logits, normalizer, dtype):
    """A single pixel: of the nine taps only the centre is inside the map."""
    logits = rounded(logits, dtype)
    output = carafepp.reassemble_with_logits(
        single(2, dtype), logits, kernel_size=3, normalizer=normalizer
    )
    expected = 2 * ref.normalize(logits, normalizer=normalizer)[:, 4:5]
    expected = double(rounded(expected, dtype))
    np.testing.assert_allclose(double(output), expected, rtol=16 * EPS[dtype], atol=SMALLEST[dtype])


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
def test_pixels_with_nan_masks_do_not_touch_their_neighbours(normalizer, rng):
    case = CASES["ratio_3_2"]
    arrays = integer_arrays(case, DTYPES[0])
    options = {**case.factors, "kernel_size": case.kernel_size, "normalizer": normalizer}
    plain = carafepp.reassemble_with_logits(arrays.features, arrays.logits, **options)
    masked = ref.pixel_shuffle(double(arrays.logits), case.up)
    masked[:, :, 3, 4] = -np.inf
    logits = ref.pixel_unshuffle(masked, case.up).astype(np.float32)
    output = carafepp.reassemble_with_logits(arrays.features, logits, **options)
    assert np.isnan(output[:, :, 3, 4]).all()
    plain[:, :, 3, 4] = np.nan
    np.testing.assert_array_equal(output, plain)


# Garbage in the result's memory


@product(case=CASES, by_default={"case": FEW}, turns={"dtypes": SOME_DTYPES})
def test_every_element_of_a_result_is_written(case, dtypes):
    arrays = integer_arrays(case, dtypes)
    out = np.full(case.output_shape, np.nan, numpy_dtype(dtypes.features))
    gradients = tuple(
        np.full(shape, np.nan, numpy_dtype(dtype))
        for shape, dtype in (
            (case.features_shape, dtypes.features),
            (case.masks_shape, dtypes.masks),
        )
    )
    inputs = arrays.features, arrays.masks
    carafepp.reassemble(*inputs, **case.factors, **case.crop, out=out)
    carafepp.reassemble_backward(arrays.grad_output, *inputs, **case.factors, out=gradients)
    for result in (out, *gradients):
        assert not np.isnan(double(result)).any()


# The state of the processor


@product(
    layout=LAYOUTS_OF_KERNELS,
    isa=ISAS,
    valid=lambda *kernel: takes("reassemble", "output")(CASES["crop_up"], *kernel),
)
def test_long_doubles_stay_the_same(layout, isa):
    """They share registers with MMX instructions, which must not be left in them; so does fmod."""
    case = CASES["crop_up"]
    run("reassemble", "output", layout, isa, case, integer_arrays(case, DTYPES[1]))
    assert np.longdouble(1) + np.longdouble(2) == 3


# docs/numerics.md

PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"


def test_the_page_has_the_masks_of_extreme_logits():
    assert accuracy.extreme_table() in PAGE.read_text()


def test_the_page_tells_the_bounds_and_no_less_than_the_errors():
    written = {
        (cells[1].strip(), dtype): cell.strip()
        for cells in (line.split("|") for line in PAGE.read_text().splitlines())
        for dtype, cell in zip(accuracy.STORED, cells[2:-1], strict=False)
    }
    errors = accuracy.worst_errors([CASES["up2"], CASES["ratio_3_2"]])
    assert {quantity for quantity, _ in errors} == set(accuracy.C)
    for (quantity, dtype), error in errors.items():
        worst, bound = written[quantity, dtype].split(" of ")
        assert bound == accuracy.bound(quantity, dtype)
        assert error <= float(worst) + 0.01
