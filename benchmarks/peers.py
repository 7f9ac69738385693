"""PyTorch's candidates: compositions of the same computation, and other operators.

A composition takes features and masks, axes N, C, H, W, contiguous or channels_last. Its factor is
an integer, up or down; `gathered` takes fractions too. From masks, `gathered` takes groups, and so
does `unfold` without upsampling. From logits, a composition begins with pixel_shuffle and softmax.
Without autograd, its last step writes into the recycled `out`; temporary tensors come from
PyTorch's allocator.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from cases import Case

from .passes import Pass, as_nchw
from .problems import Arrays
from .timing import Candidate

aten = torch.ops.aten
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def tensor(array: np.ndarray, layout: str) -> torch.Tensor:
    """Return a tensor on the memory of an array, axes N, C, H, W."""
    if array.dtype.name == "bfloat16":
        shared = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        shared = torch.from_numpy(array)
    return as_nchw(shared, layout)


# Compositions. Shapes: features (N, C, H, W), masks (N, K*K, h, w). The output has the size h, w
# before a crop, s is the factor, and t = K*K counts taps.


def _padding(case: Case) -> tuple[int, int]:
    """Return the rows and the columns of zeros beyond each border."""
    return case.padding or (case.kernel_size // 2,) * 2


def _padded(features, case: Case):
    rows, columns = _padding(case)
    return F.pad(features, [columns, columns, rows, rows])


def _phases(masks, case: Case):
    """Return a view of masks whose outputs are sorted by source pixel: (N, t, H, s, W, s)."""
    n, taps, h, w = masks.shape
    return masks.view(n, taps, h // case.up, case.up, w // case.up, case.up)


def _finish(output, case: Case, out):
    """Crop; write into `out` if there is one."""
    output = output[:, :, : case.output_size[0], : case.output_size[1]]
    return output if out is None else out.copy_(output)


def _add_product(total, x, mask):
    """Return total + x * mask, in place without autograd."""
    if total is None:
        return x * mask
    return torch.addcmul(total, x, mask) if torch.is_grad_enabled() else total.addcmul_(x, mask)


def unfold(features, masks, case: Case, out=None):
    """Contract a tensor of all windows, (N, C, t, H or h, W or w), over t."""
    (n, c), (h, w), k = features.shape[:2], case.centres, case.kernel_size
    if case.up == 1:
        out_h, out_w = masks.shape[2:]
        windows = F.unfold(features, k, padding=_padding(case), stride=case.down)
        windows = windows.view(n, case.groups, -1, k * k, out_h, out_w)
        masks = masks.unflatten(1, (case.groups, 1, k * k))
        return _finish((windows * masks).sum(3).flatten(1, 2), case, out)
    windows = F.unfold(features, k, padding=_padding(case)).view(n, c, k * k, h, w)
    masks = _phases(masks, case).permute(0, 3, 5, 1, 2, 4).reshape(n, case.up**2, k * k, h, w)
    output = torch.einsum("nskhw,nckhw->ncshw", masks, windows)
    return _finish(F.pixel_shuffle(output.reshape(n, -1, h, w), case.up), case, out)


def taps(features, masks, case: Case, out=None):
    """Loop over taps: add shifted features times one channel of masks."""
    (n, c), (h, w), k, s = features.shape[:2], case.centres, case.kernel_size, case.up
    out_h, out_w = masks.shape[2:]
    padded, down, output = _padded(features, case), case.down, None
    in_place = out is not None and out.shape[2:] == masks.shape[2:]  # no crop
    for tap in range(k * k):
        a, b = divmod(tap, k)
        if down > 1:
            x = padded[:, :, a : a + down * (out_h - 1) + 1 : down]
            x = x[:, :, :, b : b + down * (out_w - 1) + 1 : down]
            mask = masks[:, tap].unsqueeze(1)
        else:
            x = padded[:, :, a : a + h, b : b + w].reshape(n, c, h, 1, w, 1)
            mask = _phases(masks, case)[:, tap].unsqueeze(1)
        if output is None and in_place:
            output = torch.mul(x, mask, out=out if down > 1 else out.view(n, c, h, s, w, s))
        else:
            output = _add_product(output, x, mask)
    return out if in_place else _finish(output.reshape(n, c, out_h, out_w), case, out)


def taps_per_phase(features, masks, case: Case, out=None):
    """Loop over phases and taps, at the size of the features; up only."""
    n, (h, w), k, s = len(features), case.centres, case.kernel_size, case.up
    padded = _padded(features, case)
    masks = _phases(masks, case).permute(3, 5, 0, 1, 2, 4).contiguous()
    phases = []
    for phase in masks.reshape(s * s, n, k * k, h, w):
        total = None
        for tap in range(k * k):
            a, b = divmod(tap, k)
            x = padded[:, :, a : a + h, b : b + w]
            total = _add_product(total, x, phase[:, tap].unsqueeze(1))
        phases.append(total)
    output = F.pixel_shuffle(torch.stack(phases, 2).reshape(n, -1, h, w), s)
    return _finish(output, case, out)


def bmm(features, masks, case: Case, out=None):
    """Multiply the s*s masks of each source pixel by its window: (s*s, t) @ (t, C)."""
    (n, c), k, s, d = features.shape[:2], case.kernel_size, case.up, case.down
    h, w = (-(-size // d) for size in case.centres)
    pixels = _padded(features, case).permute(0, 2, 3, 1).contiguous()
    windows = pixels.unfold(1, k, d).unfold(2, k, d).permute(0, 1, 2, 4, 5, 3)
    windows = windows.reshape(n * h * w, k * k, c)
    masks = _phases(masks, case).permute(0, 2, 4, 3, 5, 1).reshape(n * h * w, s * s, k * k)
    output = torch.bmm(masks, windows).view(n, h, w, s, s, c).permute(0, 5, 1, 3, 2, 4)
    return _finish(output.reshape(n, c, h * s, w * s), case, out)


def gathered(features, masks, case: Case, out=None):
    """Loop over taps: add gathered features times one channel of each group's masks."""
    (out_h, out_w), k = masks.shape[2:], case.kernel_size
    rows, columns = (
        torch.arange(size, device=features.device) * case.down // case.up for size in (out_h, out_w)
    )
    padded, output = _padded(features, case), None
    masks = masks.unflatten(1, (case.groups, 1, k * k))
    for tap in range(k * k):
        a, b = divmod(tap, k)
        x = padded.index_select(2, rows + a).index_select(3, columns + b)
        x = x.unflatten(1, (case.groups, -1))
        output = _add_product(output, x, masks[:, :, :, tap])
    return _finish(output.flatten(1, 2), case, out)


