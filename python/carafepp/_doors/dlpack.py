"""Arrays of every other library that speaks DLPack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import _core
from .door import Door

_LEGACY_DEFAULT_STREAM = 1  # in DLPack's terms


class DLPack(Door):
    """A library that the class of an array names."""

    def recognise(self, array: Any) -> str | None:
        """Return the top package of the class of an array that speaks DLPack."""
        cls = type(array)
        if hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__"):
            return cls.__module__.partition(".")[0]
        return None

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return the array; for a CUDA array a capsule, ordered before the legacy stream."""
        device_type, _ = array.__dlpack_device__()
        if device_type not in (_core.CUDA, _core.CUDA_MANAGED):
            return array
        try:  # version 1 tells whether the array is read-only
            return array.__dlpack__(stream=_LEGACY_DEFAULT_STREAM, max_version=(1, 0))
        except TypeError:
            return array.__dlpack__(stream=_LEGACY_DEFAULT_STREAM)

    def empty(self, function: str, like: Any, shape: Sequence[int]) -> Any:
        """Return an uninitialised result from the array's own namespace."""
        return like.__array_namespace__().empty(shape, dtype=like.dtype, device=like.device)

    def stream(self, array: Any) -> int:
        """Return the legacy default stream, in CUDA's terms."""
        return 0

    def call(
        self,
        function: str,
        inputs: tuple[Any, ...],
        params: Mapping[str, Any],
        out: tuple[Any, ...] = (None, None),
        needed: tuple[bool, ...] = (True, True),
    ) -> tuple[Any, ...]:
        """Compute, if results can be made and written."""
        like = inputs[0]
        if self.recognise(like) == "tensorflow":
            raise TypeError(
                f"[{function}] arrays of tensorflow are immutable, so that no result can be "
                "written into one. Pass NumPy arrays."
            )
        made = [need and result is None for result, need in zip(out, needed, strict=False)]
        if any(made) and not hasattr(like, "__array_namespace__"):
            raise TypeError(
                f"[{function}] out must be given: {type(like).__name__} has no __array_namespace__ "
                "that a result could come from."
            )
        return self.compute(function, inputs, params, out, needed)
