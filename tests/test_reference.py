"""The definition itself: against finite differences, plain loops, and results in closed form."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import reference as ref

# (up, down, kernel_size, groups, (H, W), size or None)
PROBLEMS = {
    "up2": (2, 1, 3, 1, (3, 2), None),
    "down2": (1, 2, 3, 2, (5, 4), None),
    "ratio_3_2": (3, 2, 3, 2, (3, 2), None),
    "ratio_2_3": (2, 3, 3, 1, (5, 4), None),
    "k5_over_the_border": (1, 1, 5, 2, (2, 3), None),
    "down5_skips_features": (1, 5, 3, 1, (6, 7), None),
    "crop": (2, 1, 3, 2, (3, 3), (5, 4)),
    "k1": (2, 1, 1, 1, (2, 2), None),
}
problems = pytest.mark.parametrize("problem", PROBLEMS, indirect=True)
normalizers = pytest.mark.parametrize("normalizer", ref.NORMALIZERS)


@pytest.fixture
def problem(request, rng):
    up, down, k, groups, (h, w), size = PROBLEMS[request.param]
    n, c = 1, 2 * groups
    out_h, out_w = ref.output_size(h, w, up, down) if size is None else size
    logits_h, logits_w = -(-h // down), -(-w // down)
    return SimpleNamespace(
        params={"up": up, "down": down, "groups": groups},
        kernel_size=k,
        features=rng.standard_normal((n, c, h, w)),
        masks=rng.standard_normal((n, groups * k * k, out_h, out_w)),
        grad_output=rng.standard_normal((n, c, out_h, out_w)),
        logits=rng.standard_normal((n, groups * k * k * up * up, logits_h, logits_w)),
        size=(out_h, out_w),
    )


def finite_differences(function, x, step=1e-5):
    """Return the gradient of the scalar function at x by central differences, for each element."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def assert_gradient(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-7)


def quadruple_loop(features, masks, kernel_size, *, up, down, groups):
    """The formula letter by letter, one multiplication at a time."""
    n, c, h, w = features.shape
    out_h, out_w = masks.shape[2:]
    k, r = kernel_size, kernel_size // 2
    output = np.zeros((n, c, out_h, out_w))
    for b, ch, i, j in np.ndindex(output.shape):
        g = ch // (c // groups)
        for di, dj in itertools.product(range(-r, r + 1), repeat=2):
            y, x = i * down // up + di, j * down // up + dj
            if 0 <= y < h and 0 <= x < w:
                mask = masks[b, g * k * k + (di + r) * k + (dj + r), i, j]
                output[b, ch, i, j] += mask * features[b, ch, y, x]
    return output


@problems
def test_reassemble_equals_the_formula_in_plain_loops(problem):
    expected = quadruple_loop(
        problem.features, problem.masks, problem.kernel_size, **problem.params
    )
    actual = ref.reassemble(problem.features, problem.masks, **problem.params)
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-13)


@problems
def test_images_of_a_batch_do_not_mix(problem):
    p = problem
    features, masks, d = (np.concatenate([x, 2 * x]) for x in (p.features, p.masks, p.grad_output))
    size, k = p.features.shape[2:], p.kernel_size
    y = ref.reassemble(features, masks, **p.params)
    np.testing.assert_allclose(y[1:], 4 * y[:1])
    gx = ref.grad_features(d, masks, size, **p.params)
    np.testing.assert_allclose(gx[1:], 4 * gx[:1])
    gm = ref.grad_masks(d, features, k, **p.params)
    np.testing.assert_allclose(gm[1:], 4 * gm[:1])


@problems
def test_grad_features_equals_finite_differences(problem):
    p = problem
    expected = finite_differences(
        lambda x: (p.grad_output * ref.reassemble(x, p.masks, **p.params)).sum(), p.features
    )
    actual = ref.grad_features(p.grad_output, p.masks, p.features.shape[2:], **p.params)
    assert_gradient(actual, expected)


@problems
def test_grad_masks_equals_finite_differences(problem):
    p = problem
    expected = finite_differences(
        lambda m: (p.grad_output * ref.reassemble(p.features, m, **p.params)).sum(), p.masks
    )
    actual = ref.grad_masks(p.grad_output, p.features, p.kernel_size, **p.params)
    assert_gradient(actual, expected)


@normalizers
@problems
def test_normalize_backward_equals_finite_differences(problem, normalizer):
    p, up, groups = problem, problem.params["up"], problem.params["groups"]
    options = {"up": up, "groups": groups, "normalizer": normalizer}
    expected = finite_differences(
        lambda x: (p.masks * ref.normalize(x, size=p.size, **options)).sum(), p.logits
    )
    assert_gradient(ref.normalize_backward(p.masks, p.logits, **options), expected)


