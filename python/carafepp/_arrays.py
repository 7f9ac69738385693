"""Framework facts: which library an array is of, how the core reads it, how one like it is made.

No framework is imported here: an array of one only comes in when somebody else has imported it.

A call does not wait for its work on a GPU, so arrays may be freed while it is still queued. For
CuPy and PyTorch that is safe: it is queued on the stream by which they order their memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from . import _core

# Their arrays speak DLPack but must never be written to.
_IMMUTABLE = ("jax", "jaxlib", "tensorflow")


class NumPy:
    """NumPy arrays, those of ml_dtypes' bfloat16 included."""

    @staticmethod
    def view(function: str, name: str, array: Any) -> Any:
        """Return what `_core` takes for an array."""
        if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"[{function}] {name} must not be a masked array: its mask would be lost."
            )
        dtype = array.dtype
        if dtype.kind == "V" and dtype.name == "bfloat16":  # which NumPy does not export
            return array.view(np.uint16), _core.BFLOAT16
        return array

    @staticmethod
    def empty(function: str, like: Any, shape: tuple[int, ...]) -> Any:
        """Return an uninitialised result, in C order whatever order `like` has."""
        return np.empty(shape, like.dtype)

    @staticmethod
    def stream(array: Any) -> int:
        """Return the CUDA stream that work on an array belongs on: of no meaning on the CPU."""
        return 0


class PyTorch:
    """PyTorch tensors that hold data of their own."""

    @staticmethod
    def view(function: str, name: str, array: Any) -> Any:
        """Return what `_core` takes for a tensor: a capsule, cheaper than its `__dlpack__`."""
        torch = sys.modules["torch"]
        if array.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"[{function}] {name} must not require grad: what is written to out has no "
                "gradient. Call without out, or under torch.no_grad()."
            )
        if type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(
                f"[{function}] {name} must be a tensor with data of its own; "
                f"got {type(array).__name__}."
            )
        if array.is_neg():  # a sign that only PyTorch's own functions know of
            raise ValueError(f"[{function}] {name} must hold its values; call its resolve_neg().")
        try:
            return torch.to_dlpack(array)
        except (RuntimeError, BufferError) as error:
            raise TypeError(
                f"[{function}] {name} must be a dense tensor with data of its own; "
                f"got one on {array.device} with layout {array.layout}, of which PyTorch says: "
                f"{error}"
            ) from error

    @staticmethod
    def empty(function: str, like: Any, shape: tuple[int, ...]) -> Any:
        """Return an uninitialised result, channels_last if `like` unambiguously is."""
        if len(shape) == 4 and _is_channels_last(like.shape, like.stride()):
            torch = sys.modules["torch"]
            return torch.empty(
                shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
            )
        return like.new_empty(shape)

    @staticmethod
    def stream(array: Any) -> int:
        """Return PyTorch's current stream on the tensor's device."""
        if not array.is_cuda:
            return 0
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)


def _is_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether pixels of several adjacent channels follow each other, in rows."""
    _, c, h, w = shape
    _, stride_c, stride_h, stride_w = strides
    if c == 1 or h * w == 1 or stride_c != 1:
        return False
    return (w == 1 or stride_w >= c) and (h == 1 or stride_h >= (stride_w * w if w > 1 else c))


class CuPy:
    """CuPy arrays."""

    @staticmethod
    def view(function: str, name: str, array: Any) -> Any:
        """Return what `_core` takes for an array: a capsule that orders no streams.

        The work goes on the stream that CuPy's own is on. Asked without a stream, CuPy would order
        it with the legacy default stream, which a graph that is being captured forbids.
        """
        return array.__dlpack__(stream=-1)

    @staticmethod
    def empty(function: str, like: Any, shape: tuple[int, ...]) -> Any:
        """Return an uninitialised result on the device of `like`, in C order."""
        with like.device:
            return sys.modules["cupy"].empty(shape, like.dtype)

    @staticmethod
    def stream(array: Any) -> int:
        """Return CuPy's current stream on the array's device."""
        return int(sys.modules["cupy"].cuda.get_current_stream(array.device.id).ptr)


class DLPack:
    """Arrays of any other library that speaks DLPack."""

    @staticmethod
    def view(function: str, name: str, array: Any) -> Any:
        """Return what `_core` takes for an array: itself, or for a CUDA array a capsule."""
        device_type, _ = array.__dlpack_device__()
        if device_type not in (_core.CUDA, _core.CUDA_MANAGED):
            return array
        legacy_default = 1  # what DLPack calls it
        try:  # version 1 tells whether the array is read-only
            return array.__dlpack__(stream=legacy_default, max_version=(1, 0))
        except TypeError:
            return array.__dlpack__(stream=legacy_default)

    @staticmethod
    def empty(function: str, like: Any, shape: tuple[int, ...]) -> Any:
        """Return an uninitialised result from the array's own namespace."""
        return like.__array_namespace__().empty(shape, dtype=like.dtype, device=like.device)

    @staticmethod
    def stream(array: Any) -> int:
        """Return the legacy default stream, in CUDA's terms; the library has ordered its own."""
        return 0


