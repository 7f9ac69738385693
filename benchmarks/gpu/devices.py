"""Devices for arrays and calls: a GPU, or the host in a rehearsal.

A device puts NumPy arrays into its memory, and `given` returns such an array as carafepp takes it.
On the host, ml_dtypes has bfloat16.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cases import numpy_dtype

from .dlpack import Relabelled

NAN_BYTE = 255  # a NaN of every dtype


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array that every library takes: bfloat16 as uint16."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class TorchGpu:
    """PyTorch's tensors on the first GPU."""

    calls = 16  # fewest calls in a graph
    samples = 7
    spin = 0.06  # seconds of work until the clocks settle
    sample_seconds = 4e-3

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("PyTorch finds no GPU; --rehearse runs without one")
        self.torch = torch
        self.name = "cuda"
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.memory = torch.cuda.get_device_properties(0).total_memory
        self._nvml = _nvml()

    def put(self, array: np.ndarray) -> Any:
        """Return a copy on the device."""
        tensor = self.torch.from_numpy(np.array(bits(array), order="C")).to(self.name)
        return tensor.view(getattr(self.torch, array.dtype.name))

    def get(self, tensor: Any) -> np.ndarray:
        """Return a copy on the host."""
        tensor = tensor.cpu()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.uint16).numpy().view(numpy_dtype("bfloat16"))
        return tensor.numpy()

    def nans(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of NaN."""
        return self.torch.full(
            shape, float("nan"), dtype=getattr(self.torch, dtype), device=self.name
        )

    def given(self, tensor: Any) -> Any:
        """Return the tensor as carafepp takes it: unchanged."""
        return tensor

    def synchronize(self) -> None:
        """Wait for all work; raise the errors of earlier work."""
        if self.name == "cuda":
            self.torch.cuda.synchronize()

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture the work of a call in a CUDA graph, without a warm-up; return its replay."""
        cuda = self.torch.cuda
        graph, stream = cuda.CUDAGraph(), cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            graph.capture_begin()
            try:
                call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the call's error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        cuda.current_stream().wait_stream(stream)
        return graph.replay

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the seconds of the work that a call queues."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def clock(self) -> int | None:
        """Return the clock of the multiprocessors in MHz, or None if no library tells it."""
        return self._nvml() if self._nvml else None


def _nvml() -> Callable[[], int] | None:
    """Return a function that reads the clock in a millisecond; nvidia-smi takes longer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:
        return None
    return lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)


class TorchHost(TorchGpu):
    """PyTorch's CPU tensors, labelled as CUDA arrays for emulated kernels."""

    calls, samples, spin, sample_seconds = 1, 1, 0.0, 0.0

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.name = "cpu"
        self.cache = 1 << 12
        self.memory = 1 << 30

    def given(self, tensor: Any) -> Any:
        """Return the tensor's memory, labelled as a CUDA array."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            tensor = tensor.view(self.torch.uint16)
        return Relabelled(tensor.numpy(), dtype, on_cuda=True)

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the call: there are no graphs."""
        return call

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the seconds of a call."""
        from ..timing import wall_time

        return wall_time(call)

    def clock(self) -> None:
        """Return None: there is no GPU."""
        return


class CuPyGpu:
    """CuPy's arrays; each is an allocation, so that a sanitizer knows where it ends.

    CuPy loads in a second and brings no kernels of its own, so that a watched process stays fast.
    """

    def __init__(self) -> None:
        import cupy

        cupy.cuda.set_allocator(None)
        self.cupy = cupy

    def put(self, array: np.ndarray) -> Any:
        """Return a copy on the device."""
        return self._named(self.cupy.asarray(bits(array)), array.dtype.name)

    def nans(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of NaN."""
        array = self.cupy.empty(shape, bits(np.empty(0, numpy_dtype(dtype))).dtype)
        array.data.memset(NAN_BYTE, array.nbytes)
        return self._named(array, dtype)

    def _named(self, array: Any, dtype: str) -> Any:
        return Relabelled(array, dtype, on_cuda=False) if dtype == "bfloat16" else array

    def given(self, array: Any) -> Any:
        """Return the array as carafepp takes it: unchanged."""
        return array

    def get(self, array: Any) -> np.ndarray:
        """Return a copy on the host."""
        if isinstance(array, Relabelled):
            return array.array.get().view(numpy_dtype(array.dtype))
        return array.get()

    def synchronize(self) -> None:
        """Wait for all work; raise the errors of earlier work."""
        self.cupy.cuda.runtime.deviceSynchronize()

    def profile(self, call: Callable[[], Any]) -> None:
        """Run a call under the profiler."""
        self.cupy.cuda.profiler.start()
        call()
        self.synchronize()
        self.cupy.cuda.profiler.stop()


class NumPyHost:
    """NumPy arrays labelled as CUDA arrays; a rehearsal has them in the place of CuPy's."""

    def put(self, array: np.ndarray) -> Any:
        """Return a copy."""
        return Relabelled(bits(array).copy(), array.dtype.name, on_cuda=True)

    def nans(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of NaN."""
        array = bits(np.empty(shape, numpy_dtype(dtype)))
        array.view(np.uint8)[...] = NAN_BYTE
        return Relabelled(array, dtype, on_cuda=True)

    def given(self, array: Any) -> Any:
        """Return the array as carafepp takes it: unchanged."""
        return array

    def get(self, array: Any) -> np.ndarray:
        """Return the array in its dtype."""
        return array.array.view(numpy_dtype(array.dtype))

    def synchronize(self) -> None:
        """Return at once: all calls have ended."""

    def profile(self, call: Callable[[], Any]) -> None:
        """Run a call."""
        call()
