"""The definition of every operator in float64 NumPy: obviously right rather than fast.

CARAFE++ (Wang et al., arXiv:2012.04733), section 3.3, Eqn. (3), for any factor up/down, groups and
padding:

    Y[n,c,i',j'] = sum over a,b in [-r,r] of
                   M[n, g(c)*K*K + (a+r)*K + (b+r), i', j'] * X[n, c, src(i')+a, src(j')+b]

    r = K//2,   g(c) = c // (C/G),   src(i') = floor(i' * down / up) + r - padding

Nothing here is shared with the core. The sum leaves out a tap outside the border: it contributes
0, even against an Inf or NaN mask or gradient. Each result is a sum of products. Rounding
bounds rest on the sum of their magnitudes: the same function of absolute values (`*_magnitude`).
"""

import itertools
import math

import numpy as np

NORMALIZERS = ("softmax", "sigmoid", "sigmoid_normalized", "none")


def output_size(h, w, up, down, kernel_size=1, padding=None):
    """Natural size of the result: up/down for each window that fits into the padded map."""
    r = kernel_size // 2
    pad_h, pad_w = (r, r) if padding is None else padding
    h, w = max(0, h + 2 * pad_h - 2 * r), max(0, w + 2 * pad_w - 2 * r)
    return -(-h * up // down), -(-w * up // down)


def _double(array):
    return np.asarray(array).astype(np.float64)


def _kernel_size(mask_channels, groups):
    return math.isqrt(mask_channels // groups)


def _split_groups(array, groups):
    """[N, G*Q, H, W] -> [N, G, Q, H, W]."""
    n, channels, h, w = array.shape
    return array.reshape(n, groups, channels // groups, h, w)


def _merge_groups(array):
    n, groups, per_group, h, w = array.shape
    return array.reshape(n, groups * per_group, h, w)


def _taps(h, w, out_h, out_w, k, up, down, padding):
    """Yield for each tap: its number, the outputs that have it inside the map, its pixels."""
    r = k // 2
    pad_h, pad_w = (r, r) if padding is None else padding
    src_i = np.arange(out_h) * down // up + r - pad_h
    src_j = np.arange(out_w) * down // up + r - pad_w
    for t, (a, b) in enumerate(itertools.product(range(-r, r + 1), repeat=2)):
        i = np.flatnonzero((src_i + a >= 0) & (src_i + a < h))
        j = np.flatnonzero((src_j + b >= 0) & (src_j + b < w))
        if i.size and j.size:
            yield t, (i[:, None], j), (src_i[i][:, None] + a, src_j[j] + b)


@np.errstate(invalid="ignore", over="ignore")
def reassemble(features, masks, *, up=1, down=1, groups=1, padding=None):
    """Y [N, C, H', W'] from X [N, C, H, W] and M [N, G*K*K, H', W']."""
    x, m = _split_groups(_double(features), groups), _split_groups(_double(masks), groups)
    k = _kernel_size(masks.shape[1], groups)
    y = np.zeros(x.shape[:3] + m.shape[3:])
    for t, (oi, oj), (si, sj) in _taps(*x.shape[3:], *m.shape[3:], k, up, down, padding):
        y[..., oi, oj] += m[:, :, t, None][..., oi, oj] * x[..., si, sj]
    return _merge_groups(y)


@np.errstate(invalid="ignore", over="ignore")
def grad_features(grad_output, masks, size, *, up=1, down=1, groups=1, padding=None):
    """Gradient of <D, Y> with respect to X [N, C, H, W], where (H, W) = size."""
    d, m = _split_groups(_double(grad_output), groups), _split_groups(_double(masks), groups)
    k = _kernel_size(masks.shape[1], groups)
    gx = np.zeros(d.shape[:3] + tuple(size))
    for t, (oi, oj), (si, sj) in _taps(*size, *m.shape[3:], k, up, down, padding):
        np.add.at(gx, (..., si, sj), d[..., oi, oj] * m[:, :, t, None][..., oi, oj])
    return _merge_groups(gx)


@np.errstate(invalid="ignore", over="ignore")
def grad_masks(grad_output, features, kernel_size, *, up=1, down=1, groups=1, padding=None):
    """Gradient of <D, Y> with respect to M [N, G*K*K, H', W']."""
    d, x = _split_groups(_double(grad_output), groups), _split_groups(_double(features), groups)
    gm = np.zeros((*d.shape[:2], kernel_size**2, *d.shape[3:]))
    sizes = *x.shape[3:], *d.shape[3:]
    for t, (oi, oj), (si, sj) in _taps(*sizes, kernel_size, up, down, padding):
        gm[:, :, t][..., oi, oj] = (d[..., oi, oj] * x[..., si, sj]).sum(axis=2)
    return _merge_groups(gm)


# Kernel normaliser (section 3.2, Table 14): over the K*K axis of pixel_shuffle(L, up), cropped to
# (H', W').


def pixel_shuffle(logits, up):
    """[N, Q*up*up, Hl, Wl] -> [N, Q, Hl*up, Wl*up].

    Channel q*up*up + dy*up + dx goes to row i*up+dy, column j*up+dx.
    """
    n, channels, h, w = logits.shape
    q = channels // up**2
    array = logits.reshape(n, q, up, up, h, w)  # n, q, dy, dx, i, j
    return array.transpose(0, 1, 4, 2, 5, 3).reshape(n, q, h * up, w * up)


def pixel_unshuffle(array, up):
    """The inverse of pixel_shuffle."""
    n, q, h, w = array.shape
    array = array.reshape(n, q, h // up, up, w // up, up)  # n, q, i, dy, j, dx
    return array.transpose(0, 1, 3, 5, 2, 4).reshape(n, q * up**2, h // up, w // up)


def _shuffled(logits, up, groups, size):
    """The logits as [N, G, K*K, H', W']."""
    full = pixel_shuffle(_double(logits), up)
    h, w = full.shape[2:] if size is None else size
    return _split_groups(full[:, :, :h, :w], groups)


def _logsigmoid(x):
    return -np.logaddexp(0, -x)


def _softmax(x):
    e = np.exp(x - x.max(axis=2, keepdims=True))
    return e / e.sum(axis=2, keepdims=True)


@np.errstate(invalid="ignore", over="ignore")
def _normalized(x, normalizer):
    """The normaliser along axis 2 (K*K). Infinite logits behave as in torch.softmax."""
    if normalizer == "softmax":
        return _softmax(x)
    if normalizer == "sigmoid":
        return np.exp(_logsigmoid(x))
    if normalizer == "sigmoid_normalized":  # sigmoid over its sum, without dividing 0 by 0
        return _softmax(_logsigmoid(x))
    return {"none": x}[normalizer]


@np.errstate(invalid="ignore", over="ignore")
def _normalized_backward(gm, x, normalizer):
    m = _normalized(x, normalizer)
    if normalizer == "softmax":
        return m * (gm - (m * gm).sum(axis=2, keepdims=True))
    if normalizer == "sigmoid":
        return gm * m * np.exp(_logsigmoid(-x))
    if normalizer == "sigmoid_normalized":
        return m * (gm - (m * gm).sum(axis=2, keepdims=True)) * np.exp(_logsigmoid(-x))
    return {"none": gm}[normalizer]


def normalize(logits, *, up=1, groups=1, normalizer="softmax", size=None):
    """M [N, G*K*K, H', W'] from L [N, G*K*K*up*up, Hl, Wl]; without a size (Hl*up, Wl*up)."""
    return _merge_groups(_normalized(_shuffled(logits, up, groups, size), normalizer))


def _to_logits(gradient, logits_shape, up):
    """A gradient [N, G*K*K, H', W'] in the order and shape of the logits; 0 outside the crop."""
    n, channels, h, w = logits_shape
    full = np.zeros((n, channels // up**2, h * up, w * up))
    full[:, :, : gradient.shape[2], : gradient.shape[3]] = gradient
    return pixel_unshuffle(full, up)


def normalize_backward(grad_masks, logits, *, up=1, groups=1, normalizer="softmax"):
    """Gradient of <grad_masks, M> with respect to L; the size is that of grad_masks."""
    x = _shuffled(logits, up, groups, grad_masks.shape[2:])
    gl = _normalized_backward(_split_groups(_double(grad_masks), groups), x, normalizer)
    return _to_logits(_merge_groups(gl), logits.shape, up)


def reassemble_with_logits(
    features, logits, *, up=1, down=1, groups=1, normalizer="softmax", size=None, padding=None
):
    """Y from X and L: reassemble with the normalised masks."""
    k = _kernel_size(logits.shape[1] // up**2, groups)
    size = output_size(*features.shape[2:], up, down, k, padding) if size is None else size
    masks = normalize(logits, up=up, groups=groups, normalizer=normalizer, size=size)
    return reassemble(features, masks, up=up, down=down, groups=groups, padding=padding)


def reassemble_with_logits_backward(
    grad_output, features, logits, *, up=1, down=1, groups=1, normalizer="softmax", padding=None
):
    """Gradients of <D, Y> with respect to X and to L; the size is that of grad_output."""
    size = grad_output.shape[2:]
    masks = normalize(logits, up=up, groups=groups, normalizer=normalizer, size=size)
    k = _kernel_size(masks.shape[1], groups)
    params = {"up": up, "down": down, "groups": groups, "padding": padding}
    gx = grad_features(grad_output, masks, features.shape[2:], **params)
    gm = grad_masks(grad_output, features, k, **params)
    return gx, normalize_backward(gm, logits, up=up, groups=groups, normalizer=normalizer)


# Sums of magnitudes, to which rounding errors are proportional.


def reassemble_magnitude(features, masks, **params):
    return reassemble(np.abs(_double(features)), np.abs(_double(masks)), **params)


def grad_features_magnitude(grad_output, masks, size, **params):
    return grad_features(np.abs(_double(grad_output)), np.abs(_double(masks)), size, **params)


def grad_masks_magnitude(grad_output, features, kernel_size, **params):
    return grad_masks(
        np.abs(_double(grad_output)), np.abs(_double(features)), kernel_size, **params
    )


def normalize_backward_magnitude(
    grad_masks_magnitude, logits, *, up=1, groups=1, normalizer="softmax"
):
    """Sum of the magnitudes of the products in normalize_backward, given those of grad_masks.

    The factor 1 - sigmoid(L) is bounded by 1, which allows it to be computed by that subtraction.
    """
    gm = _split_groups(np.abs(_double(grad_masks_magnitude)), groups)
    m = np.abs(_normalized(_shuffled(logits, up, groups, gm.shape[3:]), normalizer))
    if normalizer in ("softmax", "sigmoid_normalized"):
        magnitude = m * (gm + (m * gm).sum(axis=2, keepdims=True))
    else:
        magnitude = gm * {"sigmoid": m, "none": 1.0}[normalizer]
    return _to_logits(_merge_groups(magnitude), logits.shape, up)