Library = type[NumPy] | type[PyTorch] | type[CuPy] | type[DLPack]


def imported_class(package: str, name: str) -> type | None:
    """Return a class of a package that somebody has imported: not half, lazily or as a mock."""
    try:  # by object, so that no __getattr__ imports what nobody has asked for
        cls = object.__getattribute__(sys.modules.get(package), name)
    except AttributeError:
        return None
    return cls if isinstance(cls, type) else None


def is_tensor(array: Any) -> bool:
    """Tell whether something is a PyTorch tensor."""
    if type(array) is np.ndarray:
        return False
    tensor = imported_class("torch", "Tensor")
    return tensor is not None and isinstance(array, tensor)


def are_tensors(arrays: Iterable[Any]) -> bool:
    """Tell whether arrays are PyTorch's: tensors, or what stands for them, as in a trace of fx."""
    return all([type(array) is not np.ndarray and _is_for_torch(array) for array in arrays])


def _is_for_torch(array: Any) -> bool:
    # PyTorch 2.5 compiles the first as False.
    return hasattr(array, "__torch_function__") or type(array).__module__.split(".")[0] == "torch"


def check_writable(function: str, tensors: Mapping[str, Any]) -> None:
    """Refuse a tensor that PyTorch would not let its own functions change."""
    for name, tensor in tensors.items():
        if tensor.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
            raise RuntimeError(
                f"[{function}] {name} must not be an inference tensor outside of "
                "torch.inference_mode(); got one. Pass a clone of it."
            )


def check_no_tangents(function: str, arrays: Mapping[str, Any]) -> None:
    """Refuse tensors with a forward-mode derivative, which the result would not have."""
    for name, array in arrays.items():
        if not is_tensor(array):
            continue
        if sys.modules["torch"].autograd.forward_ad.unpack_dual(array).tangent is not None:
            raise NotImplementedError(
                f"[{function}] {name} must not have a tangent: what is written to out has none. "
                "Call without out."
            )


def note_changes(tensors: Iterable[Any]) -> None:
    """Tell autograd that tensors were written, as PyTorch's own functions do."""
    sys.modules["torch"].autograd.graph.increment_version(tensors)


def library_of(function: str, inputs: Mapping[str, Any], results: Mapping[str, Any]) -> Library:
    """Return the one library that all arrays of a call are of. Results may be None: to be made."""
    arrays = {**inputs, **{name: array for name, array in results.items() if array is not None}}
    for array in arrays.values():
        if type(array) is not np.ndarray:
            break
    else:
        return NumPy

    first = next(iter(inputs))
    library, package = _recognise(function, first, inputs[first])
    for name, array in arrays.items():
        if type(array) is type(inputs[first]):
            continue
        _, other_package = _recognise(function, name, array)
        if other_package != package:
            raise TypeError(
                f"[{function}] {name} must be an array of the library of {first}, {package}; "
                f"got one of {other_package}."
            )
    if library is DLPack:
        _check_results(function, package, inputs[first], results)
    return library


def _recognise(function: str, name: str, array: Any) -> tuple[Library, str]:
    """Return the library of one array, and the name of its package."""
    if isinstance(array, np.ndarray):
        return NumPy, "numpy"
    if is_tensor(array):
        return PyTorch, "torch"
    cupy_array = imported_class("cupy", "ndarray")
    if cupy_array is not None and isinstance(array, cupy_array):
        return CuPy, "cupy"
    cls = type(array)
    if hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__"):
        return DLPack, cls.__module__.partition(".")[0]
    raise TypeError(
        f"[{function}] {name} must be an array: of NumPy, PyTorch or another library that speaks "
        f"DLPack; got {cls.__name__}."
    )


def _check_results(function: str, package: str, like: Any, results: Mapping[str, Any]) -> None:
    """Check that results can be written, and made where none are given."""
    if package in _IMMUTABLE:
        raise TypeError(
            f"[{function}] arrays of {package} are immutable, so that no result can be written "
            "into one. Pass NumPy arrays."
        )
    if not hasattr(like, "__array_namespace__") and None in results.values():
        raise TypeError(
            f"[{function}] out must be given: {type(like).__name__} has no __array_namespace__ "
            "that a result could come from."
        )
