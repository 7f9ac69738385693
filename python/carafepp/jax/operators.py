"""The functions of carafepp in JAX programs.

A function is a custom call of XLA, which runs a handler of ``libcarafepp_jax``. It has a rule
for vmap and a derivative in reverse mode. Derivatives consist of the same functions, and
so have derivatives themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import index
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from .. import _core
from .._arguments import NORMALIZERS, padding_pair, pair
from .._doors.door import FUNCTIONS, forced_implementation, params_of, result_shape
from .._doors.numpy import NumPy
from .._paths import get_library

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
    if not _has_handlers():
        raise NotImplementedError(
            f"[{function}] JAX arrays cannot be computed on: this build of carafepp has no "
            "handlers for JAX. In a clone of carafepp, build it with them: CARAFEPP_JAX=1 pip "
            "install ."
        )
    spec = FUNCTIONS[function]
    core_params = params_of(function, **params)
    views = [_view(function, *named) for named in zip(spec.inputs, arrays, strict=True)]
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
    results = iter(_operator(problem, *arrays))
    return tuple(next(results) if need else None for need in problem.needed)


@cache
def _has_handlers() -> bool:
    """Tell XLA the handlers for the CPU and for CUDA devices, if this build has them."""
    core = Path(get_library())
    path = core.with_name(core.name.replace("libcarafepp", "libcarafepp_jax"))
    if not path.exists():
        return False
    library = ctypes.CDLL(str(path))
    platforms = {"cpu": "cpu"}
    if jax.__version_info__ >= (0, 6, 2):  # before, XLA does not tell which device
        platforms["cuda"] = "CUDA"
    for function in FUNCTIONS:
        for suffix, platform in platforms.items():
            handler = ffi.pycapsule(getattr(library, f"carafepp_{function}_on_{suffix}"))
            ffi.register_ffi_target(f"carafepp_{function}", handler, platform=platform)
    return True


# Arguments


def _view(function: str, name: str, array: jax.Array) -> Any:
    """Return a view of the shape and the dtype, without the memory."""
    if str(array.dtype) not in ("float32", "float64", "float16", "bfloat16"):
        raise TypeError(
            f"[{function}] {name} must be float32, float64, float16 or bfloat16; got {array.dtype}."
        )
    return NumPy().view(function, name, np.broadcast_to(np.zeros((), array.dtype), array.shape))


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
            results.append(jax.ShapeDtypeStruct(tuple(shape), like.dtype))
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


@cache
def _program(problem: Problem) -> Callable[..., Arrays]:
    """Return the custom call of a problem, with its rule for vmap."""

    def fold(axis_size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Arrays, Any]:
        """Give all arrays one more leading axis."""
        arrays = tuple(
            array if has_axis else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, has_axis in zip(arrays, batched, strict=True)
        )
        results = program(*arrays)
        return results, tuple(True for _ in results)

    program: Callable[..., Arrays] = custom_vmap(partial(_custom_call, problem))
    program.def_vmap(fold)  # type: ignore[attr-defined]
    return program


# Derivatives


@partial(jax.jit, static_argnums=0, inline=True)  # so that a call outside of jit is compiled once
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operator(problem: Problem, *arrays: jax.Array) -> Arrays:
    return _program(problem)(*arrays)


def _forward(problem: Problem, *arrays: Any) -> tuple[Arrays, Any]:
    values = tuple(array.value for array in arrays)
    # JAX would trace booleans. It keeps empty tuples and None as they are.
    marks = tuple(() if array.perturbed else None for array in arrays)
    return _operator(problem, *values), (values, marks)


def _backward(problem: Problem, residuals: Any, grads: Any) -> Gradients:
    """Return a gradient for each array that needs one, else None."""
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
    """Differentiate the composition of the other functions."""

    def composed(grad_output: jax.Array, features: jax.Array, logits: jax.Array) -> Arrays:
        needs_features, needs_logits = (grad is not None for grad in grads)
        normalize = replace(problem, down=1, padding=None)
        size = _size(grad_output.shape, problem.layout)
        (masks,) = compute(
            replace(normalize, function="normalize_masks", needed=(True,), size=size), logits
        )
        results = compute(
            replace(
                problem,
                function="reassemble_backward",
                needed=(needs_features, needs_logits),
                kernel_size=0,
                normalizer="none",
            ),
            *(grad_output, features, masks),
        )
        if needs_logits:
            backward = replace(normalize, function="normalize_masks_backward", needed=(True,))
            results = results[0], *compute(backward, results[1], logits)
        return tuple(result for result in results if result is not None)

    gradients: Gradients = jax.vjp(composed, *arrays)[1](
        tuple(grad for grad in grads if grad is not None)
    )
    return gradients


def _derive_normalize_masks_backward(
    problem: Problem, _: tuple[bool, ...], grads: Arrays, *arrays: jax.Array
) -> Gradients:
    def gradient(grad_masks: jax.Array, logits: jax.Array) -> jax.Array:
        size = _size(grad_masks.shape, problem.layout)
        grad_logits: jax.Array = jax.vjp(partial(_normalize, problem, size), logits)[1](grad_masks)[
            0
        ]
        return grad_logits

    gradients: Gradients = jax.vjp(gradient, *arrays)[1](grads[0])
    return gradients


def _normalize(problem: Problem, size: tuple[int, int], logits: jax.Array) -> jax.Array:
    """Return `normalize_masks` of logits, composed of JAX's functions."""
    nhwc = problem.layout == "NHWC"
    if nhwc:
        logits = jnp.moveaxis(logits, -1, -3)
    *batch, channels, h, w = logits.shape
    up, groups = problem.up, problem.groups
    taps = channels // (groups * up**2)
    values = logits.reshape(*batch, groups, taps, up, up, h, w)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if problem.normalizer == "sigmoid":
        values = jax.nn.sigmoid(values)
    elif problem.normalizer != "none":
        if problem.normalizer == "sigmoid_normalized":
            values = jax.nn.log_sigmoid(values)
        values = jax.nn.softmax(values, axis=-5)
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
