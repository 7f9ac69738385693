"""Places of arrays, and how calls on them are timed: a GPU, or the host in a rehearsal.

A device puts NumPy arrays into its memory, and `given` returns what carafepp takes of that.
bfloat16 arrays are those of ml_dtypes on the host.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cases import numpy_dtype

from .dlpack import Relabelled

NAN_BYTE = 255  # a NaN of every dtype


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array that every library takes: bfloat16 as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class TorchGpu:
    """PyTorch's tensors on the first GPU."""

    calls = 16  # at least, in one graph
    samples = 7
    spin = 0.06  # seconds of work before a measurement, for the clocks to settle
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

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of NaN."""
        return self.torch.full(
            shape, float("nan"), dtype=getattr(self.torch, dtype), device=self.name
        )

    def given(self, tensor: Any) -> Any:
        """Return what carafepp takes: the tensor itself."""
        return tensor

    def synchronize(self) -> None:
        """Wait for all work; errors of earlier work are raised here."""
        if self.name == "cuda":
            self.torch.cuda.synchronize()

    def is_lost(self) -> bool:
        """Tell whether an error made the device unusable for this process."""
        try:
            self.synchronize()
            if self.name == "cuda":
                self.torch.cuda.empty_cache()  # fails for good after a capture that broke off
        except RuntimeError:
            return True
        return False

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture what a call queues in a CUDA graph, without a warm-up; return its replay."""
        cuda = self.torch.cuda
        graph, stream = cuda.CUDAGraph(), cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            graph.capture_begin()
            try:
                call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the error of the call says more
                    graph.capture_end()
                raise
            graph.capture_end()
        cuda.current_stream().wait_stream(stream)
        return graph.replay

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the time of the work that a call queues."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def clock(self) -> int | None:
        """Return the clock of the multiprocessors in MHz, where it can be asked for."""
        return self._nvml() if self._nvml else None


def _nvml() -> Callable[[], int] | None:
    """Return a function that reads the clock in a millisecond; nvidia-smi would take many."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:
        return None
    return lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)


class TorchHost(TorchGpu):
    """PyTorch's CPU tensors, given to carafepp as CUDA arrays: the kernels are emulated."""

    calls, samples, spin, sample_seconds = 1, 1, 0.0, 0.0

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.name = "cpu"
        self.cache = 1 << 12
        self.memory = 1 << 30

    def given(self, tensor: Any) -> Any:
        """Return the tensor's memory under the name of a CUDA array."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            tensor = tensor.view(self.torch.uint16)
        return Relabelled(tensor.numpy(), dtype, on_cuda=True)

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the call: there are no graphs."""
        return call

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the time of a call."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def clock(self) -> None:
        """Return None: the clock of a GPU is meant."""
        return


class CuPyGpu:
    """CuPy's arrays, each an allocation of its own, so that a sanitizer sees both of its ends.

    CuPy loads in a second and brings no kernels of its own: tools that watch a process are fast.
    """

    def __init__(self) -> None:
        import cupy

        cupy.cuda.set_allocator(None)
        self.cupy = cupy

    def put(self, array: np.ndarray) -> Any:
        """Return a copy on the device."""
        return self._named(self.cupy.asarray(bits(array)), array.dtype.name)

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of NaN."""
        array = self.cupy.empty(shape, bits(np.empty(0, numpy_dtype(dtype))).dtype)
        array.data.memset(NAN_BYTE, array.nbytes)
        return self._named(array, dtype)

    def _named(self, array: Any, dtype: str) -> Any:
        return Relabelled(array, dtype, on_cuda=False) if dtype == "bfloat16" else array

    def given(self, array: Any) -> Any:
        """Return what carafepp takes: the array itself."""
        return array

    def get(self, array: Any) -> np.ndarray:
        """Return a copy on the host."""
        if isinstance(array, Relabelled):
            return array.array.get().view(numpy_dtype(array.dtype))
        return array.get()

    def synchronize(self) -> None:
        """Wait for all work; errors of earlier work are raised here."""
        self.cupy.cuda.runtime.deviceSynchronize()

    def profile(self, call: Callable[[], Any]) -> None:
        """Run a call where a profiler looks."""
        self.cupy.cuda.profiler.start()
        call()
        self.synchronize()
        self.cupy.cuda.profiler.stop()


class NumPyHost:
    """NumPy arrays under the name of CUDA arrays, in a rehearsal in the place of CuPy's."""

    def put(self, array: np.ndarray) -> Any:
        """Return a copy."""
        return Relabelled(bits(array).copy(), array.dtype.name, on_cuda=True)

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of NaN."""
        array = bits(np.empty(shape, numpy_dtype(dtype)))
        array.view(np.uint8)[...] = NAN_BYTE
        return Relabelled(array, dtype, on_cuda=True)

    def given(self, array: Any) -> Any:
        """Return what carafepp takes: the array itself."""
        return array

    def get(self, array: Any) -> np.ndarray:
        """Return the array in its dtype."""
        return array.array.view(numpy_dtype(array.dtype))

    def synchronize(self) -> None:
        """Return: calls have ended."""

    def profile(self, call: Callable[[], Any]) -> None:
        """Run a call."""
        call()


def timed(device: TorchGpu, call: Callable[[], Any]) -> tuple[list[float], list[int | None]]:
    """Return samples of the seconds that a call takes, and the clocks before and after them.

    The same work goes before the samples, for the clocks to settle.
    """
    call()
    once = max(device.seconds(call), 1e-7)
    end = time.perf_counter() + device.spin
    while time.perf_counter() < end:
        once = min(once, device.seconds(call))
    rounds = max(1, int(device.sample_seconds / once))

    def sample() -> None:
        for _ in range(rounds):
            call()

    clock = device.clock()
    samples = [device.seconds(sample) / rounds for _ in range(device.samples)]
    return samples, [clock, device.clock()]


def copy_bandwidth(device: TorchGpu, writes: int) -> float:
    """Return the bytes a second of a copy that reads one part and writes so many."""
    torch = device.torch
    rows = (1 << 30 if device.name == "cuda" else 1 << 16) // (1 + writes) // 4096
    source = torch.ones(rows, 1, 1024, device=device.name)
    target = torch.empty(rows, writes, 1024, device=device.name)
    samples, _ = timed(device, lambda: target.copy_(source.expand_as(target)))
    return (source.nbytes + target.nbytes) / statistics.median(samples)
