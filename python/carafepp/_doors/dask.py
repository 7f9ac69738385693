"""Dask arrays: a lazy result with the bits of a result in one piece.

A cell is up x up outputs, whose windows are centred on down x down features. A chunk of the result
is a whole number of cells. Its task reads a tile: the features of these cells, with a halo from the
chunks around. A tile has no zeros beyond the borders of the map: an infinite mask would make NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from .._arguments import padding_pair, positive
from .._imported import imported_class
from .door import FUNCTIONS, Door, forced_implementation, params_of
from .numpy import NumPy

# The bits depend on the kernel. The kernel for the whole takes all tiles that have so many columns
# of cells and, in one group, a multiple of so many channels.
_FEWEST_CELLS = 4
_CHANNELS = 16


class Dask(Door):
    """Dask, with chunks of NumPy or CuPy."""

    cast = NumPy.cast

    def recognise(self, array: Any) -> str | None:
        """Return "dask" for a Dask array."""
        cls = imported_class("dask.array", "Array")
        return "dask" if cls is not None and isinstance(array, cls) else None

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return a view of the shape and the dtype, as of a NumPy array in C order."""
        if any(math.isnan(length) for length in array.shape):
            raise ValueError(
                f"[{function}] {name} must have chunks of known sizes; got shape {array.shape}. "
                "Call its compute_chunk_sizes()."
            )
        return NumPy().view_of_shape(function, name, array.shape, array.dtype)

    def call(
        self,
        function: str,
        inputs: tuple[Any, ...],
        params: Mapping[str, Any],
        out: tuple[Any, ...] = (None, None),
        needed: tuple[bool, ...] = (True, True),
    ) -> tuple[Any, ...]:
        """Return a lazy result. The core checks the arguments at once."""
        if function.endswith("_backward"):
            raise NotImplementedError(
                f"[{function}] there are no gradients of Dask arrays. Compute them on NumPy arrays."
            )
        if out[0] is not None:
            raise TypeError(
                f"[{function}] out must be None: the result is lazy. Store it, for example by its "
                "to_zarr()."
            )
        implementation = self._check(function, inputs, params)
        return (_lazy(function, inputs, params, implementation),)

    def _check(
        self, function: str, inputs: tuple[Any, ...], params: Mapping[str, Any]
    ) -> str | None:
        """Check the arguments, and return the kernel that would compute the whole on NumPy."""
        from dask.array.utils import meta_from_array

        from . import door_of

        named = [*zip(FUNCTIONS[function].inputs, inputs, strict=True)]
        views = [self.view(function, name, array) for name, array in named]
        forced = forced_implementation.get()
        core_params = params_of(function, **params)
        try:
            listed = _core.list_implementations(core_params, views, [None], fastest=forced is None)
        except (TypeError, ValueError) as error:
            error.args = (self._in_callers_words(function, str(error)),)
            raise
        reasons = dict(listed)
        if forced is not None and reasons.get(forced):
            raise NotImplementedError(
                f"[{function}] implementation {forced} declines: {reasons[forced]}."
            )
        metas = [meta_from_array(array) for array in inputs]
        door = door_of(function, tuple(metas), (None,))
        for (name, _), meta in zip(named, metas, strict=True):
            door.view(function, name, meta)  # refuses masked arrays
        if forced is not None or not isinstance(door, NumPy):
            return forced
        return next(name for name, reason in listed if reason is None)


class _Tile(NamedTuple):
    """Rows or columns of a tile."""

    begin: int  # of its features
    end: int
    padding: int  # of the call
    before: int  # cells that the call computes before those of the chunk
    after: int


