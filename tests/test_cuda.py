"""CUDA arrays of CuPy and PyTorch: results, streams, graphs, memory, devices.

In a build that emulates CUDA, most tests run on host memory that says it is on a GPU.
CARAFEPP_REQUIRE=cuda (or cuda_emulated) turns skips into failures.
"""

import contextlib
import ctypes
import itertools
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import carafepp
from cases import (
    BROADCAST_AXES,
    CASES,
    CUDA_CASES,
    DTYPES,
    FEW,
    LAYOUTS,
    double,
    integer_arrays,
    random_arrays,
)
from cases.calls import FUNCTIONS, RESULTS, arguments, call, from_layout, in_layout, is_generic
from cuda_libraries import BUILT_WITHOUT, EMULATED, connected
from expected import assert_results
from foreign import PretendedCUDA
from functions import EACH_INPUT, call_into, each_function
from products import product
from skips import skip
from wrong_environment import call_in_vain

F32, CASE = DTYPES[0], CASES["groups_2"]
alone = pytest.mark.alone  # the work and memory of other processes would disturb it
SOME_CASES = ["up2", "down2", "ratio_3_2", "groups_2", "one_pixel_up4", "crop_up", "picture"]


@pytest.fixture(params=["emulated"] if EMULATED else ["cupy", "torch"])
def library(request):
    return connected(request.param)


@pytest.fixture(params=["cupy"] if EMULATED or BUILT_WITHOUT else ["cupy", "torch"])
def gpu(request):
    """A library on a real device."""
    return connected(request.param)


def problem(function, case=CASE, dtypes=F32):
    """NumPy arrays, integers and the normaliser none: exact results."""
    return arguments(function, case, integer_arrays(case, dtypes), normalizer="none")


def placed(library, arrays, memory="contiguous"):
    return [library.place(array, memory) for array in arrays]


def nans_like(library, arrays, memory="contiguous"):
    return tuple(library.place(np.full_like(array, np.nan), memory) for array in arrays)


def read(library, arrays):
    return tuple(library.read(array) for array in arrays)


def assert_equal(results, expected):
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(double(result), double(exact))


def out_of(outs):
    return tuple(outs) if len(outs) == 2 else outs[0]


def accepting(function, arrays, params):
    """Return the implementations that take these arrays. All are kernels for CUDA."""
    if "out" not in params:  # its layout matters too
        params = {**params, "out": out_of(call(function, arrays, params))}
    entries = carafepp.list_implementations(function, *arrays, **params)
    names = [name for name, reason in entries if reason is None]
    assert names, entries
    assert all(re.search("_(cuda|sm[0-9]+)$", name) for name in names), names
    return names


@contextlib.contextmanager
def by(implementation, *what):
    """Force this implementation, and name it if the test fails."""
    try:
        with carafepp.force_implementation(implementation):
            yield
    except AssertionError as error:
        raise AssertionError(f"{implementation}, {', '.join(map(str, what))}: {error}") from error


# Results


@product(
    case=CASES | CUDA_CASES,
    function=FUNCTIONS,
    by_default={"case": FEW if EMULATED or BUILT_WITHOUT else CASES},
)
def test_every_implementation_is_right_for_every_dtype(case, function, library):
    large_for_an_emulator = EMULATED and case.terms > 10**5
    all_dtypes = DTYPES[:1] if large_for_an_emulator else DTYPES
    for dtypes, layout in itertools.product(all_dtypes, ["NCHW", "NHWC"]):
        for normalizer, arrays in (
            (None, integer_arrays(case, dtypes)),
            ("softmax", random_arrays(case, dtypes)),
        ):
            inputs, params = arguments(function, case, arrays, normalizer or "none")
            on_device = placed(library, in_layout(inputs, layout))
            params["layout"] = layout
            for name in accepting(function, on_device, params):
                with by(name, dtypes, layout, normalizer):
                    results = from_layout(read(library, call(function, on_device, params)), layout)
                    assert_results(function, case, dtypes, results, normalizer)


