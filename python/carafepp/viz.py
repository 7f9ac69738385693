"""Pictures of what CARAFE++ does: masks, feature maps, and the features behind a location.

Figures 1 and 9 of the paper come from `trace`. It follows the contributions to a location back
through the masks of one module after another. A unit is one position of a feature map, as in the
paper. This module needs matplotlib; `record_reassemblies` needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._lazy import missing
from .ops import reassemble_backward

try:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as error:
    raise missing(error, "carafepp[demo]") from error

Array = NDArray[Any]
Location = tuple[int, int]  # row and column

LOCATION, SOURCE = "lime", "red"  # colours, as in the paper


class Reassembly(NamedTuple):
    """The reassembly of one feature map into another one.

    Attributes
    ----------
    masks : array, [groups*K*K, H', W']
        Normalised reassembly kernels.
    size : (int, int)
        (H, W) of the input features.
    up, down, groups : int
    padding : (int, int) or None
        As for `carafepp.reassemble`.
    """

    masks: Array
    size: tuple[int, int]
    up: int = 1
    down: int = 1
    groups: int = 1
    padding: tuple[int, int] | None = None


@contextmanager
def record_reassemblies(network: Any) -> Iterator[dict[str, Reassembly]]:
    """Record the reassemblies of a network's CARAFE modules in the last forward pass.

    The record has the first picture of a batch.

    Parameters
    ----------
    network : torch.nn.Module

    Yields
    ------
    dict
        The `Reassembly` of each module, by its name in ``network.named_modules()``.

    Examples
    --------
    >>> import torch
    >>> from carafepp.torch import CARAFE
    >>> network = torch.nn.Sequential(CARAFE(8, down=2), CARAFE(8, up=2))
    >>> with record_reassemblies(network) as reassemblies:
    ...     _ = network(torch.rand(1, 8, 6, 6))
    >>> {name: (r.masks.shape, r.size) for name, r in reassemblies.items()}
    {'0': ((25, 3, 3), (6, 6)), '1': ((25, 6, 6), (3, 3))}
    """
    import torch

    from .torch import CARAFE

    reassemblies: dict[str, Reassembly] = {}

    def keep(name: str) -> Any:
        def hook(module: CARAFE, inputs: Any, keywords: Any, output: Any) -> None:
            x = inputs[0] if inputs else keywords["x"]
            with torch.no_grad():
                masks = module.masks(x, tuple(output.shape[-2:]))
            masks = masks.reshape(-1, *masks.shape[-3:])[0].float().cpu().numpy()
            reassemblies[name] = Reassembly(
                masks, tuple(x.shape[-2:]), module.up, module.down, module.groups, module.padding
            )

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in network.named_modules()
        if isinstance(module, CARAFE)
    ]
    try:
        yield reassemblies
    finally:
        for handle in handles:
            handle.remove()


def nearest(size: tuple[int, int], up: int = 2) -> Reassembly:
    """Return nearest-neighbour interpolation as a reassembly: masks with a single tap, 1."""
    height, width = size
    return Reassembly(np.ones((1, height * up, width * up), np.float32), size, up=up)


def trace(chain: Sequence[Reassembly], location: Location) -> list[Array]:
    """Return how much each unit contributes to a location, through one reassembly after another.

    A contribution is the weight of a unit in the sum at the location. It is a gradient, by
    `reassemble_backward`, through the masks alone: layers between reassemblies are ignored.
    Groups of channels are averaged. Kernels that sum to 1 leave a sum of 1 within the borders. Taps
    beyond the borders do not count, whatever the `padding_mode`.

    Parameters
    ----------
    chain : sequence of Reassembly
        The last reassembly first: the source of each is the result of the next one.
    location : (int, int)
        A position in the output of ``chain[0]``.

    Returns
    -------
    list of array, [H, W]
        The contributions for the source of each reassembly in the chain.

    Raises
    ------
    ValueError
        The location is outside, or the reassemblies do not fit each other.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", Figures 1 and 9.

    Examples
    --------
    >>> trace([nearest((4, 4)), nearest((2, 2))], (5, 6))[1]
    array([[0., 0.],
           [0., 1.]], dtype=float32)
    """
    if not chain:
        raise ValueError("[trace] chain must have one reassembly or more; got none.")
    size = chain[0].masks.shape[1:]
    if not (0 <= location[0] < size[0] and 0 <= location[1] < size[1]):
        raise ValueError(f"[trace] location must be within {size}; got {tuple(location)}.")
    weights = np.zeros(size, chain[0].masks.dtype)
    weights[location] = 1
    traced = []
    for number, (masks, source, up, down, groups, padding) in enumerate(chain):
        if masks.shape[1:] != weights.shape:
            raise ValueError(
                f"[trace] chain[{number}] must make what chain[{number - 1}] reassembles, of size "
                f"{weights.shape}; got {masks.shape[1:]}."
            )
        grad_output = np.repeat(weights[None, None] / groups, groups, axis=1)
        features = np.zeros((1, groups, *source), masks.dtype)
        gradient, _ = reassemble_backward(
            grad_output.astype(masks.dtype),
            features,
            masks[None],
            up=up,
            down=down,
            groups=groups,
            padding=padding,
            need_masks=False,
        )
        assert gradient is not None
        weights = gradient[0].sum(0)
        traced.append(weights)
    return traced


def most_weighted(weights: Array, share: float) -> Array:
    """Return the smallest set of units with a given share of the weight: [H, W] of bool."""
    if not 0 < share <= 1:
        raise ValueError(f"[most_weighted] share must be above 0, at most 1; got {share}.")
    order = np.argsort(weights, axis=None)[::-1]
    before = np.cumsum(weights.flat[order]) - weights.flat[order]
    chosen = np.zeros(weights.shape, bool)
    chosen.flat[order] = (before < share * weights.sum()) & (weights.flat[order] > 0)
    return chosen


def principal_colours(features: Array) -> Array:
    """Return a feature map in colours: [C, H, W] -> [H, W, 3], 0 to 1.

    Red, green and blue are the first three principal components of the channels. Each is scaled
    from its 2nd to its 98th percentile. The largest weight of each component is positive.
    """
    channels = features.reshape(len(features), -1).astype(np.float64)
    channels = channels - channels.mean(1, keepdims=True)
    directions = np.linalg.svd(channels @ channels.T)[0][:, :3]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0)
    components = (directions * np.sign(largest)).T @ channels
    low, high = np.percentile(components, [2, 98], axis=1)[..., None]
    colours = np.zeros((3, components.shape[1]))
    colours[: len(components)] = (components - low) / np.maximum(high - low, 1e-12)
    return np.clip(colours, 0, 1).reshape(3, *features.shape[1:]).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------- drawing
# A unit of a feature map with a stride covers stride*stride pixels of the picture.


def draw_picture(axes: Any, picture: Array, title: str = "") -> None:
    """Show a picture, [3, H, W] in 0..1 or a map [H, W], without axes."""
    shown = picture.transpose(1, 2, 0).clip(0, 1) if picture.ndim == 3 else picture
    axes.imshow(shown, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_location(axes: Any, location: Location, stride: float = 1) -> None:
    """Draw a green ring around a location."""
    y, x = (_middle(i, stride) for i in location)
    axes.plot(x, y, "o", ms=9, mfc="none", mec="black", mew=3.2)
    axes.plot(x, y, "o", ms=9, mfc="none", mec=LOCATION, mew=1.8)


def draw_units(axes: Any, weights: Array, stride: float, share: float = 0.8) -> None:
    """Draw red dots in the centres of the units with most of the weight (Figure 9).

    The area of a dot is proportional to the weight.
    """
    rows, columns = np.nonzero(most_weighted(weights, share))
    area = weights[rows, columns] / weights.max()
    x, y = _middle(columns, stride), _middle(rows, stride)
    axes.scatter(x, y, s=4 + 26 * area, c=SOURCE, edgecolors="white", linewidths=0.3)


def draw_unit(axes: Any, unit: Location, stride: float) -> None:
    """Draw a white frame around the pixels of a unit."""
    row, column = unit
    corner = (column * stride - 0.5, row * stride - 0.5)
    axes.add_patch(Rectangle(corner, stride, stride, fc="none", ec="white", lw=1))


def draw_region(axes: Any, weights: Array, stride: int) -> None:
    """Tint the picture red by the weight; the largest weight is full red (Figure 1)."""
    opacity = np.kron(np.sqrt(weights / weights.max()), np.ones((stride, stride)))
    tint = np.empty((*opacity.shape, 4))
    tint[..., :3], tint[..., 3] = to_rgb(SOURCE), 0.85 * opacity
    axes.imshow(tint, interpolation="nearest")


def draw_mask(
    axes: Any, reassembly: Reassembly, location: Location, stride: float, group: int = 0
) -> None:
    """Draw the reassembly kernel of a location over its window; the largest weight is full red.

    Parameters
    ----------
    axes : matplotlib's Axes
    reassembly : Reassembly
    location : (int, int)
        A position in the output.
    stride : float
        The stride of the source.
    group : int, default 0
        The group of channels.
    """
    taps = len(reassembly.masks) // reassembly.groups
    k = round(taps**0.5)
    row, column = location
    kernel = reassembly.masks[group * taps : (group + 1) * taps, row, column].reshape(k, k)
    up, down, padding = reassembly.up, reassembly.down, reassembly.padding or (k // 2, k // 2)
    offsets = [k // 2 - number for number in padding]  # the source of the output (0, 0)
    middle = [i * down // up + n for i, n in zip(location, offsets, strict=True)]
    for a, b in np.ndindex(k, k):
        row, column = middle[0] + a - k // 2, middle[1] + b - k // 2
        if 0 <= row < reassembly.size[0] and 0 <= column < reassembly.size[1]:
            corner = (column * stride - 0.5, row * stride - 0.5)
            opacity = 0.9 * max(0.0, float(kernel[a, b] / kernel.max()))
            axes.add_patch(
                Rectangle(corner, stride, stride, fc=(*to_rgb(SOURCE), opacity), ec="none")
            )
    row, column = (i - k // 2 for i in middle)
    corner = (column * stride - 0.5, row * stride - 0.5)
    axes.add_patch(Rectangle(corner, k * stride, k * stride, fc="none", ec="white", lw=0.8))
    y, x = (i + n * up / down for i, n in zip(location, offsets, strict=True))
    draw_location(axes, (y, x), stride * down / up)


def _middle(index: Any, stride: float) -> Any:
    return (index + 0.5) * stride - 0.5
