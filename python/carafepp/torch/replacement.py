"""Puts CARAFE++ in the place of a network's resampling layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from .modules import CARAFE

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_LAYERS = (nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, *_CONVOLUTIONS)


class Replacement(NamedTuple):
    """What became of one resampling layer.

    Attributes
    ----------
    name : str
        Its name in the network.
    old : Module
    new : Module or None
        None where it stays.
    reason : str
        Why it stays, else empty.
    """

    name: str
    old: nn.Module
    new: nn.Module | None
    reason: str = ""

    def __str__(self) -> str:
        """Tell it in a line or, with the new module, a few."""
        became = f"stays: {self.reason}" if self.new is None else f"-> {self.new}"
        return f"{self.name}: {self.old} {became}"


class _Input(NamedTuple):
    """What a layer that does not know its channels is called with."""

    channels: int
    device: torch.device
    dtype: torch.dtype


class _Declined(Exception):
    """A layer stays; the argument says why."""


def replace_resampling(
    model: nn.Module,
    *example: Any,
    select: Callable[[str, nn.Module], bool] | Sequence[str] | None = None,
    **options: Any,
) -> list[Replacement]:
    """Replace resampling layers of a network by CARAFE++, in place, each by one of its own factor.

    =====================================  ======================================================
    layer                                  becomes
    =====================================  ======================================================
    ``nn.Upsample(scale_factor=s)``        ``CARAFE(channels, up=s)``; also 1.5 or 0.5
    ``nn.MaxPool2d``, ``nn.AvgPool2d``     ``CARAFE(channels, down=stride)``
    ``nn.Conv2d`` with a stride            ``CARAFE(channels, down=stride)``, then the convolution
                                           without its stride (Figure 4), its weights kept
    ``nn.ConvTranspose2d``                 ``CARAFE(channels, up=stride)``, then a new 1x1
                                           convolution if it changed the number of channels
    =====================================  ======================================================

    Output sizes stay what they were, for every input. Layers for which that cannot be stay as they
    are, and the report says why.

    Parameters
    ----------
    model : Module
    *example : optional
        Arguments of a call ``model(*example)``, made once in evaluation mode without gradients, to
        learn the channels of pooling and upsampling layers, which only their input tells.
    select : function of (name, module), or sequence of str, optional
        Which resampling layers to replace, by a predicate or by their names; all, by default.
    **options
        Further arguments of every `CARAFE`: kernel_size, groups, batch_norm, ...

    Returns
    -------
    list of Replacement
        One for each layer that was selected, in the order of `model.named_modules()`.

    Raises
    ------
    ValueError
        model is itself a resampling layer, or a name in `select` is that of none.

    Notes
    -----
    New layers are in the mode, on the device and of the dtype of the old ones. What a network does
    by functions, as ``F.interpolate``, is not seen.

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
    inputs = _record_inputs(model, set(chosen.values()), example) if example else None
    made: dict[nn.Module, Replacement] = {}  # a layer may stand in several places
    report = []
    for name, old in chosen.items():
        if old not in made:
            made[old] = _replace(name, old, inputs, options)
        new = made[old].new
        if new is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        report.append(made[old]._replace(name=name))
    return report


def _select(
    layers: dict[str, nn.Module], select: Callable[[str, nn.Module], bool] | Sequence[str] | None
) -> dict[str, nn.Module]:
    if select is None:
        return layers
    if callable(select):
        return {name: layer for name, layer in layers.items() if select(name, layer)}
    for name in select:
        if name not in layers:
            raise ValueError(
                f"[replace_resampling] select must name resampling layers, {', '.join(layers)}; "
                f"got {name!r}."
            )
    return {name: layer for name, layer in layers.items() if name in select}


def _record_inputs(
    model: nn.Module, layers: set[nn.Module], example: tuple[Any, ...]
) -> dict[nn.Module, set[_Input]]:
    """Return what each layer is called with in a call of the model."""
    inputs: dict[nn.Module, set[_Input]] = {layer: set() for layer in layers}

    def record(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        (x,) = arguments
        inputs[layer].add(_Input(x.shape[-3], x.device, x.dtype))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return inputs


def _replace(
    name: str,
    old: nn.Module,
    inputs: dict[nn.Module, set[_Input]] | None,
    options: dict[str, Any],
) -> Replacement:
    try:
        factor = _factor(old)
        if isinstance(old, _CONVOLUTIONS):
            new = _convolution(old, {**factor, **options})
        else:
            channels, device, dtype = _input(old, inputs)
            new = CARAFE(channels, **{**factor, "device": device, "dtype": dtype, **options})
    except _Declined as reason:
        return Replacement(name, old, None, str(reason))
    return Replacement(name, old, new.train(old.training))


def _input(old: nn.Module, inputs: dict[nn.Module, set[_Input]] | None) -> _Input:
    """Return the one kind of input that a layer is called with."""
    if isinstance(old, nn.MaxPool2d) and old.return_indices:
        raise _Declined("it returns indices")
    if inputs is None:
        raise _Declined("its channels are unknown without an example")
    channels = sorted({x.channels for x in inputs[old]})
    if not channels:
        raise _Declined("the example does not reach it")
    if len(channels) > 1:
        raise _Declined(f"it serves several numbers of channels, {channels}")
    return next(iter(inputs[old]))


def _convolution(old: nn.Conv2d | nn.ConvTranspose2d, options: dict[str, Any]) -> nn.Module:
    """Return CARAFE++ and the convolution that is left when it resamples no more."""
    if type(old) not in _CONVOLUTIONS:
        raise _Declined(f"what {type(old).__name__} adds to a convolution would be lost")
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    carafe = CARAFE(old.in_channels, **{**place, **options})
    if isinstance(old, nn.ConvTranspose2d):
        if old.in_channels == old.out_channels:
            return carafe
        return nn.Sequential(carafe, nn.Conv2d(old.in_channels, old.out_channels, 1, **place))
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
        **place,
    )
    convolution.weight, convolution.bias = old.weight, old.bias
    return nn.Sequential(carafe, convolution)


# The factors of layers


def _resamples(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Upsample) or _pair(layer.stride) != (1, 1)


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, str):  # padding="valid", which is all that a stride allows
        return 0, 0
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _factor(layer: nn.Module) -> dict[str, Any]:
    """Return up, down and ceil_mode that give a layer's output sizes, whatever its input."""
    factors = []
    for axis in range(2):
        scale, size = _axis(layer, axis)
        up, down = scale.numerator, scale.denominator
        for ceil_mode in (True, False):
            rounding = down - 1 if ceil_mode else 0
            if all(size(n) == (n * up + rounding) // down for n in range(32, 32 + down)):
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
        scale = Fraction(_pair(layer.scale_factor)[axis]).limit_denominator(16)
        return scale, lambda n: n * scale.numerator // scale.denominator

    names = ("stride", "padding", "kernel_size", "dilation")
    numbers: list[int] = [_pair(getattr(layer, name, 1))[axis] for name in names]
    stride, padding, kernel_size, dilation = numbers
    span = dilation * (kernel_size - 1) + 1
    if isinstance(layer, nn.ConvTranspose2d):
        more = span - 2 * padding + _pair(layer.output_padding)[axis]
        return Fraction(stride), lambda n: (n - 1) * stride + more

    def shrunk(n: int) -> int:
        steps, rest = divmod(n + 2 * padding - span, stride)
        # A last window that begins outside of what is there is not counted.
        more = bool(
            rest and getattr(layer, "ceil_mode", False) and (steps + 1) * stride < n + padding
        )
        return steps + 1 + more

    return Fraction(1, stride), shrunk
