"""Threads: the same bits for any number; concurrent callers; forked and spawned children."""

import concurrent.futures
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, Case, random_arrays
from cases.calls import FUNCTIONS, arguments, call, in_layout
from functions import each_function, forced, layout_of, names
from products import product

LARGE = Case("large", "several tiles for each of 7 threads", 2, 24, 31, 29, up=2, kernel_size=5)
LARGE_DOWN = Case("large_down", "the same, downsampling", 3, 16, 61, 57, down=2, groups=2)
FLOW = Case("flow", "convex upsampling", 1, 2, 19, 45, up=8)
FLOW_CROP = Case("flow_crop", "the same, a crop within a cell", 2, 2, 19, 45, up=8, size=(85, 333))
FEW_ROWS = Case("few_rows", "fewer rows than threads", 1, 64, 2, 200, up=2, kernel_size=5)


@pytest.fixture
def num_threads():
    """set_num_threads, undone after the test."""
    yield carafepp.set_num_threads
    carafepp.set_num_threads(0)


def bits(results):
    return [np.ascontiguousarray(result).tobytes() for result in results]


@product(
    kernel={f"{f}-{name}": (f, name) for f in FUNCTIONS for name in names(f)},
    turns={
        "case": [LARGE, LARGE_DOWN, FEW_ROWS, CASES["ratio_3_2"]],
        "dtypes": [DTYPES[0], DTYPES[2]],
    },
)
def test_any_number_of_threads_gives_the_same_bits(kernel, case, dtypes, num_threads):
    function, implementation = kernel
    layout = layout_of(implementation)
    inputs, params = arguments(function, case, random_arrays(case, dtypes))
    inputs, params = in_layout(inputs, layout), {**params, "layout": layout}
    with forced(implementation, function, inputs, params):
        num_threads(1)
        expected = bits(call(function, inputs, params))
        for threads in (2, 7, 1, 7):
            num_threads(threads)
            assert bits(call(function, inputs, params)) == expected, f"{threads} threads"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", [FLOW, FLOW_CROP, CASES["convex_up4"]], ids=lambda case: case.name)
def test_gradients_together_have_the_bits_of_each_alone(case, layout, num_threads):
    """One thread computes both from the same masks."""
    function = "reassemble_with_logits_backward"
    inputs, params = arguments(function, case, random_arrays(case, DTYPES[0]))
    inputs, params = in_layout(inputs, layout), {**params, "layout": layout}
    num_threads(1)
    together = call(function, inputs, params)
    for threads in (1, 3):
        num_threads(threads)
        features, _ = call(function, inputs, {**params, "need_logits": False})
        _, logits = call(function, inputs, {**params, "need_features": False})
        assert bits((features, logits)) == bits(together), f"{threads} threads"


@pytest.mark.parametrize("threads", [1, 3])
@each_function
def test_concurrent_callers_get_the_results_of_a_single_one(function, threads, num_threads):
    num_threads(threads)
    problems = [
        arguments(function, case, random_arrays(case, DTYPES[0]))
        for case in (LARGE, LARGE_DOWN, CASES["up2"], CASES["one_pixel"])
    ]
    expected = [bits(call(function, *problem)) for problem in problems]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda i: bits(call(function, *problems[i % 4])), range(64), timeout=120)
        )
    assert all(result == expected[i % 4] for i, result in enumerate(results))


def test_number_of_threads_may_change_while_others_compute(num_threads):
    inputs, params = arguments("reassemble", LARGE, random_arrays(LARGE, DTYPES[0]))
    expected = bits(call("reassemble", inputs, params))

    def work(i):
        carafepp.set_num_threads(1 + i % 5)
        return bits(call("reassemble", inputs, params))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(result == expected for result in pool.map(work, range(64), timeout=120))


def test_a_failing_call_does_not_disturb_concurrent_ones():
    inputs, params = arguments("reassemble", LARGE, random_arrays(LARGE, DTYPES[0]))
    expected = bits(call("reassemble", inputs, params))

    def work(i):
        if i % 2:
            with pytest.raises(ValueError, match=rf"\(2, 1, {i}, 5\)"):
                carafepp.reassemble(inputs[0], np.zeros((2, 1, i, 5), np.float32), up=2)
            return expected
        return bits(call("reassemble", inputs, params))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(result == expected for result in pool.map(work, range(64), timeout=120))


# The number of threads


def test_get_num_threads_returns_the_number_that_was_set(num_threads):
    num_threads(3)
    assert carafepp.get_num_threads() == 3


def test_zero_goes_back_to_the_default(num_threads):
    default = carafepp.get_num_threads()
    num_threads(default + 5)
    num_threads(0)
    assert carafepp.get_num_threads() == default