@product(
    function=[f for f in FUNCTIONS if "logits" in f or "normalize" in f],
    normalizer=["sigmoid", "sigmoid_normalized"],
    name=SOME_CASES,
)
def test_every_implementation_is_right_for_the_other_normalizers(
    function, normalizer, name, library
):
    case = CASES[name]
    for dtypes in DTYPES:
        inputs, params = arguments(function, case, random_arrays(case, dtypes), normalizer)
        on_device = placed(library, inputs)
        for implementation in accepting(function, on_device, params):
            with by(implementation, dtypes):
                results = read(library, call(function, on_device, params))
                assert_results(function, case, dtypes, results, normalizer)


@product(
    memory=list(LAYOUTS),
    function=FUNCTIONS,
    turns={"name": SOME_CASES, "dtypes": DTYPES},
)
def test_inputs_and_results_may_have_any_layout(memory, function, name, dtypes, library):
    if "flipped" in memory and not library.negative_strides:
        pytest.skip("PyTorch has no negative strides")
    inputs, params = problem(function, CASES[name], dtypes)
    expected = call(function, inputs, params)
    on_device = placed(library, inputs, memory)
    outs = nans_like(library, expected, memory)
    for implementation in accepting(function, on_device, {**params, "out": out_of(outs)}):
        outs = nans_like(library, expected, memory)
        with by(implementation):
            call_into(function, on_device, params, outs)
            assert_equal(read(library, outs), expected)


@product(memory=list(LAYOUTS))
def test_a_new_output_is_right_for_inputs_of_any_layout(memory, library):
    """It is contiguous: its columns may be whole vectors where those of features are not."""
    if "flipped" in memory and not library.negative_strides:
        pytest.skip("PyTorch has no negative strides")
    for kernel_size in (3, 5, 7):
        case = replace(CASES["up2"], c=8, h=4, w=8, groups=1, kernel_size=kernel_size)
        inputs, params = problem("reassemble", case)
        expected = call("reassemble", inputs, params)
        on_device = placed(library, inputs, memory)
        for implementation in accepting("reassemble", on_device, params):
            with by(implementation, kernel_size):
                assert_equal(read(library, call("reassemble", on_device, params)), expected)


@product(which=EACH_INPUT, axes=BROADCAST_AXES)
def test_broadcast_inputs_are_read(which, axes, library):
    function, index = which
    inputs, params = problem(function)
    shape = inputs[index].shape
    first = inputs[index][tuple(slice(0, 1 if k in axes else None) for k in range(4))]
    on_device = placed(library, inputs)
    on_device[index] = library.broadcast(library.place(first), shape)
    inputs = list(inputs)
    inputs[index] = np.broadcast_to(first, shape)
    results = read(library, call(function, on_device, params))
    assert_equal(results, call(function, inputs, params))


@product(function=FUNCTIONS, turns={"dtypes": DTYPES})
def test_results_are_arrays_of_the_same_library_and_device(function, dtypes, library):
    inputs, params = problem(function, dtypes=dtypes)
    on_device = placed(library, inputs)
    results = call(function, on_device, params)
    for result, exact in zip(results, call(function, inputs, params), strict=True):
        assert isinstance(result, library.Array)
        assert result.device == on_device[0].device
        assert library.read(result).dtype == exact.dtype
        np.testing.assert_array_equal(double(library.read(result)), double(exact))


@each_function
def test_unbatched_arrays_give_unbatched_results(function, library):
    inputs, params = problem(function)
    inputs = [array[0] for array in inputs]
    results = call(function, placed(library, inputs), params)
    assert_equal(read(library, results), call(function, inputs, params))


def test_repeated_runs_give_the_same_bits(library):
    case = CASES["many_pixels"]
    for function in RESULTS:
        inputs, params = arguments(function, case, random_arrays(case, F32))
        on_device = placed(library, inputs)
        first = read(library, call(function, on_device, params))
        for _ in range(3):
            assert_equal(read(library, call(function, on_device, params)), first)


def test_torch_channels_last_in_channels_last_out():
    library = connected("torch")
    for function in RESULTS:
        inputs, params = problem(function)
        on_device = placed(library, inputs, "nhwc")
        results = call(function, on_device, params)
        for result in results:
            assert result.is_contiguous(memory_format=library.torch.channels_last)
            assert not result.is_contiguous()
        assert_equal(read(library, results), call(function, inputs, params))


