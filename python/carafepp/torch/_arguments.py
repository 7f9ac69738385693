"""Checks of what modules are made and called with: one rule and one form of sentence for all."""

from __future__ import annotations

from collections.abc import Mapping, Set
from operator import index
from typing import Any

import torch
from torch import Tensor


def integer(where: str, name: str, value: Any, least: int = 1) -> int:
    """Return an integer that is at least `least`, of any type that has ``__index__``."""
    rule = "a positive integer" if least == 1 else f"an integer from {least}"
    number = _index(value)
    if number is None:
        raise TypeError(f"[{where}] {name} must be {rule}; {_got(value)}.")
    if number < least:
        raise ValueError(f"[{where}] {name} must be at least {least}; got {number}.")
    return number


def positive(where: str, **values: Any) -> list[int]:
    """Return several positive integers."""
    return [integer(where, name, value) for name, value in values.items()]


def odd(where: str, name: str, value: Any) -> int:
    """Return the side of a window: odd, from 1 to 31."""
    number = _index(value)
    if number is None:
        raise TypeError(f"[{where}] {name} must be an odd integer, from 1 to 31; {_got(value)}.")
    if not 1 <= number <= 31 or number % 2 == 0:
        raise ValueError(f"[{where}] {name} must be odd, from 1 to 31; got {number}.")
    return number


def integers(
    where: str, name: str, values: Any, rule: str, *, least: int = 0, most: int | None = None
) -> tuple[int, ...]:
    """Return positive integers, from `least` to `most` of them; rule says so in words."""
    numbers = None if _unordered(values) else [_index(value) for value in values]
    if numbers is None or None in numbers:
        raise TypeError(f"[{where}] {name} must be {rule}; {_got(values)}.")
    checked = tuple(number for number in numbers if number is not None)
    few, many = len(checked) < least, most is not None and len(checked) > most
    if few or many or min(checked, default=1) < 1:
        raise ValueError(f"[{where}] {name} must be {rule}; got {checked}.")
    return checked


def pair(where: str, name: str, value: Any) -> tuple[int, int]:
    """Return a size: two integers from 0, in a sequence or an array of two.

    Its numbers may be symbols of a graph and, while PyTorch traces, tensors that hold one integer.
    """
    numbers = None
    if not _unordered(value):
        parts = value.tolist() if _eager_tensor(value) and value.dim() == 1 else value
        numbers = [_symbol(part) for part in parts]
    if numbers is None or len(numbers) != 2 or None in numbers:
        raise TypeError(f"[{where}] {name} must be a pair of integers (H', W'); {_got(value)}.")
    return numbers[0], numbers[1]


def _got(value: Any) -> str:
    return f"got {value!r} ({type(value).__name__})"


def _index(value: Any) -> int | None:
    if type(value) is int:
        return value
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def _symbol(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, Tensor) and torch.jit.is_tracing():
        integral = not value.is_floating_point() and value.dtype != torch.bool
        return value if integral and value.dim() == 0 else None
    return _index(value)


def _eager_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not torch.jit.is_tracing()


def _unordered(value: Any) -> bool:
    """Tell whether something is no row of values: not iterable, without an order, or a word."""
    if isinstance(value, (str, bytes, Set, Mapping)) or not hasattr(value, "__len__"):
        return True
    return getattr(value, "ndim", 1) != 1
