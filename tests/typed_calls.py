"""Calls for type checkers: mypy reads this file, nothing runs it.

An error that is expected is ignored by its code, and mypy tells where there is none.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import assert_type

import carafepp
from carafepp.torch import CARAFE
from carafepp.torch.mmcv import xavier_init

Array = npt.NDArray[np.float32]


def forward(x: Array, m: Array) -> None:
    assert_type(carafepp.reassemble(x, m, up=2, layout="NHWC"), Array)
    assert_type(carafepp.reassemble_with_logits(x, m, normalizer="sigmoid"), Array)
    assert_type(carafepp.reassemble(x, m, padding=(1, 0)), Array)
    assert_type(carafepp.output_size((5, 7), kernel_size=3, padding=0), tuple[int, int])
    assert_type(carafepp.normalize_masks(m, normalizer="none", layout="NCHW"), Array)
    assert_type(carafepp.normalize_masks_backward(m, m), Array)


def backward(d: Array, x: Array, m: Array, needed: bool) -> None:
    functions = carafepp.reassemble_backward, carafepp.reassemble_with_logits_backward
    masks, logits = functions
    assert_type(masks(d, x, m), tuple[Array, Array])
    assert_type(masks(d, x, m, padding=0, need_masks=False), tuple[Array, None])
    assert_type(masks(d, x, m, need_features=False), tuple[None, Array])
    assert_type(masks(d, x, m, need_masks=needed), tuple[Array | None, Array | None])
    assert_type(logits(d, x, m, kernel_size=3), tuple[Array, Array])
    assert_type(logits(d, x, m, need_logits=False), tuple[Array, None])
    assert_type(logits(d, x, m, need_features=False), tuple[None, Array])
    assert_type(logits(d, x, m, need_logits=needed), tuple[Array | None, Array | None])


def mistyped(d: Array, x: Array, m: Array, params: dict[str, Any]) -> None:
    carafepp.reassemble(x, m, **params)
    carafepp.reassemble(x, m, layout="NCWH")  # type: ignore[arg-type]
    carafepp.reassemble_backward(d, x, m, layout="nhwc")  # type: ignore[call-overload]
    carafepp.reassemble_with_logits(x, m, normalizer="sofmax")  # type: ignore[arg-type]
    carafepp.reassemble_with_logits(x, m, layout="NCWH")  # type: ignore[arg-type]
    carafepp.reassemble_with_logits_backward(d, x, m, normalizer="tanh")  # type: ignore[call-overload]
    carafepp.normalize_masks(m, normalizer="Softmax")  # type: ignore[arg-type]
    carafepp.normalize_masks_backward(m, m, normalizer="")  # type: ignore[arg-type]
    carafepp.list_implementations("reassemble", x, m, layout="NCWH")  # type: ignore[arg-type]
    carafepp.reassemble(x, m, up=1.5)  # type: ignore[arg-type]
    carafepp.reassemble(x, m, size=6)  # type: ignore[arg-type]
    carafepp.reassemble(x, m, padding=(1, 0, 1))  # type: ignore[arg-type]
    carafepp.normalize_masks(m, padding=0)  # type: ignore[arg-type]
    carafepp.reassemble(x, m, scale_factor=2)  # type: ignore[arg-type]
    carafepp.reasemble(x, m)  # type: ignore[attr-defined]


def lazy_modules() -> None:
    carafepp.torch.CARAFE(8, up=2)
    assert_type(carafepp.torch.mmcv.xavier_init(torch.nn.Identity()), None)
    carafepp.torch.CARAFF(8)  # type: ignore[attr-defined]


def mistyped_for_modules(layer: torch.nn.Module, options: dict[str, Any]) -> None:
    CARAFE(8, normalizer="sigmoid", compressed_channels="auto")
    CARAFE(8, **options)
    CARAFE(8, normalizer="sofmax")  # type: ignore[arg-type]
    CARAFE(8, compressed_channels="none")  # type: ignore[arg-type]
    CARAFE(8, up=1.5)  # type: ignore[arg-type]
    xavier_init(layer, distribution="gaussian")  # type: ignore[arg-type]
