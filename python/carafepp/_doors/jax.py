"""JAX arrays, inside and outside of jit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .._imported import imported_class
from .dlpack import DLPack
from .door import FUNCTIONS


class JAX(DLPack):
    """JAX."""

    def recognise(self, array: Any) -> str | None:
        """Return "jax" for an array, and for a value that JAX traces."""
        cls = imported_class("jax", "Array")
        return "jax" if cls is not None and isinstance(array, cls) else None

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return the array; of one that JAX traces, a view of its shape and dtype."""
        if isinstance(array, sys.modules["jax"].core.Tracer):
            from carafepp.jax import operators

            return operators.view(function, name, array)
        return super().view(function, name, array)

    def call(
        self,
        function: str,
        inputs: tuple[Any, ...],
        params: Mapping[str, Any],
        out: tuple[Any, ...] = (None, None),
        needed: tuple[bool, ...] = (True, True),
    ) -> tuple[Any, ...]:
        """Call the functions that XLA can compile."""
        for name, result in zip(FUNCTIONS[function].out, out, strict=True):
            if result is not None:
                raise TypeError(
                    f"[{function}] {name} must be None for JAX arrays, which are immutable; "
                    f"got {type(result).__name__}."
                )
        from carafepp.jax import operators

        return operators.call(function, inputs, params, needed)
