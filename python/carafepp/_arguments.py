"""Checks of numbers for functions and modules, with one form of error sentence.

A value with ``__index__`` is an integer, but a bool or a tensor is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Set
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._imported import imported_class, is_tensor

if TYPE_CHECKING:
    from fractions import Fraction

NORMALIZERS = {
    "softmax": _core.SOFTMAX,
    "sigmoid": _core.SIGMOID,
    "sigmoid_normalized": _core.SIGMOID_NORMALIZED,
    "none": _core.NONE,
}


PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def index_of(value: Any) -> int | None:
    """Return an integer as an int, and None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)) or is_tensor(value):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def integer(where: str, name: str, value: Any, least: int | None = 1) -> int:
    """Return an integer from `least` to 2**31 - 1; if `least` is None, any integer."""
    number = index_of(value)
    if number is None:
        rules = {None: "an integer", 1: "a positive integer"}
        rule = rules.get(least, f"an integer from {least}")
        raise TypeError(f"[{where}] {name} must be {rule}; {_got(value)}.")
    if least is not None and number < least:
        raise ValueError(f"[{where}] {name} must be at least {least}; got {number}.")
    if least is not None and number >= 2**31:
        raise ValueError(f"[{where}] {name} must be below 2**31; got {number}.")
    return number


def positive(where: str, **values: Any) -> list[int]:
    """Return several positive integers."""
    return [integer(where, name, value) for name, value in values.items()]


def odd(where: str, name: str, value: Any) -> int:
    """Return the side of a window: odd, from 1 to 31."""
    number = index_of(value)
    if number is None:
        raise TypeError(f"[{where}] {name} must be an odd integer, from 1 to 31; {_got(value)}.")
    if not 1 <= number <= 31 or number % 2 == 0:
        raise ValueError(f"[{where}] {name} must be odd, from 1 to 31; got {number}.")
    return number


def divisible(where: str, name: str, number: int, groups_name: str, groups: int) -> None:
    """Check that a number of channels can be divided into groups."""
    if number % groups:
        raise ValueError(
            f"[{where}] {name} must be divisible by {groups_name}={groups}; got {number}."
        )


def integers(
    where: str, name: str, values: Any, rule: str, *, least: int = 0, most: int | None = None
) -> tuple[int, ...]:
    """Return `least` to `most` positive integers; `rule` says this in words."""
    numbers = _read(values, index_of)
    if numbers is None:
        raise TypeError(f"[{where}] {name} must be {rule}; {_got(values)}.")
    few, many = len(numbers) < least, most is not None and len(numbers) > most
    if few or many or min(numbers, default=1) < 1:
        raise ValueError(f"[{where}] {name} must be {rule}; got {numbers}.")
    return numbers


def pair(where: str, size: Any, names: str = "(H', W')") -> tuple[int, int]:
    """Return a size as a tuple of two integers, or of the symbols that PyTorch's graphs use."""
    if type(size) is tuple and len(size) == 2 and type(size[0]) is type(size[1]) is int:
        return size
    if not isinstance(size, (tuple, list)) and is_proxy(size):
        size = size[0], size[1]
    numbers = _read(size, _length)
    if numbers is None or len(numbers) != 2:
        raise TypeError(f"[{where}] size must be a pair {names} of integers; {_got(size)}.")
    return numbers[0], numbers[1]


