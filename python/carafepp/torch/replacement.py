"""Replacement of a network's resampling layers by CARAFE++."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .modules import CARAFE

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_LAYERS = (nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, *_CONVOLUTIONS)
_FUNCTIONS = {
    F.interpolate: "F.interpolate",
    F.max_pool2d: "F.max_pool2d",
    F.avg_pool2d: "F.avg_pool2d",
}


class Replacement(NamedTuple):
    """The outcome for a resampling layer, or for a call of a resampling function.

    Attributes
    ----------
    name : str
        The name of the layer in the network.
    old : Module
    new : Module or None
        None if the layer stays.
    reason : str
        Why the layer stays, else empty.
    """

    name: str
    old: nn.Module
    new: nn.Module | None
    reason: str = ""

    def __str__(self) -> str:
        """Return the outcome in a line or, with the new module, in a few."""
        old = self.old if isinstance(self.old, _LAYERS) else type(self.old).__name__
        became = f"stays: {self.reason}" if self.new is None else f"-> {self.new}"
        return f"{self.name}: {old} {became}"


class _Call(NamedTuple):
    """The arguments of a layer's call."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    autocast: bool
    others: tuple[str, ...]


class _Declined(Exception):
    """The layer stays; the argument tells why."""


def replace_resampling(
    model: nn.Module,
    *example: Any,
    select: Callable[[str, nn.Module], bool] | str | Iterable[str] | None = None,
    **options: Any,
) -> list[Replacement]:
    """Replace resampling layers of a network by CARAFE++ with the same factor, in place.

    =====================================  ======================================================
    layer                                  replacement
    =====================================  ======================================================
    ``nn.Upsample(scale_factor=s)``        ``CARAFE(channels, up=s)``; also 1.5 or 0.5
    ``nn.MaxPool2d``, ``nn.AvgPool2d``     ``CARAFE(channels, down=stride)``
    ``nn.Conv2d`` with a stride            ``CARAFE(channels, down=stride)``, then the convolution
                                           without its stride (Figure 4), its weights kept
    ``nn.ConvTranspose2d``                 ``CARAFE(channels, up=stride)``, then a new 1x1
                                           convolution if it changed the number of channels
    =====================================  ======================================================

    Output sizes stay the same for every input. The replacement of a transposed convolution also
    takes an `output_size`. A layer stays if its sizes cannot be kept, and the report tells why. If
    something fails, the network stays as it was.

    Parameters
    ----------
    model : Module
    *example : optional
        Arguments for one call ``model(*example)``, in evaluation mode without gradients. It tells
        the channels of pooling and upsampling layers.
    select : function of (name, module), str or iterable of str, optional
        A predicate for the resampling layers to replace, or their names; by default all.
    **options
        Further arguments of every `CARAFE`: kernel_size, groups, batch_norm, ...

    Returns
    -------
    list of Replacement
        One for each selected layer, in the order of `model.named_modules()`. Then, unless `select`
        has names, one for each line that calls ``F.interpolate``, ``F.max_pool2d`` or
        ``F.avg_pool2d`` in the example. These calls stay; the reason tells what to write instead.

    Raises
    ------
    TypeError
        `select` has another type, or the layers determine an option.
    ValueError
        model itself is a resampling layer, or a name in `select` belongs to none.

    Notes
    -----
    New layers have the mode, device and dtype of the old ones. They take over hooks and added
    attributes. Layers with a forward of their own stay. So do convolutions with a computed weight
    (as by ``spectral_norm``).

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", section 4.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2))
    >>> (report,) = replace_resampling(network, torch.zeros(1, 3, 16, 16))
    >>> report.name, report.new.down
    ('1', 2)
    """
    for option in ("up", "down", "ceil_mode", "padding"):
        if option in options:
            raise TypeError(
                f"[replace_resampling] options must not have {option}, which a layer decides; "
                f"got {option}={options[option]!r}."
            )
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _LAYERS) and _resamples(module)
    }
    if "" in layers:
        raise ValueError(
            "[replace_resampling] model must be a network of layers; got a layer itself, "
            f"{model}. Put it into an nn.Sequential."
        )
    chosen = _select(layers, select)
    calls, left = _watch(model, set(chosen.values()), example) if example else (None, [])
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    made: dict[nn.Module, Replacement] = {}  # a network may use a layer twice
    for name, old in chosen.items():
        if old not in made:
            made[old] = _replace(name, old, calls, dtypes, options)
    report = [made[old]._replace(name=name) for name, old in chosen.items()]
    for name, _, new, _ in report:
        if new is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
    return report + (left if select is None or callable(select) else [])


