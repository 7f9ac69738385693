"""The stream of every call, and what libraries are asked for: stand-ins for what needs a GPU."""

import sys
import types

import numpy as np
import pytest

import carafepp
from cases import CASES, DTYPES, integer_arrays
from cases.calls import FUNCTIONS, RESULTS, arguments, call
from foreign import CPU, CUDA, CUDA_HOST, CUDA_MANAGED, Foreign, PretendedCUDA
from functions import each_function

HANDLE = 0x7F00_1234_5678


def problem(function):
    """Writable arrays, integers and the normaliser none: exact results."""
    arrays = integer_arrays(CASES["groups_2"], DTYPES[0])
    inputs, params = arguments(function, CASES["groups_2"], arrays, normalizer="none")
    return tuple(array.copy() for array in inputs), params


@pytest.fixture
def streams(monkeypatch):
    """Record the streams that reach the core, which computes as always."""
    reached = []

    def recorded(run):
        def record_and_run(*given):
            reached.append(given[-1])
            return run(*given)

        return record_and_run

    for name in FUNCTIONS:
        monkeypatch.setattr(carafepp._core, name, recorded(getattr(carafepp._core, name)))
    return reached


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of the core, which must not follow these pointers."""
    reached = []
    for name in FUNCTIONS:
        monkeypatch.setattr(carafepp._core, name, lambda *given: reached.append(given))
    return reached


# NumPy


@each_function
def test_numpy_arrays_have_no_stream(function, streams):
    call(function, *problem(function))
    assert streams == [0]


# CuPy


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in for CuPy in host memory: two devices with a current stream each."""
    module = types.ModuleType("cupy")
    module.current_device = [0]
    module.current_streams = [0, HANDLE]

    class Device:
        def __init__(self, number):
            self.id = number

        def __enter__(self):
            module.current_device.append(self.id)

        def __exit__(self, *error):
            module.current_device.pop()

    class Array(Foreign):
        def __init__(self, array, number):
            super().__init__(array)
            self.dtype, self.device = array.dtype, Device(number)

    def get_current_stream(number):
        return types.SimpleNamespace(ptr=module.current_streams[number])

    module.ndarray = Array
    module.empty = lambda shape, dtype: Array(np.empty(shape, dtype), module.current_device[-1])
    module.cuda = types.SimpleNamespace(get_current_stream=get_current_stream)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("device", [0, 1])
@each_function
def test_cupy_arrays_go_on_the_current_stream_of_their_device(function, device, cupy, streams):
    inputs, params = problem(function)
    arrays = [cupy.ndarray(array, device) for array in inputs]
    results = call(function, arrays, params)
    assert streams == [cupy.current_streams[device]]
    assert cupy.current_device == [0]
    for array in (*arrays, *results):
        assert array.asked == [{"stream": -1}]
    streams.clear()
    for result, exact in zip(results, call(function, inputs, params), strict=True):
        assert type(result) is cupy.ndarray
        assert result.device.id == device
        np.testing.assert_array_equal(result.array, exact)


@pytest.mark.parametrize("handle", [0, 1, 2, 2**64 - 1])
def test_streams_are_passed_on_as_they_are(handle, cupy, streams):
    """1 and 2 are CUDA's names for the legacy and the per-thread default stream."""
    cupy.current_streams[0] = handle
    inputs, params = problem("reassemble")
    carafepp.reassemble(*(cupy.ndarray(array, 0) for array in inputs), **params)
    assert streams == [handle]


def test_cupy_out_is_written_and_returned(cupy, streams):
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    streams.clear()
    out = cupy.ndarray(np.zeros_like(expected), 1)
    arrays = [cupy.ndarray(array, 1) for array in inputs]
    assert carafepp.reassemble(*arrays, **params, out=out) is out
    np.testing.assert_array_equal(out.array, expected)
    assert streams == [HANDLE]


def test_cupy_and_numpy_arrays_do_not_mix(cupy):
    (features, masks), params = problem("reassemble")
    with pytest.raises(TypeError, match="library of features, cupy; got one of numpy"):
        carafepp.reassemble(cupy.ndarray(features, 0), masks, **params)


