"""The cost of one call: `carafepp.reassemble` of one value beside the least that others do."""

from typing import Any

import numpy as np
import torch

import carafepp

from .timing import Rival, measure


class Product(torch.autograd.Function):
    """The least that an operator with a gradient takes in Python: a product, both inputs saved."""

    @staticmethod
    def forward(ctx, features, masks):  # noqa: D102
        ctx.save_for_backward(features, masks)
        return features * masks


def one_call(seconds: float) -> list[dict[str, Any]]:
    """Return a row for each call; "ratio" is carafepp's time on the same arrays by this one's."""
    one = np.ones((1, 1, 1, 1), np.float32)
    out = np.empty_like(one)
    tensor = torch.ones(1, 1, 1, 1, requires_grad=True)
    listed = [
        ("NumPy", "carafepp.reassemble", lambda: carafepp.reassemble(one, one, out=out)),
        ("NumPy", "np.multiply", lambda: np.multiply(one, one, out=out)),
        ("NumPy", "np.einsum", lambda: np.einsum("nchw,nmhw->nchw", one, one, out=out)),
        (
            "PyTorch, with autograd",
            "carafepp.reassemble",
            lambda: carafepp.reassemble(tensor, tensor),
        ),
        ("PyTorch, with autograd", "torch.mul", lambda: torch.mul(tensor, tensor)),
        ("PyTorch, with autograd", "an autograd.Function", lambda: Product.apply(tensor, tensor)),
    ]
    rivals = [Rival(name, call, labels={"arrays": arrays}) for arrays, name, call in listed]
    measure(rivals, seconds)
    rows = [rival.row() for rival in rivals]
    ours = {row["arrays"]: row["seconds"] for row in rows if row["name"] == rivals[0].name}
    return [row | {"ratio": ours[row["arrays"]] / row["seconds"]} for row in rows]
