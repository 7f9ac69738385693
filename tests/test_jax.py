"""JAX arrays: the functions inside and outside of jit, their derivatives, vmap and sharding."""

import os

# Before JAX starts: devices for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import contextlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

import carafepp
from cases import CASES, DTYPES, FEW, random_arrays
from cases.calls import FUNCTIONS, arguments, call, in_layout
from products import product
from skips import import_or_skip, skip

INSTALL = 'CARAFEPP_JAX=1 pip install ".[test,jax]"'
jax = import_or_skip("jax", INSTALL)
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

try:
    carafepp.reassemble(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)))
except NotImplementedError as error:
    skip("jax", f"{error}; {INSTALL}")

NORMALIZERS = ["softmax", "sigmoid", "sigmoid_normalized", "none"]
LAYOUTS = ["NCHW", "NHWC"]


@contextlib.contextmanager
def float64():
    """Let JAX have 64-bit numbers."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def assert_same_bits(actual, expected):
    actual = np.asarray(actual)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == np.ascontiguousarray(expected).tobytes()


def on_jax(function, inputs, params):
    """Return the results of a compiled call."""
    return jax.jit(lambda *arrays: call(function, arrays, params))(*map(jnp.asarray, inputs))


def random(rng, *shape, dtype=np.float32):
    return jnp.asarray(rng.standard_normal(shape).astype(dtype))


# Values


@product(
    case=CASES,
    function=FUNCTIONS,
    layout=LAYOUTS,
    turns={"dtypes": DTYPES, "normalizer": NORMALIZERS},
    by_default={"case": FEW},
)
def test_results_are_those_of_numpy(case, function, layout, dtypes, normalizer):
    inputs, params = arguments(function, case, random_arrays(case, dtypes), normalizer)
    inputs, params = in_layout(inputs, layout), {**params, "layout": layout}
    with float64():
        for actual, expected in zip(
            on_jax(function, inputs, params), call(function, inputs, params), strict=True
        ):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_single_images_outside_of_jit(function):
    inputs, params = arguments(function, CASES["up2"], random_arrays(CASES["up2"], DTYPES[0]))
    inputs = tuple(array[0] for array in inputs)
    results = call(function, tuple(map(jnp.asarray, inputs)), params)
    for actual, expected in zip(results, call(function, inputs, params), strict=True):
        assert isinstance(actual, jax.Array)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_a_gradient_that_is_not_needed_is_none(rng, needs):
    grad_output, features, masks = (
        random(rng, 1, c, *size) for c, *size in [(4, 6, 10), (4, 3, 5), (9, 6, 10)]
    )
    both = carafepp.reassemble_backward(grad_output, features, masks, up=2)
    some = carafepp.reassemble_backward(
        *(grad_output, features, masks), up=2, need_features=needs[0], need_masks=needs[1]
    )
    for need, one, of_both in zip(needs, some, both, strict=True):
        if need:
            assert_same_bits(one, np.asarray(of_both))
        else:
            assert one is None


def test_a_forced_implementation_is_that_of_the_trace(rng):
    features, masks = random(rng, 1, 9, 6, 7), random(rng, 1, 9, 6, 7)
    with carafepp.force_implementation("reassemble_any_ref"):
        expected = carafepp.reassemble(np.asarray(features), np.asarray(masks))
        assert_same_bits(carafepp.reassemble(features, masks), expected)
        compiled = jax.jit(carafepp.reassemble).lower(features, masks)
    assert "reassemble_any_ref" in compiled.as_text()
    with carafepp.force_implementation("no_such_one"), pytest.raises(Exception, match="no_such_"):
        carafepp.reassemble(features, masks)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_list_of_implementations(dtypes):
    inputs, params = arguments("reassemble", CASES["up2"], random_arrays(CASES["up2"], dtypes))
    expected = carafepp.list_implementations("reassemble", *inputs, **params)
    listed = partial(carafepp.list_implementations, "reassemble", **params)
    with float64():
        arrays = tuple(map(jnp.asarray, inputs))
        assert listed(*arrays) == expected
        traced = []
        jax.jit(lambda *arrays: traced.append([name for name, _ in listed(*arrays)]))(*arrays)
        assert traced == [[name for name, _ in expected]]


def test_calls_from_several_threads(rng):
    features, logits = random(rng, 2, 16, 20, 22), random(rng, 2, 100, 20, 22)
    compiled = jax.jit(partial(carafepp.reassemble_with_logits, up=2))
    expected = np.asarray(compiled(features, logits))
    with ThreadPoolExecutor(8) as threads:
        for result in threads.map(lambda _: compiled(features, logits), range(64)):
            assert_same_bits(result, expected)


def test_export_of_fixed_shapes(rng):
    """JAX asks for a promise that a later version still has the custom call."""
    export = pytest.importorskip("jax.export")
    features, logits = random(rng, 1, 4, 3, 5), random(rng, 1, 100, 3, 5)
    function = jax.jit(partial(carafepp.reassemble_with_logits, up=2))
    with pytest.raises(ValueError, match="carafepp_reassemble_with_logits"):
        export.export(function)(features, logits)
    promise = export.DisabledSafetyCheck.custom_call("carafepp_reassemble_with_logits")
    exported = export.export(function, disabled_checks=[promise])(features, logits)
    assert_same_bits(exported.call(features, logits), np.asarray(function(features, logits)))
    (batch,) = export.symbolic_shape("batch")
    symbolic = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (features, logits)]
    with pytest.raises(TypeError, match=r"features must have a shape of numbers.* got \(batch, 4"):
        export.export(function, disabled_checks=[promise])(*symbolic)


# Errors, told while JAX traces


@pytest.mark.parametrize(
    ("function", "shapes", "params"),
    [
        ("reassemble", [(2, 4, 3, 5), (2, 9, 6, 9)], {"up": 2}),
        ("reassemble", [(2, 4, 3, 5), (2, 8, 6, 10)], {"up": 2}),
        ("reassemble", [(2, 4, 3, 5), (3, 9, 3, 5)], {}),
        ("reassemble", [(2, 4, 3, 5), (9, 3, 5)], {}),
        ("reassemble", [(2, 4, 3, 5, 1), (2, 9, 3, 5, 1)], {}),
        ("reassemble", [(4, 4), (4, 4)], {}),
        ("reassemble", [(2, 4, 3, 5), (2, 27, 3, 5)], {"groups": 3}),
        ("reassemble", [(2, 4, 3, 5), (2, 9, 3, 5)], {"up": 0}),
        ("reassemble", [(2, 4, 3, 5), (2, 9, 3, 5)], {"up": 1.5}),
        ("reassemble", [(2, 4, 3, 5), (2, 9, 3, 5)], {"layout": "HWC"}),
        ("reassemble", [(2, 4, 3, 5), (2, 9, 3, 5)], {"size": (4, 5)}),
        ("reassemble", [(2, 4, 3, 5), (2, 9, 3, 5)], {"size": 3}),
        ("reassemble", [(2, 4, 3, 5), (2, 9, 3, 5)], {"padding": 2}),
        ("reassemble_backward", [(2, 4, 6, 9), (2, 4, 3, 5), (2, 9, 6, 10)], {"up": 2}),
        ("reassemble_with_logits", [(2, 4, 3, 5), (2, 9, 3, 5)], {"kernel_size": 2}),
        ("reassemble_with_logits", [(2, 4, 3, 5), (2, 9, 3, 5)], {"normalizer": "max"}),
        ("reassemble_with_logits_backward", [(2, 4, 3, 5), (2, 4, 3, 5), (2, 9, 3, 5)], {}),
        ("normalize_masks", [(2, 9, 3, 5)], {"kernel_size": 3, "up": 2}),
        ("normalize_masks_backward", [(2, 9, 3, 5), (2, 9, 3, 4)], {"kernel_size": 3}),
    ],
)
def test_wrong_arguments_give_the_sentence_of_numpy(function, shapes, params):
    inputs = tuple(np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises((TypeError, ValueError)) as expected:
        call(function, inputs, params)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        on_jax(function, inputs, params)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float8_e4m3fn", "bool"])
def test_wrong_dtypes(dtype):
    array = jnp.ones((1, 1, 2, 2), dtype)
    with pytest.raises(TypeError, match=r"\[reassemble\] features must"):
        carafepp.reassemble(array, array)
    features, masks = jnp.ones((1, 1, 2, 2)), jnp.ones((1, 1, 2, 2), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"\[reassemble\] masks must"):
        carafepp.reassemble(features, masks)


def test_a_build_without_handlers(monkeypatch, tmp_path):
    from carafepp.jax import operators

    monkeypatch.setattr(operators, "get_library", lambda: str(tmp_path / "libcarafepp.so"))
    monkeypatch.setattr(operators, "_register", operators._register.__wrapped__)
    ones = jnp.ones((1, 1, 2, 2))
    with pytest.raises(
        NotImplementedError,
        match=r"\[reassemble\] .*: this build of carafepp has no handlers\. .*CARAFEPP_JAX=1 pip",
    ):
        carafepp.reassemble(ones, ones)


def test_random_keys_are_no_features():
    keys = jax.random.split(jax.random.key(0), (1, 1, 2, 2))
    with pytest.raises(TypeError, match=r"\[reassemble\] features must .* got key<fry>"):
        carafepp.reassemble(keys, keys)


def test_results_cannot_be_written_into_jax_arrays():
    ones = jnp.ones((1, 1, 2, 2))
    for function, out in [("reassemble", ones), ("reassemble_backward", (None, ones))]:
        inputs = (ones,) * (2 if function == "reassemble" else 3)
        with pytest.raises(TypeError, match=r"out.* must be None for JAX arrays"):
            call(function, inputs, {"out": out})


def test_numpy_among_jax_arrays_is_refused():
    """A conversion would hide that float64 becomes float32."""
    on_host, on_device = np.ones((1, 1, 2, 2), np.float32), jnp.ones((1, 1, 2, 2))
    for arrays in [(on_host, on_device), (on_device, on_host)]:
        with pytest.raises(TypeError, match=r"masks must be an array of the library of features"):
            carafepp.reassemble(*arrays)


# Derivatives


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_numpy(rng, layout):
    shapes = (2, 6, 5, 7), (2, 2 * 9 * 4, 5, 7), (2, 6, 9, 13)
    inputs = in_layout([rng.standard_normal(shape).astype("f4") for shape in shapes], layout)
    features, logits, weights = inputs
    params = {"up": 2, "kernel_size": 3, "groups": 2, "layout": layout}

    def loss(features, logits):
        output = carafepp.reassemble_with_logits(features, logits, size=(9, 13), **params)
        return jnp.vdot(output, weights)

    gradients = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(features), jnp.asarray(logits))
    expected = carafepp.reassemble_with_logits_backward(weights, features, logits, **params)
    for gradient, from_numpy in zip(gradients, expected, strict=True):
        assert_same_bits(gradient, from_numpy)


@pytest.mark.parametrize(("needed", "argument"), [(1, 0), (2, 1), (3, (0, 1))])
def test_only_the_needed_gradients_are_computed(rng, needed, argument):
    features, masks = random(rng, 1, 4, 3, 5), random(rng, 1, 9, 6, 10)
    gradient = jax.grad(lambda *arrays: carafepp.reassemble(*arrays, up=2).sum(), argument)
    text = jax.jit(gradient).lower(features, masks).as_text()
    (call,) = [line for line in text.splitlines() if "@carafepp_reassemble_backward" in line]
    assert f"needed = {needed} :" in call


def has_normalizer(function, normalizer):
    return "logits" in function or "normalize" in function or normalizer == "none"


@product(
    function=FUNCTIONS,
    normalizer=NORMALIZERS,
    turns={"case": ["ratio_3_2", "padding_crop", "groups_down"], "layout": LAYOUTS},
    valid=has_normalizer,
)
def test_second_derivatives(function, normalizer, case, layout):
    """JAX compares with differences of the function itself."""
    case = CASES[case]
    inputs, params = arguments(function, case, random_arrays(case, DTYPES[1]), normalizer)
    with float64():
        inputs = tuple(map(jnp.asarray, in_layout([a[:1] for a in inputs], layout)))
        compiled = jax.jit(lambda *arrays: call(function, arrays, {**params, "layout": layout}))
        check_grads(compiled, inputs, order=2, modes=["rev"], rtol=1e-4)


def test_derivatives_of_half_features_with_float32_logits(rng):
    features = random(rng, 1, 4, 3, 5).astype(jnp.bfloat16)
    logits = random(rng, 1, 36, 3, 5)

    def loss(features, logits):
        return carafepp.reassemble_with_logits(features, logits, up=2, kernel_size=3).sum()

    def second(features, logits):
        of_features, of_logits = jax.grad(loss, (0, 1))(features, logits)
        return (of_features**2).sum().astype(jnp.float32) + (of_logits**2).sum()

    assert [g.dtype for g in jax.grad(loss, (0, 1))(features, logits)] == [
        jnp.bfloat16,
        jnp.float32,
    ]
    third = jax.jit(jax.grad(second, (0, 1)))
    half, exact = third(features, logits), third(features.astype(jnp.float32), logits)
    for actual, expected in zip(half, exact, strict=True):
        np.testing.assert_allclose(
            actual.astype(jnp.float32), expected, atol=0.05 * float(abs(expected).max())
        )


def test_scan_and_remat(rng):
    features, logits = random(rng, 1, 4, 5, 6), random(rng, 1, 25, 5, 6)

    def filtered(features, logits):
        return carafepp.reassemble_with_logits(features, logits)

    def loop(features, logits, step):
        def body(features, _):
            return step(features, logits), None

        return jnp.sum(jax.lax.scan(body, features, length=3)[0] ** 2)

    def unrolled(features, logits):
        for _ in range(3):
            features = filtered(features, logits)
        return jnp.sum(features**2)

    expected = jax.grad(unrolled, (0, 1))(features, logits)
    for step in (filtered, jax.checkpoint(filtered)):
        gradients = jax.jit(jax.grad(partial(loop, step=step), (0, 1)))(features, logits)
        for actual, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


# vmap


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0), (1, 2)])
def test_vmap(rng, in_axes):
    features, logits = random(rng, 3, 4, 5, 6), random(rng, 3, 36, 5, 6)
    function = partial(carafepp.reassemble_with_logits, up=2, kernel_size=3)
    arrays = [
        array[0] if axis is None else jnp.moveaxis(array, 0, axis)
        for array, axis in zip((features, logits), in_axes, strict=True)
    ]
    results = jax.vmap(function, in_axes)(*arrays)
    for k in range(3):
        inputs = [
            a if axis is None else jnp.take(a, k, axis)
            for a, axis in zip(arrays, in_axes, strict=True)
        ]
        assert_same_bits(results[k], np.asarray(function(*inputs)))


def test_vmap_of_vmap_and_of_a_gradient(rng):
    features, masks = random(rng, 2, 3, 1, 4, 5, 6), random(rng, 2, 3, 1, 9, 10, 12)

    def loss(features, masks):
        return jnp.sum(carafepp.reassemble(features, masks, up=2) ** 2)

    gradients = jax.jit(jax.vmap(jax.vmap(jax.grad(loss, (0, 1)))))(features, masks)
    for i, j in np.ndindex(2, 3):
        for gradient, expected in zip(
            gradients, jax.grad(loss, (0, 1))(features[i, j], masks[i, j]), strict=True
        ):
            assert_same_bits(gradient[i, j], np.asarray(expected))


def test_gradient_of_vmap_sums_over_what_is_shared(rng):
    features, masks = random(rng, 3, 4, 5, 6), random(rng, 9, 10, 12)
    function = partial(carafepp.reassemble, up=2)

    def loss(masks):
        return jnp.sum(jax.vmap(function, (0, None))(features, masks) ** 2)

    def one_by_one(masks):
        return sum(jnp.sum(function(image, masks) ** 2) for image in features)

    np.testing.assert_allclose(jax.grad(loss)(masks), jax.grad(one_by_one)(masks), rtol=1e-5)


# Sharding

SHARDY = bool(jax.config.jax_use_shardy_partitioner)
BATCH, CHANNELS, WHOLE = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()


def mesh_of(devices, kind="Auto"):
    if not hasattr(jax.sharding, "AxisType"):
        return Mesh(np.array(jax.devices()[:devices]), ("data",))
    kinds = (getattr(jax.sharding.AxisType, kind),)
    return jax.make_mesh((devices,), ("data",), axis_types=kinds, devices=jax.devices()[:devices])


def integers(rng, *shape):
    return rng.integers(-3, 3, shape, endpoint=True).astype(np.float32)


def collectives(compiled):
    names = "all-gather|all-reduce|all-to-all|collective-permute"
    return set(re.findall(rf" ({names})\(", compiled.as_text()))


@pytest.mark.skipif(not SHARDY, reason="before JAX 0.7 XLA gathers the arrays of custom calls")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("groups", "of_features", "of_logits", "sums"),
    [
        pytest.param(1, BATCH, BATCH, set(), id="batch"),
        pytest.param(1, CHANNELS, WHOLE, {"all-reduce"}, id="channels"),
        pytest.param(2, CHANNELS, CHANNELS, set(), id="groups"),
    ],
)
def test_shards_are_not_gathered(rng, kind, layout, groups, of_features, of_logits, sums):
    mesh = mesh_of(2, kind)
    shapes = (2, 8, 4, 5), (2, groups * 9 * 4, 4, 5), (2, 8, 8, 10)
    inputs = in_layout([integers(rng, *shape) for shape in shapes], layout)
    params = {"up": 2, "kernel_size": 3, "groups": groups, "layout": layout, "normalizer": "none"}
    forward = partial(carafepp.reassemble_with_logits, **params)
    arrays = []
    for array, spec in zip(inputs, (of_features, of_logits, of_features), strict=True):
        axes = [*spec, *[None] * (4 - len(spec))]
        axes = axes if layout == "NCHW" else [axes[0], *axes[2:], axes[1]]
        arrays.append(jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes))))

    def gradients(features, logits, weights):
        return jax.grad(lambda *inputs: jnp.sum(forward(*inputs) * weights), (0, 1))(
            features, logits
        )

    def curvatures(*arrays):
        def loss(*inputs):
            return sum(jnp.sum(gradient**2) for gradient in gradients(*inputs, arrays[2]))

        return jax.grad(loss, (0, 1))(*arrays[:2])

    for function, count, summed in [
        (forward, 2, set()),
        (gradients, 3, sums),
        (curvatures, 3, sums),
    ]:
        compiled = jax.jit(function).lower(*arrays[:count]).compile()
        assert collectives(compiled) <= summed
        results = compiled(*arrays[:count])
        expected = jax.jit(function)(*map(jnp.asarray, inputs[:count]))
        for result, whole in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
            assert_same_bits(result, np.asarray(whole))


@pytest.mark.skipif(not SHARDY, reason="before JAX 0.7 XLA gathers the arrays of custom calls")
@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        pytest.param(2, (2, 8, 4, 5), id="more devices than groups"),
        pytest.param(1, (2, 6, 4, 5), id="channels that devices do not divide"),
    ],
)
def test_what_cannot_be_shared_is_gathered(rng, groups, shape):
    mesh = mesh_of(4)
    features, masks = integers(rng, *shape), integers(rng, 2, groups * 9, 4, 5)
    padded = np.zeros((2, 8, 4, 5), np.float32)
    padded[:, : shape[1]] = features
    on_devices = jax.device_put(padded, NamedSharding(mesh, CHANNELS))

    def loss(padded, masks):
        output = carafepp.reassemble(padded[:, : shape[1]], masks, groups=groups)
        return jnp.sum(output**2)

    actual = jax.jit(jax.grad(loss, (0, 1)))(on_devices, jnp.asarray(masks))
    expected = jax.grad(loss, (0, 1))(jnp.asarray(padded), jnp.asarray(masks))
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, np.asarray(other))


def test_vmap_over_a_part_of_a_sharded_axis(rng):
    features, masks = integers(rng, 8, 4, 5, 6), integers(rng, 8, 9, 5, 6)
    on_devices = [
        jax.device_put(array, NamedSharding(mesh_of(4), BATCH)) for array in (features, masks)
    ]

    def by_time(features, masks):
        videos = (array.reshape(2, 4, *array.shape[1:]) for array in (features, masks))
        return jax.vmap(carafepp.reassemble)(*videos).reshape(features.shape)

    assert_same_bits(jax.jit(by_time)(*on_devices), carafepp.reassemble(features, masks))


@pytest.mark.parametrize("of_masks", [BATCH, WHOLE])
def test_shard_map(rng, of_masks):
    if hasattr(jax, "shard_map"):
        shard_map = jax.shard_map
    else:
        from jax.experimental.shard_map import shard_map

        shard_map = partial(shard_map, check_rep=False)
    features, masks = integers(rng, 4, 8, 5, 6), integers(rng, 4, 9, 5, 6)
    specs = {"in_specs": (CHANNELS, WHOLE), "out_specs": CHANNELS}
    if of_masks == BATCH:
        specs = {"in_specs": (BATCH, BATCH), "out_specs": BATCH}
    function = jax.jit(shard_map(carafepp.reassemble, mesh=mesh_of(4), **specs))
    output = carafepp.reassemble(features, masks)
    assert_same_bits(function(features, masks), output)
    gradients = jax.grad(lambda *inputs: jnp.sum(function(*inputs) ** 2), (0, 1))(
        jnp.asarray(features), jnp.asarray(masks)
    )
    expected = carafepp.reassemble_backward(2 * output, features, masks)
    for gradient, from_numpy in zip(gradients, expected, strict=True):
        assert_same_bits(gradient, from_numpy)


HESSIAN = """
import jax, jax.numpy as jnp, carafepp
def f(logits):
    return (carafepp.normalize_masks(logits, kernel_size=5) ** 2).sum()
hessian = jax.jacrev(jax.grad(f))(jax.random.normal(jax.random.key(0), (1, 25, 2, 2)))
assert jnp.allclose(hessian.reshape(100, 100), hessian.reshape(100, 100).T, atol=1e-5)
"""


def test_a_hessian_of_many_logits():
    """A crash of XLA would end the process."""
    done = subprocess.run([sys.executable, "-c", HESSIAN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_traced_size_is_refused():
    features, masks = jnp.ones((1, 2, 4, 4)), jnp.ones((1, 9, 8, 8))
    with pytest.raises(TypeError, match=r"^\[reassemble\] size must be"):
        jax.jit(lambda size: carafepp.reassemble(features, masks, up=2, size=size))(
            jnp.ones(2, int)
        )
