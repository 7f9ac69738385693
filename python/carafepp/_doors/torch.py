"""PyTorch tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .._imported import is_tensor
from .door import FUNCTIONS, Door, not_an_array


class PyTorch(Door):
    """PyTorch, whose own operators compute unless `out` is given (`carafepp.torch.operators`)."""

    cast = "{}.to(torch.{})"

    def recognise(self, array: Any) -> str | None:
        """Return "torch" for a tensor and for all that PyTorch takes for one, as in traces."""
        if type(array).__module__.partition(".")[0] == "torch":
            return "torch"
        if not hasattr(array, "__torch_function__"):
            return None
        # An array of another library may have both protocols.
        return "torch" if is_tensor(array) or not hasattr(type(array), "__dlpack__") else None

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return a capsule: it costs less than the tensor's `__dlpack__`."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(array, torch.Tensor):
            raise not_an_array(function, name, array)
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
        if array.is_neg():  # only PyTorch's own functions know this sign
            raise ValueError(f"[{function}] {name} must hold its values; call its resolve_neg().")
        try:
            return torch.to_dlpack(array)
        except (RuntimeError, BufferError) as error:
            raise TypeError(
                f"[{function}] {name} must be a dense tensor with data of its own; "
                f"got one on {array.device} with layout {array.layout}, of which PyTorch says: "
                f"{error}"
            ) from error

    def empty(self, function: str, like: Any, shape: Sequence[int]) -> Any:
        """Return an uninitialised result, channels_last if `like` unambiguously is."""
        usual = len(shape) != 4 or (like.is_contiguous() and like.numel() > 0)
        if not usual and _is_channels_last(like.shape, like.stride()):
            torch = sys.modules["torch"]
            return torch.empty(
                shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
            )
        return like.new_empty(shape)

    def stream(self, array: Any) -> int:
        """Return PyTorch's current stream on the tensor's device."""
        if not array.is_cuda:
            return 0
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)

    def call(
        self,
        function: str,
        inputs: tuple[Any, ...],
        params: Mapping[str, Any],
        out: tuple[Any, ...] = (None, None),
        needed: tuple[bool, ...] = (True, True),
    ) -> tuple[Any, ...]:
        """Call PyTorch's operators. With `out`, compute and report the written tensors."""
        for result in out:
            if result is not None:
                break
        else:
            from carafepp.torch import operators  # a relative import costs more in each call

            return operators.call(function, inputs, params, needed)

        spec = FUNCTIONS[function]
        given = {
            name: result for name, result in zip(spec.out, out, strict=True) if result is not None
        }
        _check_writable(function, given)
        _check_no_tangents(function, {**dict(zip(spec.inputs, inputs, strict=True)), **given})
        results = self.compute(function, inputs, params, out, needed)
        sys.modules["torch"].autograd.graph.increment_version(given.values())
        return results


def _is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether pixels of several adjacent channels follow each other, row after row."""
    _, c, h, w = shape
    _, stride_c, stride_h, stride_w = strides
    if c == 1 or h * w == 1 or stride_c != 1:
        return False
    return (w == 1 or stride_w >= c) and (h == 1 or stride_h >= (stride_w * w if w > 1 else c))


def _check_writable(function: str, results: Mapping[str, Any]) -> None:
    """Refuse a tensor that PyTorch's own functions must not change either."""
    for name, tensor in results.items():
        if not is_tensor(tensor):
            raise not_an_array(function, name, tensor)
        if tensor.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
            raise RuntimeError(
                f"[{function}] {name} must not be an inference tensor outside of "
                "torch.inference_mode(); got one. Pass a clone of it."
            )


def _check_no_tangents(function: str, arrays: Mapping[str, Any]) -> None:
    """Refuse tensors with a forward-mode derivative: the result would lose it."""
    for name, array in arrays.items():
        if not is_tensor(array):
            raise not_an_array(function, name, array)
        if sys.modules["torch"].autograd.forward_ad.unpack_dual(array).tangent is not None:
            raise NotImplementedError(
                f"[{function}] {name} must not have a tangent: what is written to out has none. "
                "Call without out."
            )
