"""The cost of one call: `carafepp.reassemble` of one value beside the cheapest calls of others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import carafepp

from .timing import Candidate, measure

JAX = "JAX, under jit"


class Product(torch.autograd.Function):
    """The cheapest operator with a gradient in Python: a product that saves both inputs."""

    @staticmethod
    def forward(ctx, features, masks):  # noqa: D102
        ctx.save_for_backward(features, masks)
        return features * masks


def one_call(seconds: float) -> list[dict[str, Any]]:
    """Return a row for each call; "ratio" is carafepp's time divided by this call's time."""
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
        *calls_on_jax(),
    ]
    calls = [Candidate(name, call, labels={"arrays": arrays}) for arrays, name, call in listed]
    for call in calls:
        call.call()  # JAX compiles
    measure(calls, seconds)
    rows = [call.row() for call in calls]
    ours = {row["arrays"]: row["seconds"] for row in rows if row["name"] == calls[0].name}
    return [row | {"ratio": ours[row["arrays"]] / row["seconds"]} for row in rows]


def calls_on_jax() -> list[tuple[str, str, Callable[[], Any]]]:
    """Return calls under jit, where JAX and its handlers are installed."""
    try:
        import jax

        from carafepp.jax import register_handlers

        register_handlers()
    except (ImportError, NotImplementedError):
        return []
    one = jax.numpy.ones((1, 1, 1, 1))
    ours, theirs = jax.jit(carafepp.reassemble), jax.jit(lambda x: x + 1)
    return [
        (JAX, "carafepp.reassemble", lambda: ours(one, one).block_until_ready()),
        (JAX, "x + 1", lambda: theirs(one).block_until_ready()),
    ]
