"""The functions of carafepp as operators of PyTorch: ``torch.ops.carafepp.*``.

An operator has a kernel (a function of `carafepp.ops`, for tensors that hold data), the result of
tensors that hold none, a derivative, and rules for vmap and autocast. Derivatives are made of the
same operators, and so can be derived again: the reassembly is linear in features and in masks, and
its two gradients are defined by

    <reassemble(V, M), D> = <V, grad_features(D, M)> = <M, grad_masks(D, V)>.

Only the second derivative of the normaliser is composed of PyTorch's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from .. import ops
from .._arrays import PyTorch

Needs = tuple[bool, ...]
Gradients = tuple[Tensor | None, ...]

_library = torch.library.Library("carafepp", "DEF")
_operators: dict[str, Any] = {}


def _define(
    schema: str,
    kernel: Callable[..., Tensor],
    result: Callable[..., Tensor],
    derivative: Callable[..., Gradients],
    *,
    cast: bool = False,
) -> Any:
    """Register an operator and return it.

    An operator takes tensors first and parameters by name; of these, only such as differ from
    their default come through. ``derivative(needs, grad, *tensors, **params)`` returns a gradient
    for each tensor that needs one. cast says that autocast has a dtype for the two tensors.
    """
    name = schema.partition("(")[0]
    # A compiler must not change strides: the result's memory format follows those of an argument.
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    _library.define(schema, tags=tags)
    operator = _operators[name] = getattr(torch.ops.carafepp, name).default
    names = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]

    def forward(ctx: Any, params: dict[str, Any], *tensors: Tensor) -> Any:
        ctx.params = params
        ctx.save_for_backward(*tensors)
        if not torch._C._are_functorch_transforms_active():
            return below(*tensors, **params)
        with torch.enable_grad():  # which apply has off, for the outer levels of torch.func
            return below(*tensors, **params)

    def backward(ctx: Any, grad: Tensor) -> Gradients:
        needs = ctx.needs_input_grad[1:]
        return None, *derivative(needs, grad, *ctx.saved_tensors, **ctx.params)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    grad_fn = name.title().replace("_", "")  # is what autograd names it by
    # Function's apply would hand torch.func's tensors over to machinery of its own. Here the
    # dispatcher has already come down to one level, for which its base class is enough.
    function: Any = type(grad_fn, (_SingleLevelFunction,), methods)
    apply = function.apply

    def below(*tensors: Tensor, **params: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, **params)

    def autograd(*tensors: Tensor, **params: Any) -> Any:
        differentiated = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
        # apply refuses forward mode, where a tangent would be lost.
        if not differentiated and torch.autograd.forward_ad._current_level < 0:
            return below(*tensors, **params)
        if not torch._C._are_functorch_transforms_active():
            return apply(params, *tensors)
        with enable_single_level_autograd_function():
            return apply(params, *tensors)

    def fake(*tensors: Tensor, **params: Any) -> Tensor:
        # The dispatcher comes here if one tensor holds no data, whatever the others do.
        (first, device), *others = zip(names, [tensor.device for tensor in tensors], strict=True)
        for other, its_device in others:
            if its_device != device:
                raise ValueError(
                    f"[{name}] {other} must be on the device of {first} ({device}); "
                    f"got {its_device}."
                )
        return result(*tensors, **params)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"carafepp::{name}", fake, lib=_library)
    torch.library.register_vmap(f"carafepp::{name}", partial(_vmap, operator), lib=_library)
    if cast:
        for device in ("CPU", "CUDA"):
            _library.impl(name, partial(_autocast, operator, device), f"Autocast{device}")
    return operator


def _vmap(
    operator: Any, info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor, **params: Any
) -> tuple[Tensor, int]:
    """Fold vmap's axis into the batch, which every argument and result has first, if at all."""
    leading = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    if leading[0].dim() < 5:  # of single images
        return operator(*leading, **params), 0
    batches = leading[0].shape[:2]
    result = operator(*(tensor.flatten(0, 1) for tensor in leading), **params)
    return result.unflatten(0, batches), 0


def _autocast(operator: Any, device: str, features: Tensor, masks: Tensor, **params: Any) -> Any:
    """Cast features to autocast's dtype, and masks or logits too unless they are float32.

    float64 and what is no number of this kind are left alone, as by PyTorch's own operators.
    """
    if features.is_floating_point() and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.lower())
        features = features.to(dtype)
        if masks.is_floating_point() and masks.dtype != torch.float32:
            masks = masks.to(dtype)
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return operator(features, masks, **params)


# What operators do with data.


