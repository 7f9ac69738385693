"""The functions of carafepp as operators of PyTorch: ``torch.ops.carafepp.*``.

An operator has an eager kernel (`Door.compute`) and a fake kernel, for tensors without data. It has
a derivative, and rules for vmap and autocast. Derivatives consist of the same operators, and so
have derivatives themselves. The reassembly is linear in features and in masks. Its gradients are
defined by

    <reassemble(V, M), D> = <V, grad_features(D, M)> = <M, grad_masks(D, V)>.

A normaliser's Jacobian is symmetric, so one operator serves reverse and forward mode. The Jacobian
of sigmoid_normalized is not symmetric: the derivative treats it as the softmax of logsigmoid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from math import isqrt
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from .._arguments import integer, is_proxy, natural_size, padding_pair, pair
from .._doors.door import FUNCTIONS, not_an_array, params_of
from .._doors.torch import PyTorch
from . import compositions, dtensor
from .compositions import size_of
from .flops import (
    count_normalize_masks,
    count_normalize_masks_backward,
    count_reassemble,
    count_reassemble_backward,
    count_reassemble_with_logits,
    count_reassemble_with_logits_backward,
)

try:  # the public API cannot express derivatives inside torch.func
    from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd
    from torch._functorch.autograd_function import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError:
    _SingleLevelFunction = None

try:  # no public API tells that a call needs nothing but its kernel
    from torch._C import (
        _get_tracing_state,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import is_legacy_batchedtensor
    from torch.autograd import _profiler_enabled

    _knows_plain = _SingleLevelFunction is not None
except ImportError:
    _knows_plain = False

Needs = tuple[bool, ...]
Gradients = tuple[Tensor | None, ...]

if "_library" not in globals():  # the registrations must outlive a reload
    _library = torch.library.Library("carafepp", "FRAGMENT")
_door = PyTorch()
_operators: dict[str, Any] = {}
_compositions: dict[str, Callable[..., Tensor]] = {}
flop_formulas: dict[str, Callable[..., int]] = {}
_on_shards: dict[str, Callable[..., Tensor]] = {}

_DEVICES = ("cpu", "cuda", "meta")  # where the core computes, and tensors without data

# The type and the default of each parameter in the operators' schemas
_PARAMS: dict[str, tuple[str, Any]] = {
    "up": ("int", 1),
    "down": ("int", 1),
    "groups": ("int", 1),
    "kernel_size": ("int", 5),
    "normalizer": ("str", "softmax"),
    "size": ("SymInt[2]?", None),
    "layout": ("str", "NCHW"),
    "padding": ("int[2]?", None),
}


def _define(
    name: str,
    tensors: str,
    params: str,
    computes: tuple[str, int],
    result: Callable[..., Tensor],
    derivative: Callable[..., Gradients],
    *,
    pushes: tuple[Callable[..., Tensor] | None, ...],
    flops: Callable[..., int],
    composition: Callable[..., Tensor],
    cast: bool = False,
) -> Any:
    """Register an operator and return it. After a reload, return the registered one.

    Parameters are positional, because AOTInductor miscounts keyword-only ones. PyTorch omits the
    last parameters if they have their defaults. Append a new parameter at the end: exported
    programs then stay valid.

    computes
        A function of the core, and the index of its result that the operator returns.
    result
        Returns the result for tensors without data.
    derivative
        ``derivative(needs, grad, *tensors, **params)`` returns a gradient for each tensor that
        needs one.
    pushes
        For each tensor, ``push(tangent, *tensors, **params)`` returns the tangent of the result;
        None if the operator is linear in that tensor.
    composition
        Computes the same with operators of PyTorch.
    cast
        If true, autocast casts the two tensors.
    """
    names = tensors.split()
    keys = params.split()
    count = len(names)

    def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any, **more: Any) -> Any:
            if len(args) == count:
                return function(*args, **more)
            return function(*args[:count], **dict(zip(keys, args[count:], strict=False)), **more)

        return named

    defaults = {key: _PARAMS[key][1] for key in keys}

    def composed(*tensors: Tensor, **params: Any) -> Tensor:
        _check(computes[0], tensors, {**defaults, **params})
        return composition(*tensors, **params)

    kernel = _kernel(*computes, defaults, composed)
    if _SingleLevelFunction is None:
        kernel, result = _without_tangents(name, kernel), _without_tangents(name, result)
    flop_formulas[name] = by_name(flops)
    _compositions[name] = by_name(composition)
    if hasattr(torch.ops.carafepp, name):
        operator = _operators[name] = getattr(torch.ops.carafepp, name).default
        return operator
    # A compiler must not change strides: the result takes its memory format from an argument.
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    arguments = [f"Tensor {tensor}" for tensor in names]
    for key in keys:
        kind, default = _PARAMS[key]
        arguments.append(f"{kind} {key}=" + (f'"{default}"' if kind == "str" else str(default)))
    _library.define(f"{name}({', '.join(arguments)}) -> Tensor", tags=tags)
    operator = _operators[name] = getattr(torch.ops.carafepp, name).default

    def fake(*tensors: Tensor, **params: Any) -> Tensor:
        # The dispatcher comes here if any tensor holds no data.
        (first, device), *others = zip(names, [tensor.device for tensor in tensors], strict=True)
        for other, its_device in others:
            if its_device != device:
                raise ValueError(
                    f"[{name}] {other} must be on the device of {first} ({device}); "
                    f"got {its_device}."
                )
        return result(*tensors, **params)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        result: tuple[Tensor, int] = by_name(partial(_vmap, operator, info, in_dims[:count]))(*args)
        return result

    _library.impl(name, by_name(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"carafepp::{name}", by_name(fake), lib=_library)
    torch.library.register_vmap(f"carafepp::{name}", vmap, lib=_library)
    if _SingleLevelFunction is None:
        _register_autograd(name, count, keys, derivative)
    else:
        autograd = _autograd(operator, count, keys, derivative, pushes, by_name(composed))
        _library.impl(name, autograd, "Autograd")
    if cast:
        for device in ("cpu", "cuda", "mps", "xpu"):
            autocast = by_name(partial(_autocast, operator, device))
            _library.impl(name, autocast, f"Autocast{device.upper()}")
    register_flop_formula(getattr(torch.ops.carafepp, name))(flop_formulas[name])
    _on_shards[name] = by_name(partial(dtensor.compute_on_shards, operator, result, name, names))
    return operator


def _autograd(
    operator: Any,
    count: int,
    keys: list[str],
    derivative: Callable[..., Gradients],
    pushes: tuple[Callable[..., Tensor] | None, ...],
    composition: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Return the function that the dispatcher calls for a possible derivative."""

    def forward(ctx: Any, grad_enabled: bool, args: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.params = dict(zip(keys, args, strict=False))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        if not _are_functorch_transforms_active():
            return below(*tensors, *args)
        # Function.apply switches both modes off, but the outer levels of torch.func need them.
        with torch.set_grad_enabled(grad_enabled), _set_fwd_grad_enabled(True):
            return below(*tensors, *args)

    def backward(ctx: Any, grad: Tensor) -> Gradients:
        needs = ctx.needs_input_grad[2:]
        return None, None, *derivative(needs, grad, *ctx.saved_tensors, **ctx.params)

    def jvp(ctx: Any, *_: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):  # PyTorch switches it off before it calls jvp
            return push(*ctx.saved_tensors, **ctx.params)

    def push(*tensors: Tensor, **params: Any) -> Tensor:
        duals = [forward_ad.unpack_dual(tensor, level=0) for tensor in tensors]
        primals = [dual.primal for dual in duals]
        changes = []
        for k, (change, (_, tangent)) in enumerate(zip(pushes, duals, strict=True)):
            if tangent is not None and change is not None:
                changes.append(change(tangent, *primals, **params))
            elif tangent is not None:  # linear
                changes.append(operator(*primals[:k], tangent, *primals[k + 1 :], **params))
        return sum(changes[1:], changes[0])

    methods = {f.__name__: staticmethod(f) for f in (forward, backward, jvp)}
    grad_fn = operator.name().rpartition(":")[2].title().replace("_", "")  # autograd's name for it
    # autograd.Function would process the levels of torch.func itself. The dispatcher has already
    # come down to one level, and the base class handles a single level.
    function: Any = type(grad_fn, (_SingleLevelFunction,), methods)
    apply = function.apply

    def below(*args: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            return operator(*args)

    def traced(tensors: tuple[Tensor, ...]) -> bool:
        """Tell whether tensors may belong to a compiler, which hides its forward-mode level."""
        return not all([type(tensor) in (Tensor, Parameter) for tensor in tensors])

    def autograd(*args: Any) -> Any:
        tensors = args[:count]
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(torch.is_grad_enabled(), args[count:], *tensors)
        if _has_no_kernel(tensors):  # PyTorch derives from the composition
            return composition(*args)
        grad_enabled = torch.is_grad_enabled()
        differentiated = grad_enabled and any([t.requires_grad for t in tensors])
        if differentiated or getattr(forward_ad, "_current_level", 0) >= 0 or traced(tensors):
            return apply(grad_enabled, args[count:], *tensors)
        return below(*args)

    return autograd


def _has_no_kernel(tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether only PyTorch's own operators can compute: elsewhere, or in an ONNX graph."""
    device = tensors[0].device.type
    if device not in _DEVICES:
        _warn_of_device(device)
        return True
    exported: bool = torch.onnx.is_in_onnx_export()
    return exported


def _check(function: str, tensors: tuple[Tensor, ...], params: Mapping[str, Any]) -> None:
    """Let the core refuse arguments of a composition by their shapes and dtypes."""
    if all([type(tensor) in (Tensor, Parameter) for tensor in tensors]):  # no trace
        views = tuple(torch.empty(1, dtype=tensor.dtype).expand(tensor.shape) for tensor in tensors)
        _door._check_inputs(function, views, params_of(function, **params))


@cache
def _warn_of_device(device: str) -> None:
    warnings.warn(
        f"carafepp has no kernels for {device}: PyTorch's own operators compute there. They are "
        "slower and take more memory.",
        stacklevel=2,
    )


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """Return the compositions of all operators, for ``ExportedProgram.run_decompositions``.

    The program then has no operator of carafepp, so exporters that know PyTorch's operators alone
    take it (ONNX, ExecuTorch, Core ML). Halves are summed in float32.

    Examples
    --------
    >>> import torch, carafepp.torch
    >>> upsample = carafepp.torch.CARAFE(8, up=2).eval()
    >>> program = torch.export.export(upsample, (torch.zeros(1, 8, 4, 4),))
    >>> program = program.run_decompositions(carafepp.torch.decompositions())
    >>> any("carafepp" in str(node.target) for node in program.graph.nodes)
    False
    """
    return {_operators[name]: composition for name, composition in _compositions.items()}


def _without_tangents(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Refuse forward mode, because `_register_autograd` would lose tangents."""

    def checked(*tensors: Tensor, **params: Any) -> Tensor:
        if forward_ad.unpack_dual(tensors[0]).primal is not tensors[0]:  # inside a level
            raise NotImplementedError(
                f"[{name}] must not be called in forward mode: with this version of PyTorch it "
                "has no jvp."
            )
        return function(*tensors, **params)

    return checked


def _register_autograd(
    name: str, count: int, keys: list[str], derivative: Callable[..., Gradients]
) -> None:
    """Register the derivative by the public API alone; torch.func.grad refuses it."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.params = dict(zip(keys, inputs[count:], strict=True))

    def backward(ctx: Any, grad: Tensor) -> Gradients:
        needs = ctx.needs_input_grad[:count]
        gradients = derivative(needs, grad, *ctx.saved_tensors, **ctx.params)
        return *gradients, *[None for _ in keys]

    torch.library.register_autograd(
        f"carafepp::{name}", backward, setup_context=setup_context, lib=_library
    )


def _vmap(
    operator: Any, info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor, **params: Any
) -> tuple[Tensor, int]:
    """Fold the axis of vmap into the batch, the first axis of all arguments and results."""
    leading = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    if leading[0].dim() < 5:  # unbatched images
        return operator(*leading, **params), 0
    batches = leading[0].shape[:2]
    result = operator(*(tensor.flatten(0, 1) for tensor in leading), **params)
    return result.unflatten(0, batches), 0


def _autocast(operator: Any, device: str, features: Tensor, masks: Tensor, **params: Any) -> Any:
    """Cast features to autocast's dtype, and masks or logits too unless they are float32.

    As with PyTorch's own operators, float64 tensors and integers keep their dtype.
    """
    if features.is_floating_point() and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        features = features.to(dtype)
        if masks.is_floating_point() and masks.dtype != torch.float32:
            masks = masks.to(dtype)
    torch.set_autocast_enabled(device, False)  # torch.autocast would also look for the device
    try:
        return operator(features, masks, **params)
    finally:
        torch.set_autocast_enabled(device, True)


# The arguments of a caller


def _is_plain(tensors: tuple[Any, ...]) -> bool:
    """Tell whether the dispatcher has nothing to do but to call the eager kernel.

    It has, for example, with a gradient, vmap, a trace, a mode, autocast or a profiler.
    """
    if not _knows_plain or torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor or not (tensor.is_cpu or tensor.is_cuda):
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
        if tensor.is_neg() or tensor._is_zerotensor() or is_legacy_batchedtensor(tensor):
            return False
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or _get_tracing_state()
        or _profiler_enabled()
        or _are_functorch_transforms_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
    )


def call(
    function: str, tensors: tuple[Any, ...], params: Mapping[str, Any], needed: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Call the operator for each result of a function that is needed.

    PyTorch alone would truncate some parameters and would not know others. The dispatcher costs as
    much as several small calls, so plain tensors pass it by.
    """
    if _is_plain(tensors) and isinstance(params.get("size"), (NoneType, torch.Size)):
        return _door.compute(function, tensors, params, needed=needed)
    changed = {}
    for key, value in params.items():
        kind, default = _PARAMS[key]
        if value is not default:  # an operator is called faster without its defaults
            changed[key] = _integer(function, key, value) if kind == "int" else value
    size = params.get("size")
    if size is not None:
        changed["size"] = size = pair(function, size)
    padding = params.get("padding")
    # torch.compile cannot ask an integer of its graph whether it is a proxy.
    if padding is not None and (isinstance(padding, (int, tuple, list)) or not is_proxy(padding)):
        changed["padding"] = padding_pair(function, padding)
    try:
        if size is not None and (isinstance(size[0], Tensor) or isinstance(size[1], Tensor)):
            return (_crop(function, tensors, **changed),)
        results: tuple[Any, ...] = ()
        for k, operator in enumerate(_operators_of[function]):
            results += (operator(*tensors, **changed) if needed[k] else None,)
        return results
    except RuntimeError as error:
        if "carafepp::" not in str(error):
            raise
        # PyTorch's dispatcher has refused an argument: carafepp has a better sentence.
        for k, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise not_an_array(function, FUNCTIONS[function].inputs[k], tensor) from None
        _door.compute(function, tensors, params, needed=needed)
        raise


def _integer(function: str, name: str, value: Any) -> Any:
    if type(value) is int or isinstance(value, torch.SymInt) or is_proxy(value):
        return value
    return integer(function, name, value, least=None)


def _crop(name: str, tensors: tuple[Tensor, ...], *, size: Any, **params: Any) -> Tensor:
    """Crop by slicing, so that a torch.jit trace also works with other sizes."""
    height, width = size
    nhwc = params.get("layout") == "NHWC"
    if name == "reassemble":
        features, masks = tensors
        more: dict[str, Any] = {}
        if "padding" in params:
            with warnings.catch_warnings():  # kernel_size is a constant of the trace
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                taps = int(masks.shape[-1 if nhwc else -3]) // params.get("groups", 1)
            more["kernel_size"] = isqrt(taps)
        rows, columns = natural_size(size_of(features, **params), **params, **more)
        missing = (0, columns - width, 0, rows - height)
        tensors = features, F.pad(masks, (0, 0, *missing) if nhwc else missing)
    output: Tensor = _operators[name](*tensors, **params)
    return output[..., :height, :width, :] if nhwc else output[..., :height, :width]


# Eager kernels


def _kernel(
    function: str, index: int, defaults: dict[str, Any], composed: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return a function that computes one result of a function of the core."""
    needed = (index == 0, index == 1)

    def kernel(*tensors: Tensor, **params: Any) -> Tensor:
        if _has_no_kernel(tensors):  # in inference mode; others have stopped at autograd
            return composed(*tensors, **params)
        results = _door.compute(function, tensors, {**defaults, **params}, needed=needed)
        tensor: Tensor = results[index]
        return tensor

    return kernel


# Fake (meta) kernels: shapes and strides


def _resized(
    like: Tensor, size: tuple[int, int], *, shrink: int = 1, layout: str = "NCHW", **_: Any
) -> Tensor:
    if layout == "NCHW":
        return _door.empty("", like, (*like.shape[:-3], like.shape[-3] // shrink, *size))
    return _door.empty("", like, (*like.shape[:-3], *size, like.shape[-1] // shrink))


def _reassembled(
    features: Tensor, masks: Tensor, *, size: Any = None, padding: Any = None, **params: Any
) -> Tensor:
    if padding is not None:  # the natural size depends on kernel_size, which only the masks tell
        size = size_of(masks, **params)
    return _reassembled_with_logits(features, masks, size=size, **params)


def _reassembled_with_logits(
    features: Tensor, logits: Tensor, *, size: Any = None, **params: Any
) -> Tensor:
    return _resized(features, size or natural_size(size_of(features, **params), **params), **params)


def _normalized(logits: Tensor, *, size: Any = None, up: int = 1, **params: Any) -> Tensor:
    size = size or natural_size(size_of(logits, **params), up)
    return _resized(logits, size, shrink=up**2, **params)


def _like(index: int) -> Callable[..., Tensor]:
    def gradient(*tensors: Tensor, **_: Any) -> Tensor:
        return _door.empty("", tensors[index], tensors[index].shape)

    return gradient


# Derivatives. Functions with logits and with masks share them, except for grad_logits.


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
        size = size_of(grad_output, **params)
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
    size = size_of(grad_output, **params)
    return (
        reassemble(features, grad, size=size, **params) if needs[0] else None,
        reassemble_grad_features(grad_output, features, grad, **params) if needs[1] else None,
        None,
    )


def _derive_grad_logits(
    needs: Needs, grad: Tensor, grad_output: Tensor, features: Tensor, logits: Tensor, **params: Any
) -> Gradients:
    tensors = grad_output, features, logits
    gradients: Gradients = None, None
    if needs[0] or needs[1]:
        size = size_of(grad_output, **params)
        grad_masks = _push_masks(grad, logits, size=size, **_normalizer(params))
        gradients = _derive_grad_masks(needs, grad_masks, *tensors, **_factors(params))
    return *gradients[:2], _push_grad_logits(grad, *tensors, **params) if needs[2] else None


def _derive_normalize_masks(
    needs: Needs, grad: Tensor, logits: Tensor, *, size: Any = None, **params: Any
) -> Gradients:
    return (normalize_masks_backward(grad, logits, **params),)


def _derive_normalize_masks_backward(
    needs: Needs, grad: Tensor, grad_masks: Tensor, logits: Tensor, **params: Any
) -> Gradients:
    size = size_of(grad_masks, **params)
    return (
        _push_masks(grad, logits, size=size, **params) if needs[0] else None,
        _push_normalize_masks_backward(grad, grad_masks, logits, **params) if needs[1] else None,
    )


# Forward mode: the change of a result along a direction, for tensors in which it is not linear


def _unchanged(direction: Tensor, *_: Tensor, **__: Any) -> Tensor:
    """Return zeros: a gradient depends only on the shape of this tensor."""
    return torch.zeros_like(direction)


def _normalizer(params: dict[str, Any]) -> dict[str, Any]:
    return {key: params[key] for key in params if key not in ("down", "padding")}


def _factors(params: dict[str, Any]) -> dict[str, Any]:
    return {key: params[key] for key in params if key not in ("kernel_size", "normalizer")}


def _push_masks(
    direction: Tensor,
    logits: Tensor,
    *,
    size: Any = None,
    normalizer: str = "softmax",
    **params: Any,
) -> Tensor:
    """Return the change of the masks m along d: ``m*(d - sum(m*d))`` for softmax."""
    if normalizer == "sigmoid_normalized":
        direction, logits = direction * (-logits).sigmoid(), F.logsigmoid(logits)
        normalizer = "softmax"
    shuffle = partial(normalize_masks, size=size, normalizer="none", **params)
    change = normalize_masks_backward(shuffle(direction), logits, normalizer=normalizer, **params)
    masks: Tensor = shuffle(change)
    return masks


def _push_normalize_masks_backward(
    direction: Tensor,
    grad_masks: Tensor,
    logits: Tensor,
    *,
    normalizer: str = "softmax",
    **params: Any,
) -> Tensor:
    """Return the change of grad_logits along d.

    A second derivative is symmetric, so this is the gradient too. It is
    `normalize_masks_backward` of ``(d - sum(m*d)) * (grad_masks - sum(m*grad_masks))`` for softmax,
    and of ``(1 - 2*m) * d * grad_masks`` for sigmoid, with d in the axes of the masks m.
    """
    if normalizer == "none":
        return torch.zeros_like(logits)
    if normalizer == "sigmoid_normalized":
        scores, slope = F.logsigmoid(logits), (-logits).sigmoid()
        change = _push_normalize_masks_backward(slope * direction, grad_masks, scores, **params)
        grad_scores = normalize_masks_backward(grad_masks, scores, **params)
        return slope * (change - (1 - slope) * direction * grad_scores)
    size = size_of(grad_masks, **params)
    masks = normalize_masks(logits, size=size, normalizer=normalizer, **params)
    change = normalize_masks(direction, size=size, normalizer="none", **params)
    if normalizer == "sigmoid":
        product = (1 - 2 * masks) * change * grad_masks
    else:
        product = _centred(change, masks, **params) * _centred(grad_masks, masks, **params)
    grad_logits: Tensor = normalize_masks_backward(product, logits, normalizer=normalizer, **params)
    return grad_logits


def _centred(
    values: Tensor, masks: Tensor, *, groups: int = 1, layout: str = "NCHW", **_: Any
) -> Tensor:
    """Return the values minus their weighted mean in each window; the masks are the weights."""
    axis = -3 if layout == "NCHW" else -1
    pairs = zip(values.chunk(groups, axis), masks.chunk(groups, axis), strict=True)
    return torch.cat([x - (m * x).sum(axis, keepdim=True, dtype=x.dtype) for x, m in pairs], axis)


def _push_output(
    direction: Tensor, features: Tensor, logits: Tensor, *, size: Any = None, **params: Any
) -> Tensor:
    size = size or natural_size(size_of(features, **params), **params)
    masks = _push_masks(direction, logits, size=size, **_normalizer(params))
    output: Tensor = reassemble(features, masks, size=size, **_factors(params))
    return output


def _push_grad_features(
    direction: Tensor, grad_output: Tensor, features: Tensor, logits: Tensor, **params: Any
) -> Tensor:
    size = size_of(grad_output, **params)
    masks = _push_masks(direction, logits, size=size, **_normalizer(params))
    gradient: Tensor = reassemble_grad_features(grad_output, features, masks, **_factors(params))
    return gradient


def _push_grad_logits(
    direction: Tensor, grad_output: Tensor, features: Tensor, logits: Tensor, **params: Any
) -> Tensor:
    masks = normalize_masks(logits, size=size_of(grad_output, **params), **_normalizer(params))
    grad_masks = reassemble_grad_masks(grad_output, features, masks, **_factors(params))
    return _push_normalize_masks_backward(direction, grad_masks, logits, **_normalizer(params))


# The operators

reassemble = _define(
    "reassemble",
    "features masks",
    "up down groups size layout padding",
    ("reassemble", 0),
    _reassembled,
    _derive_output("reassemble", "masks"),
    pushes=(None, None),
    flops=count_reassemble,
    composition=compositions.reassemble,
    cast=True,
)
reassemble_grad_features = _define(
    "reassemble_grad_features",
    "grad_output features masks",
    "up down groups layout padding",
    ("reassemble_backward", 0),
    _like(1),
    _derive_grad_features("reassemble", "masks"),
    pushes=(None, _unchanged, None),
    flops=count_reassemble_backward,
    composition=compositions.gradient(compositions.reassemble, 0),
)
reassemble_grad_masks = _define(
    "reassemble_grad_masks",
    "grad_output features masks",
    "up down groups layout padding",
    ("reassemble_backward", 1),
    _like(2),
    _derive_grad_masks,
    pushes=(None, None, _unchanged),
    flops=count_reassemble_backward,
    composition=compositions.gradient(compositions.reassemble, 1),
)
reassemble_with_logits = _define(
    "reassemble_with_logits",
    "features logits",
    "up down groups kernel_size normalizer size layout padding",
    ("reassemble_with_logits", 0),
    _reassembled_with_logits,
    _derive_output("reassemble_with_logits", "logits"),
    pushes=(None, _push_output),
    flops=count_reassemble_with_logits,
    composition=compositions.reassemble_with_logits,
    cast=True,
)
reassemble_with_logits_grad_features = _define(
    "reassemble_with_logits_grad_features",
    "grad_output features logits",
    "up down groups kernel_size normalizer layout padding",
    ("reassemble_with_logits_backward", 0),
    _like(1),
    _derive_grad_features("reassemble_with_logits", "logits"),
    pushes=(None, _unchanged, _push_grad_features),
    flops=count_reassemble_with_logits_backward,
    composition=compositions.gradient(compositions.reassemble_with_logits, 0),
)
reassemble_with_logits_grad_logits = _define(
    "reassemble_with_logits_grad_logits",
    "grad_output features logits",
    "up down groups kernel_size normalizer layout padding",
    ("reassemble_with_logits_backward", 1),
    _like(2),
    _derive_grad_logits,
    pushes=(None, None, _push_grad_logits),
    flops=count_reassemble_with_logits_backward,
    composition=compositions.gradient(compositions.reassemble_with_logits, 1),
)
normalize_masks = _define(
    "normalize_masks",
    "logits",
    "up groups kernel_size normalizer size layout",
    ("normalize_masks", 0),
    _normalized,
    _derive_normalize_masks,
    pushes=(_push_masks,),
    flops=count_normalize_masks,
    composition=compositions.normalize_masks,
)
normalize_masks_backward = _define(
    "normalize_masks_backward",
    "grad_masks logits",
    "up groups kernel_size normalizer layout",
    ("normalize_masks_backward", 0),
    _like(1),
    _derive_normalize_masks_backward,
    pushes=(None, _push_normalize_masks_backward),
    flops=count_normalize_masks_backward,
    composition=compositions.gradient(compositions.normalize_masks, 0),
)

if _on_shards:
    dtensor.register(_on_shards, _library)


# The operators of each function, in the order of its results
_operators_of = {
    "reassemble": (reassemble,),
    "reassemble_backward": (reassemble_grad_features, reassemble_grad_masks),
    "reassemble_with_logits": (reassemble_with_logits,),
    "reassemble_with_logits_backward": (
        reassemble_with_logits_grad_features,
        reassemble_with_logits_grad_logits,
    ),
    "normalize_masks": (normalize_masks,),
    "normalize_masks_backward": (normalize_masks_backward,),
}