def _select(layers: dict[str, nn.Module], select: Any) -> dict[str, nn.Module]:
    if select is None:
        return layers
    if callable(select):
        return {name: layer for name, layer in layers.items() if select(name, layer)}
    if not isinstance(select, Iterable):
        raise TypeError(
            "[replace_resampling] select must be a function, a name or names; "
            f"got {select!r} ({type(select).__name__})."
        )
    names = [select] if isinstance(select, str) else list(select)
    for name in names:
        if name not in layers:
            raise ValueError(
                f"[replace_resampling] select must name resampling layers, {', '.join(layers)}; "
                f"got {name!r}."
            )
    return {name: layer for name, layer in layers.items() if name in names}


# Facts from the example


def _watch(
    model: nn.Module, layers: set[nn.Module], example: tuple[Any, ...]
) -> tuple[dict[nn.Module, list[_Call]], list[Replacement]]:
    """Return the arguments of each layer in a call of the model, and the calls of functions."""
    calls: dict[nn.Module, list[_Call]] = {layer: [] for layer in layers}

    def record(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        known = {"output_size"} if isinstance(layer, nn.ConvTranspose2d) else set()
        others = ["more than its input"] * (len(arguments) > 1 + len(known))
        others += [f"{name}=" for name in named if name not in known]
        for x in (*arguments, *named.values()):
            if isinstance(x, Tensor):
                autocast = torch.is_autocast_enabled(x.device.type)
                calls[layer].append(_Call(x.shape, x.device, x.dtype, autocast, tuple(others)))
                break

    functions = _Functions(model)
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), functions:
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return calls, list(functions.found.values())


