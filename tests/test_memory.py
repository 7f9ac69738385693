"""Memory: references, leaks, and offsets beyond 2^31 elements."""

import functools
import gc
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, double, integer_arrays, integers
from cases.calls import arguments, call
from functions import EACH_INPUT, EACH_RESULT, call_into, each_function
from products import product


def problem(function, name="up2"):
    return arguments(function, CASES[name], integer_arrays(CASES[name], DTYPES[0]))


# References


def reference_counts(arrays):
    return [sys.getrefcount(array) for array in arrays]


@each_function
def test_a_call_keeps_no_reference_to_its_arrays(function):
    inputs, params = problem(function)
    results = call(function, inputs, params)
    outs = tuple(np.empty_like(result) for result in results)
    before = reference_counts((*inputs, *outs))
    for _ in range(10):
        call_into(function, inputs, params, outs)
    assert reference_counts((*inputs, *outs)) == before


@each_function
def test_a_result_is_referenced_by_its_caller_alone(function):
    inputs, params = problem(function)
    results = call(function, inputs, params)
    fresh = tuple(np.empty(3) for _ in results)
    assert reference_counts(results) == reference_counts(fresh)


@each_function
def test_a_failing_call_keeps_no_reference_to_its_arrays(function):
    inputs, params = problem(function)
    inputs = tuple(array.copy() for array in inputs)
    wrong = np.zeros((2, 4, 3, 3), np.float32)  # no channel count or batch of these functions fits
    before = reference_counts((*inputs, wrong))
    for _ in range(10):
        try:
            call(function, (*inputs[:-1], wrong), params)
        except ValueError:
            continue
        pytest.fail("the call does not fail")
    assert reference_counts((*inputs, wrong)) == before


# Leaks


