"""The public functions: any array in, the same kind of array out.

Each makes its result if none is given and hands all arrays to the core, where they are checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

import numpy as np

from . import _core
from ._arguments import integer, pair, positive
from ._arrays import (
    are_tensors,
    check_no_tangents,
    check_writable,
    is_tensor,
    library_of,
    note_changes,
)


class Array(Protocol):
    """What a type checker can know of an array of any library."""

    @property
    def shape(self) -> Any:
        """The lengths of the axes."""


ArrayT = TypeVar("ArrayT", bound=Array)

Layout = Literal["NCHW", "NHWC"]
Normalizer = Literal["softmax", "sigmoid", "sigmoid_normalized", "none"]

_NORMALIZERS = {
    "softmax": _core.SOFTMAX,
    "sigmoid": _core.SIGMOID,
    "sigmoid_normalized": _core.SIGMOID_NORMALIZED,
    "none": _core.NONE,
}

_LAYOUTS = {"NCHW": False, "NHWC": True}

_forced_implementation: ContextVar[str | None] = ContextVar("implementation", default=None)

P = ParamSpec("P")
R = TypeVar("R")


# The names that the core gives to results, and those that the caller gives.
_RESULTS = {
    "reassemble": {"output": "out"},
    "reassemble_backward": {"grad_features": "out[0]", "grad_masks": "out[1]"},
    "reassemble_with_logits": {"output": "out"},
    "reassemble_with_logits_backward": {"grad_features": "out[0]", "grad_logits": "out[1]"},
    "normalize_masks": {"masks": "out"},
    "normalize_masks_backward": {"grad_logits": "out"},
}


def _public(compute: Callable[P, R]) -> Callable[P, R]:
    """Let PyTorch's operator of that name compute on its tensors, unless `out` is given.

    The operator comes back to `compute` where there is data to compute on.
    """
    name = compute.__name__
    arrays = compute.__code__.co_varnames[: compute.__code__.co_argcount]

    @wraps(compute)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("out") is not None:
            return _write(compute, arrays, args, kwargs)
        named = arrays[len(args) :]  # those that are given by their names
        given = (*args, *[kwargs.get(array) for array in named]) if named else args
        if not are_tensors(given):
            return compute(*args, **kwargs)

        from .torch import operators

        params = {**kwargs}
        for key in (*named, "out"):
            params.pop(key, None)
        try:
            result: R = operators.call(name, given, params)
            return result
        except RuntimeError as error:
            if "carafepp::" not in str(error):
                raise
            # An argument that PyTorch's dispatcher refused: here is a better sentence.
            compute(*args, **kwargs)
            raise

    return function


def _write(
    compute: Callable[..., R],
    arrays: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> R:
    """Compute into `out`, and speak of it by the name that the caller knows."""
    function, out = compute.__name__, kwargs["out"]
    names = _RESULTS[function]
    tensors = {}
    if type(out) is not np.ndarray:
        results = out if isinstance(out, (tuple, list)) else (out,)
        named = zip(names.values(), results, strict=False)
        tensors = {name: result for name, result in named if is_tensor(result)}
    if tensors:
        check_writable(function, tensors)
        given = zip(arrays, args, strict=False)
        check_no_tangents(function, {**dict(given), **kwargs, **tensors})
    try:
        computed = compute(*args, **kwargs)
    except (TypeError, ValueError, NotImplementedError) as error:
        pattern = rf"(\[{function}\] |share memory with )({'|'.join(names)})\b"
        sentence = re.sub(pattern, lambda match: match[1] + names[match[2]], str(error))
        error.args = (sentence,)
        raise
    if tensors:
        note_changes(tensors.values())
    return computed


@_public
def reassemble(
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    size: tuple[int, int] | None = None,
    layout: Layout = "NCHW",
    out: ArrayT | None = None,
) -> ArrayT:
    """Rescale features by a weighted sum over a window for every output pixel.

    ``output[n,c,i',j'] = sum over a,b in [-r,r] of
    masks[n, g(c)*K*K + (a+r)*K + (b+r), i', j'] * features[n, c, src(i')+a, src(j')+b]``
    with ``r = K//2``, ``g(c) = c // (C//groups)``, ``src(i') = i'*down // up``. Features are 0
    outside their borders: such a tap contributes exactly 0.

    Parameters
    ----------
    features : array, (N, C, H, W) or (C, H, W)
        float32, float64, float16 or bfloat16, any strides.
    masks : array, (N, groups*K*K, H', W') or (groups*K*K, H', W')
        Normalised reassembly kernels, one of K*K weights for every output pixel; K odd, 1 to 31.
        The dtype of features or, with half features, float32.
    up, down : int, default 1
        The factor up/down, taken as given, not reduced: up=2 doubles the size, down=2 halves it,
        up=3, down=2 makes it half as large again.
    groups : int, default 1
        How many groups of channels have kernels of their own; C is divisible by it.
        (mmcv's ``group_size`` is this number too.)
    size : (int, int), optional
        (H', W') where it is to be smaller than (ceil(H*up/down), ceil(W*up/down)): a crop at the
        bottom and right.
    layout : "NCHW" or "NHWC", default "NCHW"
        The order of the axes of every array. How they lie in memory is told by their strides: a
        PyTorch tensor in channels_last memory format is "NCHW" in its axes.
    out : array, optional
        Where the result is to be written. Any strides; no element shared with an input.

    Returns
    -------
    array, (N, C, H', W') or (C, H', W')
        Library, device and dtype of features.

    Raises
    ------
    TypeError
        Something is not an array, arrays are of different libraries, or a dtype does not fit.
    ValueError
        A shape, a range, a device, or memory that is shared, not aligned or read-only.
    NotImplementedError
        A CUDA array in a build without CUDA; with `out`, a tensor that requires grad.
    RuntimeError
        CUDA has failed, or its driver is missing; the sentence names the error.

    Notes
    -----
    Sums are kept in float32 (float64 for float64) in a fixed order: the same bits at every run
    and every thread count. NaN and Inf propagate by the formula.

    Work on CuPy arrays and on PyTorch CUDA tensors is queued on the current stream of their
    device; for CUDA arrays of other libraries, on the legacy default stream. The call does not
    wait for it, and the result is all that it allocates, from the library's own memory pool.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", section 3.3, Eqn. 3.

    Examples
    --------
    A 3x3 box filter, and nearest-neighbour upsampling:

    >>> import numpy as np
    >>> features = np.arange(4.0, dtype=np.float32).reshape(1, 1, 2, 2)
    >>> reassemble(features, np.full((1, 9, 2, 2), 1 / 9, np.float32))
    array([[[[0.6666667, 0.6666667],
             [0.6666667, 0.6666667]]]], dtype=float32)
    >>> reassemble(features, np.ones((1, 1, 4, 4), np.float32), up=2)[0, 0]
    array([[0., 0., 1., 1.],
           [0., 0., 1., 1.],
           [2., 2., 3., 3.],
           [2., 2., 3., 3.]], dtype=float32)
    """
    function = "reassemble"
    params = _params(function, _core.REASSEMBLE, up, down, groups, layout, size=size)
    library = library_of(function, {"features": features, "masks": masks}, {"out": out})
    features_view = library.view(function, "features", features)
    masks_view = library.view(function, "masks", masks)
    if out is None:
        out = library.empty(function, features, _core.output_shape(params, features.shape))
    out_view = library.view(function, "output", out)
    _core.reassemble(params, features_view, masks_view, out_view, library.stream(features))
    return out


@overload
def reassemble_backward(
    grad_output: ArrayT,
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    layout: Layout = "NCHW",
    need_features: Literal[True] = True,
    need_masks: Literal[True] = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def reassemble_backward(
    grad_output: ArrayT,
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    layout: Layout = "NCHW",
    need_features: Literal[True] = True,
    need_masks: Literal[False],
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT, None]: ...
@overload
def reassemble_backward(
    grad_output: ArrayT,
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    layout: Layout = "NCHW",
    need_features: Literal[False],
    need_masks: Literal[True] = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[None, ArrayT]: ...
@overload
def reassemble_backward(
    grad_output: ArrayT,
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    layout: Layout = "NCHW",
    need_features: bool = True,
    need_masks: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT | None, ArrayT | None]: ...
@_public
def reassemble_backward(
    grad_output: ArrayT,
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    layout: Layout = "NCHW",
    need_features: bool = True,
    need_masks: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT | None, ArrayT | None]:
    """Return the gradients of `reassemble` for features and for masks.

    ``grad_masks[n, g*K*K+t, i', j'] = sum over c in group g of
    grad_output[n,c,i',j'] * features[n, c, src(i')+a_t, src(j')+b_t]``
    and
    ``grad_features[n,c,i,j] = sum over (i',j',a,b) with src(i')+a = i, src(j')+b = j of
    grad_output[n,c,i',j'] * masks[n, g(c)*K*K + (a+r)*K + (b+r), i', j']``.

    Parameters
    ----------
    grad_output : array, (N, C, H', W')
        The gradient for the output, in the dtype of features.
    features : array, (N, C, H, W)
    masks : array, (N, groups*K*K, H', W')
        Its size is that of the output.
    up, down, groups, layout
        As for `reassemble`.
    need_features, need_masks : bool, default True
        Which gradients to compute; the other is returned as None.
    out : pair of arrays, optional
        Where to write (grad_features, grad_masks); an entry may be None.

    Returns
    -------
    grad_features : array as features, or None
    grad_masks : array as masks, or None

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    Every element is summed by one thread in a fixed order: the same bits at every run and every
    thread count. What no tap reaches gets exactly 0, and so does the gradient of a mask whose tap
    falls outside the border.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", the derivative of
    section 3.3, Eqn. 3.

    Examples
    --------
    >>> import numpy as np
    >>> features = np.full((1, 1, 1, 2), 3, np.float32)
    >>> masks = np.ones((1, 1, 2, 4), np.float32)
    >>> grad_features, grad_masks = reassemble_backward(
    ...     np.ones((1, 1, 2, 4), np.float32), features, masks, up=2
    ... )
    >>> grad_features
    array([[[[4., 4.]]]], dtype=float32)
    >>> grad_masks[0, 0]
    array([[3., 3., 3., 3.],
           [3., 3., 3., 3.]], dtype=float32)
    """
    function = "reassemble_backward"
    params = _params(function, _core.REASSEMBLE_BACKWARD, up, down, groups, layout)
    inputs = {"grad_output": grad_output, "features": features, "masks": masks}
    return _backward(
        function, params, _core.reassemble_backward, inputs, (need_features, need_masks), out
    )


@_public
def reassemble_with_logits(
    features: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    size: tuple[int, int] | None = None,
    layout: Layout = "NCHW",
    out: ArrayT | None = None,
) -> ArrayT:
    """Normalise logits to masks and reassemble features with them, in one pass.

    ``output = reassemble(features, normalize_masks(logits))``, where
    ``masks = normalizer over the K*K taps of pixel_shuffle(logits, up)``, cropped to the size of
    the output; the masks are never stored.

    Parameters
    ----------
    features : array, (N, C, H, W) or (C, H, W)
        As for `reassemble`.
    logits : array, (N, groups*K*K*up*up, ceil(H/down), ceil(W/down))
        What the content encoder predicts. Channel ``(g*K*K + t)*up*up + dy*up + dx`` is tap t of
        the output pixel at sub-pixel (dy, dx): the order of ``torch.pixel_shuffle``. The dtype of
        features or, with half features, float32.
    up, down, groups, size, layout, out
        As for `reassemble`.
    kernel_size : int, default 5
        K: odd, 1 to 31.
    normalizer : {"softmax", "sigmoid", "sigmoid_normalized", "none"}, default "softmax"
        "sigmoid_normalized" is the sigmoid divided by its sum over the taps, computed as
        softmax(log(sigmoid(logits))), so that it never divides 0 by 0.

    Returns
    -------
    array, (N, C, H', W') or (C, H', W')
        Library, device and dtype of features.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    The softmax is shifted by its maximum. Infinite logits behave as in ``torch.softmax``: where
    all taps are -inf the result is NaN. Sums, order and determinism are those of `reassemble`.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", sections 3.2 and
    3.3; normalizers: Table 14.

    Examples
    --------
    Equal logits make an average of the window:

    >>> import numpy as np
    >>> features = np.full((1, 2, 8, 8), 3, np.float32)
    >>> logits = np.zeros((1, 3 * 3 * 2 * 2, 8, 8), np.float32)
    >>> output = reassemble_with_logits(features, logits, up=2, kernel_size=3)
    >>> output.shape, bool(np.allclose(output[:, :, 2:-2, 2:-2], 3))
    ((1, 2, 16, 16), True)
    """
    function = "reassemble_with_logits"
    number = _core.REASSEMBLE_WITH_LOGITS
    params = _params(function, number, up, down, groups, layout, kernel_size, normalizer, size)
    library = library_of(function, {"features": features, "logits": logits}, {"out": out})
    features_view = library.view(function, "features", features)
    logits_view = library.view(function, "logits", logits)
    if out is None:
        out = library.empty(function, features, _core.output_shape(params, features.shape))
    out_view = library.view(function, "output", out)
    _core.reassemble_with_logits(
        params, features_view, logits_view, out_view, library.stream(features)
    )
    return out


@overload
def reassemble_with_logits_backward(
    grad_output: ArrayT,
    features: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    layout: Layout = "NCHW",
    need_features: Literal[True] = True,
    need_logits: Literal[True] = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def reassemble_with_logits_backward(
    grad_output: ArrayT,
    features: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    layout: Layout = "NCHW",
    need_features: Literal[True] = True,
    need_logits: Literal[False],
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT, None]: ...
@overload
def reassemble_with_logits_backward(
    grad_output: ArrayT,
    features: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    layout: Layout = "NCHW",
    need_features: Literal[False],
    need_logits: Literal[True] = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[None, ArrayT]: ...
@overload
def reassemble_with_logits_backward(
    grad_output: ArrayT,
    features: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    layout: Layout = "NCHW",
    need_features: bool = True,
    need_logits: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT | None, ArrayT | None]: ...
@_public
def reassemble_with_logits_backward(
    grad_output: ArrayT,
    features: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    layout: Layout = "NCHW",
    need_features: bool = True,
    need_logits: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT | None, ArrayT | None]:
    """Return the gradients of `reassemble_with_logits` for features and for logits.

    The masks are computed again from the logits: ``grad_features`` is that of
    `reassemble_backward`, ``grad_logits = normalize_masks_backward(grad_masks, logits)``.

    Parameters
    ----------
    grad_output : array, (N, C, H', W')
        The gradient for the output, in the dtype of features; its size is the output's, at most
        (ceil(H*up/down), ceil(W*up/down)).
    features : array, (N, C, H, W)
    logits : array, (N, groups*K*K*up*up, ceil(H/down), ceil(W/down))
    up, down, kernel_size, groups, normalizer, layout
        As for `reassemble_with_logits`.
    need_features, need_logits : bool, default True
        Which gradients to compute; the other is returned as None.
    out : pair of arrays, optional
        Where to write (grad_features, grad_logits); an entry may be None.

    Returns
    -------
    grad_features : array as features, or None
    grad_logits : array as logits, or None
        Exactly 0 where a crop left no output.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    Determinism is that of `reassemble_backward`.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", the derivative of
    sections 3.2 (kernel normalizer) and 3.3.

    Examples
    --------
    An average of equal features does not depend on the logits:

    >>> import numpy as np
    >>> features = np.ones((1, 2, 5, 5), np.float32)
    >>> logits = np.zeros((1, 9, 5, 5), np.float32)
    >>> grad_features, grad_logits = reassemble_with_logits_backward(
    ...     np.ones((1, 2, 5, 5), np.float32), features, logits, kernel_size=3
    ... )
    >>> bool(np.allclose(grad_logits[:, :, 1:-1, 1:-1], 0, atol=1e-6))
    True
    """
    function = "reassemble_with_logits_backward"
    number = _core.REASSEMBLE_WITH_LOGITS_BACKWARD
    params = _params(function, number, up, down, groups, layout, kernel_size, normalizer)
    inputs = {"grad_output": grad_output, "features": features, "logits": logits}
    return _backward(
        function,
        params,
        _core.reassemble_with_logits_backward,
        inputs,
        (need_features, need_logits),
        out,
    )


@_public
def normalize_masks(
    logits: ArrayT,
    *,
    up: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    size: tuple[int, int] | None = None,
    layout: Layout = "NCHW",
    out: ArrayT | None = None,
) -> ArrayT:
    """Return the masks that `reassemble_with_logits` uses.

    ``masks = normalizer over the K*K taps of pixel_shuffle(logits, up)``, cropped to `size`.

    Parameters
    ----------
    logits : array, (N, groups*K*K*up*up, Hl, Wl)
        As for `reassemble_with_logits`.
    up, kernel_size, groups, normalizer, layout
        As for `reassemble_with_logits`.
    size : (int, int), optional
        (H', W') where it is to be smaller than (Hl*up, Wl*up): `output_size` tells it for
        features whose size down does not divide.
    out : array, optional
        Where the masks are to be written.

    Returns
    -------
    array, (N, groups*K*K, H', W')
        Library, device and dtype of logits.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    float32 and half logits are normalised in float32, float64 ones in float64. The same bits at
    every run and every thread count.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", section 3.2, kernel
    normalizer, and Table 14.

    Examples
    --------
    >>> import numpy as np
    >>> normalize_masks(np.zeros((1, 9, 1, 1)), kernel_size=3)[0, :, 0, 0].sum().round(12)
    np.float64(1.0)
    """
    function = "normalize_masks"
    number = _core.NORMALIZE_MASKS
    params = _params(function, number, up, 1, groups, layout, kernel_size, normalizer, size)
    library = library_of(function, {"logits": logits}, {"out": out})
    logits_view = library.view(function, "logits", logits)
    if out is None:
        out = library.empty(function, logits, _core.output_shape(params, logits.shape))
    out_view = library.view(function, "masks", out)
    _core.normalize_masks(params, logits_view, out_view, library.stream(logits))
    return out


@_public
def normalize_masks_backward(
    grad_masks: ArrayT,
    logits: ArrayT,
    *,
    up: int = 1,
    kernel_size: int = 5,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    layout: Layout = "NCHW",
    out: ArrayT | None = None,
) -> ArrayT:
    """Return the gradient of `normalize_masks` for logits.

    For the softmax ``grad_logits_t = masks_t * (grad_masks_t - sum over s of
    masks_s * grad_masks_s)``, in the places that pixel_shuffle took them from.

    Parameters
    ----------
    grad_masks : array, (N, groups*K*K, H', W')
        The gradient for the masks, in the dtype of logits; its size is at most (Hl*up, Wl*up).
    logits : array, (N, groups*K*K*up*up, Hl, Wl)
    up, kernel_size, groups, normalizer, layout
        As for `normalize_masks`.
    out : array, optional
        Where the gradient is to be written.

    Returns
    -------
    array as logits
        Exactly 0 where a crop left no mask.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    The same bits at every run and every thread count.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", the derivative of
    section 3.2, kernel normalizer.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.zeros((1, 9, 1, 1))
    >>> normalize_masks_backward(np.ones((1, 9, 1, 1)), logits, kernel_size=3).shape
    (1, 9, 1, 1)
    """
    function = "normalize_masks_backward"
    number = _core.NORMALIZE_MASKS_BACKWARD
    params = _params(function, number, up, 1, groups, layout, kernel_size, normalizer)
    library = library_of(function, {"grad_masks": grad_masks, "logits": logits}, {"out": out})
    grad_masks_view = library.view(function, "grad_masks", grad_masks)
    logits_view = library.view(function, "logits", logits)
    if out is None:
        out = library.empty(function, logits, logits.shape)
    out_view = library.view(function, "grad_logits", out)
    _core.normalize_masks_backward(
        params, grad_masks_view, logits_view, out_view, library.stream(logits)
    )
    return out


def output_size(size: tuple[int, int], up: int = 1, down: int = 1) -> tuple[int, int]:
    """Return the natural size of an output: ``(ceil(H*up/down), ceil(W*up/down))``.

    Parameters
    ----------
    size : (int, int)
        (H, W) of the features. They may be symbols of PyTorch's graphs.
    up, down : int, default 1

    Returns
    -------
    (int, int)
        (H', W').

    Raises
    ------
    TypeError
        size is not a pair of integers.
    ValueError
        A negative size, up or down not from 1 to 2**31 - 1, or a result of 2**63 or more.

    Examples
    --------
    >>> output_size((7, 8), up=3, down=2)
    (11, 12)
    """
    size = pair("output_size", size, "(H, W)")
    up, down = positive("output_size", up=up, down=down)
    if any([type(length) is int and length < 0 for length in size]):
        raise ValueError(f"[output_size] size must not be negative; got {size}.")
    if any([type(length) is int and length * up >= 2**63 for length in size]):
        raise ValueError(
            f"[output_size] size is too large for up={up}: positions in the result must stay below "
            f"2**63; got {size}."
        )
    return natural_size(size, up, down)


def natural_size(size: tuple[int, int], up: int = 1, down: int = 1, **_: Any) -> tuple[int, int]:
    """Return `output_size` without checks."""
    height, width = size
    return (height * up + down - 1) // down, (width * up + down - 1) // down


def set_num_threads(threads: int) -> None:
    """Set how many CPU threads one call may use; 0 goes back to the default.

    The default is CARAFEPP_NUM_THREADS or else the number of cores that the process may use.
    Results do not depend on it.

    Parameters
    ----------
    threads : int, 0 to 1024

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Another number.
    """
    count = integer("set_num_threads", "threads", threads, least=None)
    if not 0 <= count <= 1024:
        raise ValueError(f"[set_num_threads] threads must be from 0 to 1024; got {count}.")
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """Return how many CPU threads one call may use."""
    return _core.get_num_threads()


def show_config() -> None:
    """Print the version, the build, the processor's instruction sets, threads and devices."""
    print(_core.config())
    print(f"threads: {get_num_threads()}")


def list_implementations(
    function: str,
    *arrays: Any,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 0,
    groups: int = 1,
    normalizer: Normalizer = "softmax",
    size: tuple[int, int] | None = None,
    layout: Layout = "NCHW",
    out: Any = None,
) -> list[tuple[str, str | None]]:
    """Return the implementations of a function for a problem, best first.

    Parameters
    ----------
    function : str
        The name of a function of this module.
    *arrays
        The arrays that it reads, in the order of its signature.
    up, down, kernel_size, groups, normalizer, size, layout
        As for that function.
    out : array or pair of arrays, optional
        As for that function. Without it, what the layout of a result rules out is not told.

    Returns
    -------
    list of (name, reason)
        reason is None for an implementation that can run the problem, else why it declines. Names
        are ``<result>[_<factor>]_<layout>[_mma]_<target>``, as carafepp.h tells. A backward lists
        those of its first result, then those of its second.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As the function itself.

    Examples
    --------
    >>> import numpy as np
    >>> features, masks = np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2))
    >>> list_implementations("reassemble", features, masks)[-1]
    ('reassemble_any_ref', None)
    """
    number = getattr(_core, function.upper(), None)
    if not isinstance(number, int) or number == _core.OUTPUT_SIZE or function not in globals():
        raise ValueError(f"[list_implementations] {function!r} has no implementations to list.")
    params = _params(function, number, up, down, groups, layout, kernel_size, normalizer, size)
    inputs = {f"arrays[{k}]": array for k, array in enumerate(arrays)}
    backward = number in (_core.REASSEMBLE_BACKWARD, _core.REASSEMBLE_WITH_LOGITS_BACKWARD)
    given = (out or (None, None)) if backward else (out,)
    results = dict(zip(_RESULTS[function].values(), given, strict=True))
    known = {name: result for name, result in results.items() if result is not None}
    library = library_of(function, {**inputs, **known}, {})
    return _core.list_implementations(
        params,
        [library.view(function, name, array) for name, array in inputs.items()],
        [a if a is None else library.view(function, name, a) for name, a in results.items()],
    )


@contextmanager
def force_implementation(name: str) -> Iterator[None]:
    """Use one implementation wherever it stands in a list, in this context, for tests and timing.

    Raises
    ------
    ValueError
        From the calls made inside: no list has that name.
    NotImplementedError
        From the calls made inside: the implementation declines the problem; the reason is told.
    """
    token = _forced_implementation.set(name)
    try:
        yield
    finally:
        _forced_implementation.reset(token)


def _params(
    function: str,
    number: int,
    up: int,
    down: int,
    groups: int,
    layout: Layout,
    kernel_size: int = 0,
    normalizer: Normalizer = "none",
    size: tuple[int, int] | None = None,
) -> _core.Params:
    """Return the core's parameters; words become numbers here."""
    if not (type(up) is type(down) is type(groups) is type(kernel_size) is int):
        numbers = {"up": up, "down": down, "groups": groups, "kernel_size": kernel_size}
        up, down, groups, kernel_size = [
            integer(function, name, value, least=None) for name, value in numbers.items()
        ]  # whose range the core checks
    if size is not None:
        size = pair(function, size)
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise ValueError(f"[{function}] layout must be 'NCHW' or 'NHWC'; got {layout!r}.")
    check_normalizer(function, normalizer)
    return _core.Params(
        function,
        number,
        up,
        down,
        kernel_size,
        groups,
        _NORMALIZERS[normalizer],
        size,
        _LAYOUTS[layout],
        _forced_implementation.get(),
    )


def check_normalizer(function: str, normalizer: str) -> None:
    """Raise a ValueError if there is no such normaliser."""
    if not isinstance(normalizer, str) or normalizer not in _NORMALIZERS:
        raise ValueError(
            f"[{function}] normalizer must be one of {', '.join(map(repr, _NORMALIZERS))}; "
            f"got {normalizer!r}."
        )


def _backward(
    function: str,
    params: _core.Params,
    run: Any,
    inputs: dict[str, Any],
    needed: tuple[bool, bool],
    out: tuple[Any, Any] | None,
) -> tuple[Any, Any]:
    """Make the gradients that are needed and not given, each like its argument, and fill them."""
    names = list(inputs)[1:]
    if out is None:
        out = (None, None)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(
            f"[{function}] out must be a pair (grad_{names[0]}, grad_{names[1]}); "
            f"got {type(out).__name__}."
        )
    for name, need, result in zip(names, needed, out, strict=True):
        if result is not None and not need:
            raise ValueError(
                f"[{function}] out must be None for grad_{name} where need_{name} is False."
            )
    results = {f"out[{k}]": out[k] for k in range(2) if needed[k]}
    library = library_of(function, inputs, results)
    views = [library.view(function, name, array) for name, array in inputs.items()]
    grads: list[Any] = [None, None]
    grad_views: list[Any] = [None, None]
    for k, name in enumerate(names):
        if needed[k]:
            like = inputs[name]
            grads[k] = library.empty(function, like, like.shape) if out[k] is None else out[k]
            grad_views[k] = library.view(function, f"grad_{name}", grads[k])
    run(params, *views, *grad_views, library.stream(inputs["features"]))
    return grads[0], grads[1]