def convex(features, logits, case: Case, out=None):
    """Contract all windows with normalised logits, then shuffle, as RAFT does; up only."""
    (n, c), (h, w), k, s = features.shape[:2], case.centres, case.kernel_size, case.up
    masks = F.softmax(logits.view(n, 1, k * k, s, s, h, w), 2)
    windows = F.unfold(features, k, padding=_padding(case)).view(n, c, k * k, 1, 1, h, w)
    output = (masks * windows).sum(2).permute(0, 1, 4, 2, 5, 3)
    return _finish(output.reshape(n, c, s * h, s * w), case, out)


COMPOSITIONS: dict[str, Callable] = {
    "unfold": unfold,
    "taps": taps,
    "taps per phase": taps_per_phase,
    "bmm": bmm,
    "gathered": gathered,
}
COMPILED = "compiled"  # prefix of the best composition and of taps, by torch.compile


def compositions(case: Case) -> list[str]:
    """Return the names of the compositions for this problem."""
    if case.up > 1 and case.down > 1:
        return ["gathered"]
    if case.groups > 1:
        return ["gathered", "unfold"] if case.up == 1 else ["gathered"]
    names = [name for name in COMPOSITIONS if name != "gathered"]  # slower than slices
    return [name for name in names if case.up > 1 or name != "taps per phase"]


def _masks(values, case: Case, weights: str):
    """Return masks of the natural size, from logits by pixel_shuffle and softmax."""
    (h, w), (full_h, full_w) = case.output_size, case.natural_size
    if weights == "logits":
        return F.softmax(F.pixel_shuffle(values, case.up), 1)[:, :, :full_h, :full_w]
    return values if (h, w) == (full_h, full_w) else F.pad(values, (0, full_w - w, 0, full_h - h))


def composed(name: str, case: Case, weights: str, features, values, out=None):
    """Compute the output by one composition, from masks or from logits."""
    if name == "convex":
        return convex(features, values, case, out)
    return COMPOSITIONS[name](features, _masks(values, case, weights), case, out)


