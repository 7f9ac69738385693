"""NumPy arrays, and those of ml_dtypes' bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from .. import _core
from .door import Door

CACHE_LINE = 64  # bytes; np.empty begins in the middle of one
LARGE = 1 << 22  # bytes; stores of larger results pass by the caches, and want whole lines


class NumPy(Door):
    """NumPy."""

    cast = "{}.astype(np.{})"

    def recognise(self, array: Any) -> str | None:
        """Return "numpy" for a NumPy array, subclasses included."""
        return "numpy" if isinstance(array, np.ndarray) else None

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return the array; a bfloat16 array as 16-bit integers with the core's dtype."""
        if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"[{function}] {name} must not be a masked array: its mask would be lost."
            )
        dtype = array.dtype
        if dtype.kind == "V" and dtype.name == "bfloat16":  # NumPy does not export it
            return array.view(np.uint16), _core.BFLOAT16
        return array

    def view_of_shape(self, function: str, name: str, shape: Sequence[int], dtype: Any) -> Any:
        """Return a view in C order with memory for one element, for checks that read none."""
        one = np.empty(1, dtype)
        strides = [one.itemsize * prod(shape[k + 1 :]) for k in range(len(shape))]
        return self.view(function, name, np.lib.stride_tricks.as_strided(one, shape, strides))

    def empty(self, function: str, like: Any, shape: Sequence[int]) -> Any:
        """Return an uninitialised result in C order; a large one begins at a cache line.

        The large one is a view: it does not own its memory.
        """
        dtype = like.dtype
        size = prod(shape) * dtype.itemsize
        if size < LARGE:
            return np.empty(shape, dtype)
        memory = np.empty(size + CACHE_LINE, np.uint8)
        begin = -memory.ctypes.data % CACHE_LINE
        return memory[begin : begin + size].view(dtype).reshape(shape)

    def stream(self, array: Any) -> int:
        """Return 0: the CPU has no streams."""
        return 0
