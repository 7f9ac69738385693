"""Memory layouts: every layout of every argument and result, layout="NHWC", unbatched arrays."""

import numpy as np
import pytest

import carafepp
from cases import (
    BROADCAST_AXES,
    CASES,
    DTYPES,
    LAYOUTS,
    broadcast,
    double,
    integer_arrays,
    place,
)
from cases.calls import FUNCTIONS, RESULTS, arguments, call
from functions import EACH_INPUT, call_into, each_function
from products import product

SOME_CASES = [
    CASES[name]
    for name in (
        *("up2", "down2", "ratio_3_2", "groups_2", "one_pixel_up4", "w17", "crop_up", "picture"),
    )
]
F32 = DTYPES[0]


def problem(function, case, dtypes=F32):
    """Integers and the normaliser none: every result is exact in whatever order it is summed."""
    return arguments(function, case, integer_arrays(case, dtypes), normalizer="none")


def assert_equal(results, expected):
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(double(result), double(exact))


def nhwc(array):
    return np.ascontiguousarray(np.moveaxis(array, -3, -1))


# Inputs


@product(function=FUNCTIONS, memory=list(LAYOUTS), turns={"index": range(3), "case": SOME_CASES})
def test_any_layout_of_an_input_gives_the_same_result(function, memory, index, case):
    inputs, params = problem(function, case)
    expected = call(function, inputs, params)
    inputs, index = list(inputs), index % len(inputs)
    inputs[index] = place(inputs[index], memory)
    assert_equal(call(function, inputs, params), expected)


@product(which=EACH_INPUT, axes=BROADCAST_AXES, turns={"case": SOME_CASES})
def test_a_broadcast_input_gives_the_result_of_its_copy(which, axes, case):
    function, index = which
    inputs, params = problem(function, case)
    inputs = list(inputs)
    inputs[index] = broadcast(inputs[index], axes)
    result = call(function, inputs, params)
    inputs[index] = inputs[index].copy()
    assert_equal(result, call(function, inputs, params))


@product(
    memory=list(LAYOUTS),
    turns={
        "function": FUNCTIONS,
        "dtypes": DTYPES,
        "name": ["groups_down", "picture_down3", "k1_wide", "k31_up2"],
    },
)
def test_all_inputs_in_one_layout_give_the_same_result(memory, function, dtypes, name):
    case = CASES[name]
    inputs, params = problem(function, case, dtypes)
    expected = call(function, inputs, params)
    assert_equal(call(function, [place(a, memory) for a in inputs], params), expected)


# Results


@product(function=FUNCTIONS, memory=list(LAYOUTS), turns={"index": [0, 1], "case": SOME_CASES})
def test_out_of_any_layout_gets_the_result_and_nothing_else_is_touched(
    function, memory, index, case
):
    inputs, params = problem(function, case)
    expected = call(function, inputs, params)
    index %= len(expected)
    outs = [np.full_like(result, np.nan) for result in expected]
    buffer, outs[index] = LAYOUTS[memory](expected[index].shape, expected[index].dtype)
    buffer[...] = 12345
    touched, touched_view = LAYOUTS[memory](expected[index].shape, bool)
    touched[...] = False
    touched_view[...] = True
    call_into(function, inputs, params, tuple(outs))
    assert_equal(outs, expected)
    assert (buffer[~touched] == 12345).all()


@product(memory=list(LAYOUTS), turns={"function": FUNCTIONS, "dtypes": DTYPES})
def test_out_of_any_layout_and_dtype_gets_the_result(memory, function, dtypes):
    case = CASES["ratio_3_2"]
    inputs, params = problem(function, case, dtypes)
    expected = call(function, inputs, params)
    outs = tuple(LAYOUTS[memory](result.shape, result.dtype)[1] for result in expected)
    call_into(function, inputs, params, outs)
    assert_equal(outs, expected)


@pytest.mark.parametrize("function", [f for f, names in RESULTS.items() if len(names) == 2])
@pytest.mark.parametrize("given", [0, 1])
def test_an_entry_of_the_pair_may_be_none(function, given):
    """And is then allocated."""
    inputs, params = problem(function, CASES["up2"])
    expected = call(function, inputs, params)
    out = [None, None]
    out[given] = np.full_like(expected[given], np.nan)
    results = getattr(carafepp, function)(*inputs, **params, out=tuple(out))
    assert results[given] is out[given]
    assert_equal(results, expected)