@pytest.fixture
def resident_bytes():
    """A function that gives the memory of this process that is in use."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc/self/statm on this system")

    def read():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    return read


def assert_flat(resident_bytes, function, calls=500, allowed=4 << 20):
    """Memory in use may not grow with the number of calls. The first ones warm up."""
    for _ in range(50):
        function()
    before = resident_bytes()
    for _ in range(calls):
        function()
    grown = resident_bytes() - before
    assert grown < allowed, f"{grown / calls:.0f} bytes a call"


@pytest.mark.parametrize("threads", [1, 3])
@each_function
def test_calls_leak_no_memory(function, threads, resident_bytes, rng):
    n, c, h = 1, 64, 32  # work for 3 threads; the smallest array, leaked 200 times, is 7 MB
    arrays = SimpleNamespace(
        features=integers(rng, (n, c, h, h), 4),
        masks=integers(rng, (n, 9, h, h), 2),
        logits=integers(rng, (n, 9, h, h), 2),
        grad_output=integers(rng, (n, c, h, h), 4),
        grad_masks=integers(rng, (n, 9, h, h), 4),
    )
    inputs, params = arguments(function, CASES["same_size"], arrays)
    params.pop("size", None)
    carafepp.set_num_threads(threads)
    try:
        assert_flat(resident_bytes, lambda: call(function, inputs, params), calls=200)
    finally:
        carafepp.set_num_threads(0)


def test_a_hundred_thousand_small_calls_take_no_memory(resident_bytes):
    features, masks = np.ones((1, 2, 4, 4), np.float32), np.ones((1, 9, 4, 4), np.float32)
    function = functools.partial(carafepp.reassemble, features, masks)
    assert_flat(resident_bytes, function, calls=100_000, allowed=1 << 20)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("masks of a wrong shape", ValueError),
        ("masks of a wrong dtype", TypeError),
        ("out of a wrong shape", ValueError),
        ("no array", TypeError),
    ],
)
def test_failing_calls_leak_no_memory(what, error, resident_bytes):
    features = np.zeros((1, 8, 32, 32), np.float32)
    masks = np.zeros((1, 9, 32, 32), np.float32)

    def fail():
        masks_given, out = masks.copy(), np.empty((1, 8, 32, 32), np.float32)
        if what == "masks of a wrong shape":
            masks_given = masks_given[:, :8]
        elif what == "masks of a wrong dtype":
            masks_given = masks_given.astype(np.float64)
        elif what == "out of a wrong shape":
            out = out[:, :, 1:]
        else:
            masks_given = "masks"
        try:
            carafepp.reassemble(features.copy(), masks_given, out=out)
        except error:
            return
        pytest.fail("the call does not fail")

    assert_flat(resident_bytes, fail)


def test_torch_tensors_leak_no_memory(torch, resident_bytes):
    features, masks = torch.zeros(1, 8, 32, 32), torch.zeros(1, 9, 32, 32)
    assert_flat(resident_bytes, lambda: carafepp.reassemble(features, masks))


# Offsets beyond 2^31 elements. The memory is mapped but, for a few pages, never touched.


def huge_zeros(shape, dtype):
    try:
        return np.zeros(shape, dtype)
    except MemoryError:
        pytest.skip(f"the system lends no address space for {shape} of {dtype}")


def far_apart(array, axis):
    """A copy whose elements along this axis are so far apart that the last is beyond 2^31."""
    shape = list(array.shape)
    far = math.ceil(2**31 / (shape[axis] - 1)) + 12345
    buffer_shape = [shape[axis], far]
    buffer = huge_zeros(buffer_shape, array.dtype)
    others = [extent for k, extent in enumerate(shape) if k != axis]
    view = buffer[:, : math.prod(others)].reshape(shape[axis], *others)
    view = np.moveaxis(view, 0, axis)
    assert view.base is not None
    assert view.strides[axis] // view.itemsize * (shape[axis] - 1) > 2**31
    view[...] = array
    return view


AXES = {"batch": 0, "channels": 1, "rows": 2, "columns": 3}


@product(which=EACH_INPUT, turns={"axis": AXES})
def test_strides_beyond_2_31_elements_in_an_input(which, axis):
    function, index = which
    case = CASES["up2"]
    inputs, params = arguments(function, case, integer_arrays(case, DTYPES[2]), "none")
    expected = call(function, inputs, params)
    inputs = list(inputs)
    inputs[index] = far_apart(inputs[index], axis)
    for result, exact in zip(call(function, inputs, params), expected, strict=True):
        np.testing.assert_array_equal(result, exact)


@product(which=EACH_RESULT, turns={"axis": AXES})
def test_strides_beyond_2_31_elements_in_a_result(which, axis):
    function, index = which
    case = CASES["up2"]
    inputs, params = arguments(function, case, integer_arrays(case, DTYPES[2]), "none")
    expected = call(function, inputs, params)
    outs = [np.empty_like(exact) for exact in expected]
    outs[index] = far_apart(np.full_like(expected[index], np.nan), axis)
    call_into(function, inputs, params, outs)
    for out, exact in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
def test_features_of_more_than_2_31_elements(memory):
    """Dense: 3 x 32771 x 32771 x 1, of which down=4093 reads 9 rows of 9 windows."""
    h, w, down = 32771, 32771, 4093
    if memory == "nchw":
        features = huge_zeros((1, 3, h, w), np.float16)
    else:
        features = huge_zeros((1, h, w, 3), np.float16).transpose(0, 3, 1, 2)
    assert features.size > 2**31
    rng = np.random.default_rng(1)
    src = np.arange(9) * down
    small = np.zeros((1, 3, 27, 27), np.float16)
    for a in range(3):
        for b in range(3):
            i, j = src + a - 1, src + b - 1
            ok_i, ok_j = np.flatnonzero(i >= 0), np.flatnonzero(j >= 0)
            values = integers(rng, (3, ok_i.size, ok_j.size), 4, "float16")
            features[0, :, i[ok_i][:, None], j[ok_j]] = values.transpose(1, 2, 0)
            small[0, :, 3 * ok_i[:, None] + a, 3 * ok_j + b] = values.transpose(1, 2, 0)
    masks = integers(rng, (1, 9, 9, 9), 2, "float16")
    output = carafepp.reassemble(features, masks, down=down)
    windows = small.reshape(1, 3, 9, 3, 9, 3).transpose(0, 1, 3, 5, 2, 4)  # n, c, a, b, i', j'
    taps = double(masks).reshape(1, 1, 3, 3, 9, 9)
    np.testing.assert_array_equal(output, (double(windows) * taps).sum(axis=(2, 3)))


def test_logits_of_more_than_2_31_elements():
    """up=6000 and K=9: 81 * 36 million channels for one pixel, cropped to a few outputs."""
    up, k, size = 6000, 9, (2, 3)
    logits = huge_zeros((1, k * k * up * up, 1, 1), np.float16)
    assert logits.size > 2**31
    rng = np.random.default_rng(2)
    values = integers(rng, (k * k, *size), 2, "float16")
    logits.reshape(k * k, up, up)[:, : size[0], : size[1]] = values
    features = np.full((1, 2, 1, 1), 3, np.float16)
    options = {"up": up, "kernel_size": k, "normalizer": "none", "size": size}
    masks = carafepp.normalize_masks(logits, **options)
    np.testing.assert_array_equal(masks[0], values)
    output = carafepp.reassemble_with_logits(features, logits, **options)
    np.testing.assert_array_equal(output, ref.reassemble(features, masks, up=up))


def test_broadcast_masks_of_more_than_2_31_elements():
    """C = 0: there is nothing to write, only shapes and strides to check."""
    n = 2**31 // 9 + 12345
    masks = np.broadcast_to(np.ones((1, 9, 1, 1), np.float16), (n, 9, 1, 1))
    assert masks.size > 2**31
    features = np.empty((n, 0, 1, 1), np.float16)
    assert carafepp.reassemble(features, masks).shape == (n, 0, 1, 1)


@pytest.mark.slow
def test_an_output_of_more_than_2_31_elements():
    """Dense, 4 GB of float16, from one broadcast feature and mask."""
    shape = (1, 5, 20741, 20729)
    assert math.prod(shape) > 2**31
    features = np.broadcast_to(np.full((1, 1, 1, 1), 3, np.float16), shape)
    masks = np.broadcast_to(np.full((1, 1, 1, 1), 2, np.float16), (1, 1, *shape[2:]))
    output = carafepp.reassemble(features, masks)
    for channel in output[0]:
        assert (channel == 6).all()
