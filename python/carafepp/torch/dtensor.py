"""The operators on DTensors: each process computes on its shard of the batch or of the channels.

The rules are registered when somebody else imports DTensor. Its import takes nearly as long as
PyTorch's own, so this module does not import it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MODULE = "torch.distributed.tensor"
Rules = dict[str, Callable[..., Tensor]]


def compute_on_shards(
    operator: Callable[..., Tensor],
    result: Callable[..., Tensor],
    name: str,
    names: Sequence[str],
    *tensors: Any,
    **params: Any,
) -> Tensor:
    """Return an operator's result on DTensors as a DTensor, by one call on the local shards.

    These rules hold for each dimension of the device mesh:

    1. If one argument is sharded by the batch, all are.
    2. Else, if one is sharded by the channels, all are, in whole groups. The masks of a single
       group are replicated, and their gradient is a sum over processes.
    3. Else all are replicated.

    ``result`` returns the operator's result without data.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    for other, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"[{name}] {other} must be a DTensor as the other tensors are; "
                f"got {type(tensor).__name__}."
            )
        if tensor.device_mesh != tensors[0].device_mesh:
            raise ValueError(
                f"[{name}] {other} must be on the device mesh of {names[0]} "
                f"({tensors[0].device_mesh}); got {tensor.device_mesh}."
            )
    mesh, axes = tensors[0].device_mesh, tensors[0].dim()
    # Shards of other lengths would be refused by some processes only, and the rest would wait.
    if any(tensor.dim() != axes for tensor in tensors) or (
        axes == 4 and any(tensor.shape[0] != tensors[0].shape[0] for tensor in tensors)
    ):
        axes = 0  # all are replicated, so that the operator refuses them in each process
    axis = axes - 1 if params.get("layout") == "NHWC" else axes - 3
    batch, channels, everywhere = Shard(0), Shard(axis), Replicate()
    # The last entry is the argument that the result is like.
    likes = [*names, "masks" if name.startswith("normalize") else name.partition("_grad_")[2]]
    of_features = [like in ("features", "grad_output", "") for like in likes]
    groups = params.get("groups", 1)
    pairs = zip(tensors, of_features, strict=False)
    alike = axes >= 3 and len({tensor.shape[axis] for tensor, of in pairs if of}) < 2

    placements: list[list[Any]] = []
    for dim in range(mesh.ndim):
        given = [tensor.placements[dim] for tensor in tensors]
        whole_groups = groups > 1 and groups % mesh.size(dim) == 0
        if axes == 4 and batch in given:
            placements.append([batch for _ in likes])
        elif groups == 1 and alike and (channels, True) in zip(given, of_features, strict=False):
            placements.append([channels if of else everywhere for of in of_features])
            if not of_features[-1]:
                placements[-1][-1] = Partial()
        elif (
            whole_groups
            and channels in given
            and all(tensor.shape[axis] % groups == 0 for tensor in tensors)
        ):
            placements.append([channels for _ in likes])
            groups //= mesh.size(dim)
        else:
            placements.append([everywhere for _ in likes])
    *arguments, placement = zip(*placements, strict=True)

    with torch.no_grad():  # the derivative is the operator's
        shards = [
            tensor.detach().redistribute(placements=argument).to_local()
            for tensor, argument in zip(tensors, arguments, strict=True)
        ]
        if mesh.get_coordinate() is None:  # this process is not in the mesh
            local = shards[0]
        else:
            local = operator(*shards, **{**params, "groups": groups})
        whole = [
            torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            for tensor in tensors
        ]
        like = result(*whole, **params)
        return DTensor.from_local(
            local, mesh, placement, run_check=False, shape=like.shape, stride=like.stride()
        )


def register(rules: Rules, library: torch.library.Library) -> None:
    """Register the rules when DTensor is imported."""

    def register_now() -> None:
        from torch.distributed.tensor import DTensor

        for name, rule in rules.items():
            torch.library.register_torch_dispatch(
                f"carafepp::{name}", DTensor, _dispatch(rule), lib=library
            )

    if _MODULE in sys.modules:
        register_now()
    else:
        sys.meta_path.insert(0, _Finder(register_now))


def _dispatch(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch(_: type, func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        return rule(*args, **(kwargs or {}))

    return dispatch


class _Finder:
    """Finds DTensor's module by the finders after this one, and calls a function after its import.

    It stays in sys.meta_path, because other threads may be iterating over that list.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self.then: Callable[[], None] | None = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE or self.then is None:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_then(module: ModuleType) -> None:
            load(module)
            then, self.then = self.then, None
            if then is not None:
                then()

        spec.loader.exec_module = load_then  # type: ignore[method-assign]
        return spec
