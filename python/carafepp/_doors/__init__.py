"""The array libraries that carafepp knows, each behind a door (`door.Door`).

To add a library, write a file with its door here, and add the door to `DOORS`. No library is
imported before an array of it comes in.

A call does not wait for its work on a GPU. An array may be freed while the work is queued, as its
library orders memory by the same stream. With DLPack alone the caller keeps arrays until then.
"""

from __future__ import annotations

from typing import Any

from .cupy import CuPy
from .dask import Dask
from .dlpack import DLPack
from .door import FUNCTIONS, Door, not_an_array
from .jax import JAX
from .numpy import NumPy
from .torch import PyTorch

# The first door that recognises an array takes it; the last one takes all that speak DLPack.
DOORS: tuple[Door, ...] = (NumPy(), PyTorch(), CuPy(), Dask(), JAX(), DLPack())


def call(
    function: str,
    inputs: tuple[Any, ...],
    params: dict[str, Any],
    out: tuple[Any, ...],
    needed: tuple[bool, ...] = (True, True),
) -> tuple[Any, ...]:
    """Return the results of a function by the library of its arrays (`Door.call`)."""
    return door_of(function, inputs, out).call(function, inputs, params, out, needed)


def door_of(function: str, inputs: tuple[Any, ...], out: tuple[Any, ...]) -> Door:
    """Return the door of the library that all arrays belong to; those of `out` may be None."""
    first = inputs[0]
    for door in DOORS:
        library = door.recognise(first)
        if library is not None:
            break
    else:
        raise not_an_array(function, FUNCTIONS[function].inputs[0], first)
    for array in inputs:
        if type(array) is not type(first):
            return _checked(door, library, function, inputs, out)
    for array in out:
        if array is not None and type(array) is not type(first):
            return _checked(door, library, function, inputs, out)
    return door


def _checked(
    door: Door, library: str, function: str, inputs: tuple[Any, ...], out: tuple[Any, ...]
) -> Door:
    """Return the door, if every array belongs to the library."""
    spec = FUNCTIONS[function]
    named = [*zip(spec.inputs, inputs, strict=True)]
    named += [(name, array) for name, array in zip(spec.out, out, strict=True) if array is not None]
    for name, array in named:
        for other_door in DOORS:
            other = other_door.recognise(array)
            if other is not None:
                break
        else:
            raise not_an_array(function, name, array)
        if other != library:
            raise TypeError(
                f"[{function}] {name} must be an array of the library of {spec.inputs[0]}, "
                f"{library}; got one of {other}."
            )
    return door