def padding_pair(where: str, padding: Any, kernel_size: int | None = None) -> tuple[int, int]:
    """Return (rows, columns) of a padding, a pair or one integer; with kernel_size check them."""
    number = None if isinstance(padding, (tuple, list)) else index_of(padding)
    numbers = _read(padding, _index_or_proxy) if number is None else (number, number)
    if numbers is None or len(numbers) != 2:
        raise TypeError(
            f"[{where}] padding must be an integer or a pair (rows, columns) of integers, from 0 "
            f"to kernel_size // 2; {_got(padding)}."
        )
    if kernel_size is not None and (min(numbers) < 0 or max(numbers) > kernel_size // 2):
        raise ValueError(
            f"[{where}] padding must be from 0 to kernel_size // 2 = {kernel_size // 2}; "
            f"got {numbers}."
        )
    return numbers[0], numbers[1]


def check_normalizer(function: str, normalizer: str) -> None:
    """Raise a ValueError if there is no such normaliser."""
    if not isinstance(normalizer, str) or normalizer not in NORMALIZERS:
        raise ValueError(
            f"[{function}] normalizer must be one of {', '.join(map(repr, NORMALIZERS))}; "
            f"got {normalizer!r}."
        )


def module_options(
    *,
    channels: int,
    up: int,
    down: int,
    kernel_size: int,
    groups: int,
    compressed_channels: int | str | None,
    encoder_kernel_size: int,
    encoder_dilation: int,
    padding: int | tuple[int, int] | None,
    padding_mode: str,
    batch_norm: bool,
    normalizer: str,
    ceil_mode: bool,
) -> dict[str, Any]:
    """Return the options of a CARAFE module, of any framework, as checked values."""
    channels, up, down = positive("CARAFE", channels=channels, up=up, down=down)
    kernel_size = odd("CARAFE", "kernel_size", kernel_size)
    groups = integer("CARAFE", "groups", groups)
    if isinstance(compressed_channels, str) and compressed_channels == "auto":
        compressed_channels = 16 if down > up else 64
    elif compressed_channels is not None:
        compressed_channels = integer("CARAFE", "compressed_channels", compressed_channels)
    encoder_kernel_size = odd("CARAFE", "encoder_kernel_size", encoder_kernel_size)
    encoder_dilation = integer("CARAFE", "encoder_dilation", encoder_dilation)
    if padding is not None:
        padding = padding_pair("CARAFE", padding, kernel_size)
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"[CARAFE] padding_mode must be one of {', '.join(map(repr, PADDING_MODES))}; "
            f"got {padding_mode!r}."
        )
    divisible("CARAFE", "channels", channels, "groups", groups)
    if batch_norm and compressed_channels is None:
        raise ValueError("[CARAFE] batch_norm must be False without a compressor; got True.")
    check_normalizer("CARAFE", normalizer)
    return {
        "channels": channels,
        "up": up,
        "down": down,
        "kernel_size": kernel_size,
        "groups": groups,
        "compressed_channels": compressed_channels,
        "encoder_kernel_size": encoder_kernel_size,
        "encoder_dilation": encoder_dilation,
        "padding": padding,
        "padding_mode": padding_mode,
        "batch_norm": batch_norm,
        "normalizer": normalizer,
        "ceil_mode": ceil_mode,
    }


# Names that other libraries have for a parameter
_OTHER_NAMES = {
    "up": ("scale_factor", "scale", "factor", "up_factor", "upscale_factor", "upscale"),
    "down": ("stride", "down_factor", "downscale_factor", "downscale"),
    "kernel_size": ("kernel", "ksize", "k", "up_kernel", "k_up", "kernel_up", "reassembly_kernel"),
    "groups": ("group", "group_size", "up_group", "num_groups", "n_groups"),
    "normalizer": ("normaliser", "normalization", "activation"),
    "size": ("output_size", "out_size", "target_size"),
    "layout": ("data_format", "memory_format", "channels_last"),
    "padding": ("pad",),
    "out": ("output",),
    "channels": ("in_channels", "num_channels", "inplanes", "c"),
    "compressed_channels": ("mid_channels", "c_mid", "c_m", "compress_channels"),
    "encoder_kernel_size": ("encoder_kernel", "k_enc", "k_encoder", "kernel_encoder"),
    "encoder_dilation": ("dilation",),
}


def unexpected(function: Callable[..., Any], unknown: Mapping[str, Any]) -> TypeError:
    """Return the error for keywords that a function does not have, with the name that it has."""
    from inspect import signature

    name, value = next(iter(unknown.items()))
    parameters = [p.name for p in signature(function).parameters.values()]
    parameters = [known for known in parameters if known != "unknown"]
    meant = _meant(name, value, parameters)
    hint = f"Did you mean {meant}?" if meant else f"Its parameters are {', '.join(parameters)}."
    return TypeError(f"[{function.__name__}] got an unexpected keyword argument {name!r}. {hint}")