class _Functions(TorchFunctionMode):
    """A mode of PyTorch that finds the modules of a model that resample by functions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.found: dict[tuple[str, str], Replacement] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        x = args[0] if args else (kwargs or {}).get("input")
        if function in _FUNCTIONS and isinstance(x, Tensor) and x.dim() == 4:
            old, new = tuple(x.shape[-2:]), tuple(result.shape[-2:])
            module, line = self._caller()
            if old != new and not isinstance(module, _LAYERS):
                reason = (
                    f"it calls {_FUNCTIONS[function]} ({line}), here from {old} to {new}; "
                    + _advice(x.shape[1], old, new)
                )
                name = self.names.get(module, "")
                self.found.setdefault((name, reason), Replacement(name, module, None, reason))
        return result

    def _caller(self) -> tuple[Any, str]:
        """Return the module that calls, and the file and line where it does."""
        library = f"{Path(torch.__file__).parent}{os.sep}"
        frame, line = sys._getframe(2), ""
        while frame is not None:
            file = frame.f_code.co_filename
            if not line and not file.startswith(library):
                line = f"{Path(file).name}:{frame.f_lineno}"
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self.names:
                return module, line
            frame = frame.f_back  # type: ignore[assignment]
        return next(iter(self.names)), line


def _advice(channels: int, old: tuple[int, ...], new: tuple[int, ...]) -> str:
    """Return the call of CARAFE++ that does the same."""
    up = max(1, *(round(n / max(1, o)) for o, n in zip(old, new, strict=True)))
    down = max(1, *(round(o / max(1, n)) for o, n in zip(old, new, strict=True)))
    sizes = list(zip(old, new, strict=True))
    if up > 1 and all(abs(n - o * up) < up for o, n in sizes):
        return f"write CARAFE({channels}, up={up}), and call it with size=(H', W')"
    if down > 1 and all(n == -(-o // down) for o, n in sizes):
        return f"write CARAFE({channels}, down={down})"
    if down > 1 and all(n == o // down for o, n in sizes):
        return f"write CARAFE({channels}, down={down}, ceil_mode=False)"
    return f"write CARAFE({channels}, up=..., down=...) if it has one factor"


# New layers


class _Enlarged(CARAFE):
    """The replacement of a transposed convolution, which takes the size of its output."""

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(input, None if output_size is None else output_size[-2:])

    def _get_name(self) -> str:
        return "CARAFE"


class _EnlargedConvolved(nn.Sequential):
    """The same, and the convolution behind it."""

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        carafe, convolution = self
        output: Tensor = convolution(carafe(input, output_size))
        return output

    def _get_name(self) -> str:
        return "Sequential"


class _Convolved(nn.Sequential):
    """CARAFE++ and a convolution; later layers can be folded into it, as into the old one.

    Before inference, ultralytics folds a batch normalisation into weight and bias. Its checkpoints
    hold the name of this class.
    """

    @property
    def weight(self) -> Any:
        return self[1].weight

    @property
    def bias(self) -> Any:
        return self[1].bias

    @bias.setter
    def bias(self, bias: nn.Parameter | None) -> None:
        self[1].bias = bias

    @property
    def out_channels(self) -> Any:
        return self[1].out_channels

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self[1].register_parameter(name, param)

    def _get_name(self) -> str:
        return "Sequential"


def _replace(
    name: str,
    old: nn.Module,
    calls: dict[nn.Module, list[_Call]] | None,
    dtypes: list[torch.dtype],
    options: dict[str, Any],
) -> Replacement:
    try:
        base = _plain(old)
        factor = _factor(old)
        if calls is not None:
            for call in calls[old]:
                if call.others:
                    raise _Declined(f"it is called with {', '.join(call.others)}")
        if isinstance(old, _CONVOLUTIONS):
            new = _convolution(old, {**factor, **options})
        else:
            channels, tensor_options = _input(old, None if calls is None else calls[old], dtypes)
            new = CARAFE(channels, **{**factor, **tensor_options, **options})
    except _Declined as reason:
        return Replacement(name, old, None, str(reason))
    _carry_over(old, new, base)
    return Replacement(name, old, new.train(old.training))


def _plain(old: nn.Module) -> type[nn.Module]:
    """Return the PyTorch class of a layer, if the layer does no more than that class."""
    base: type[nn.Module] = next(cls for cls in _LAYERS if isinstance(old, cls))
    added = type(old).forward is not base.forward or type(old).__call__ is not base.__call__
    if added or (base in _CONVOLUTIONS and type(old) is not base):
        kind = "a convolution" if base in _CONVOLUTIONS else base.__name__
        raise _Declined(f"what {type(old).__name__} adds to {kind} would be lost")
    if "forward" in vars(old):
        raise _Declined("it has a forward of its own")
    for name, child in old.named_children():
        raise _Declined(f"what it contains, {name} ({type(child).__name__}), would be lost")
    return base


def _carry_over(old: nn.Module, new: nn.Module, base: type[nn.Module]) -> None:
    """Give a new layer the hooks of the old one, and attributes that its class does not have."""
    own = _like(base)

    def added(name: str) -> bool:
        free = not hasattr(new, name) or hasattr(nn.Module, name)  # which may be hidden, as before
        return free and name not in vars(own)

    for name, value in vars(old).items():
        # Hooks stay in the same dictionary, so that a handle goes on removing its own.
        if "hook" in name or added(name):
            vars(new)[name] = value
    for name, parameter in old.named_parameters(recurse=False):
        if not hasattr(own, name) and not hasattr(new, name):
            new.register_parameter(name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        if not hasattr(new, name):
            persistent = name not in old._non_persistent_buffers_set
            new.register_buffer(name, buffer, persistent=persistent)


def _like(base: type[nn.Module]) -> nn.Module:
    """Return a layer of a class as PyTorch makes it."""
    if base is nn.Upsample:
        return base(1)
    return base(1, 1, 1, device="meta") if base in _CONVOLUTIONS else base(1)


def _input(
    old: nn.Module, calls: list[_Call] | None, dtypes: list[torch.dtype]
) -> tuple[int, dict[str, Any]]:
    """Return the channels of a layer's input, and the device and dtype for parameters."""
    if isinstance(old, nn.MaxPool2d) and old.return_indices:
        raise _Declined("it returns indices")
    if calls is None:
        raise _Declined("its channels are unknown without an example")
    if not calls:
        raise _Declined("the example does not reach it")
    axes = (4,) if isinstance(old, nn.Upsample) else (3, 4)
    for call in calls:
        if len(call.shape) not in axes:
            raise _Declined(f"its input has {len(call.shape)} axes, not (N, C, H, W)")
        if not call.dtype.is_floating_point:
            raise _Declined(f"its input is of {call.dtype}")
    channels = sorted({call.shape[-3] for call in calls})
    if len(channels) > 1:
        raise _Declined(f"it serves several numbers of channels, {channels}")
    _, device, dtype, autocast, _ = calls[0]
    if autocast and dtype not in dtypes:  # which casts features, and parameters in every call
        dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    return channels[0], {"device": device, "dtype": dtype}