def forget_compiled() -> None:
    """Free the code of other problems; leave room for all variants of the next problem."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64


# Other operators: {name: (function of x, function of x and out, or None)}.


def operators(arrays: Arrays, layout: str) -> dict[str, tuple[Callable, Callable | None]]:
    """Return the operators with the same output shape, for an integer factor."""
    case, dtype = arrays.case, getattr(torch, arrays.dtype)
    size, s, d = case.output_size, case.up, case.down
    memory_format = FORMATS[layout]

    def weight(k: int):
        return torch.randn(case.c, case.c, k, k).to(dtype, memory_format=memory_format)

    if s > 1 and d == 1:
        w = weight(s)
        return {
            "nearest": (
                lambda x: F.interpolate(x, size, mode="nearest"),
                lambda x, out: aten.upsample_nearest2d.out(x, size, out=out),
            ),
            "bilinear": (
                lambda x: F.interpolate(x, size, mode="bilinear"),
                lambda x, out: aten.upsample_bilinear2d.out(x, size, False, out=out),
            ),
            f"conv_transpose {s}x{s}": (
                lambda x: F.conv_transpose2d(x, w, stride=s)[:, :, : size[0], : size[1]],
                None,
            ),
        }
    if d > 1 and s == 1:
        w, window = weight(3), ([d, d], [d, d], [0, 0])
        indices = torch.empty(case.output_shape, dtype=torch.int64, memory_format=memory_format)
        return {
            "avg_pool": (
                lambda x: F.avg_pool2d(x, d, ceil_mode=True),
                lambda x, out: aten.avg_pool2d.out(x, *window, True, out=out),
            ),
            "max_pool": (
                lambda x: F.max_pool2d(x, d, ceil_mode=True),
                lambda x, out: aten.max_pool2d_with_indices.out(
                    x, *window, [1, 1], True, out=out, indices=indices
                )[0],
            ),
            "conv 3x3": (lambda x: F.conv2d(x, w, stride=d, padding=1), None),
        }
    return {}


# Candidates


def forward(function: Callable, *inputs):
    """Return the result, without autograd."""
    with torch.no_grad():
        return function(*inputs)


def forward_backward(function: Callable, leaves: list, grad_output) -> tuple:
    """Return the result and the gradients of the leaves."""
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def candidates(arrays: Arrays, weights: str, pass_: str, asked) -> Iterator[Candidate]:
    """Yield eager compositions and operators; --quick takes only the first number of threads."""
    for layout in asked.layout:
        for threads in asked.threads[:1] if asked.quick else asked.threads:
            how = (arrays, weights, pass_, layout, threads, asked.fresh)
            for name in filter(asked.peer, compositions(arrays.case)):
                yield composition(name, *how)
            for name, functions in operators(arrays, layout).items():
                if asked.peer(name):
                    yield _candidate("operator", name, *functions, *how)


def composition(name: str, *how, compiled: bool = False) -> Candidate:
    """Return one composition, eager or by torch.compile."""
    arrays, weights = how[:2]
    function = partial(composed, name, arrays.case, weights)
    if compiled:
        name, function = f"{COMPILED} {name}", torch.compile(function, dynamic=False)
    candidate = _candidate("composition", name, function, function, *how)
    candidate.compiles = compiled
    return candidate


def operator(name: str, arrays: Arrays, *how) -> Candidate:
    """Return one of the other operators."""
    layout = how[2]
    return _candidate("operator", name, *operators(arrays, layout)[name], arrays, *how)


def _candidate(kind, name, function, into, arrays, weights, pass_, layout, threads, fresh):
    """Return a candidate that computes `function` of inputs, or `into` of inputs and `out=`."""
    names = ["features"] if kind == "operator" else ["features", weights]
    inputs = [tensor(arrays(key, layout), layout) for key in names]
    if pass_ == "forward+backward":
        leaves = [array.detach().requires_grad_() for array in inputs]
        grad_output = tensor(arrays("grad_output", layout), layout)
        call, fresh = partial(forward_backward, function, leaves, grad_output), True
    elif fresh or into is None:
        call, fresh = partial(forward, function, *inputs), True
    else:
        call = partial(forward, into, *inputs, tensor(arrays("output", layout), layout))
    labels = {
        "kind": kind,
        "pass": pass_,
        "weights": weights,
        "layout": layout,
        "dtype": arrays.dtype,
        "outputs": "fresh" if fresh else "recycled",
        "chosen": False,
    }
    results = Pass(arrays.case, weights, pass_).results if kind == "composition" else ()
    return Candidate(name, call, threads, None, labels, results)