def _forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of `carafepp.ops` as it is for the arrays of other libraries."""
    return function.__wrapped__  # type: ignore[attr-defined, no-any-return]


def _gradient(function: Callable[..., Any], index: int, other: str) -> Callable[..., Tensor]:
    """Return a function for one of the results of a backward, without that for the other."""
    backward = _forward(function)

    def kernel(*tensors: Tensor, **params: Any) -> Tensor:
        return backward(*tensors, **{f"need_{other}": False}, **params)[index]

    return kernel


# What they do without: results of the right shape and strides.


def natural_size(size: tuple[int, int], up: int = 1, down: int = 1, **_: Any) -> tuple[int, int]:
    """Return `carafepp.output_size` of numbers that may be symbols of a graph."""
    height, width = size
    return (height * up + down - 1) // down, (width * up + down - 1) // down


def _size(tensor: Tensor, *, layout: str = "NCHW", **_: Any) -> tuple[int, int]:
    height, width = tensor.shape[-2:] if layout == "NCHW" else tensor.shape[-3:-1]
    return height, width


def _resized(
    like: Tensor, size: tuple[int, int], *, shrink: int = 1, layout: str = "NCHW", **_: Any
) -> Tensor:
    if layout == "NCHW":
        return PyTorch.empty("", like, (*like.shape[:-3], like.shape[-3] // shrink, *size))
    return PyTorch.empty("", like, (*like.shape[:-3], *size, like.shape[-1] // shrink))


def _reassembled(features: Tensor, masks: Tensor, *, size: Any = None, **params: Any) -> Tensor:
    return _resized(features, size or natural_size(_size(features, **params), **params), **params)


def _normalized(logits: Tensor, *, size: Any = None, up: int = 1, **params: Any) -> Tensor:
    size = size or natural_size(_size(logits, **params), up)
    return _resized(logits, size, shrink=up**2, **params)


def _like(index: int) -> Callable[..., Tensor]:
    def gradient(*tensors: Tensor, **_: Any) -> Tensor:
        return PyTorch.empty("", tensors[index], tensors[index].shape)

    return gradient


# Derivatives. Those of the functions with logits read like those with masks, but for grad_logits.


def _derive_output(name: str, masks: str) -> Callable[..., Gradients]:
    def derivative(
        needs: Needs, grad: Tensor, *inputs: Tensor, size: Any = None, **params: Any
    ) -> Gradients:
        names = (f"{name}_grad_features", f"{name}_grad_{masks}")
        return tuple(
            _operators[name](grad, *inputs, **params) if needed else None
            for name, needed in zip(names, needs, strict=True)
        )

    return derivative


def _derive_grad_features(name: str, masks: str) -> Callable[..., Gradients]:
    def derivative(
        needs: Needs, grad: Tensor, grad_output: Tensor, _: Tensor, masks_: Tensor, **params: Any
    ) -> Gradients:
        size = _size(grad_output, **params)
        reassemble, grad_masks = _operators[name], _operators[f"{name}_grad_{masks}"]
        return (
            reassemble(grad, masks_, size=size, **params) if needs[0] else None,
            None,
            grad_masks(grad_output, grad, masks_, **params) if needs[2] else None,
        )

    return derivative


def _derive_grad_masks(
    needs: Needs, grad: Tensor, grad_output: Tensor, features: Tensor, _: Tensor, **params: Any
) -> Gradients:
    size = _size(grad_output, **params)
    return (
        reassemble(features, grad, size=size, **params) if needs[0] else None,
        reassemble_grad_features(grad_output, features, grad, **params) if needs[1] else None,
        None,
    )


def _derive_grad_logits(
    needs: Needs, grad: Tensor, grad_output: Tensor, features: Tensor, logits: Tensor, **params: Any
) -> Gradients:
    normalizer = {key: params[key] for key in params if key != "down"}
    factors = {key: params[key] for key in params if key not in ("kernel_size", "normalizer")}

    def grad_logits(grad_output: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        masks = normalize_masks(logits, size=_size(grad_output, **params), **normalizer)
        grad_masks = reassemble_grad_masks(grad_output, features, masks, **factors)
        return normalize_masks_backward(grad_masks, logits, **normalizer)

    gradients: Gradients = torch.func.vjp(grad_logits, grad_output, features, logits)[1](grad)
    return gradients


def _derive_normalize_masks(
    needs: Needs, grad: Tensor, logits: Tensor, *, size: Any = None, **params: Any
) -> Gradients:
    return (normalize_masks_backward(grad, logits, **params),)


def _derive_normalize_masks_backward(
    needs: Needs, grad: Tensor, grad_masks: Tensor, logits: Tensor, **params: Any
) -> Gradients:
    masks = partial(_normalize, size=_size(grad_masks, **params), **params)

    def grad_logits(grad_masks: Tensor, logits: Tensor) -> Tensor:
        return torch.func.vjp(masks, logits)[1](grad_masks)[0]

    gradients: Gradients = torch.func.vjp(grad_logits, grad_masks, logits)[1](grad)
    return gradients


def _normalize(
    logits: Tensor,
    *,
    size: tuple[int, int],
    up: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: str = "softmax",
    layout: str = "NCHW",
) -> Tensor:
    """Return the masks, by functions of PyTorch."""
    if layout == "NHWC":
        logits = logits.movedim(-1, -3)
    # Not by pixel_shuffle, whose derivative of an empty batch has a wrong shape.
    taps = logits.unflatten(-3, (groups, kernel_size**2, up, up)).movedim((-4, -3), (-3, -1))
    taps = taps.flatten(-4, -3).flatten(-2, -1)[..., : size[0], : size[1]]
    if normalizer == "sigmoid":
        taps = taps.sigmoid()
    elif normalizer != "none":
        taps = (F.logsigmoid(taps) if normalizer == "sigmoid_normalized" else taps).softmax(-3)
    masks = taps.flatten(-4, -3)
    return masks.movedim(-3, -1) if layout == "NHWC" else masks


# The operators


_FACTORS = "*, int up=1, int down=1, int groups=1, "
_NORMALIZER = 'int kernel_size=5, str normalizer="softmax", '
_SIZE = "SymInt[2]? size=None, "
_END = 'str layout="NCHW") -> Tensor'
_BACKWARD = "(Tensor grad_output, Tensor features, Tensor "

reassemble = _define(
    f"reassemble(Tensor features, Tensor masks, {_FACTORS}{_SIZE}{_END}",
    _forward(ops.reassemble),
    _reassembled,
    _derive_output("reassemble", "masks"),
    cast=True,
)
reassemble_grad_features = _define(
    f"reassemble_grad_features{_BACKWARD}masks, {_FACTORS}{_END}",
    _gradient(ops.reassemble_backward, 0, "masks"),
    _like(1),
    _derive_grad_features("reassemble", "masks"),
)
reassemble_grad_masks = _define(
    f"reassemble_grad_masks{_BACKWARD}masks, {_FACTORS}{_END}",
    _gradient(ops.reassemble_backward, 1, "features"),
    _like(2),
    _derive_grad_masks,
)
reassemble_with_logits = _define(
    f"reassemble_with_logits(Tensor features, Tensor logits, {_FACTORS}{_NORMALIZER}{_SIZE}{_END}",
    _forward(ops.reassemble_with_logits),
    _reassembled,
    _derive_output("reassemble_with_logits", "logits"),
    cast=True,
)
reassemble_with_logits_grad_features = _define(
    f"reassemble_with_logits_grad_features{_BACKWARD}logits, {_FACTORS}{_NORMALIZER}{_END}",
    _gradient(ops.reassemble_with_logits_backward, 0, "logits"),
    _like(1),
    _derive_grad_features("reassemble_with_logits", "logits"),
)
reassemble_with_logits_grad_logits = _define(
    f"reassemble_with_logits_grad_logits{_BACKWARD}logits, {_FACTORS}{_NORMALIZER}{_END}",
    _gradient(ops.reassemble_with_logits_backward, 1, "features"),
    _like(2),
    _derive_grad_logits,
)
normalize_masks = _define(
    f"normalize_masks(Tensor logits, *, int up=1, int groups=1, {_NORMALIZER}{_SIZE}{_END}",
    _forward(ops.normalize_masks),
    _normalized,
    _derive_normalize_masks,
)
normalize_masks_backward = _define(
    "normalize_masks_backward(Tensor grad_masks, Tensor logits, *, int up=1, int groups=1, "
    f"{_NORMALIZER}{_END}",
    _forward(ops.normalize_masks_backward),
    _like(1),
    _derive_normalize_masks_backward,
)


def reassemble_backward(
    *inputs: Tensor, need_features: bool = True, need_masks: bool = True, **params: Any
) -> Gradients:
    """Return the gradients of `reassemble` that are needed, each by an operator."""
    return (
        reassemble_grad_features(*inputs, **params) if need_features else None,
        reassemble_grad_masks(*inputs, **params) if need_masks else None,
    )


def reassemble_with_logits_backward(
    *inputs: Tensor, need_features: bool = True, need_logits: bool = True, **params: Any
) -> Gradients:
    """Return the gradients of `reassemble_with_logits` that are needed, each by an operator."""
    return (
        reassemble_with_logits_grad_features(*inputs, **params) if need_features else None,
        reassemble_with_logits_grad_logits(*inputs, **params) if need_logits else None,
    )
