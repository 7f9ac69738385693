"""CuPy arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .._imported import imported_class
from .door import Door


class CuPy(Door):
    """CuPy."""

    cast = "{}.astype(cupy.{})"

    def recognise(self, array: Any) -> str | None:
        """Return "cupy" for a CuPy array, subclasses included."""
        cls = imported_class("cupy", "ndarray")
        return "cupy" if cls is not None and isinstance(array, cls) else None

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return a capsule that orders no streams.

        The work goes on CuPy's own current stream. Without ``stream=-1``, CuPy would order it with
        the legacy default stream. A graph capture forbids this.
        """
        return array.__dlpack__(stream=-1)

    def empty(self, function: str, like: Any, shape: Sequence[int]) -> Any:
        """Return an uninitialised result on the device of `like`, in C order."""
        with like.device:
            return sys.modules["cupy"].empty(shape, like.dtype)

    def stream(self, array: Any) -> int:
        """Return CuPy's current stream on the array's device."""
        return int(sys.modules["cupy"].cuda.get_current_stream(array.device.id).ptr)
