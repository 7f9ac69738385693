"""The public functions: any array in, the same kind of array out.

A function names its arguments and finds the library of its arrays. From here to the kernel:

1. `Door.compute` (_doors/door.py) makes the result and passes views of all arrays to the bindings.
   A library with operators of its own calls them first.
2. `bindings/module.cpp` makes each view a `carafepp_tensor`, and releases the GIL.
3. `core/src/carafepp.cpp` checks the arguments and chooses a kernel from a registry.
4. The kernel's launcher plans the work and starts it.
5. The kernel writes the result.

A function takes no `unknown` keyword: the error names the parameter that it may stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, Protocol, TypeVar, overload

from . import _core
from ._arguments import integer, natural_size, odd, padding_pair, pair, positive, unexpected
from ._doors import call, door_of
from ._doors.door import FUNCTIONS, forced_implementation, params_of


class Array(Protocol):
    """The properties that a type checker knows of an array of any library."""

    @property
    def shape(self) -> Any:
        """Return the lengths of the axes."""


ArrayT = TypeVar("ArrayT", bound=Array)

Layout = Literal["NCHW", "NHWC"]
Padding = int | tuple[int, int]
Normalizer = Literal["softmax", "sigmoid", "sigmoid_normalized", "none"]


def reassemble(
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    size: tuple[int, int] | None = None,
    layout: Layout = "NCHW",
    padding: Padding | None = None,
    out: ArrayT | None = None,
    **unknown: NoReturn,
) -> ArrayT:
    """Rescale features by a weighted sum over a window for every output pixel.

    ::

        output[n,c,i',j'] = sum over a,b in [-r,r] of
            masks[n, g(c)*K*K + (a+r)*K + (b+r), i', j'] * features[n, c, src(i')+a, src(j')+b]

    with ``r = K//2``, ``g(c) = c // (C//groups)``, ``src(i') = i'*down // up + r - padding``.
    Features are 0 outside their borders: such a tap contributes exactly 0.

    Parameters
    ----------
    features : array, (N, C, H, W) or (C, H, W)
        float32, float64, float16 or bfloat16, any strides.
    masks : array, (N, groups*K*K, H', W') or (groups*K*K, H', W')
        Normalised reassembly kernels, one of K*K weights for every output pixel; K odd, 1 to 31.
        The dtype of features or, with half features, float32.
    up, down : int, default 1
        The factor up/down. It is not reduced. up=2 doubles the size, down=2 halves it, and up=3
        with down=2 makes it 1.5 times as large.
    groups : int, default 1
        The number of groups of channels; each group has its own kernels. C is divisible by it.
        (mmcv calls this number ``group_size``.)
    size : (int, int), optional
        A smaller (H', W') than the natural size: a crop at the bottom and right. The natural size
        is (ceil(h*up/down), ceil(w*up/down)), with ``h = max(0, H + 2*padding - 2*r)`` and w
        likewise. By default h is H.
    layout : "NCHW" or "NHWC", default "NCHW"
        The order of the axes of every array. Strides tell the order in memory: a PyTorch tensor in
        channels_last memory format has the axes "NCHW".
    padding : int or (int, int), default K//2
        The numbers of rows and columns of zeros that count as features beyond each border, as in a
        convolution: from 0 ("valid") to K//2. With 0 you can pad the features yourself, for
        example by reflection. Or give a tile with a halo of K//2 rows and columns. If the tile
        begins at multiples of down, its output is exactly its part of the whole.
    out : array, optional
        The array for the result. It has any strides and shares no element with an input.

    Returns
    -------
    array, (N, C, H', W') or (C, H', W')
        Library, device and dtype of features.

    Raises
    ------
    TypeError
        An argument is no array, the arrays belong to different libraries, or a dtype does not fit.
    ValueError
        A shape, a number or a device does not fit, or memory is shared, not aligned or read-only.
    NotImplementedError
        An array is on a CUDA device and the build has no CUDA; or, with `out`, a tensor requires
        grad.
    RuntimeError
        CUDA has failed, or its driver is missing; the sentence names the error.

    Notes
    -----
    Sums are in float32 (in float64 for float64), in a fixed order. Every run and every number of
    threads gives the same bits. NaN and Inf propagate by the formula.

    The work on CuPy arrays and on PyTorch CUDA tensors is queued on the current stream of their
    device. The work on CUDA arrays of other libraries is queued on the legacy default stream. The
    call does not wait for it. The call allocates only the result, from the library's memory pool.

    Dask arrays give a lazy Dask array, of the same bits as NumPy's.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", section 3.3, Eqn. 3.

    Examples
    --------
    A 3x3 box filter, with zeros and with replicated features beyond the borders, and
    nearest-neighbour upsampling:

    >>> import numpy as np
    >>> features = np.arange(4.0, dtype=np.float32).reshape(1, 1, 2, 2)
    >>> reassemble(features, np.full((1, 9, 2, 2), 1 / 9, np.float32))
    array([[[[0.6666667, 0.6666667],
             [0.6666667, 0.6666667]]]], dtype=float32)
    >>> padded = np.pad(features, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    >>> reassemble(padded, np.full((1, 9, 2, 2), 1 / 9, np.float32), padding=0)
    array([[[[1.       , 1.3333334],
             [1.6666667, 2.       ]]]], dtype=float32)
    >>> reassemble(features, np.ones((1, 1, 4, 4), np.float32), up=2)[0, 0]
    array([[0., 0., 1., 1.],
           [0., 0., 1., 1.],
           [2., 2., 3., 3.],
           [2., 2., 3., 3.]], dtype=float32)
    """
    if unknown:
        raise unexpected(reassemble, unknown)
    params = {
        "up": up,
        "down": down,
        "groups": groups,
        "size": size,
        "layout": layout,
        "padding": padding,
    }
    results: tuple[ArrayT] = call("reassemble", (features, masks), params, (out,))
    return results[0]


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
    padding: Padding | None = None,
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
    padding: Padding | None = None,
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
    padding: Padding | None = None,
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
    padding: Padding | None = None,
    need_features: bool = True,
    need_masks: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT | None, ArrayT | None]: ...
def reassemble_backward(
    grad_output: ArrayT,
    features: ArrayT,
    masks: ArrayT,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    layout: Layout = "NCHW",
    padding: Padding | None = None,
    need_features: bool = True,
    need_masks: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
    **unknown: NoReturn,
) -> tuple[ArrayT | None, ArrayT | None]:
    """Return the gradients of `reassemble` for features and for masks.

    ::

        grad_masks[n, g*K*K+t, i', j'] = sum over c in group g of
            grad_output[n,c,i',j'] * features[n, c, src(i')+a_t, src(j')+b_t]
        grad_features[n,c,i,j] = sum over (i',j',a,b) with src(i')+a = i, src(j')+b = j of
            grad_output[n,c,i',j'] * masks[n, g(c)*K*K + (a+r)*K + (b+r), i', j']

    Parameters
    ----------
    grad_output : array, (N, C, H', W')
        The gradient of the output, in the dtype of features.
    features : array, (N, C, H, W)
    masks : array, (N, groups*K*K, H', W')
        The size is the size of the output.
    up, down, groups, layout, padding
        As for `reassemble`.
    need_features, need_masks : bool, default True
        The gradients to compute. The other one is None.
    out : pair of arrays, optional
        The arrays for (grad_features, grad_masks); an entry may be None.

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
    One thread sums each element in a fixed order. Every run and every number of threads gives the
    same bits. A feature that no tap reaches gets exactly 0. So does a mask element whose tap falls
    outside the border.

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
    if unknown:
        raise unexpected(reassemble_backward, unknown)
    params = {
        "up": up,
        "down": down,
        "groups": groups,
        "layout": layout,
        "padding": padding,
    }
    return _backward(
        "reassemble_backward",
        (grad_output, features, masks),
        params,
        (need_features, need_masks),
        out,
    )


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
    padding: Padding | None = None,
    out: ArrayT | None = None,
    **unknown: NoReturn,
) -> ArrayT:
    """Normalise logits to masks and reassemble features with them, in one pass.

    ``output = reassemble(features, masks)`` with
    ``masks = normalizer over the K*K taps of pixel_shuffle(logits, up)``, cropped to the size of
    the output. The masks are never stored.

    Parameters
    ----------
    features : array, (N, C, H, W) or (C, H, W)
        As for `reassemble`.
    logits : array, (N, groups*K*K*up*up, ceil(h/down), ceil(w/down))
        The prediction of the content encoder. By default h is H and w is W; `reassemble` tells how
        they depend on padding. Channel ``(g*K*K + t)*up*up + dy*up + dx`` is tap t of the output
        pixel at sub-pixel (dy, dx): the order of ``torch.pixel_shuffle``. The dtype of features or,
        with half features, float32.
    up, down, groups, size, layout, padding, out
        As for `reassemble`.
    kernel_size : int, default 5
        K: odd, 1 to 31.
    normalizer : {"softmax", "sigmoid", "sigmoid_normalized", "none"}, default "softmax"
        "sigmoid_normalized" is the sigmoid divided by its sum over the taps. It is computed as
        softmax(log(sigmoid(logits))), which never divides 0 by 0.

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
    The softmax is shifted by its maximum. Infinite logits behave as in ``torch.softmax``: if all
    taps are -inf, the result is NaN. Sums and bits are as in `reassemble`.

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
    if unknown:
        raise unexpected(reassemble_with_logits, unknown)
    params = {
        "up": up,
        "down": down,
        "groups": groups,
        "kernel_size": kernel_size,
        "normalizer": normalizer,
        "size": size,
        "layout": layout,
        "padding": padding,
    }
    results: tuple[ArrayT] = call("reassemble_with_logits", (features, logits), params, (out,))
    return results[0]


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
    padding: Padding | None = None,
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
    padding: Padding | None = None,
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
    padding: Padding | None = None,
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
    padding: Padding | None = None,
    need_features: bool = True,
    need_logits: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
) -> tuple[ArrayT | None, ArrayT | None]: ...
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
    padding: Padding | None = None,
    need_features: bool = True,
    need_logits: bool = True,
    out: tuple[ArrayT | None, ArrayT | None] | None = None,
    **unknown: NoReturn,
) -> tuple[ArrayT | None, ArrayT | None]:
    """Return the gradients of `reassemble_with_logits` for features and for logits.

    ``masks = normalize_masks(logits)`` is computed again, and
    ``grad_features, grad_masks = reassemble_backward(grad_output, features, masks)``,
    ``grad_logits = normalize_masks_backward(grad_masks, logits)``.

    Parameters
    ----------
    grad_output : array, (N, C, H', W')
        The gradient of the output, in the dtype of features. The size is at most the natural one.
    features : array, (N, C, H, W)
    logits : array, (N, groups*K*K*up*up, ceil(h/down), ceil(w/down))
    up, down, kernel_size, groups, normalizer, layout, padding
        As for `reassemble_with_logits`.
    need_features, need_logits : bool, default True
        The gradients to compute. The other one is None.
    out : pair of arrays, optional
        The arrays for (grad_features, grad_logits); an entry may be None.

    Returns
    -------
    grad_features : array as features, or None
    grad_logits : array as logits, or None
        Exactly 0 for a logit that a crop leaves without an output.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    Every run and every number of threads gives the same bits, as in `reassemble_backward`.

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
    if unknown:
        raise unexpected(reassemble_with_logits_backward, unknown)
    params = {
        "up": up,
        "down": down,
        "groups": groups,
        "kernel_size": kernel_size,
        "normalizer": normalizer,
        "layout": layout,
        "padding": padding,
    }
    return _backward(
        "reassemble_with_logits_backward",
        (grad_output, features, logits),
        params,
        (need_features, need_logits),
        out,
    )


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
    **unknown: NoReturn,
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
        A smaller (H', W') than (Hl*up, Wl*up). If `down` does not divide the size of the features,
        `output_size` returns it.
    out : array, optional
        The array for the masks.

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
    float32 and half logits are normalised in float32, float64 logits in float64. Every run and
    every number of threads gives the same bits.

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
    if unknown:
        raise unexpected(normalize_masks, unknown)
    params = {
        "up": up,
        "groups": groups,
        "kernel_size": kernel_size,
        "normalizer": normalizer,
        "size": size,
        "layout": layout,
    }
    results: tuple[ArrayT] = call("normalize_masks", (logits,), params, (out,))
    return results[0]


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
    **unknown: NoReturn,
) -> ArrayT:
    """Return the gradient of `normalize_masks` for logits.

    For the softmax, in the order of the logits before pixel_shuffle::

        grad_logits_t = masks_t * (grad_masks_t - sum over s of masks_s * grad_masks_s)

    Parameters
    ----------
    grad_masks : array, (N, groups*K*K, H', W')
        The gradient of the masks, in the dtype of logits. The size is at most (Hl*up, Wl*up).
    logits : array, (N, groups*K*K*up*up, Hl, Wl)
    up, kernel_size, groups, normalizer, layout
        As for `normalize_masks`.
    out : array, optional
        The array for the gradient.

    Returns
    -------
    array as logits
        Exactly 0 for a logit that a crop leaves without a mask.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `reassemble`.

    Notes
    -----
    Every run and every number of threads gives the same bits.

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
    if unknown:
        raise unexpected(normalize_masks_backward, unknown)
    params = {
        "up": up,
        "groups": groups,
        "kernel_size": kernel_size,
        "normalizer": normalizer,
        "layout": layout,
    }
    results: tuple[ArrayT] = call("normalize_masks_backward", (grad_masks, logits), params, (out,))
    return results[0]


def output_size(
    size: tuple[int, int],
    up: int = 1,
    down: int = 1,
    kernel_size: int | None = None,
    padding: Padding | None = None,
    **unknown: NoReturn,
) -> tuple[int, int]:
    """Return the natural size of an output: ``(ceil(h*up/down), ceil(w*up/down))``.

    By default ``(h, w) = (H, W)``. With padding ``h = max(0, H + 2*padding - 2*(kernel_size//2))``,
    and w likewise.

    Parameters
    ----------
    size : (int, int)
        (H, W) of the features. Symbols of PyTorch's graphs are allowed.
    up, down : int, default 1
    kernel_size : int, optional
        K: odd, 1 to 31. It must be given with padding, and does not matter without.
    padding : int or (int, int), default K//2
        As for `reassemble`.

    Returns
    -------
    (int, int)
        (H', W').

    Raises
    ------
    TypeError
        size is not a pair of integers, padding is neither that nor an integer, or kernel_size is
        missing.
    ValueError
        size is negative, up or down is not from 1 to 2**31 - 1, kernel_size is not odd from 1 to
        31, padding is not from 0 to kernel_size//2, or the result is 2**63 or more.

    Examples
    --------
    >>> output_size((7, 8), up=3, down=2)
    (11, 12)
    >>> output_size((7, 8), kernel_size=5, padding=0)
    (3, 4)
    """
    if unknown:
        raise unexpected(output_size, unknown)
    size = pair("output_size", size, "(H, W)")
    up, down = positive("output_size", up=up, down=down)
    if any([type(length) is int and length < 0 for length in size]):
        raise ValueError(f"[output_size] size must not be negative; got {size}.")
    if any([type(length) is int and length * up >= 2**63 for length in size]):
        raise ValueError(
            f"[output_size] size is too large for up={up}: positions in the result must stay below "
            f"2**63; got {size}."
        )
    if padding is None and kernel_size is None:
        return natural_size(size, up, down)
    if kernel_size is None:
        raise TypeError(
            "[output_size] kernel_size must be given with padding: the output size depends on it; "
            "got None."
        )
    kernel_size = odd("output_size", "kernel_size", kernel_size)
    if padding is not None:
        padding = padding_pair("output_size", padding, kernel_size)
    return natural_size(size, up, down, kernel_size, padding)


def set_num_threads(threads: int) -> None:
    """Set the largest number of CPU threads for one call; 0 restores the default.

    The default is CARAFEPP_NUM_THREADS, from 1 to 1024, else the number of cores that the process
    may use. Results do not depend on the number of threads.

    The threads are carafepp's own. ``torch.set_num_threads`` and ``OMP_NUM_THREADS`` do not change
    their number, and this function does not change that of other libraries.

    Parameters
    ----------
    threads : int, 0 to 1024

    Raises
    ------
    TypeError
        threads is not an integer.
    ValueError
        threads is not from 0 to 1024.
    """
    count = integer("set_num_threads", "threads", threads, least=None)
    if not 0 <= count <= 1024:
        raise ValueError(f"[set_num_threads] threads must be from 0 to 1024; got {count}.")
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """Return the largest number of CPU threads for one call."""
    return _core.get_num_threads()


def show_config() -> None:
    """Print the version, the build, the processor's instruction sets, CUDA devices and threads.

    The driver is asked for devices, but no CUDA context is made. A child that is forked afterwards
    cannot use CUDA.
    """
    print(_core.config())
    if devices := _core.devices():
        print(devices)
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
    padding: Padding | None = None,
    out: Any = None,
) -> list[tuple[str, str | None]]:
    """Return the implementations of a function for a problem, in the order of preference.

    The first without a reason runs, unless it is slower here (``CARAFEPP_LOG=debug`` tells).

    Parameters
    ----------
    function : str
        The name of a function.
    *arrays
        The input arrays, in the order of its signature.
    up, down, kernel_size, groups, normalizer, size, layout, padding
        As for that function.
    out : array or pair of arrays, optional
        As for that function. Without it, the reasons do not consider the layout of results.

    Returns
    -------
    list of (name, reason)
        The reason is None if the implementation can run the problem; else it tells why not. Names
        are ``<result>[_<factor>|_few|_runs]_<layout>[_mma]_<target>``, as carafepp.h describes. A
        backward lists the implementations for both results, for its first, then for its second.

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
    if not isinstance(function, str) or function not in FUNCTIONS:
        raise ValueError(f"[list_implementations] {function!r} has no implementations to list.")
    spec = FUNCTIONS[function]
    if len(arrays) != len(spec.inputs):
        raise TypeError(
            f"[{function}] the implementations depend on {len(spec.inputs)} arrays, those that the "
            f"function reads; got {len(arrays)}."
        )
    if padding is not None and "features" not in spec.inputs:
        raise TypeError(f"[{function}] padding must be None: there are no features; got {padding}.")
    core_params = params_of(
        function,
        up=up,
        down=down,
        kernel_size=kernel_size,
        groups=groups,
        normalizer=normalizer,
        size=size,
        layout=layout,
        padding=padding,
    )
    results = (out,) if len(spec.out) == 1 else tuple(out or (None, None))
    door = door_of(function, arrays, results)
    views = [
        None if array is None else door.view(function, name, array)
        for name, array in zip(spec.inputs + spec.out, arrays + results, strict=True)
    ]
    return _core.list_implementations(core_params, views[: len(arrays)], views[len(arrays) :])


@contextmanager
def force_implementation(name: str) -> Iterator[None]:
    """Use one implementation in this context wherever a list has it, for tests and timing.

    Raises
    ------
    TypeError
        The name is no string.
    ValueError
        A call inside the context raises it if no list has that name.
    NotImplementedError
        A call inside the context raises it, with the reason, if the implementation declines.
    """
    if not isinstance(name, str):
        raise TypeError(f"[force_implementation] name must be a string; got {name!r}.")
    token = forced_implementation.set(name)
    try:
        yield
    finally:
        forced_implementation.reset(token)


def _backward(
    function: str,
    inputs: tuple[Any, ...],
    params: dict[str, Any],
    needed: tuple[bool, bool],
    out: tuple[Any, Any] | None,
) -> tuple[Any, Any]:
    """Compute the gradients that are needed, each like its input."""
    names = FUNCTIONS[function].inputs[1:]
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
    first, second = call(function, inputs, params, tuple(out), needed)
    return first, second