def _convolution(old: nn.Conv2d | nn.ConvTranspose2d, options: dict[str, Any]) -> nn.Module:
    """Return CARAFE++ and the convolution without its stride."""
    for name in ("weight", "bias"):
        value = getattr(old, name)
        if value is not None and not isinstance(value, nn.Parameter):
            raise _Declined(f"its {name} is computed, as by spectral_norm")
    tensor_options = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.ConvTranspose2d):
        enlarged = _Enlarged(old.in_channels, **{**tensor_options, **options})
        if old.in_channels == old.out_channels:
            return enlarged
        projection = nn.Conv2d(old.in_channels, old.out_channels, 1, **tensor_options)
        return _EnlargedConvolved(enlarged, projection)
    carafe = CARAFE(old.in_channels, **{**tensor_options, **options})
    spans = [d * (k - 1) for d, k in zip(old.dilation, old.kernel_size, strict=True)]
    odd = all(span % 2 == 0 for span in spans)
    convolution = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        padding=[span // 2 for span in spans] if odd else "same",
        dilation=old.dilation,
        groups=old.groups,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
        **tensor_options,
    )
    convolution.weight, convolution.bias = old.weight, old.bias
    return _Convolved(carafe, convolution)


# The factors of layers


def _resamples(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Upsample) or _pair(layer.stride) != (1, 1)


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, str):  # padding="valid", which is all that a stride allows
        return 0, 0
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _factor(layer: nn.Module) -> dict[str, Any]:
    """Return the up, down and ceil_mode that give a layer's output size for every input."""
    factors = []
    for axis in range(2):
        scale, size = _axis(layer, axis)
        up, down = scale.numerator, scale.denominator
        # Sizes repeat with the stride, unless the factor is a float that is no small fraction.
        numbers = range(1, 2**14) if isinstance(layer, nn.Upsample) else range(32, 32 + down)
        for ceil_mode in (True, False):
            rounding = down - 1 if ceil_mode else 0
            if all(size(n) == (n * up + rounding) // down for n in numbers):
                factors.append({"up": up, "down": down, "ceil_mode": ceil_mode})
                break
        else:
            raise _Declined(f"its output is not {scale} of its input in size, rounded up or down")
    if factors[0] != factors[1]:
        raise _Declined("its factors differ for rows and columns")
    return factors[0]


def _axis(layer: Any, axis: int) -> tuple[Fraction, Callable[[int], int]]:
    """Return the factor along an axis, and the size of the output as a function of the input's."""
    if isinstance(layer, nn.Upsample):
        if layer.scale_factor is None:
            raise _Declined("its output has one size for every input")
        factor = _pair(layer.scale_factor)[axis]
        return Fraction(factor).limit_denominator(16), lambda n: math.floor(n * factor)

    names = ("stride", "padding", "kernel_size", "dilation")
    numbers: list[int] = [_pair(getattr(layer, name, 1))[axis] for name in names]
    stride, padding, kernel_size, dilation = numbers
    span = dilation * (kernel_size - 1) + 1
    if isinstance(layer, nn.ConvTranspose2d):
        more = span - 2 * padding + _pair(layer.output_padding)[axis]
        return Fraction(stride), lambda n: (n - 1) * stride + more

    def shrunk(n: int) -> int:
        steps, rest = divmod(n + 2 * padding - span, stride)
        # A last window that begins beyond the input is not counted.
        more = bool(
            rest and getattr(layer, "ceil_mode", False) and (steps + 1) * stride < n + padding
        )
        return steps + 1 + more

    return Fraction(1, stride), shrunk
