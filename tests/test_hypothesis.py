"""Random problems: shapes, parameters, dtypes and strides that nobody thought of.

HYPOTHESIS_PROFILE=long runs 2,500 new examples of each property, 22,500 in all. Without it each has
50 examples, the same every time.
"""

import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

import carafepp
import reference as ref
from cases import DTYPES, Case, broadcast, integers, normal, numpy_dtype
from functions import one_that_accepts
from tolerances import assert_exact, assert_within_bound

MAX_TERMS = 60_000  # multiplications of the forward pass: keeps an example in milliseconds


@st.composite
def problems(draw):
    """A legal problem of any kind, one axis of it empty now and then."""
    groups = draw(st.integers(1, 4))
    empty = draw(st.sampled_from(12 * [""] + ["n", "c", "h", "w"]))
    case = Case(
        name="hypothesis",
        reason="",
        n=draw(st.integers(1, 3)) if empty != "n" else 0,
        c=groups * draw(st.integers(1, 9)) if empty != "c" else 0,
        h=draw(st.integers(1, 20)) if empty != "h" else 0,
        w=draw(st.integers(1, 20)) if empty != "w" else 0,
        up=draw(st.integers(1, 5)),
        down=draw(st.integers(1, 5)),
        kernel_size=draw(st.sampled_from([1, 3, 5, 7, 9, 31])),
        groups=groups,
    )
    if draw(st.booleans()):
        largest = case.kernel_size // 2
        padding = draw(st.tuples(st.integers(0, largest), st.integers(0, largest)))
        case = Case(**{**vars(case), "padding": padding})
    if draw(st.booleans()):
        smallest = 0 if empty else 1
        size = tuple(
            draw(st.integers(min(smallest, extent), extent)) for extent in case.natural_size
        )
        case = Case(**{**vars(case), "size": size})
    assume(case.terms <= MAX_TERMS and np.prod(case.logits_shape) <= MAX_TERMS)
    event("empty" if case.terms == 0 else "not empty")
    return case


@st.composite
def views(draw, shape, dtype, *, writeable):
    """An uninitialised array with random strides: order of axes, gaps, flips, an offset."""
    order = draw(st.permutations(range(4)))
    steps = draw(st.tuples(*4 * [st.sampled_from([1, 1, 1, 2, 3, -1, -2])]))
    before = draw(st.tuples(*4 * [st.sampled_from([0, 0, 1])]))
    extents = [b + extent * abs(step) for extent, step, b in zip(shape, steps, before, strict=True)]
    buffer = np.zeros([extents[axis] for axis in order], dtype)
    view = buffer.transpose(np.argsort(order))[
        tuple(slice(b, None, abs(step)) for b, step in zip(before, steps, strict=True))
    ][tuple(slice(None, None, 1 if step > 0 else -1) for step in steps)]
    assert view.shape == tuple(shape)
    if not writeable and draw(st.integers(0, 3)) == 0:
        axes = tuple(axis for axis in range(4) if draw(st.booleans()))
        view = broadcast(view, axes)
    return view


def filled(view, values):
    """The values in the memory of the view; a broadcast view repeats the first of them."""
    if view.flags.writeable:
        view[...] = values
        return view
    axes = tuple(axis for axis in range(4) if view.strides[axis] == 0)
    return broadcast(values, axes)


@st.composite
def runs(draw, *names):
    """A problem, its dtypes, a seed, and a view for each of the named arrays and results."""
    case, dtypes = draw(problems()), draw(st.sampled_from(DTYPES))
    shapes = {
        "features": (case.features_shape, dtypes.features),
        "output": (case.output_shape, dtypes.features),
        "grad_output": (case.output_shape, dtypes.features),
        "masks": (case.masks_shape, dtypes.masks),
        "grad_masks": (case.masks_shape, dtypes.masks),
        "logits": (case.logits_shape, dtypes.masks),
        "grad_features": (case.features_shape, dtypes.features),
        "grad_logits": (case.logits_shape, dtypes.masks),
    }
    arrays = {
        name.removeprefix("out:"): draw(
            views(
                shapes[name.removeprefix("out:")][0],
                numpy_dtype(shapes[name.removeprefix("out:")][1]),
                writeable=name.startswith("out:"),
            )
        )
        for name in names
    }
    return case, dtypes, draw(st.integers(0, 2**32 - 1)), arrays