def test_implementations_of_cupy_arrays_are_listed_without_ordering_streams(cupy):
    inputs, params = problem("reassemble")
    arrays = [cupy.ndarray(array, 0) for array in inputs]
    assert carafepp.list_implementations("reassemble", *arrays, **params)
    assert all(array.asked == [{"stream": -1}] for array in arrays)


# PyTorch


@each_function
def test_torch_cuda_tensors_go_on_the_current_stream_of_their_device(
    function, torch, streams, monkeypatch
):
    class Tensor(torch.Tensor):
        """In host memory."""

        is_cuda = True

    asked = []

    def current_stream(device):
        asked.append(device)
        return types.SimpleNamespace(cuda_stream=HANDLE)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    inputs, params = problem(function)
    tensors = [torch.from_numpy(array).as_subclass(Tensor) for array in inputs]
    call(function, tensors, params)
    operators = len(RESULTS[function])  # each gradient is a call
    assert streams == [HANDLE] * operators
    assert asked == [tensors[0].device] * operators


@each_function
def test_torch_cpu_tensors_ask_nothing_of_cuda(function, torch, streams, monkeypatch):
    monkeypatch.delattr(torch.cuda, "current_stream")
    inputs, params = problem(function)
    call(function, [torch.from_numpy(array) for array in inputs], params)
    assert streams == [0]  # one call of the core for all results
    assert not torch.cuda.is_initialized()


# DLPack


@pytest.mark.parametrize("device", [(CUDA, 0), (CUDA, 3), (CUDA_MANAGED, 0)])
@each_function
def test_dlpack_cuda_arrays_are_ordered_before_the_legacy_default_stream(function, device, calls):
    inputs, params = problem(function)
    arrays = [PretendedCUDA(array, device=device) for array in inputs]
    call(function, arrays, params)
    assert calls[0][-1] == 0
    assert all(array.asked == [{"stream": 1, "max_version": (1, 0)}] for array in arrays)


@pytest.mark.parametrize("device", [(CPU, 0), (CUDA_HOST, 0)])
def test_dlpack_cpu_arrays_are_asked_for_no_stream(device, streams):
    (features, masks), params = problem("reassemble")
    (expected,) = call("reassemble", (features, masks), params)
    arrays = [Foreign(a, device=device) for a in (features, masks, np.zeros_like(expected))]
    carafepp.reassemble(*arrays[:2], **params, out=arrays[2])
    np.testing.assert_array_equal(arrays[2].array, expected)
    assert streams == [0, 0]
    assert not any("stream" in options for array in arrays for options in array.asked)


def test_dlpack_cuda_arrays_of_old_libraries_are_read(calls):
    class Old(PretendedCUDA):
        def __dlpack__(self, stream):
            return super().__dlpack__(stream=stream)

    inputs, params = problem("reassemble")
    arrays = [Old(array) for array in inputs]
    carafepp.reassemble(*arrays, **params)
    assert all(array.asked == [{"stream": 1}] for array in arrays)


def test_an_error_of_a_dlpack_cuda_export_reaches_the_caller():
    class Broken(PretendedCUDA):
        def __dlpack__(self, **options):
            raise BufferError("no driver")

    inputs, params = problem("reassemble")
    with pytest.raises(BufferError, match="no driver"):
        carafepp.reassemble(*(Broken(array) for array in inputs), **params)


@each_function
def test_read_only_cuda_arrays_are_refused_as_out(function):
    """Every build checks them before it follows a pointer."""
    inputs, params = problem(function)
    results = call(function, inputs, params)
    outs = tuple(PretendedCUDA(np.zeros_like(result), read_only=True) for result in results)
    arrays = [PretendedCUDA(array, read_only=True) for array in inputs]
    sentence = rf"\[{function}\] out(\[0\])? must be writable; got a read-only array\."
    with pytest.raises(ValueError, match=sentence):
        call(function, arrays, {**params, "out": outs if len(outs) == 2 else outs[0]})


def test_shapes_of_cuda_arrays_are_checked_before_any_pointer_is_followed():
    (features, masks), params = problem("reassemble")
    arrays = PretendedCUDA(features), PretendedCUDA(masks[:, :-1].copy())
    with pytest.raises(ValueError, match="masks must have"):
        carafepp.reassemble(*arrays, **params)
