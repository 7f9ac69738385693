"""The price of a call on tiny arrays, counted: Python frames, calls of C functions, threads."""

import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import carafepp
from carafepp._doors.torch import PyTorch

FRAMES = 16  # of Python in one call of reassemble on NumPy arrays, `out` included
CALLS = 10  # of functions written in C


@pytest.fixture
def arrays():
    return np.ones((1, 16, 8, 8), np.float32), np.ones((1, 1, 8, 8), np.float32)


def counted(function) -> Counter:
    """Count the events of Python's profiler in one call."""
    events: Counter = Counter()
    function()  # a first call remembers some facts
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        function()
    finally:
        sys.setprofile(None)
    return events


@pytest.mark.parametrize("given", [False, True], ids=["new result", "out"])
def test_a_call_on_numpy_arrays_takes_few_steps(given, arrays):
    features, masks = arrays
    out = np.empty_like(features) if given else None
    events = counted(lambda: carafepp.reassemble(features, masks, out=out))
    assert events["call"] <= FRAMES
    assert events["c_call"] <= CALLS


TINY_CALLS = """
import os
import numpy as np, carafepp
carafepp.set_num_threads(64)
features, masks = np.ones((1, 16, 8, 8), "f4"), np.ones((1, 1, 8, 8), "f4")
before = len(os.listdir("/proc/self/task"))
for _ in range(100):
    carafepp.reassemble(features, masks)
assert len(os.listdir("/proc/self/task")) == before
carafepp.reassemble(np.ones((8, 16, 256, 256), "f4"), np.ones((8, 1, 256, 256), "f4"))
assert len(os.listdir("/proc/self/task")) > before
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc")
def test_a_tiny_call_starts_no_thread():
    subprocess.run([sys.executable, "-c", TINY_CALLS], check=True)


def seconds_per_call(function) -> float:
    """Return the best time of several batches, so that a busy while does not matter."""
    batches = []
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(400):
            function()
        batches.append((time.perf_counter() - begin) / 400)
    return min(batches)


def test_an_operator_costs_little_more_than_an_autograd_function(arrays, torch, capsys):
    """The Function runs the same kernel and remembers its inputs, no more."""

    door = PyTorch()

    class Reassemble(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features, masks):
            ctx.save_for_backward(features, masks)
            return door.compute("reassemble", (features, masks), {})[0]

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