def call(seed, function, inputs, params, out=None):
    """Call by one of the implementations that accept the problem: which one, the seed tells."""
    with one_that_accepts(seed, function, inputs, params, out):
        return getattr(carafepp, function)(*inputs, **params, out=out)


def crop(case):
    return {"size": case.output_size}


def draw_integers(rng, view, limit):
    return filled(view, integers(rng, view.shape, limit, view.dtype.name))


def draw_normal(rng, view):
    return filled(view, normal(rng, view.shape, view.dtype.name))


@given(runs("features", "masks", "out:output"))
def test_reassemble_of_integers_is_exact(run):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    features = draw_integers(rng, arrays["features"], 4)
    masks = draw_integers(rng, arrays["masks"], 2)
    out = arrays["output"]
    call(seed, "reassemble", (features, masks), {**case.factors, **crop(case)}, out)
    assert_exact(out, ref.reassemble(features, masks, **case.factors), dtypes.features)


@given(runs("grad_output", "features", "masks", "out:grad_features", "out:grad_masks"))
def test_gradients_of_integers_are_exact(run):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    d = draw_integers(rng, arrays["grad_output"], 4)
    features = draw_integers(rng, arrays["features"], 4)
    masks = draw_integers(rng, arrays["masks"], 2)
    out = gx, gm = arrays["grad_features"], arrays["grad_masks"]
    call(seed, "reassemble_backward", (d, features, masks), case.factors, out)
    size, k = (case.h, case.w), case.kernel_size
    assert_exact(gx, ref.grad_features(d, masks, size, **case.factors), dtypes.features)
    assert_exact(gm, ref.grad_masks(d, features, k, **case.factors), dtypes.masks)


@given(runs("features", "logits", "out:output"), st.sampled_from(ref.NORMALIZERS))
def test_reassemble_with_logits_stays_within_its_bound(run, normalizer):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    features, logits = draw_normal(rng, arrays["features"]), draw_normal(rng, arrays["logits"])
    out = arrays["output"]
    options = {**case.factors, "kernel_size": case.kernel_size, "normalizer": normalizer}
    call(seed, "reassemble_with_logits", (features, logits), {**options, **crop(case)}, out)
    masks = ref.normalize(
        logits, up=case.up, groups=case.groups, normalizer=normalizer, size=case.output_size
    )
    expected = ref.reassemble(features, masks, **case.factors)
    magnitude = ref.reassemble_magnitude(features, masks, **case.factors)
    assert_within_bound(
        "output_from_logits", dtypes.features, case.kernel_size, out, expected, magnitude
    )


@given(
    runs("grad_output", "features", "logits", "out:grad_features", "out:grad_logits"),
    st.sampled_from(ref.NORMALIZERS),
)
def test_gradients_through_logits_stay_within_their_bounds(run, normalizer):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    d, features = draw_normal(rng, arrays["grad_output"]), draw_normal(rng, arrays["features"])
    logits = draw_normal(rng, arrays["logits"])
    out = gx, gl = arrays["grad_features"], arrays["grad_logits"]
    options = {**case.factors, "kernel_size": case.kernel_size, "normalizer": normalizer}
    call(seed, "reassemble_with_logits_backward", (d, features, logits), options, out)
    size, k = (case.h, case.w), case.kernel_size
    params = {"up": case.up, "groups": case.groups, "normalizer": normalizer}
    masks = ref.normalize(logits, size=case.output_size, **params)
    assert_within_bound(
        "grad_features_from_logits",
        dtypes.features,
        case.kernel_size,
        gx,
        ref.grad_features(d, masks, size, **case.factors),
        ref.grad_features_magnitude(d, masks, size, **case.factors),
    )
    gm = ref.grad_masks(d, features, k, **case.factors)
    gm_magnitude = ref.grad_masks_magnitude(d, features, k, **case.factors)
    assert_within_bound(
        "grad_logits",
        dtypes.features,
        case.kernel_size,
        gl,
        ref.normalize_backward(gm, logits, **params),
        ref.normalize_backward_magnitude(gm_magnitude, logits, **params),
    )


