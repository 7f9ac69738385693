"""The price of a call on tiny arrays, counted: Python frames, calls of C functions, threads."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import carafepp

FRAMES = 16  # of Python in one call of reassemble on NumPy arrays, `out` included
CALLS = 10  # of functions written in C
TENSOR_FRAMES = {True: 25, False: 17}  # of ours in one call on tensors that require grad, or not
TENSOR_CALLS = {True: 34, False: 38}


@pytest.fixture
def arrays():
    return np.ones((1, 16, 8, 8), np.float32), np.ones((1, 1, 8, 8), np.float32)


def counted(function, within: str = "") -> Counter:
    """Count the events of Python's profiler in one call, by the code of a folder."""
    events: Counter = Counter()

    def count(frame, event, argument):
        if frame.f_code.co_filename.startswith(within):
            events[event] += 1

    function()  # a first call remembers some facts
    sys.setprofile(count)
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


@pytest.mark.parametrize("grad", [True, False])
def test_a_call_on_tensors_takes_few_steps_of_ours(grad, arrays, torch):
    """PyTorch's own steps, which differ from version to version, are not counted."""
    features, masks = map(torch.from_numpy, arrays)
    features.requires_grad_(grad)
    package = os.path.dirname(carafepp.__file__)
    events = counted(lambda: carafepp.reassemble(features, masks), within=package)
    assert events["call"] <= TENSOR_FRAMES[grad]
    assert events["c_call"] <= TENSOR_CALLS[grad]


def test_a_profiler_and_a_mode_see_calls_on_tensors_without_gradient(arrays, torch):
    """Such calls pass PyTorch's dispatcher by, unless somebody listens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(operator.name())
            return operator(*args, **(kwargs or {}))

    features, masks = map(torch.from_numpy, arrays)
    with Listener():
        carafepp.reassemble(features, masks)
    with torch.autograd.profiler.profile() as profile:
        carafepp.reassemble(features, masks)
    assert "carafepp::reassemble" in seen
    assert "carafepp::reassemble" in [event.name for event in profile.function_events]
