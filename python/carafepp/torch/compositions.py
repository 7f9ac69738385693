"""The operators as compositions of PyTorch's own, for exporters and for devices without kernels.

A composition loops over the K*K taps: a slice of the padded features times one mask of each pixel.
It takes no patches, which would be K*K times as large as the features. Halves are summed in
float32. A mask that is Inf or NaN also spreads to taps beyond the borders.

PyTorch derives the gradients from the forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import natural_size


def reassemble(
    features: Tensor,
    masks: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    size: Any = None,
    layout: str = "NCHW",
    padding: Any = None,
) -> Tensor:
    """Compose `carafepp.reassemble`."""
    features, masks = _as_nchw(layout, features, masks)
    rows, columns = masks.shape[-2:]
    masks = F.pad(masks, (0, -columns % up, 0, -rows % up))  # whole cells of up*up outputs
    cell_rows, cell_columns = (masks.shape[-2] // up, up), (masks.shape[-1] // up, up)
    cells = masks.unflatten(-1, cell_columns).unflatten(-3, cell_rows).movedim((-3, -1), (-4, -3))
    taps = masks.shape[-3] // groups
    cells = cells.flatten(-4, -3).unflatten(-4, (groups, taps))
    output = _reassemble_cells(features, cells, up, down, padding)
    return _in_layout(layout, output[..., :rows, :columns])


def reassemble_with_logits(
    features: Tensor,
    logits: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    kernel_size: int = 5,
    normalizer: str = "softmax",
    size: Any = None,
    layout: str = "NCHW",
    padding: Any = None,
) -> Tensor:
    """Compose `carafepp.reassemble_with_logits`."""
    features, logits = _as_nchw(layout, features, logits)
    cells = logits.unflatten(-3, (groups, kernel_size**2, up**2))
    cells = _normalize(_summable(cells), normalizer)
    output = _reassemble_cells(features, cells, up, down, padding)
    if size is not None or down > 1:  # else the cells have the natural size
        height, width = features.shape[-2:]
        rows, columns = size or natural_size(
            (height, width), up, down, kernel_size=kernel_size, padding=padding
        )
        output = output[..., :rows, :columns]
    return _in_layout(layout, output)


def normalize_masks(
    logits: Tensor,
    *,
    up: int = 1,
    groups: int = 1,
    kernel_size: int = 5,
    normalizer: str = "softmax",
    size: Any = None,
    layout: str = "NCHW",
) -> Tensor:
    """Compose `carafepp.normalize_masks`."""
    (cells,) = _as_nchw(layout, logits)
    cells = _summable(cells).unflatten(-3, (groups, kernel_size**2, up**2))
    masks = _shuffle(_normalize(cells, normalizer).to(logits.dtype).flatten(-5, -4), up)
    if size is not None:
        masks = masks[..., : size[0], : size[1]]
    return _in_layout(layout, masks)


def gradient(forward: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    """Return the composition of the gradient of a forward with respect to one of its tensors."""

    def composed(grad: Tensor, *tensors: Tensor, layout: str = "NCHW", **params: Any) -> Tensor:
        def of_one(tensor: Tensor) -> Tensor:
            inputs = *tensors[:index], tensor, *tensors[index + 1 :]
            return forward(*inputs, layout=layout, size=size_of(grad, layout=layout), **params)

        result: Tensor = torch.func.vjp(of_one, tensors[index])[1](grad)[0]
        return result

    return composed


def _reassemble_cells(features: Tensor, cells: Tensor, up: int, down: int, padding: Any) -> Tensor:
    """Return the outputs of whole cells; the masks of `cells` are (groups, taps, phases, h, w)."""
    groups, taps, _, height, width = cells.shape[-5:]
    kernel_size = isqrt(taps)
    vertical, horizontal = padding or (kernel_size // 2,) * 2
    beyond = 2 * (down - 1)  # of the last cell, so that all slices end inside
    borders = horizontal, horizontal + beyond, vertical, vertical + beyond
    channels = features.shape[-3] // groups
    padded = F.pad(_summable(features), borders).unflatten(-3, (groups, channels)).unsqueeze(-3)
    if down == 1:  # what a crop leaves
        padded = padded[..., : height + kernel_size - 1, : width + kernel_size - 1]

    # Phases that are centred on one source read the same features.
    sources: dict[tuple[int, int], list[int]] = {}
    for phase in range(up**2):
        source = phase // up * down // up, phase % up * down // up
        sources.setdefault(source, []).append(phase)
    outputs = []
    for (row, column), phases in sources.items():
        masks = _summable(_phases(cells, phases)).unsqueeze(-5).unbind(-4)
        products = (
            values * mask
            for a in range(kernel_size)
            for line in [_every(padded, -2, row + a, down, height, kernel_size)]
            for b in range(kernel_size)
            for values in [_every(line, -1, column + b, down, width, kernel_size)]
            for mask in [masks[a * kernel_size + b]]
        )
        outputs.append(sum(products, next(products)))
    order = [phase for phases in sources.values() for phase in phases]
    output = _phases(torch.cat(outputs, -3), [order.index(phase) for phase in range(up**2)])
    return _shuffle(output.flatten(-5, -4), up).to(features.dtype)


def _shuffle(cells: Tensor, up: int) -> Tensor:
    """[..., C, up*up, h, w] -> [..., C, h*up, w*up]."""
    if any(isinstance(length, int) and length == 0 for length in cells.shape):
        # PyTorch's pixel_shuffle has no gradient for an empty tensor.
        cells = cells.unflatten(-3, (up, up)).movedim((-4, -3), (-3, -1))
        return cells.flatten(-4, -3).flatten(-2)
    return F.pixel_shuffle(cells.flatten(-4, -3), up)


def _phases(cells: Tensor, phases: list[int]) -> Tensor:
    """Return some phases, the third axis from the end."""
    if phases == [*range(cells.shape[-3])]:
        return cells
    return torch.stack([cells.select(-3, phase) for phase in phases], -3)


def _every(padded: Tensor, dim: int, first: int, step: int, count: Any, taps: int) -> Tensor:
    """Return so many slices of an axis, a step apart."""
    index = [slice(None)] * padded.dim()
    # Without a step, constants tell the end: a graph for many sizes stays simple.
    end = first + count * step if step > 1 else first + 1 - taps or None
    index[dim] = slice(first, end, step)
    return padded[tuple(index)]


def _normalize(cells: Tensor, normalizer: str) -> Tensor:
    """Normalise the taps, the fourth axis from the end."""
    if normalizer == "sigmoid":
        return cells.sigmoid()
    if normalizer == "sigmoid_normalized":
        cells = F.logsigmoid(cells)
    return cells if normalizer == "none" else cells.softmax(-4)


def _summable(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype of sums."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def size_of(tensor: Tensor, *, layout: str = "NCHW", **_: Any) -> tuple[int, int]:
    """Return the rows and columns of a tensor."""
    height, width = tensor.shape[-2:] if layout == "NCHW" else tensor.shape[-3:-1]
    return height, width


def _as_nchw(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    if layout == "NCHW":
        return tensors
    return tuple(tensor.movedim(-1, -3) for tensor in tensors)


def _in_layout(layout: str, tensor: Tensor) -> Tensor:
    return (tensor if layout == "NCHW" else tensor.movedim(-3, -1)).contiguous()