@given(
    runs("logits", "grad_masks", "out:masks", "out:grad_logits"),
    st.sampled_from(ref.NORMALIZERS),
)
def test_normalize_masks_and_its_backward_stay_within_their_bounds(run, normalizer):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    logits, gm = draw_normal(rng, arrays["logits"]), draw_normal(rng, arrays["grad_masks"])
    masks, gl = arrays["masks"], arrays["grad_logits"]
    params = {"up": case.up, "groups": case.groups, "normalizer": normalizer}
    options = {**params, "kernel_size": case.kernel_size}
    call(seed, "normalize_masks", (logits,), {**options, **crop(case)}, masks)
    call(seed, "normalize_masks_backward", (gm, logits), options, gl)
    expected = ref.normalize(logits, size=case.output_size, **params)
    assert_within_bound(
        "normalized_masks", dtypes.masks, case.kernel_size, masks, expected, np.abs(expected)
    )
    assert_within_bound(
        "normalized_masks_backward",
        dtypes.masks,
        case.kernel_size,
        gl,
        ref.normalize_backward(gm, logits, **params),
        ref.normalize_backward_magnitude(gm, logits, **params),
    )


@given(runs("features", "masks"), st.lists(st.integers(0, 2**16), max_size=4), st.booleans())
def test_special_values_reach_the_elements_of_the_formula(run, places, in_masks):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    features = draw_integers(rng, arrays["features"], 4).copy()
    masks = draw_integers(rng, arrays["masks"], 2).copy()
    target = masks if in_masks else features
    values = [np.nan, np.inf, -np.inf, np.inf]
    for place, value in zip(places, values, strict=False):
        if target.size:
            target.flat[place % target.size] = value
    output = call(seed, "reassemble", (features, masks), {**case.factors, **crop(case)})
    assert_exact(output, ref.reassemble(features, masks, **case.factors), dtypes.features)


@given(runs("features", "masks"))
def test_random_reassemble_stays_within_its_bound(run):
    case, dtypes, seed, arrays = run
    rng = np.random.default_rng(seed)
    features, masks = draw_normal(rng, arrays["features"]), draw_normal(rng, arrays["masks"])
    output = call(seed, "reassemble", (features, masks), {**case.factors, **crop(case)})
    expected = ref.reassemble(features, masks, **case.factors)
    magnitude = ref.reassemble_magnitude(features, masks, **case.factors)
    assert_within_bound("output", dtypes.features, case.kernel_size, output, expected, magnitude)


@st.composite
def slices_of_one_buffer(draw):
    """A buffer and two views of it, of one shape, with any strides that stay inside."""
    shape = draw(st.tuples(*4 * [st.integers(1, 3)]))
    buffer = np.arange(draw(st.integers(40, 200)), dtype=np.float32)

    def view():
        strides = draw(st.tuples(*4 * [st.integers(-25, 25)]))
        reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
        first, last = -sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
        assume(first + last < buffer.size)
        offset = draw(st.integers(first, buffer.size - 1 - last))
        return np.lib.stride_tricks.as_strided(buffer[offset:], shape, [4 * s for s in strides])

    return buffer, view(), view()


def addresses(view):
    start = view.__array_interface__["data"][0]
    steps = np.meshgrid(*(np.arange(n) for n in view.shape), indexing="ij")
    return (start + sum(i * s for i, s in zip(steps, view.strides, strict=True))).ravel().tolist()


@given(slices_of_one_buffer())
def test_out_is_refused_if_and_only_if_elements_share_memory(run):
    buffer, features, out = run
    masks = np.ones((features.shape[0], 1, *features.shape[2:]), np.float32)
    before, expected = buffer.copy(), features.copy()
    places = addresses(out)
    shared = len(set(places)) < len(places) or not set(places).isdisjoint(addresses(features))
    event("shared" if shared else "not shared")
    if shared:
        with pytest.raises(ValueError, match="out"):
            carafepp.reassemble(features, masks, out=out)
        np.testing.assert_array_equal(buffer, before)
    else:
        carafepp.reassemble(features, masks, out=out)
        np.testing.assert_array_equal(out, expected)


@given(st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 2**9), st.integers(1, 2**9))
def test_output_size_is_the_factor_rounded_up(h, w, up, down):
    out_h, out_w = carafepp.output_size((h, w), up=up, down=down)
    assert (out_h - 1) * down < h * up <= out_h * down
    assert (out_w - 1) * down < w * up <= out_w * down
