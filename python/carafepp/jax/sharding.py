"""Calls on arrays in shards, of the batch and of channels, without gathering.

With groups, devices share whole groups, of features and of masks or logits. Without, they share
channels of features, and each has all masks or logits, whose gradients are sums over devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._doors.door import FUNCTIONS

with suppress(ImportError):  # an older JAX has no Shardy
    from jax.experimental.custom_partitioning import (
        BATCHING,
        ArrayMapping,
        CompoundFactor,
        SdyShardingRule,
    )

OF_FEATURES = {"features", "output", "grad_output", "grad_features"}


def sharded(problem: Any, custom_call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``custom_call(problem, ...)`` for arrays that may be in shards."""

    def whole(*arrays: jax.Array) -> Any:
        return custom_call(problem, *arrays)

    def partition(mesh: Any, inputs: Any, _: Any) -> Any:
        """Tell XLA what each device computes, of what."""
        mesh = _with_prime_axes(mesh)
        split = Split(problem, mesh, [_spec(mesh, array) for array in inputs], inputs)
        shardings = split.shardings(split.results), split.shardings(split.inputs)
        return mesh, split.of(custom_call), *shardings

    partitioned = custom_partitioning(whole)
    partitioned.def_partition(partition, sharding_rule=_Rule(problem), decode_shardings=False)

    def call(*arrays: jax.Array) -> Any:
        mesh = explicit_mesh(arrays)
        if mesh is None:
            return partitioned(*arrays)
        given = [jax.typeof(array).sharding for array in arrays]
        split = Split(problem, mesh, [sharding.spec for sharding in given], arrays)
        out_sharding = split.shardings(split.results)
        if FUNCTIONS[problem.function].same_shape:  # JAX wants gradients in the type of the input
            like = zip(FUNCTIONS[problem.function].like, problem.needed, strict=True)
            out_sharding = tuple(given[k] for k, need in like if need)
        return jax.sharding.auto_axes(partitioned, out_sharding=out_sharding)(*arrays)

    def fold(axis_size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        """Give all arrays one more leading axis."""
        results = with_vmap(
            *[
                array if has_axis else jnp.broadcast_to(array, (axis_size, *array.shape))
                for array, has_axis in zip(arrays, batched, strict=True)
            ]
        )
        return results, tuple(True for _ in results)

    with_vmap: Any = custom_vmap(call)  # as custom_partitioning knows no vmap
    with_vmap.def_vmap(fold)
    return with_vmap  # type: ignore[no-any-return]


def varying(array: jax.Array) -> dict[str, Any]:
    """Return what tells a `ShapeDtypeStruct` how the array varies inside of a shard_map."""
    for name in ("manual_axis_type", "vma"):  # the second in older versions
        if varying_axes(array) and hasattr(_type(array), name):
            return {name: getattr(_type(array), name), "sharding": _type(array).sharding}
    return {}


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Return the axes of a shard_map over which an array varies."""
    kind = _type(array)
    axes: Any = getattr(kind, "manual_axis_type", getattr(kind, "vma", frozenset()))
    return getattr(axes, "varying", axes)  # type: ignore[no-any-return]


def varying_alike(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Let arrays vary over the same axes of a shard_map; it then sums the gradients of the rest."""
    given = [varying_axes(array) for array in arrays]
    axes: frozenset[str] = frozenset().union(*given)
    return [
        _vary(array, axes - its) if its != axes else array
        for array, its in zip(arrays, given, strict=True)
    ]


def _vary(array: jax.Array, axes: frozenset[str]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, tuple(axes), to="varying")
    return jax.lax.pvary(array, tuple(axes))


def explicit_mesh(arrays: Sequence[jax.Array]) -> Any:
    """Return the mesh of arrays whose shards are part of their types, else None."""
    for array in arrays:
        mesh = getattr(getattr(_type(array), "sharding", None), "mesh", None)
        if mesh is not None and mesh.explicit_axes:
            return mesh
    return None


def _type(array: jax.Array) -> Any:
    return jax.typeof(array) if hasattr(jax, "typeof") else None  # not before 0.6


class Split:
    """How devices share a call, by the shards of its inputs."""

    def __init__(
        self, problem: Any, mesh: Any, specs: Sequence[PartitionSpec], arrays: Sequence[Any]
    ) -> None:
        self.problem, self.mesh = problem, mesh
        self.inputs = FUNCTIONS[problem.function].inputs
        self.results = _needed(problem)
        self.channel_axis = -3 if problem.layout == "NCHW" else -1
        ndim = arrays[0].ndim
        entries = [(*spec, *[None] * (ndim - len(spec))) for spec in specs]
        used: set[str] = set()
        self.batch = [_first([e[axis] for e in entries], used) for axis in range(ndim - 3)]
        sharing = [k for k, name in enumerate(self.inputs) if self._shares_channels(name)]
        self.channels = _names(_first([entries[k][self.channel_axis] for k in sharing], used))
        parts = problem.groups if problem.groups > 1 else arrays[0].shape[self.channel_axis]
        while parts % self._devices():
            self.channels = self.channels[:-1]

    def _devices(self) -> int:
        return prod(self.mesh.shape[name] for name in self.channels)

    def _shares_channels(self, name: str) -> bool:
        return name in OF_FEATURES or self.problem.groups > 1

    def shardings(self, names: Sequence[str]) -> tuple[NamedSharding, ...]:
        """Return the shardings of inputs or results."""
        shardings = []
        for name in names:
            axes: list[Any] = [None, None, None]
            if self.channels and self._shares_channels(name):
                axes[self.channel_axis] = self.channels
            shardings.append(NamedSharding(self.mesh, PartitionSpec(*self.batch, *axes)))
        return tuple(shardings)

    def of(self, custom_call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function of one device, from shards to shards."""
        groups = self.problem.groups
        problem = replace(self.problem, groups=groups // self._devices() if groups > 1 else 1)

        def compute(*arrays: jax.Array) -> Any:
            return tuple(
                result
                if not self.channels or self._shares_channels(name)
                else jax.lax.psum(result, self.channels)
                for name, result in zip(self.results, custom_call(problem, *arrays), strict=True)
            )

        return compute


def _needed(problem: Any) -> tuple[str, ...]:
    results = FUNCTIONS[problem.function].results
    return tuple(name for name, need in zip(results, problem.needed, strict=True) if need)


def _names(entry: Any) -> tuple[str, ...]:
    """Return the axes of the mesh in an entry of a spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _first(entries: Sequence[Any], used: set[str]) -> Any:
    """Return the first entry whose axes are not used yet, and note them."""
    for entry in entries:
        if _names(entry) and used.isdisjoint(_names(entry)):
            used.update(_names(entry))
            return entry
    return None


def _with_prime_axes(mesh: Mesh) -> Mesh:
    """Return the mesh with axes that cannot be divided: Shardy may shard by a part of an axis."""
    lengths = [prime for length in mesh.shape.values() for prime in _primes(length)]
    return Mesh(mesh.devices.reshape(lengths), [f"axis{k}" for k in range(len(lengths))])


def _primes(number: int) -> Iterator[int]:
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            yield divisor
            number //= divisor
        divisor += 1


def _spec(mesh: Mesh, array: Any) -> PartitionSpec:
    """Return how an array is sharded, by the axes of the mesh; replicated if they cannot tell."""
    # Any shape does that all shardings divide.
    indices = array.sharding.devices_indices_map((mesh.size,) * array.ndim)
    starts = np.array(
        [[part.start or 0 for part in indices[device]] for device in mesh.devices.flat]
    ).reshape(*mesh.devices.shape, array.ndim)
    spec = PartitionSpec(
        *[
            tuple(
                name
                for k, name in enumerate(mesh.axis_names)
                if np.diff(starts[..., axis], axis=k).any()
            )
            for axis in range(array.ndim)
        ]
    )
    same = NamedSharding(mesh, spec).is_equivalent_to(array.sharding, array.ndim)
    return spec if same else PartitionSpec()


class _Rule:
    """Tells Shardy which axes of the arrays are the same: the batch, and groups or channels."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def __call__(self, mesh: Any, inputs: Sequence[Any], results: Sequence[Any]) -> Any:
        names = FUNCTIONS[self.problem.function].inputs + _needed(self.problem)
        groups = self.problem.groups
        channel_axis = 0 if self.problem.layout == "NCHW" else 2
        whole: list[str] = []  # axes that are not shared, in the order that Shardy asks for
        sizes = {"groups": groups} if groups > 1 else {}
        mappings = []
        for k, (name, array) in enumerate(zip(names, [*inputs, *results], strict=True)):
            axes: list[Any] = [f"rows{k}", f"columns{k}"]
            axes.insert(channel_axis, f"channels{k}")
            whole += axes
            if groups > 1:
                sizes[axes[channel_axis]] = array.shape[channel_axis - 3] // groups
                axes[channel_axis] = CompoundFactor("groups", axes[channel_axis])
            elif name in OF_FEATURES:
                whole.remove(axes[channel_axis])
                axes[channel_axis] = "channels"
            mappings.append(ArrayMapping(BATCHING, *axes))
        return SdyShardingRule(
            tuple(mappings[: len(inputs)]),
            tuple(mappings[len(inputs) :]),
            need_replication_factors=tuple(whole),
            **sizes,
        )
