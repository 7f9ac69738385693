"""The functions of carafepp in JAX programs.

A function is a custom call of XLA, which runs a handler of ``libcarafepp_jax``. It has rules for
vmap and sharding, and a derivative in reverse mode. Derivatives consist of the same functions, and
so have derivatives themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from .. import _core
from .._arguments import NORMALIZERS, padding_pair, pair
from .._doors.door import FUNCTIONS, forced_implementation, params_of, result_shape
from .._doors.numpy import NumPy
from .._paths import get_library
from .sharding import explicit_mesh, sharded, varying, varying_alike, varying_axes

try:
    from jax import ffi
except ImportError:  # before 0.5
    from jax.extend import ffi

Arrays = tuple[jax.Array, ...]
Gradients = tuple[jax.Array | None, ...]


@dataclass(frozen=True)
class Problem:
    """All that a call depends on but its arrays. A forward function has its `size`."""

    function: str
    needed: tuple[bool, ...]
    up: int = 1
    down: int = 1
    kernel_size: int = 0
    groups: int = 1
    normalizer: str = "none"
    size: tuple[int, int] | None = None
    layout: str = "NCHW"
    padding: tuple[int, int] | None = None
    implementation: str | None = None


def call(
    function: str, arrays: Arrays, params: Mapping[str, Any], needed: tuple[bool, ...]
) -> Gradients:
    """Check the arguments by their shapes and dtypes, and return the results."""
    register_handlers(function)
    spec = FUNCTIONS[function]
    core_params = params_of(function, **params)
    views = [view(function, *named) for named in zip(spec.inputs, arrays, strict=True)]
    _core.list_implementations(core_params, views, [None for _ in spec.results])
    plain = {key: _plain(function, key, value) for key, value in params.items()}
    if not spec.same_shape:
        shape = result_shape(function, core_params, params, arrays, 0)
        plain["size"] = _size(shape, params.get("layout", "NCHW"))
    problem = Problem(
        function,
        tuple(needed[: len(spec.results)]),
        **plain,
        implementation=forced_implementation.get(),
    )
    return compute(problem, *arrays)


def compute(problem: Problem, *arrays: jax.Array) -> Gradients:
    """Return the results, with None for those that are not needed."""
    if not any(problem.needed):
        return tuple(None for _ in problem.needed)
    results = iter(_operator(problem, *varying_alike(arrays)))
    return tuple(next(results) if need else None for need in problem.needed)


def register_handlers(function: str = "register_handlers") -> None:
    """Tell XLA the handlers for the CPU and for CUDA devices.

    A call does this by itself. A program that `jax.export` has loaded needs it first.

    Raises
    ------
    NotImplementedError
        This build of carafepp has no handlers, or has some for a newer jaxlib.
    """
    reason = _register()
    if reason:
        raise NotImplementedError(
            f"[{function}] JAX arrays cannot be computed on: {reason}. In a clone of carafepp, "
            "build handlers for JAX 0.4.38 and newer: CARAFEPP_JAX=1 pip install ."
        )


@cache
def _register() -> str | None:
    """Register the handlers, or return why they cannot be."""
    core = Path(get_library())
    path = core.with_name(core.name.replace("libcarafepp", "libcarafepp_jax"))
    if not path.exists():
        return "this build of carafepp has no handlers"
    library = ctypes.CDLL(str(path))
    platforms = {"cpu": "cpu"}
    if jax.__version_info__ >= (0, 6, 2):  # before, XLA does not tell which device
        platforms["cuda"] = "CUDA"
    for function in FUNCTIONS:
        for suffix, platform in platforms.items():
            handler = ffi.pycapsule(getattr(library, f"carafepp_{function}_on_{suffix}"))
            try:
                ffi.register_ffi_target(f"carafepp_{function}", handler, platform=platform)
            except RuntimeError as error:
                return f"jaxlib refuses the handlers ({error})"
    return None


# Arguments


def view(function: str, name: str, array: jax.Array) -> Any:
    """Return a view of the shape and the dtype, without the memory."""
    if str(array.dtype) not in ("float32", "float64", "float16", "bfloat16"):
        raise TypeError(
            f"[{function}] {name} must be float32, float64, float16 or bfloat16; got {array.dtype}."
        )
    if not all([isinstance(length, int) for length in array.shape]):
        raise TypeError(
            f"[{function}] {name} must have a shape of numbers, not of the symbols of jax.export; "
            f"got {array.shape}."
        )
    return NumPy().view_of_shape(function, name, array.shape, array.dtype)


def _plain(function: str, key: str, value: Any) -> Any:
    """Return a parameter as it is in a `Problem`."""
    if value is None or isinstance(value, str):
        return value
    if key == "size":
        return pair(function, value)
    return padding_pair(function, value) if key == "padding" else index(value)


def _size(shape: Any, layout: str) -> tuple[int, int]:
    height, width = shape[-2:] if layout == "NCHW" else shape[-3:-1]
    return height, width


# The custom call


def _custom_call(problem: Problem, *arrays: jax.Array) -> Arrays:
    """Call a handler. It folds leading axes into the batch."""
    spec = FUNCTIONS[problem.function]
    results = []
    for k, need in enumerate(problem.needed):
        if need:
            like = arrays[spec.like[k]]
            shape = list(like.shape)
            if problem.size is not None:
                rows = -2 if problem.layout == "NCHW" else -3
                shape[rows], shape[rows + 1] = problem.size
            if problem.function == "normalize_masks":
                shape[-3 if problem.layout == "NCHW" else -1] //= problem.up**2
            results.append(jax.ShapeDtypeStruct(tuple(shape), like.dtype, **varying(like)))
    custom_call = ffi.ffi_call(
        f"carafepp_{problem.function}", tuple(results), vmap_method="broadcast_all"
    )
    return tuple(
        custom_call(
            *arrays,
            up=problem.up,
            down=problem.down,
            kernel_size=problem.kernel_size,
            groups=problem.groups,
            normalizer=NORMALIZERS[problem.normalizer],
            flags=_core.CHANNELS_LAST if problem.layout == "NHWC" else 0,
            needed=sum(need << k for k, need in enumerate(problem.needed)),
            size=np.array(problem.size or (), np.int64),
            padding=np.array(problem.padding or (), np.int64),
            implementation=problem.implementation or "",
        )
    )


# Derivatives


@partial(jax.jit, static_argnums=0, inline=True)  # so that a call outside of jit is compiled once
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operator(problem: Problem, *arrays: jax.Array) -> Arrays:
    # An older JAX gathers shards. Inside of a shard_map there is nothing to share.
    if not jax.config.jax_use_shardy_partitioner or varying_axes(arrays[0]):
        return _custom_call(problem, *arrays)
    results: Arrays = sharded(problem, _custom_call)(*arrays)
    return results


def _forward(problem: Problem, *arrays: Any) -> tuple[Arrays, Any]:
    values = tuple(array.value for array in arrays)
    # JAX would trace booleans. It keeps empty tuples and None as they are.
    marks = tuple(() if array.perturbed else None for array in arrays)
    return _operator(problem, *values), (values, marks)


def _backward(problem: Problem, residuals: Any, grads: Any) -> Gradients:
    """Return a gradient for each array that needs one, else None."""
    gradients = _gradients(problem, residuals, grads)
    if jax.__version_info__ < (0, 7):  # where a second trace must return None at the same places
        return tuple(
            jnp.zeros_like(array) if gradient is None else gradient
            for array, gradient in zip(residuals[0], gradients, strict=True)
        )
    return gradients


def _gradients(problem: Problem, residuals: Any, grads: Any) -> Gradients:
    arrays, marks = residuals
    given = iter(None if isinstance(grad, SymbolicZero) else grad for grad in grads)
    grads = tuple(next(given) if need else None for need in problem.needed)
    if all(grad is None for grad in grads):
        return tuple(None for _ in arrays)
    needs = tuple(mark is not None for mark in marks)
    return _DERIVATIVES[problem.function](problem, needs, grads, *arrays)


_operator.__wrapped__.defvjp(_forward, _backward, symbolic_zeros=True)


def _derive_forward(
    problem: Problem, needs: tuple[bool, ...], grads: Arrays, *arrays: jax.Array
) -> Gradients:
    backward = replace(problem, function=f"{problem.function}_backward", needed=needs, size=None)
    return compute(backward, grads[0], *arrays)


def _derive_reassemble_backward(
    problem: Problem,
    needs: tuple[bool, ...],
    grads: Gradients,
    grad_output: jax.Array,
    features: jax.Array,
    masks: jax.Array,
) -> Gradients:
    """Use ``<reassemble(V, M), D> = <V, grad_features(D, M)> = <M, grad_masks(D, V)>``."""
    change_features, change_masks = grads
    size = _size(grad_output.shape, problem.layout)
    output = partial(compute, replace(problem, function="reassemble", needed=(True,), size=size))
    terms: list[Any] = []
    if needs[0] and change_features is not None:
        terms += output(change_features, masks)
    if needs[0] and change_masks is not None:
        terms += output(features, change_masks)
    needed = needs[1] and change_masks is not None, needs[2] and change_features is not None
    gradients = compute(
        replace(problem, needed=needed),
        grad_output,
        features if change_features is None else change_features,
        masks if change_masks is None else change_masks,
    )
    return sum(terms[1:], terms[0]) if terms else None, *gradients


def _derive_reassemble_with_logits_backward(
    problem: Problem, _: tuple[bool, ...], grads: Gradients, *arrays: jax.Array
) -> Gradients:
    needed = tuple(grad is not None for grad in grads)
    given = tuple(grad for grad in grads if grad is not None)
    gradients: Gradients = _differentiate(
        _composed, replace(problem, needed=needed), given, *arrays
    )
    return gradients


def _derive_normalize_masks_backward(
    problem: Problem, _: tuple[bool, ...], grads: Arrays, *arrays: jax.Array
) -> Gradients:
    gradients: Gradients = _differentiate(_normalize_backward, problem, grads, *arrays)
    return gradients


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _differentiate(
    function: Callable[..., Arrays], problem: Problem, grads: Arrays, *arrays: jax.Array
) -> Gradients:
    """Return the gradients of a composition that computes what the problem does."""
    gradients: Gradients = jax.vjp(partial(function, problem), *arrays)[1](grads)
    return gradients


def _composed(
    problem: Problem, grad_output: jax.Array, features: jax.Array, logits: jax.Array
) -> Arrays:
    """Return the results of `reassemble_with_logits_backward` by other functions."""
    normalize = replace(
        problem,
        function="normalize_masks",
        needed=(True,),
        down=1,
        padding=None,
        size=_size(grad_output.shape, problem.layout),
    )
    backward = replace(problem, function="reassemble_backward", kernel_size=0, normalizer="none")
    (masks,) = compute(normalize, logits)
    results = compute(backward, grad_output, features, masks)
    if results[1] is not None:
        derive = replace(normalize, function="normalize_masks_backward", size=None)
        results = results[0], *compute(derive, results[1], logits)
    return tuple(result for result in results if result is not None)


def _normalize_backward(problem: Problem, grad_masks: jax.Array, logits: jax.Array) -> Arrays:
    """Return the result of `normalize_masks_backward` by JAX's functions."""
    normalize = partial(_normalize, problem, _size(grad_masks.shape, problem.layout))

    def gradient(grad_masks: jax.Array, logits: jax.Array) -> Arrays:
        gradients: Arrays = jax.vjp(normalize, logits)[1](grad_masks)
        return gradients

    if explicit_mesh((logits,)) is not None:
        gradient = jax.sharding.auto_axes(gradient, out_sharding=(jax.typeof(logits).sharding,))
    return gradient(grad_masks, logits)