@pytest.mark.parametrize("threads", [-1, -(2**31), -(2**40), 2**31])
def test_a_number_of_threads_out_of_range_is_a_value_error_and_changes_nothing(
    threads, num_threads
):
    num_threads(3)
    with pytest.raises(ValueError, match=str(threads)):
        num_threads(threads)
    assert carafepp.get_num_threads() == 3


@pytest.mark.parametrize("threads", ["2", 2.5, None])
def test_a_number_of_threads_that_is_no_integer_is_a_type_error(threads):
    with pytest.raises(TypeError):
        carafepp.set_num_threads(threads)


# Other processes. Each test runs a program of its own: the test runner has threads and a pool.

PROGRAM = """
import multiprocessing
import os
import sys

import numpy as np

import carafepp

x = np.arange(2 * 16 * 40 * 40, dtype=np.float32).reshape(2, 16, 40, 40) % 7
m = np.arange(2 * 25 * 80 * 80, dtype=np.float32).reshape(2, 25, 80, 80) % 3


def checksum(_=0):
    y = carafepp.reassemble(x, m, up=2)
    gx, gm = carafepp.reassemble_backward(y, x, m, up=2)
    return [float(a.astype(np.float64).sum()) for a in (y, gx, gm)]

"""


def run_program(body, *, program=PROGRAM, **environment):
    """Return the standard output of the program with this body. A child that hangs, times out."""
    source = program + textwrap.dedent(body)
    environment = {**os.environ, **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORK = """
{before}
carafepp.set_num_threads(4)
expected = checksum()
context = multiprocessing.get_context("fork")
with context.Pool(3) as pool:
    assert pool.map_async(checksum, range(12)).get(timeout=120) == 12 * [expected]
assert checksum() == expected
print("the same")
"""


def test_a_forked_child_computes_after_its_parent_did():
    assert run_program(FORK.format(before="")) == "the same"


def test_a_forked_child_computes_after_torch_did_in_its_parent(torch):
    before = """
import torch
a = torch.randn(600, 600)
(a @ a).relu().sum()
torch.nn.functional.conv2d(torch.randn(2, 8, 64, 64), torch.randn(8, 8, 3, 3)).sum()
"""
    assert run_program(FORK.format(before=before)) == "the same"


def test_a_forked_child_uses_several_threads():
    body = """
    carafepp.set_num_threads(4)
    expected = checksum()

    def child(_):
        result = checksum()
        return result, len(os.listdir("/proc/self/task"))

    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        result, threads = pool.map_async(child, [0]).get(timeout=120)[0]
    assert result == expected
    print(threads > 1)
    """
    assert run_program(body) == "True"


def test_a_child_forked_while_another_thread_computes_computes():
    body = """
    import threading
    carafepp.set_num_threads(4)
    expected = checksum()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            checksum()

    thread = threading.Thread(target=busy)
    thread.start()
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if checksum() == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    stop.set()
    thread.join()
    print("the same")
    """
    assert run_program(body) == "the same"


def test_a_fork_inside_a_fork_computes():
    body = """
    carafepp.set_num_threads(3)
    expected = checksum()
    pid = os.fork()
    if pid == 0:
        first = checksum() == expected
        pid = os.fork()
        if pid == 0:
            os._exit(0 if checksum() == expected else 1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if first else 2)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    assert run_program(body) == "0"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_of_its_own_computes(method, tmp_path):
    program = tmp_path / "program.py"
    body = """
    if __name__ == "__main__":
        expected = checksum()
        with multiprocessing.get_context(METHOD).Pool(2) as pool:
            assert pool.map_async(checksum, range(4)).get(timeout=120) == 4 * [expected]
        print("the same")
    """
    body = textwrap.dedent(body).replace("METHOD", repr(method))
    program.write_text(PROGRAM + body)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the same"


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_environment_sets_the_number_of_threads(threads):
    body = "print(carafepp.get_num_threads())"
    assert run_program(body, CARAFEPP_NUM_THREADS=threads) == threads


def test_zero_goes_back_to_the_number_of_the_environment():
    body = """
    carafepp.set_num_threads(2)
    carafepp.set_num_threads(0)
    print(carafepp.get_num_threads())
    """
    assert run_program(body, CARAFEPP_NUM_THREADS="5") == "5"


def test_an_empty_number_in_the_environment_counts_as_not_set():
    body = "print(carafepp.reassemble(x, m, up=2).ndim, carafepp.get_num_threads() >= 1)"
    assert run_program(body, CARAFEPP_NUM_THREADS="") == "4 True"


@pytest.mark.parametrize("wrong", ["0", "-2", "1.5", "many", "4 ", "1025", "9" * 30])
def test_a_wrong_number_in_the_environment_is_an_error_of_the_next_call(wrong):
    body = """
    carafepp.set_num_threads(2)
    for _ in range(2):
        try:
            carafepp.reassemble(x, m, up=2)
        except ValueError as error:
            print(error)
    """
    sentence = (
        "[reassemble] the environment variable CARAFEPP_NUM_THREADS must be a whole number from 1 "
        f"to 1024; got {wrong}."
    )
    assert run_program(body, CARAFEPP_NUM_THREADS=wrong).splitlines() == [sentence] * 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_the_default_is_the_cores_that_the_process_may_use():
    body = "print(carafepp.get_num_threads())"
    program = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import carafepp
"""
    assert run_program(body, program=program, CARAFEPP_NUM_THREADS=None) == "1"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads in")
def test_a_tiny_call_starts_no_thread():
    body = """
    before = len(os.listdir("/proc/self/task"))
    carafepp.set_num_threads(8)
    carafepp.reassemble(x[:1, :4, :4, :4].copy(), m[:1, :, :8, :8].copy(), up=2)
    print(len(os.listdir("/proc/self/task")) - before)
    """
    assert run_program(body) == "0"


def test_the_gil_is_released_while_computing():
    """Another Python thread makes progress during one long call."""
    body = """
    import threading
    import time
    carafepp.set_num_threads(1)
    x = np.ones((1, 256, 100, 100), np.float32)
    m = np.ones((1, 31 * 31, 100, 100), np.float32)
    out = np.empty((1, 256, 100, 100), np.float32)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    carafepp.reassemble(x, m, out=out)
    end = time.monotonic()
    stop.set()
    thread.join()
    inside = sum(begin + 0.005 < t < end - 0.005 for t in ticks)
    print(inside >= 3 or f"{inside} ticks in {end - begin:.3f} s")
    """
    assert run_program(body) == "True"


def test_the_definition_agrees_with_large_problems(num_threads):
    """Other tests compare the large cases of this file by their bits alone."""
    num_threads(7)
    arrays = random_arrays(LARGE, DTYPES[1])
    output = carafepp.reassemble(arrays.features, arrays.masks, **LARGE.factors)
    expected = ref.reassemble(arrays.features, arrays.masks, **LARGE.factors)
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-12)