@normalizers
@problems
def test_gradients_through_logits_equal_finite_differences(problem, normalizer, rng):
    p, options = problem, {**problem.params, "normalizer": normalizer}

    def loss(x, logits):
        y = ref.reassemble_with_logits(x, logits, size=p.size, **options)
        return (p.grad_output * y).sum()

    gx, gl = ref.reassemble_with_logits_backward(p.grad_output, p.features, p.logits, **options)
    for _ in range(3):  # along random directions
        dx, dl = rng.standard_normal(gx.shape), rng.standard_normal(gl.shape)

        def along(step, dx=dx, dl=dl):
            return loss(p.features + step * dx, p.logits + step * dl)

        slope = finite_differences(along, np.zeros(()))
        assert_gradient((gx * dx).sum() + (gl * dl).sum(), slope)


@problems
def test_logits_outside_the_crop_have_exactly_zero_gradient(problem):
    p = problem
    _, gl = ref.reassemble_with_logits_backward(p.grad_output, p.features, p.logits, **p.params)
    outside = ref.pixel_shuffle(gl, p.params["up"])
    outside[:, :, : p.size[0], : p.size[1]] = 0
    assert not outside.any()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_uniform_masks_are_a_box_filter(kernel_size, rng):
    features = rng.standard_normal((1, 3, 6, 7))
    r = kernel_size // 2
    padded = np.pad(features, [(0, 0), (0, 0), (r, r), (r, r)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size, kernel_size), (2, 3))
    masks = np.full((1, kernel_size**2, 6, 7), 1 / kernel_size**2)
    actual = ref.reassemble(features, masks)
    np.testing.assert_allclose(actual, windows.mean(axis=(4, 5)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("up", [1, 2, 3])
def test_k1_masks_of_one_are_nearest_interpolation(up, rng):
    features = rng.standard_normal((2, 3, 4, 5))
    actual = ref.reassemble(features, np.ones((2, 1, 4 * up, 5 * up)), up=up)
    np.testing.assert_array_equal(actual, features.repeat(up, axis=2).repeat(up, axis=3))


@pytest.mark.parametrize("down", [2, 3])
def test_k1_masks_of_one_are_striding(down, rng):
    features = rng.standard_normal((2, 3, 7, 8))
    expected = features[:, :, ::down, ::down]
    masks = np.ones((2, 1, *expected.shape[2:]))
    np.testing.assert_array_equal(ref.reassemble(features, masks, down=down), expected)


@pytest.mark.parametrize("tap", range(9))
def test_a_single_tap_is_a_shift_with_zeros_at_the_border(tap, rng):
    features = rng.standard_normal((1, 2, 4, 5))
    masks = np.zeros((1, 9, 4, 5))
    masks[:, tap] = 1
    a, b = divmod(tap, 3)
    expected = np.pad(features, [(0, 0), (0, 0), (1, 1), (1, 1)])[:, :, a : a + 4, b : b + 5]
    np.testing.assert_array_equal(ref.reassemble(features, masks), expected)


def test_taps_outside_the_border_are_left_out_even_against_nan():
    masks = np.full((1, 9, 1, 1), np.nan)
    masks[0, 4] = 2.0
    assert ref.reassemble(np.full((1, 1, 1, 1), 3.0), masks) == 6.0
    assert ref.grad_features(np.full((1, 1, 1, 1), 3.0), masks, (1, 1)) == 6.0
    gm = ref.grad_masks(np.full((1, 1, 1, 1), np.inf), np.full((1, 1, 1, 1), 3.0), 3)
    np.testing.assert_array_equal(gm.ravel(), [0, 0, 0, 0, np.inf, 0, 0, 0, 0])


@pytest.mark.parametrize("up", [1, 2, 3])
def test_pixel_unshuffle_undoes_pixel_shuffle(up, rng):
    logits = rng.standard_normal((2, 3 * up * up, 4, 5))
    np.testing.assert_array_equal(ref.pixel_unshuffle(ref.pixel_shuffle(logits, up), up), logits)


@pytest.mark.parametrize("up", [1, 2, 3])
def test_pixel_shuffle_is_that_of_torch(up, rng, torch):
    logits = rng.standard_normal((2, 5 * up * up, 4, 3))
    expected = torch.nn.functional.pixel_shuffle(torch.from_numpy(logits), up).numpy()
    np.testing.assert_array_equal(ref.pixel_shuffle(logits, up), expected)


def torch_normalized(torch, logits, normalizer):
    """Over axis 2."""
    return {
        "softmax": lambda: torch.softmax(logits, 2),
        "sigmoid": lambda: torch.sigmoid(logits),
        "sigmoid_normalized": lambda: torch.softmax(torch.nn.functional.logsigmoid(logits), 2),
        "none": lambda: logits,
    }[normalizer]()


@normalizers
@pytest.mark.parametrize("groups", [1, 2])
def test_normalizers_are_those_of_torch(normalizer, groups, rng, torch):
    logits = 5 * rng.standard_normal((2, groups * 9 * 4, 3, 4))
    shuffled = torch.nn.functional.pixel_shuffle(torch.from_numpy(logits), 2)
    grouped = shuffled.reshape(2, groups, 9, 6, 8)
    expected = torch_normalized(torch, grouped, normalizer).reshape(2, groups * 9, 6, 8)
    actual = ref.normalize(logits, up=2, groups=groups, normalizer=normalizer)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-13)


INFINITE_LOGITS = {
    "all_minus_inf": [-np.inf] * 9,
    "one_minus_inf": [-np.inf] + [0.5] * 8,
    "one_plus_inf": [np.inf] + [0.5] * 8,
    "all_plus_inf": [np.inf] * 9,
    "huge": [1e30, -1e30] + [0.0] * 7,
    "nan": [np.nan] + [0.0] * 8,
}


@normalizers
@pytest.mark.parametrize("logits", INFINITE_LOGITS.values(), ids=INFINITE_LOGITS)
def test_infinite_logits_are_normalized_as_by_torch(logits, normalizer, torch):
    logits = np.array(logits).reshape(1, 9, 1, 1)
    grouped = torch.from_numpy(logits).reshape(1, 1, 9, 1, 1)
    expected = torch_normalized(torch, grouped, normalizer).reshape(1, 9, 1, 1)
    np.testing.assert_allclose(ref.normalize(logits, normalizer=normalizer), expected.numpy())


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
def test_normalized_masks_sum_to_one(normalizer, rng):
    masks = ref.normalize(rng.standard_normal((1, 18, 3, 3)), groups=2, normalizer=normalizer)
    np.testing.assert_allclose(masks.reshape(1, 2, 9, 3, 3).sum(axis=2), 1, rtol=1e-14)


def test_sigmoid_normalized_is_sigmoid_divided_by_its_sum(rng):
    logits = rng.standard_normal((1, 9, 3, 3))
    sigmoid = ref.normalize(logits, normalizer="sigmoid")
    actual = ref.normalize(logits, normalizer="sigmoid_normalized")
    np.testing.assert_allclose(actual, sigmoid / sigmoid.sum(axis=1, keepdims=True), rtol=1e-14)


@pytest.mark.parametrize(
    ("size", "up", "down", "expected"),
    [
        ((5, 6), 2, 1, (10, 12)),
        ((5, 6), 1, 2, (3, 3)),
        ((5, 6), 3, 2, (8, 9)),
        ((5, 6), 4, 6, (4, 4)),
        ((0, 1), 2, 3, (0, 1)),
    ],
)
def test_output_size_is_the_factor_rounded_up(size, up, down, expected):
    assert ref.output_size(*size, up, down) == expected


@problems
@pytest.mark.parametrize("quantity", ["reassemble", "grad_features", "grad_masks"])
def test_magnitudes_bound_the_results(problem, quantity):
    p = problem
    arguments = {
        "reassemble": (p.features, p.masks),
        "grad_features": (p.grad_output, p.masks, p.features.shape[2:]),
        "grad_masks": (p.grad_output, p.features, p.kernel_size),
    }[quantity]
    result = getattr(ref, quantity)(*arguments, **p.params)
    magnitude = getattr(ref, f"{quantity}_magnitude")(*arguments, **p.params)
    assert (np.abs(result) <= magnitude * (1 + 1e-12)).all()


@problems
@normalizers
def test_magnitude_through_the_normalizer_bounds_the_result(problem, normalizer):
    up, groups = problem.params["up"], problem.params["groups"]
    options = {"up": up, "groups": groups, "normalizer": normalizer}
    result = ref.normalize_backward(problem.masks, problem.logits, **options)
    magnitude = ref.normalize_backward_magnitude(problem.masks, problem.logits, **options)
    assert (np.abs(result) <= magnitude * (1 + 1e-12)).all()
