"""FLOPs of the operators, for the counters of PyTorch and fvcore.

The operators register the formulas for ``torch.utils.flop_counter``. A multiply-add counts as two.
As in the paper, the sums over windows count, and a fused normaliser does not. `normalize_masks`
counts 4 for each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

Shape = Sequence[int]


def _taps(masks: Shape, groups: int, layout: str) -> int:
    return masks[-3 if layout == "NCHW" else -1] // groups


def count_reassemble(
    features: Shape,
    masks: Shape,
    *,
    out_shape: Shape,
    groups: int = 1,
    layout: str = "NCHW",
    **_: Any,
) -> int:
    """Count a multiply-add for each tap of each element of the output."""
    return 2 * prod(out_shape) * _taps(masks, groups, layout)


def count_reassemble_backward(
    grad_output: Shape,
    features: Shape,
    masks: Shape,
    *,
    groups: int = 1,
    layout: str = "NCHW",
    **_: Any,
) -> int:
    """Count a multiply-add for each tap of each element of grad_output, for either gradient."""
    return 2 * prod(grad_output) * _taps(masks, groups, layout)


def count_reassemble_with_logits(
    features: Shape, logits: Shape, *, out_shape: Shape, kernel_size: int = 5, **_: Any
) -> int:
    """Count as `count_reassemble` does."""
    return 2 * prod(out_shape) * kernel_size**2


def count_reassemble_with_logits_backward(
    grad_output: Shape, features: Shape, logits: Shape, *, kernel_size: int = 5, **_: Any
) -> int:
    """Count as `count_reassemble_backward` does."""
    return 2 * prod(grad_output) * kernel_size**2


def count_normalize_masks(
    logits: Shape, *, out_shape: Shape, normalizer: str = "softmax", **_: Any
) -> int:
    """Count a difference, an exponential, a sum and a quotient for each weight."""
    return 0 if normalizer == "none" else 4 * prod(out_shape)


def count_normalize_masks_backward(
    grad_masks: Shape, logits: Shape, *, normalizer: str = "softmax", **_: Any
) -> int:
    """Count a product, a sum, a difference and a product for each weight."""
    return 0 if normalizer == "none" else 4 * prod(grad_masks)


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Return handles for fvcore, which counts a multiply-add as one.

    Examples
    --------
    >>> from fvcore.nn import FlopCountAnalysis  # doctest: +SKIP
    >>> FlopCountAnalysis(model, inputs).set_op_handle(**fvcore_handles())  # doctest: +SKIP
    """
    from .operators import flop_formulas

    def handle(count: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
        def counted(inputs: list[Any], outputs: list[Any]) -> int:
            return count(*map(_known, inputs), out_shape=outputs[0].type().sizes()) // 2

        return counted

    return {f"carafepp::{name}": handle(count) for name, count in flop_formulas.items()}


def _known(value: Any) -> Any:
    """Return the shape of a tensor in a trace, or the value of anything else."""
    return value.type().sizes() if value.type().kind() == "TensorType" else value.toIValue()