class _Axis(NamedTuple):
    """Rows or columns of a map."""

    number: int
    features: int  # that windows read
    outputs: int
    up: int
    down: int
    radius: int
    padding: int

    @property
    def cells(self) -> int:
        return -(-self.outputs // self.up)

    @property
    def halo(self) -> tuple[int, int]:
        """Return how many features before and after its own a tile may read."""
        before = self.padding + self.down - 1 if self.padding else 0
        return before, 2 * self.radius - self.padding

    def window_end(self, cell: int) -> int:
        """Return where the windows of all outputs before this cell end."""
        return cell * self.down - self.padding + 2 * self.radius

    def tile(self, first: int, last: int) -> _Tile:
        """Return the tile of the cells from `first` to before `last`.

        A call pads both sides alike. If windows reach further below the map than above it, the tile
        begins some cells earlier, and only these see the padding above.
        """
        end = min(self.features, self.window_end(last))
        below = min(self.padding, self.window_end(last) - end)
        before = 0
        if below > self.padding - first * self.down:
            before = min(first, -(-below // self.down))
        above = self.padding - (first - before) * self.down
        padding = max(above, below, 0)
        begin = padding - above
        cells = -(-(end - begin + 2 * (padding - self.radius)) // self.down)
        return _Tile(begin, end, padding, before, cells - before - (last - first))

    @property
    def least(self) -> int:
        """Return the least length of a chunk of features."""
        return max(*self.halo, _FEWEST_CELLS * self.down)

    def aligned(self, chunks: Iterable[int]) -> tuple[int, ...]:
        """Return chunks of features that hold a halo and begin with a cell."""
        end = min(self.features, self.cells * self.down)
        return _aligned(chunks, self.down, self.least, end)

    def cells_and_outputs(self, chunks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the chunks of cells and of outputs that aligned chunks of features have."""
        starts = [start // self.down for start in accumulate(chunks[:-1], initial=0)]
        cells = [*starts, self.cells]
        return _lengths(cells), _lengths([min(cell * self.up, self.outputs) for cell in cells])


def _aligned(chunks: Iterable[int], unit: int, least: int, length: int) -> tuple[int, ...]:
    """Return chunks that begin at multiples of `unit` and have at least `least` before `length`."""
    starts = [0]
    *inner, total = accumulate(chunks)
    for start in inner:
        start -= start % unit
        if starts[-1] + least <= start <= length - least:
            starts.append(start)
    return _lengths([*starts, total])


def _lengths(starts: Iterable[int]) -> tuple[int, ...]:
    return tuple(end - start for start, end in pairwise(starts))


def _lazy(
    function: str, inputs: tuple[Any, ...], params: Mapping[str, Any], implementation: str | None
) -> Any:
    """Return the result: one task for each chunk."""
    import dask.array as da
    from dask.array.utils import meta_from_array

    sources, weights = inputs[0], inputs[1:]  # features and masks or logits; or logits alone
    c, h = _channel_and_row_axis(sources.ndim, params["layout"])
    numbers = {name: params.get(name, 1) for name in ("up", "down", "groups")}
    up, down, groups = positive(function, **numbers)
    if function == "reassemble":
        radius = math.isqrt(weights[0].shape[c] // groups) // 2
        shape = (*sources.shape[:h], *weights[0].shape[h : h + 2], *sources.shape[h + 2 :])
    else:
        radius = params["kernel_size"] // 2 if weights else 0
        shape = _core.output_shape(params_of(function, **params), sources.shape)
    if 0 in shape:
        return da.zeros_like(sources, shape=shape, chunks=-1)
    padding = params.get("padding")
    pads = (radius, radius) if padding is None else padding_pair(function, padding)

    # The features that windows read, in chunks that tiles can have.
    axes = []
    for k, pad in zip((h, h + 1), pads, strict=True):
        axis = _Axis(k, sources.shape[k], shape[k], up, down, radius, pad)
        axes += [axis._replace(features=min(axis.features, axis.window_end(axis.cells)))]
    sources = _cropped(sources, {axis.number: axis.features for axis in axes})
    group = sources.shape[c] // groups
    unit = _CHANNELS if weights and 1 in (group, groups) else group
    aligned = {axis.number: axis.aligned(sources.chunks[axis.number]) for axis in axes}
    aligned[c] = _aligned(sources.chunks[c], unit, unit, sources.shape[c])
    least = tuple(axis.least for axis in axes)
    sources = _rechunked(function, sources, aligned, least, down, unit)

    # The chunks of the result, and of masks or logits.
    cells, outputs = dict(enumerate(sources.chunks)), dict(enumerate(sources.chunks))
    for axis in axes:
        k = axis.number
        cells[k], outputs[k] = axis.cells_and_outputs(sources.chunks[k])
    if weights:
        chunks = outputs if function == "reassemble" else cells
        shares = [n // group for n in sources.chunks[c]] if groups > 1 else [1]
        in_share = weights[0].shape[c] // groups
        chunks = {**chunks, c: tuple(share * in_share for share in shares)}
        cropped = _cropped(weights[0], {k: sum(lengths) for k, lengths in chunks.items()})
        weights = (cropped.rechunk(chunks),)
    else:
        outputs[c] = tuple(n // up**2 for n in sources.chunks[c])
    halos = {k: axis.halo for axis in axes if len(sources.chunks[k := axis.number]) > 1}
    return da.map_blocks(
        carafepp_tile,
        da.overlap.overlap(sources, depth=halos, boundary="none"),
        *weights,
        dtype=sources.dtype,
        meta=meta_from_array(sources),
        chunks=tuple(outputs.values()),
        function=function,
        params=dict(params),
        axes=axes,
        group=group,
        implementation=implementation,
    )


def _channel_and_row_axis(ndim: int, layout: str) -> tuple[int, int]:
    return (ndim - 1, ndim - 3) if layout == "NHWC" else (ndim - 3, ndim - 2)


def _cropped(array: Any, lengths: Mapping[int, int]) -> Any:
    return array[tuple(slice(lengths.get(k)) for k in range(array.ndim))]


def _rechunked(
    function: str,
    sources: Any,
    chunks: Mapping[int, tuple[int, ...]],
    least: tuple[int, ...],
    down: int,
    channels: int,
) -> Any:
    """Return features or logits in these chunks. One warning tells what changes.

    A short last chunk joins the one before it without a warning: a size or a crop may make it.
    """
    changed = [
        f"axis {k} from {_short(sources.chunks[k])} to {_short(new)}"
        for k, new in sorted(chunks.items())
        if new not in (sources.chunks[k], _joined(sources.chunks[k]))
    ]
    if changed:
        warnings.warn(
            f"[{function}] {FUNCTIONS[function].inputs[0]} are rechunked: {', '.join(changed)}. To "
            f"avoid this, pass chunks that begin at multiples of {down} rows and columns and of "
            f"{channels} channels, and have at least {least[0]} rows and {least[1]} columns.",
            stacklevel=6,  # the line that calls carafepp
        )
    return sources.rechunk(chunks)


def _joined(chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Return chunks whose last one has joined the one before it."""
    return (*chunks[:-2], sum(chunks[-2:]))


def _short(chunks: tuple[int, ...]) -> str:
    if len(chunks) <= 6:
        return str(chunks)
    return f"({chunks[0]}, {chunks[1]}, ..., {chunks[-1]})"


def carafepp_tile(
    sources: Any,
    *weights: Any,
    function: str,
    params: Mapping[str, Any],
    axes: list[_Axis],
    group: int,
    implementation: str | None,
    block_info: Any,
) -> Any:
    """Return one chunk of the result. Dask shows this name."""
    from .. import ops

    c, _ = _channel_and_row_axis(sources.ndim, params["layout"])
    window, kept = [slice(None)] * sources.ndim, [slice(None)] * sources.ndim
    margins, size, padding = [(0, 0)] * sources.ndim, [], []
    for axis in axes:
        begin, end = block_info[None]["array-location"][axis.number]
        first, last = begin // axis.up, -(-end // axis.up)
        tile = axis.tile(first, last)
        origin = max(0, first * axis.down - axis.halo[0])
        window[axis.number] = slice(tile.begin - origin, tile.end - origin)
        kept[axis.number] = slice(tile.before * axis.up, None)
        margins[axis.number] = (
            (tile.before * axis.up, 0) if function == "reassemble" else (tile.before, tile.after)
        )
        size += [tile.before * axis.up + end - begin]
        padding += [tile.padding]
    params = {**params, "groups": max(1, sources.shape[c] // group), "size": tuple(size)}
    if weights:
        params["padding"] = tuple(padding)
        if any(map(any, margins)):
            weights = (np.pad(weights[0], margins),)
    inputs = [_as_the_core_takes_it(array) for array in (sources[tuple(window)], *weights)]
    compute = getattr(ops, function)
    try:
        with ops.force_implementation(implementation) if implementation else nullcontext():
            result = compute(*inputs, **params)
    except NotImplementedError:  # on another processor, maybe
        result = compute(*inputs, **params)
    return result[tuple(kept)]


def _as_the_core_takes_it(array: Any) -> Any:
    """Return an aligned array in C order: chunks from other workers and transposed ones may not be.

    CuPy's flags do not have `aligned`.
    """
    aligned = getattr(array.flags, "aligned", True)
    return array if aligned and array.strides[-1] == array.itemsize else array.copy()