def test_results_may_interleave_in_one_buffer():
    """Even and odd elements of one buffer: the results share no element."""
    case = CASES["same_size"]
    inputs, params = problem("reassemble_backward", case)
    expected = call("reassemble_backward", inputs, params)
    buffer = np.full(2 * max(result.size for result in expected), np.nan, np.float32)
    outs = tuple(
        buffer[start : 2 * result.size : 2].reshape(result.shape)
        for start, result in enumerate(expected)
    )
    assert all(out.base is not None for out in outs)
    call_into("reassemble_backward", inputs, params, outs)
    assert_equal(outs, expected)


def test_out_may_interleave_with_an_input():
    """Features in the even channels of a buffer, output in the odd ones."""
    case = CASES["same_size"]
    (features, masks), params = problem("reassemble", case)
    (expected,) = call("reassemble", (features, masks), params)
    buffer = np.empty((case.n, 2 * case.c, case.h, case.w), np.float32)
    buffer[:, ::2] = features
    carafepp.reassemble(buffer[:, ::2], masks, **params, out=buffer[:, 1::2])
    np.testing.assert_array_equal(buffer[:, 1::2], expected)
    np.testing.assert_array_equal(buffer[:, ::2], features)


def test_inputs_may_be_the_same_array():
    x = np.arange(-4, 5, dtype=np.float32).reshape(1, 1, 3, 3)
    gx, gm = carafepp.reassemble_backward(x, x, x)
    np.testing.assert_array_equal(carafepp.reassemble(x, x), x * x)
    np.testing.assert_array_equal(gx, x * x)
    np.testing.assert_array_equal(gm, x * x)


# layout="NHWC" and unbatched arrays


@product(function=FUNCTIONS, turns={"case": SOME_CASES})
def test_layout_nhwc_permutes_the_axes_of_every_argument_and_result(function, case):
    inputs, params = problem(function, case)
    expected = call(function, inputs, params)
    results = call(function, [nhwc(a) for a in inputs], {**params, "layout": "NHWC"})
    assert_equal(results, [nhwc(result) for result in expected])
    assert all(result.flags.c_contiguous for result in results)


@product(function=FUNCTIONS, turns={"case": SOME_CASES})
def test_layout_nhwc_takes_out(function, case):
    inputs, params = problem(function, case)
    expected = [nhwc(result) for result in call(function, inputs, params)]
    outs = tuple(np.full_like(result, np.nan) for result in expected)
    call_into(function, [nhwc(a) for a in inputs], {**params, "layout": "NHWC"}, outs)
    assert_equal(outs, expected)


@product(function=FUNCTIONS, layout=["NCHW", "NHWC"], turns={"case": SOME_CASES})
def test_unbatched_arrays_give_unbatched_results(function, layout, case):
    inputs, params = problem(function, case)
    expected = call(function, [a[:1] for a in inputs], params)
    unbatched = [a[0] for a in inputs]
    if layout == "NHWC":
        unbatched = [nhwc(a) for a in unbatched]
        expected = [nhwc(result) for result in expected]
    results = call(function, unbatched, {**params, "layout": layout})
    assert_equal(results, [result[0] for result in expected])


@each_function
def test_unbatched_arrays_take_an_unbatched_out(function):
    inputs, params = problem(function, CASES["ratio_3_2"])
    expected = [result[0] for result in call(function, [a[:1] for a in inputs], params)]
    outs = tuple(np.full_like(result, np.nan) for result in expected)
    call_into(function, [a[0] for a in inputs], params, outs)
    assert_equal(outs, expected)


@each_function
def test_layout_nhwc_may_be_a_view_of_nchw_memory(function):
    """The word tells the order of the axes; how they lie in memory is told by the strides."""
    inputs, params = problem(function, CASES["groups_2"])
    expected = call(function, inputs, params)
    views = [a.transpose(0, 2, 3, 1) for a in inputs]
    results = call(function, views, {**params, "layout": "NHWC"})
    assert_equal(results, [nhwc(result) for result in expected])


@product(
    function=FUNCTIONS,
    name=["empty_batch", "zero_channels", "zero_height", "empty_crop"],
    turns={"memory": ["contiguous", "nhwc", "fortran", "flipped", "channel_slice"]},
)
def test_empty_arrays_of_any_layout(function, name, memory):
    inputs, params = problem(function, CASES[name])
    expected = call(function, inputs, params)
    outs = tuple(LAYOUTS[memory](result.shape, result.dtype)[1] for result in expected)
    call_into(function, [place(a, memory) for a in inputs], params, outs)
    assert_equal(outs, expected)