def test_an_interrupt_comes_after_the_call():
    body = """
    import signal, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    carafepp.set_num_threads(2)
    features = np.ones((1, 256, 100, 100), np.float32)
    masks = np.ones((1, 31 * 31, 100, 100), np.float32)
    out = np.zeros((1, 256, 100, 100), np.float32)

    def interrupt():
        while not out.any():  # until the call has begun to write
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    interrupted = False
    try:
        carafepp.reassemble(features, masks, out=out)
        thread.join()
    except KeyboardInterrupt:
        interrupted = True
    print(interrupted, (out[0, :, 50, 50] == 961).all(), checksum() == checksum())
    """
    assert run_program(body) == "True True True"


def test_a_sub_interpreter_gets_the_right_result_or_an_import_error():
    """NumPy and nanobind's runtime decide which. Nothing may crash, then or later."""
    body = """
    try:
        import _interpreters as interpreters  # Python 3.13 and newer
    except ImportError:
        import _xxsubinterpreters as interpreters
    program = "import numpy, carafepp; y = carafepp.reassemble(*[numpy.ones((1, 1, 2, 2))] * 2)"
    program += "; assert (y == 1).all()"
    expected = checksum()
    try:
        error = interpreters.run_string(interpreters.create(), program)
        error = str(error) if error else "none"
    except interpreters.RunFailedError as failure:
        error = str(failure)
    print(error, checksum() == expected, sep="; ")
    """
    error, _, same = run_program(body).rpartition("; ")
    assert error == "none" or "ImportError" in error
    assert same == "True"


def test_the_program_may_end_while_a_daemon_thread_computes():
    body = """
    import threading, time
    carafepp.set_num_threads(1)

    def compute():
        while True:  # short calls: one returns while the interpreter ends
            carafepp.reassemble(x, m, up=2)

    threading.Thread(target=compute, daemon=True).start()
    time.sleep(0.2)
    print("main is done")
    """
    for _ in range(3):
        assert run_program(body) == "main is done"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads in")
def test_the_program_may_end_while_the_threads_of_the_pool_are_idle():
    body = """
    before = len(os.listdir("/proc/self/task"))
    carafepp.set_num_threads(4)
    checksum()
    print(len(os.listdir("/proc/self/task")) > before)
    """
    assert run_program(body) == "True"


def test_a_call_while_the_program_ends_is_a_call_as_any_other():
    program = "import atexit\natexit.register(lambda: print(late()))\n" + PROGRAM  # runs last
    body = """
    def late():
        return carafepp.reassemble(x, m, up=2).shape
    """
    assert run_program(body, program=program) == "(2, 16, 80, 80)"
