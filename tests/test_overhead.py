"""The price of a call on tiny arrays, where the arithmetic costs nothing."""

import time

import numpy as np
import pytest

import carafepp

LIMIT = 10e-6  # seconds for one call of reassemble on NumPy arrays
BATCHES = 10
CALLS = 400


def seconds_per_call(function) -> float:
    """The best of several batches, so that a busy machine has to be busy all the time to matter."""
    batches = []
    for _ in range(BATCHES):
        begin = time.perf_counter()
        for _ in range(CALLS):
            function()
        batches.append((time.perf_counter() - begin) / CALLS)
    return min(batches)


def assert_below_limit(function):
    """Try up to twenty times: what a call can do counts, not what keeps the machine busy."""
    measured = []
    for _ in range(20):
        measured.append(seconds_per_call(function))
        if measured[-1] < LIMIT:
            return
        time.sleep(0.5)
    pytest.fail(f"one call takes {min(measured) * 1e6:.1f} us; the limit is {LIMIT * 1e6:.0f} us")


@pytest.fixture
def arrays():
    return np.ones((1, 16, 8, 8), np.float32), np.ones((1, 1, 8, 8), np.float32)


def test_reassemble_of_tiny_numpy_arrays_takes_less_than_10_us(arrays):
    features, masks = arrays
    assert_below_limit(lambda: carafepp.reassemble(features, masks))


def test_reassemble_into_out_takes_less_than_10_us(arrays):
    features, masks = arrays
    out = np.empty_like(features)
    assert_below_limit(lambda: carafepp.reassemble(features, masks, out=out))


def test_the_number_of_threads_adds_nothing_to_a_tiny_call(arrays):
    """No thread is woken for it."""
    features, masks = arrays
    carafepp.set_num_threads(64)
    try:
        assert_below_limit(lambda: carafepp.reassemble(features, masks))
    finally:
        carafepp.set_num_threads(0)


def test_an_operator_costs_little_more_than_an_autograd_function(arrays, torch, capsys):
    """Which would do nothing but what is needed to run the same kernel and remember it."""

    class Reassemble(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features, masks):
            ctx.save_for_backward(features, masks)
            return carafepp.reassemble.__wrapped__(features, masks)

    features, masks = map(torch.from_numpy, arrays)
    features.requires_grad_()
    for _ in range(5):
        operator = 1e6 * seconds_per_call(lambda: carafepp.reassemble(features, masks))
        function = 1e6 * seconds_per_call(lambda: Reassemble.apply(features, masks))
        shown = (
            f"tiny tensors that require grad: {operator:.1f} us, in a Function {function:.1f} us"
        )
        if operator < 2 * function:
            break
        time.sleep(0.5)
    else:
        pytest.fail(shown)
    with capsys.disabled():
        print(f"\n{shown}")
