"""CuPy, PyTorch and the emulation, by one interface for the tests for CUDA."""

import contextlib
import math
import threading
import warnings

import numpy as np

import carafepp
from cases import LAYOUTS, numpy_dtype
from foreign import PretendedCUDA
from skips import skip

EMULATED = "CUDA: built (emulated)" in carafepp._core.config()
BUILT_WITHOUT = "CUDA: not built" in carafepp._core.config()


class Missing(Exception):
    """(what, reason): a test cannot run without `what`."""


def _require_gpu_build():
    if BUILT_WITHOUT:
        raise Missing("cuda", "carafepp was built without CUDA")
    if EMULATED:
        raise Missing("cuda", "carafepp was built to emulate CUDA")


def connected(name):
    """Return the library of this name; skip the test if it is missing."""
    try:
        return LIBRARIES[name]()
    except Missing as missing:
        return skip(*missing.args)


def _laid_out(array: np.ndarray, memory: str):
    """Return bytes in host memory, and a view of them that holds the array in this layout."""
    buffer, view = LAYOUTS[memory](array.shape, array.dtype)
    buffer[...] = 0
    view[...] = array
    return buffer.reshape(-1).view(np.uint8), view, view.ctypes.data - buffer.ctypes.data


def _far_apart(shape, axis):
    """The size of a buffer, and strides in elements: along the axis the last is beyond 2^31.

    The other axes are contiguous, and everything is aligned to vectors.
    """
    others = [extent for k, extent in enumerate(shape) if k != axis]
    strides = [math.prod(others[k + 1 :]) for k in range(len(others))]
    far = 64 * (2**31 // 64 // (shape[axis] - 1) + 1)
    strides.insert(axis, far)
    return far * (shape[axis] - 1) + math.prod(others), strides


class Emulated:
    """Arrays that say they are on a GPU and lie in host memory, where emulated kernels run."""

    Array = PretendedCUDA
    negative_strides = True

    def __init__(self):
        if not EMULATED:
            raise Missing("cuda_emulated", "carafepp was not built to emulate CUDA")

    def place(self, array, memory="contiguous"):
        return PretendedCUDA(_laid_out(array, memory)[1])

    def far_apart(self, array, axis):
        """A copy whose elements along the axis are so far apart that the last is beyond 2^31."""
        size, strides = _far_apart(array.shape, axis)
        buffer = np.zeros(size, array.dtype)  # mapped; what lies between is never touched
        strides = [stride * array.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(buffer, array.shape, strides)
        view[...] = array
        return PretendedCUDA(view)

    def broadcast(self, array, shape):
        return PretendedCUDA(np.broadcast_to(array.array, shape))

    def read(self, array):
        return array.array


class CuPy:
    """CuPy by copies and views alone: its own kernels need a compiler that may be missing."""

    negative_strides = True

    def __init__(self):
        _require_gpu_build()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no toolkit is installed
                import cupy
        except ImportError as error:
            raise Missing("cuda", str(error)) from error
        if not cupy.cuda.is_available():
            raise Missing("cuda", "CuPy finds no device")
        self.cupy, self.Array = cupy, cupy.ndarray

    def place(self, array, memory="contiguous"):
        """Return a copy on the current device, in this memory layout."""
        data, view, offset = _laid_out(array, memory)
        buffer = self.cupy.empty(max(1, data.size), np.uint8)
        if data.size:
            buffer.set(data)
        return self.cupy.ndarray(array.shape, array.dtype, buffer.data + offset, view.strides)

    def far_apart(self, array, axis):
        """A copy whose elements along the axis are so far apart that the last is beyond 2^31."""
        size, strides = _far_apart(array.shape, axis)
        buffer = self.cupy.empty(size, array.dtype)
        strides = [stride * array.itemsize for stride in strides]
        view = self.cupy.ndarray(array.shape, array.dtype, buffer.data, strides)
        parts = zip(self.cupy.moveaxis(view, axis, 0), np.moveaxis(array, axis, 0), strict=True)
        for part, values in parts:
            part.set(np.ascontiguousarray(values))
        return view

    def empty(self, shape):
        return self.cupy.empty(shape, np.float32)

    def broadcast(self, array, shape):
        return self.cupy.broadcast_to(array, shape)

    def read(self, array):
        """Return a copy on the host, of any strides."""
        if array.size == 0:
            return np.empty(array.shape, array.dtype)
        ends = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        low = sum(end for end in ends if end < 0)
        high = sum(end for end in ends if end > 0) + array.itemsize
        if high - low > max(2**30, 4 * array.nbytes):  # far apart
            axis = int(np.argmax(np.abs(ends)))
            parts = self.cupy.moveaxis(array, axis, 0)
            return np.stack([self.read(part) for part in parts], axis)
        with array.device:
            data = self.cupy.ndarray((high - low,), np.uint8, array.data + low).get()
        return np.ndarray(array.shape, array.dtype, data, -low, array.strides)

    def devices(self):
        return self.cupy.cuda.runtime.getDeviceCount()

    def device(self, number):
        return self.cupy.cuda.Device(number)

    def current_device(self):
        return self.cupy.cuda.runtime.getDevice()

    def device_of(self, array):
        return array.device.id

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def done(self, stream):
        return stream.done

    def synchronize(self):
        self.cupy.cuda.runtime.deviceSynchronize()

    @contextlib.contextmanager
    def busy(self, stream):
        """The stream is busy until the end of the block."""
        end = threading.Event()
        stream.launch_host_func(lambda _: end.wait(30), None)
        try:
            yield
        finally:
            end.set()

    def copy(self, target, source):
        """Queue a copy between contiguous arrays on the current stream."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def spoil(self, array):
        """Queue on the current stream that a contiguous array becomes NaN."""
        array.data.memset_async(255, array.nbytes)

    def capture(self, run):
        """Capture a graph. Return a function that launches it, and the result of `run`."""
        stream = self.stream()
        with stream:
            stream.begin_capture()
            try:
                results = run()
            finally:
                graph = stream.end_capture()
        return graph.launch, results

    def allocated_bytes(self):
        """Return the bytes that the library's allocator has handed out."""
        return self.cupy.get_default_memory_pool().used_bytes()

    def free_bytes(self):
        """Return the bytes that are free on the device."""
        return self.cupy.cuda.runtime.memGetInfo()[0]


class PyTorch:
    negative_strides = False

    def __init__(self):
        _require_gpu_build()
        try:
            import torch
        except ImportError as error:
            raise Missing("cuda", str(error)) from error
        if not torch.cuda.is_available():
            raise Missing("cuda", "PyTorch finds no device, or was built without CUDA")
        self.torch, self.Array = torch, torch.Tensor
        if not PyTorch._is_warm:
            self._warm_up()

    _is_warm = False

    def _warm_up(self):
        """Load kernels that keep a stream busy, copy and fill: loading waits for busy streams."""
        a, b = self.torch.ones(1, device="cuda"), self.torch.ones(1, device="cuda")
        a.copy_(b)
        a.fill_(float("nan"))
        self.torch.cuda._sleep(1)
        self.torch.cuda.synchronize()
        PyTorch._is_warm = True

    def place(self, array, memory="contiguous"):
        """Return a copy on the current device, in this memory layout."""
        data, view, offset = _laid_out(array, memory)
        dtype = getattr(self.torch, array.dtype.name)
        strides = [stride // array.itemsize for stride in view.strides]
        buffer = self.torch.from_numpy(data).to("cuda").view(dtype)
        return buffer.as_strided(view.shape, strides, offset // array.itemsize)

    def far_apart(self, array, axis):
        """A copy whose elements along the axis are so far apart that the last is beyond 2^31."""
        size, strides = _far_apart(array.shape, axis)
        values = self.torch.from_numpy(array.copy())
        buffer = self.torch.empty(size, dtype=values.dtype, device="cuda")
        view = buffer.as_strided(array.shape, strides)
        return view.copy_(values)

    def empty(self, shape):
        return self.torch.empty(shape, device="cuda")

    def broadcast(self, array, shape):
        return array.expand(shape)

    def read(self, tensor):
        """Return a copy on the host, of any strides."""
        tensor = tensor.cpu()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return tensor.numpy()

    def devices(self):
        return self.torch.cuda.device_count()

    def device(self, number):
        return self.torch.cuda.device(number)

    def current_device(self):
        return self.torch.cuda.current_device()

    def device_of(self, tensor):
        return tensor.device.index

    def stream(self):
        return self.torch.cuda.Stream()

    def on(self, stream):
        return self.torch.cuda.stream(stream)

    def done(self, stream):
        return stream.query()

    def synchronize(self):
        self.torch.cuda.synchronize()

    @contextlib.contextmanager
    def busy(self, stream):
        """The stream is busy for long enough: tenths of a second."""
        with self.on(stream):
            self.torch.cuda._sleep(1_000_000_000)
        yield

    def copy(self, target, source):
        """Queue a copy on the current stream."""
        target.copy_(source)

    def spoil(self, tensor):
        """Queue on the current stream that a tensor becomes NaN."""
        tensor.fill_(float("nan"))

    def capture(self, run):
        """Capture a graph. Return a function that launches it, and the result of `run`."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            results = run()
        return graph.replay, results

    def allocated_bytes(self):
        """Return the bytes that the library's allocator has handed out."""
        return self.torch.cuda.memory_allocated()

    def free_bytes(self):
        """Return the bytes that are free on the device."""
        return self.torch.cuda.mem_get_info()[0]


LIBRARIES = {"cupy": CuPy, "torch": PyTorch, "emulated": Emulated}