def test_out_may_not_overlap_an_input(library):
    (features, masks), params = problem("reassemble", CASES["same_size"])
    x, m = placed(library, (features, masks))
    with pytest.raises(ValueError, match="out must not share memory with features"):
        carafepp.reassemble(x, m, **params, out=x)


@pytest.mark.skipif(not EMULATED, reason="a hand-built array on a GPU")
def test_read_only_inputs_are_read():
    (features, masks), params = problem("reassemble")
    x, m = (PretendedCUDA(array.copy(), read_only=True) for array in (features, masks))
    output = carafepp.reassemble(x, m, **params)
    assert_equal([output.array], call("reassemble", (features, masks), params))


def test_arrays_on_the_cpu_do_not_mix(gpu):
    (features, masks), params = problem("reassemble")
    with pytest.raises(TypeError, match="library of features"):
        carafepp.reassemble(gpu.place(features), masks, **params)


def test_implementations_for_the_cpu_are_refused(library):
    inputs, params = problem("reassemble")
    on_device = placed(library, inputs)
    sentence = "implementation must be a name of the list of implementations"
    with (
        carafepp.force_implementation("reassemble_any_ref"),
        pytest.raises(ValueError, match=sentence),
    ):
        carafepp.reassemble(*on_device, **params)


def test_a_missing_driver_is_reported():
    if BUILT_WITHOUT or EMULATED:
        pytest.skip("a build without real CUDA needs no driver")
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver")
    (features, masks), params = problem("reassemble")
    with pytest.raises(RuntimeError, match=r"(?i)driver"):
        carafepp.reassemble(PretendedCUDA(features), PretendedCUDA(masks), **params)


# Fast kernels, and an environment without them


def fast(names):
    """Return the names of kernels that are not generic."""
    return {name for name in names if not is_generic(name)}


def problems_for_fast_kernels(library):
    """Return problems for the fast kernels: (function, NumPy arrays, CUDA arrays, parameters)."""
    of_factors = [CASES["c32"], CUDA_CASES["up2_c32"], CASES["c16_down"]]  # up x2 and down x2
    others = [CUDA_CASES[name] for name in ("same_c40", "few_up8", "down3_c8_wide")]
    cases = [*of_factors, *others]
    wanted = itertools.product(RESULTS, cases, (DTYPES[0], DTYPES[2]), ("NCHW", "NHWC"))
    for function, case, dtypes, layout in wanted:
        inputs, params = problem(function, case, dtypes)
        inputs, params = in_layout(inputs, layout), {**params, "layout": layout}
        yield function, inputs, placed(library, inputs), params


def use_every_fast_kernel(library):
    listed, accepted = set(), set()
    for function, _, on_device, params in problems_for_fast_kernels(library):
        entries = carafepp.list_implementations(function, *on_device, **params)
        listed |= fast(name for name, _ in entries)
        accepted |= fast(accepting(function, on_device, params))
    assert accepted == listed


def use_generic_kernels(library):
    """Run where CARAFEPP_CUDA_KERNELS is generic."""
    reason = "CARAFEPP_CUDA_KERNELS allows generic kernels only"
    for function, inputs, on_device, params in problems_for_fast_kernels(library):
        results = call(function, on_device, params)
        assert_equal(read(library, results), call(function, inputs, params))
        entries = carafepp.list_implementations(function, *on_device, **params, out=out_of(results))
        assert entries
        for name, declines in entries:
            assert declines == (reason if fast([name]) else None)
            with carafepp.force_implementation(name):
                if declines is None:
                    call(function, on_device, params)
                    continue
                sentence = f"[{function}] implementation {name} declines: {reason}."
                with pytest.raises(NotImplementedError, match=re.escape(sentence)):
                    call(function, on_device, params)