def _meant(name: str, value: Any, parameters: list[str]) -> str | None:
    """Return the parameter that a keyword may stand for, with its value if that changes."""
    from difflib import get_close_matches

    known = next((ours for ours, others in _OTHER_NAMES.items() if name in others), None)
    if known == "up":
        factor = _factor_of(value)
        changed = {} if factor is None else {"up": factor.numerator, "down": factor.denominator}
        changed = {ours: number for ours, number in changed.items() if number > 1}
        if changed.keys() - set(parameters):
            return None
        if changed:
            return " and ".join(f"{ours}={number}" for ours, number in changed.items())
    if known in parameters:
        return known
    return next(iter(get_close_matches(name, parameters, 1)), None)


def _factor_of(value: Any) -> Fraction | None:
    """Return a number, or the number that a pair repeats, as a ratio of small integers."""
    from fractions import Fraction

    try:
        if isinstance(value, (tuple, list)) and len(set(value)) == 1:
            value = value[0]
        factor = Fraction(value).limit_denominator(64)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return factor if factor > 0 and abs(factor - Fraction(value)) < 1e-6 * factor else None


def check_reach(where: str, size: Any, natural: Any, up: int) -> None:
    """Raise a ValueError if a size exceeds the natural one by `up` or more."""
    most = natural[0] + up - 1, natural[1] + up - 1
    if not (0 <= size[0] <= most[0] and 0 <= size[1] <= most[1]):
        raise ValueError(
            f"[{where}] size must be from (0, 0) to {most}, the natural size "
            f"{tuple(natural)} and less than up={up} more; got {tuple(size)}."
        )


def natural_size(
    size: tuple[int, int],
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,  # as in the functions of logits
    padding: tuple[int, int] | None = None,
    **_: Any,
) -> tuple[int, int]:
    """Return `output_size` without checks."""
    height, width = size
    if padding is not None:
        rows, columns = padding
        height = _not_negative(height + 2 * (rows - kernel_size // 2))
        width = _not_negative(width + 2 * (columns - kernel_size // 2))
    return (height * up + down - 1) // down, (width * up + down - 1) // down


def is_proxy(value: Any) -> bool:
    """Tell whether a trace of torch.fx has put this object in the place of a value."""
    return hasattr(value, "__torch_function__") and not is_tensor(value)


def _read(values: Any, read: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """Return the integers of a sequence or of an array with one axis; None for anything else."""
    if not isinstance(values, (tuple, list)):
        if not _is_row(values):
            return None
        if hasattr(values, "tolist") and not _is_traced(values):
            try:
                values = values.tolist()
            except TypeError:  # JAX traces it
                return None
    numbers = tuple([read(value) for value in values])
    return None if any([number is None for number in numbers]) else numbers


def _is_row(values: Any) -> bool:
    """Tell whether an object that is no tuple or list has values in an order."""
    if isinstance(values, (str, bytes, bytearray, Set, Mapping)):
        return False
    ordered = hasattr(type(values), "__len__") and hasattr(type(values), "__getitem__")
    return ordered and getattr(values, "ndim", 1) == 1


def _index_or_proxy(value: Any) -> Any:
    number = index_of(value)
    return value if number is None and is_proxy(value) else number


def _length(value: Any) -> Any:
    """Return an entry of a size: an integer, a symbol or, in a PyTorch trace, a scalar tensor."""
    if type(value) is int:  # torch.compile can follow this branch only
        return value
    if is_tensor(value):
        kind = value.dtype
        numbers = str(kind) != "torch.bool" and not kind.is_floating_point and not kind.is_complex
        return value if numbers and value.dim() == 0 and _is_traced(value) else None
    if type(value) is imported_class("torch", "SymInt") or is_proxy(value):
        return value
    return index_of(value)


def _not_negative(length: Any) -> Any:
    """Return max(0, length) of an integer, or of a symbol of a graph."""
    if type(length) is int:
        return max(0, length)
    if is_tensor(length):
        return length.clamp(min=0)
    return sys.modules["torch"].sym_max(length, 0)


def _is_traced(value: Any) -> bool:
    return is_tensor(value) and bool(sys.modules["torch"].jit.is_tracing())


def _got(value: Any) -> str:
    return f"got {value!r} ({type(value).__name__})"
