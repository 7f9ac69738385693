"""The right results of a problem: PyTorch's own functions in float64, on three blocks of pixels.

The first block lies in the first corner of the first image, another in the middle of the middle
image. The last one lies in the last corner of the last image. Only the features of a block and of
its halo decide its results.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cases import Case, double

from . import peers
from .check import assert_near
from .passes import Pass

_BLOCK = 6  # source pixels along an axis, at least


@dataclass(frozen=True)
class Extent:
    """A block along one axis, with its halo and without."""

    with_halo: slice
    block: slice

    @property
    def within(self) -> slice:
        """The block, counted from the begin of the halo."""
        begin = self.with_halo.start
        return slice(self.block.start - begin, self.block.stop - begin)


class Truth:
    """The right results of one problem.

    Parameters
    ----------
    case : Case
    weights : "masks" or "logits"
    dtype : str
        The dtype of the results that are checked.
    array : function
        Returns an input by its name, axes N, C, H, W: an array, or a tensor on any device. Only the
        blocks are copied.
    """

    def __init__(self, case: Case, weights: str, dtype: str, array: Callable[[str], Any]):
        self.dtype = dtype
        results = Pass(case, weights, "forward+backward").results
        self.expected: list[dict[str, tuple]] = []  # of each block: index and values, by name
        for image, extents in _blocks(case):

            def crop(name: str, image=image, extents=extents) -> torch.Tensor:
                r, c = extents[name.removeprefix("grad_")]
                return _double(array(name)[image : image + 1, :, r.with_halo, c.with_halo])

            features, masks, grad_output = map(crop, ("features", weights, "grad_output"))
            h, w = features.shape[2:]
            small = replace(case, n=1, h=h, w=w, size=tuple(grad_output.shape[2:]))
            function = partial(peers.composed, "gathered", small, weights)
            leaves = [features.requires_grad_(), masks.requires_grad_()]
            values = peers.forward_backward(function, leaves, grad_output)
            expected = {}
            for name, value in zip(results, values, strict=True):
                r, c = extents[name.removeprefix("grad_")]
                index = (slice(image, image + 1), slice(None), r.block, c.block)
                expected[name] = (index, value[..., r.within, c.within].numpy())
            self.expected.append(expected)

    def check(self, results: dict[str, Any], slack: float = 1) -> None:
        """Raise an AssertionError where a result is wrong; axes are N, C, H, W."""
        for expected in self.expected:
            for name, result in results.items():
                index, exact = expected[name]
                try:
                    assert_near(_double(result[index]).numpy(), exact, self.dtype, slack)
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error


def _double(array: Any) -> torch.Tensor:
    """Return an array or a tensor in float64, as a tensor on the CPU."""
    if isinstance(array, torch.Tensor):
        return array.double().cpu()
    return torch.from_numpy(double(array))


def _blocks(case: Case) -> Iterator[tuple[int, dict[str, tuple[Extent, Extent]]]]:
    """Yield an image, and the rows and columns of its block in each array."""
    for image, corner in [(0, "first"), (case.n // 2, "middle"), (case.n - 1, "last")]:
        rows, columns = (_extents(case, axis, corner) for axis in (0, 1))
        yield image, {name: (rows[name], columns[name]) for name in rows}


def _extents(case: Case, axis: int, corner: str) -> dict[str, Extent]:
    """Return the block along one axis; it begins at a multiple of down."""
    up, down, r = case.up, case.down, case.kernel_size // 2
    length, out_length = case.centres[axis], case.output_size[axis]
    beyond = case.features_shape[2 + axis] - length  # features that only windows reach
    block = -(-_BLOCK // down) * down
    halo = -(-r // down) * down
    last = max(0, (length - block) // down * down)
    begin = {"first": 0, "middle": last // 2 // down * down, "last": last}[corner]
    end = length if corner == "last" else min(length, begin + block)
    ends = (max(0, begin - halo), min(length, end + halo), begin, end)

    def extent(scale_up: int, scale_down: int, limit: int) -> Extent:
        low, high, begin, end = (min(limit, -(-x * scale_up // scale_down)) for x in ends)
        return Extent(slice(low, high), slice(begin, end))

    return {
        "features": Extent(
            slice(ends[0], ends[1] + beyond), slice(begin + beyond // 2, end + beyond // 2)
        ),
        "output": extent(up, down, out_length),
        "masks": extent(up, down, out_length),
        "logits": extent(1, down, -(-length // down)),
    }