def with_kernels(value, test, library):
    """Call a function in a process that has this CARAFEPP_CUDA_KERNELS."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "CARAFEPP_CUDA_KERNELS": value,
        "CARAFEPP_LOG": "debug",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    name = type(library).__name__
    module = test.__module__
    code = f"import cuda_libraries, {module}; {module}.{test.__name__}(cuda_libraries.{name}())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if re.search(r"^carafepp: .*_cuda", line)]


def test_each_fast_kernel_takes_a_problem(library):
    use_every_fast_kernel(library)


def test_the_environment_leaves_only_generic_kernels(library):
    """Each fast kernel declines, the results are right, and the log tells why."""
    log = with_kernels("generic", use_generic_kernels, library)
    assert log
    for line in log:
        chosen = re.match(r"carafepp: \[\w+\] (.*?)(;|$)", line)[1]
        assert "_any_cuda" in chosen or chosen == "no kernel of both gradients", line
    assert any("_mma_cuda declines: CARAFEPP_CUDA_KERNELS allows generic" in line for line in log)


@pytest.mark.parametrize("value", ["all", ""])
def test_the_environment_may_leave_all_kernels(value, library):
    with_kernels(value, use_every_fast_kernel, library)


def test_the_environment_may_not_leave_some_kernels(library):
    assert not with_kernels("some", call_in_vain, library)


# Streams


@alone
@each_function
def test_a_call_returns_while_its_stream_is_busy_and_sees_the_queued_work(function, gpu):
    """Nothing is synchronised: neither the call nor the work before and after it."""
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    sources, outs = placed(gpu, inputs), nans_like(gpu, expected)
    on_device = nans_like(gpu, inputs)
    call_into(function, on_device, params, outs)  # loads the kernels
    gpu.synchronize()
    stream = gpu.stream()
    with gpu.on(stream), gpu.busy(stream):
        for target, source in zip(on_device, sources, strict=True):
            gpu.copy(target, source)
        call_into(function, on_device, params, outs)
        for target in on_device:
            gpu.spoil(target)
        assert not gpu.done(stream)
    stream.synchronize()
    assert_equal(read(gpu, outs), expected)


@alone
@each_function
def test_a_call_waits_for_no_other_stream(function, gpu):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    on_device, outs = placed(gpu, inputs), nans_like(gpu, expected)
    call_into(function, on_device, params, outs)
    for out in outs:
        gpu.spoil(out)
    gpu.synchronize()
    own, other = gpu.stream(), gpu.stream()
    with gpu.busy(other):
        with gpu.on(own):
            call_into(function, on_device, params, outs)
        own.synchronize()
        assert not gpu.done(other)
    gpu.synchronize()
    assert_equal(read(gpu, outs), expected)


@alone
@each_function
def test_arrays_may_be_freed_while_their_work_is_queued(function, gpu):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    call(function, placed(gpu, inputs), params)
    gpu.synchronize()
    stream = gpu.stream()
    with gpu.on(stream):
        on_device = placed(gpu, inputs)
        outs = nans_like(gpu, expected)
        stream.synchronize()
        with gpu.busy(stream):
            call_into(function, on_device, params, outs)
            shapes = [array.shape for array in on_device]
            del on_device
            for shape in shapes:  # in memory that has just become free
                gpu.spoil(gpu.empty(shape))
        stream.synchronize()
        assert_equal(read(gpu, outs), expected)


@alone
def test_the_current_stream_may_be_the_default_one(gpu):
    for function in RESULTS:
        inputs, params = problem(function)
        results = call(function, placed(gpu, inputs), params)
        assert_equal(read(gpu, results), call(function, inputs, params))


@alone
def test_cupy_per_thread_default_stream():
    library = connected("cupy")
    inputs, params = problem("reassemble")
    with library.cupy.cuda.Stream.ptds:
        results = call("reassemble", placed(library, inputs), params)
        assert_equal(read(library, results), call("reassemble", inputs, params))


@alone
def test_two_threads_have_a_stream_each(gpu):
    problems = [problem("reassemble", CASES[name]) for name in ("up2", "down2")]
    wrong = []

    def work(inputs, params):
        try:
            (expected,) = call("reassemble", inputs, params)
            with gpu.on(gpu.stream()):
                on_device = placed(gpu, inputs)
                for _ in range(200):
                    output = carafepp.reassemble(*on_device, **params)
                assert_equal(read(gpu, [output]), [expected])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=each) for each in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


class Bare:
    """An array of a library that carafepp does not know."""

    def __init__(self, array):
        self.array, self.shape = array, tuple(array.shape)

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@alone
@each_function
def test_bare_dlpack_arrays_are_ordered_before_the_legacy_default_stream(function, gpu):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    sources, outs = placed(gpu, inputs), nans_like(gpu, expected)
    on_device = nans_like(gpu, inputs)
    call_into(function, on_device, params, outs)
    for out in outs:
        gpu.spoil(out)
    gpu.synchronize()
    stream = gpu.stream()
    with gpu.on(stream), gpu.busy(stream):
        for target, source in zip(on_device, sources, strict=True):
            gpu.copy(target, source)
        call_into(function, [Bare(a) for a in on_device], params, [Bare(out) for out in outs])
        assert not gpu.done(stream)
    gpu.synchronize()
    assert_equal(read(gpu, outs), expected)


@alone
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_torch_finds_no_synchronisation():
    library = connected("torch")
    cuda = library.torch.cuda
    for function in RESULTS:
        inputs, params = problem(function)
        on_device = placed(library, inputs)
        cuda.set_sync_debug_mode("error")
        try:
            results = call(function, on_device, params)
        finally:
            cuda.set_sync_debug_mode("default")
        assert_equal(read(library, results), call(function, inputs, params))


# Graphs


@alone
@pytest.mark.parametrize("given", [False, True], ids=["new results", "out"])
@each_function
def test_a_captured_graph_is_replayed_on_new_values(function, given, gpu):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    on_device = nans_like(gpu, inputs)
    if given:
        params = {**params, "out": out_of(nans_like(gpu, expected))}
    call(function, on_device, params)  # loads the kernels
    gpu.synchronize()
    replay, results = gpu.capture(lambda: call(function, on_device, params))
    for factor in (1, -1):
        values = [factor * array for array in inputs]
        for target, source in zip(on_device, placed(gpu, values), strict=True):
            gpu.copy(target, source)
        replay()
        gpu.synchronize()
        params.pop("out", None)
        assert_equal(read(gpu, results), call(function, values, params))


# Memory


@alone
@each_function
def test_nothing_is_allocated_but_the_results(function, gpu):
    inputs, params = problem(function, CASES["many_pixels"])
    on_device = placed(gpu, inputs)
    results = call(function, on_device, params)
    sizes = [512 * math.ceil(gpu.read(result).nbytes / 512) for result in results]
    gpu.synchronize()
    allocated, free = gpu.allocated_bytes(), gpu.free_bytes()
    call_into(function, on_device, params, results)
    gpu.synchronize()
    assert (gpu.allocated_bytes(), gpu.free_bytes()) == (allocated, free)
    more = call(function, on_device, params)
    assert gpu.allocated_bytes() == allocated + sum(sizes)
    del more
    assert gpu.allocated_bytes() == allocated


@alone  # a buffer of gigabytes each
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["c32", "c16_down"])  # up x2, down x2
@pytest.mark.parametrize("function", [function for function in RESULTS if "reassemble" in function])
def test_fast_kernels_reach_elements_beyond_2_31(function, name, layout, library):
    """Images, channels or rows of one array lie far apart, with nothing in between."""
    inputs, params = problem(function, CASES[name], DTYPES[2])
    inputs, params = in_layout(inputs, layout), {**params, "layout": layout}
    expected = call(function, inputs, params)
    on_device = placed(library, inputs)
    accepted = accepting(function, on_device, params)
    kernels = fast(accepted)
    operations = [name.removesuffix("any_cuda") for name in accepted if name not in kernels]
    assert len(operations) == len(expected)
    for operation in operations:
        assert any(kernel.startswith(operation) for kernel in kernels), operation
    assert "down" in name or any("_mma_" in kernel for kernel in kernels)

    def far_apart(array, axis):
        try:
            return library.far_apart(array, axis)
        except MemoryError as error:
            return skip("memory", str(error))

    def check(kernel, arrays, outs, *where):
        try:
            with by(kernel, *where):
                call_into(function, arrays, params, outs)
        except NotImplementedError as error:  # another kernel takes what does not fit 32 bits
            if "too far apart" not in str(error):
                raise
            call_into(function, arrays, params, outs)
        with by(kernel, *where):
            assert_equal(read(library, outs), expected)

    for axis, kernel in itertools.product(range(3), sorted(kernels)):
        for index in range(len(inputs)):
            arrays, outs = list(on_device), nans_like(library, expected)
            arrays[index] = far_apart(inputs[index], axis)
            check(kernel, arrays, outs, "input", index, "axis", axis)
        for index in range(len(expected)):
            outs = list(nans_like(library, expected))
            outs[index] = far_apart(np.full_like(expected[index], np.nan), axis)
            check(kernel, on_device, outs, "result", index, "axis", axis)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["contiguous", "nhwc"])
def test_arrays_of_more_than_2_31_elements(memory, gpu):
    """3 x 32771 x 32771 float16 features, of which down=4093 reads 9 rows of 9 windows.

    The windows side by side are a small problem of down=3, which the CPU solves.
    """
    h, w, down = 32771, 32771, 4093
    assert 3 * h * w > 2**31
    rng = np.random.default_rng(1)
    features = np.zeros((1, 3, h, w), np.float16)
    positions = np.add.outer(np.arange(9) * down, [-1, 0, 1]).reshape(-1)[1:]
    windows = rng.integers(-4, 5, (1, 3, 26, 26)).astype(np.float16)
    features[:, :, positions[:, None], positions] = windows
    masks = rng.integers(-2, 3, (1, 9, 9, 9)).astype(np.float16)
    grad_output = rng.integers(-4, 5, (1, 3, 9, 9)).astype(np.float16)
    x, m = gpu.place(features, memory), gpu.place(masks)
    expected = carafepp.reassemble(windows, masks, down=3)
    np.testing.assert_array_equal(gpu.read(carafepp.reassemble(x, m, down=down)), expected)

    gx, gm = carafepp.reassemble_backward(gpu.place(grad_output), x, m, down=down)
    expected_gx, expected_gm = carafepp.reassemble_backward(grad_output, windows, masks, down=3)
    np.testing.assert_array_equal(gpu.read(gm), expected_gm)
    for found, of_windows in zip(gpu.read(gx)[0], expected_gx[0], strict=True):
        np.testing.assert_array_equal(found[positions[:, None], positions], of_windows)
        found[positions[:, None], positions] = 0
        assert not np.count_nonzero(found)


@pytest.mark.slow
def test_an_output_of_more_than_2_31_elements(gpu):
    shape = (1, 5, 20741, 20729)
    assert math.prod(shape) > 2**31
    features = gpu.broadcast(gpu.place(np.full((1, 1, 1, 1), 3, np.float16)), shape)
    masks = gpu.broadcast(gpu.place(np.full((1, 1, 1, 1), 2, np.float16)), (1, 1, *shape[2:]))
    for channel in gpu.read(carafepp.reassemble(features, masks))[0]:
        assert (channel == 6).all()


# Devices


@pytest.fixture
def two_devices(gpu):
    if gpu.devices() < 2:
        pytest.skip("one device")
    return gpu


@each_function
def test_work_is_done_on_the_device_of_the_arrays(function, two_devices):
    """The current device stays current."""
    gpu = two_devices
    inputs, params = problem(function)
    with gpu.device(1):
        on_device = placed(gpu, inputs)
        gpu.synchronize()
    with gpu.device(0):
        results = call(function, on_device, params)
        assert gpu.current_device() == 0
    assert all(gpu.device_of(result) == 1 for result in results)
    assert_equal(read(gpu, results), call(function, inputs, params))


def test_arrays_on_two_devices_do_not_mix(two_devices):
    gpu = two_devices
    (features, masks), params = problem("reassemble")
    x = gpu.place(features)
    with gpu.device(1):
        m = gpu.place(masks)
    with pytest.raises(ValueError, match=r"masks must be on the device of features \(cuda:0\)"):
        carafepp.reassemble(x, m, **params)