def _normalize(problem: Problem, size: tuple[int, int], logits: jax.Array) -> jax.Array:
    """Return `normalize_masks` of logits, composed of JAX's functions."""
    nhwc = problem.layout == "NHWC"
    if nhwc:
        logits = jnp.moveaxis(logits, -1, -3)
    *batch, channels, h, w = logits.shape
    up, groups = problem.up, problem.groups
    taps = channels // (groups * up**2)
    # XLA of jaxlib 0.10 crashes in second derivatives of a softmax over one of seven axes.
    values = logits.reshape(prod(batch) * groups, taps, up**2 * h * w)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if problem.normalizer == "sigmoid":
        values = jax.nn.sigmoid(values)
    elif problem.normalizer != "none":
        if problem.normalizer == "sigmoid_normalized":
            values = jax.nn.log_sigmoid(values)
        values = jax.nn.softmax(values, axis=1)
    values = values.reshape(*batch, groups, taps, up, up, h, w)
    values = jnp.moveaxis(values, (-4, -3), (-3, -1))
    masks = values.reshape(*batch, groups * taps, h * up, w * up)[..., : size[0], : size[1]]
    masks = masks.astype(logits.dtype)
    return jnp.moveaxis(masks, -3, -1) if nhwc else masks


_DERIVATIVES: dict[str, Callable[..., Gradients]] = {
    "reassemble": _derive_forward,
    "reassemble_backward": _derive_reassemble_backward,
    "reassemble_with_logits": _derive_forward,
    "reassemble_with_logits_backward": _derive_reassemble_with_logits_backward,
    "normalize_masks": _derive_forward,
    "normalize_masks_backward": _derive_normalize_masks_backward,
}
