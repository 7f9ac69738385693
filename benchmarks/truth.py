"""The right results of a problem: PyTorch's own functions in float64, in three windows."""

from dataclasses import replace
from functools import partial

import torch

from cases import double

from . import peers
from .gpu.check import assert_near
from .problems import Arrays
from .windows import windows


class Truth:
    """The right results for the inputs of one dtype, from masks or logits (`source`)."""

    def __init__(self, arrays: Arrays, source: str):
        self.dtype = arrays.dtype
        weights = "output" if source == "masks" else "logits"
        places = {"output": "output", "grad_features": "features", f"grad_{source}": weights}
        self.expected: list[tuple[dict, dict]] = []
        for image, rows, columns in windows(arrays.case):

            def seen(name: str, place: str, image=image, rows=rows, columns=columns):
                part = arrays(name, "NCHW")[image : image + 1, :, rows[place].seen]
                return torch.from_numpy(double(part[..., columns[place].seen]))

            leaves = [
                seen("features", "features").requires_grad_(),
                seen(source, weights).requires_grad_(),
            ]
            grad_output = seen("grad_output", "output")
            h, w = leaves[0].shape[2:]
            size = tuple(grad_output.shape[2:])
            case = replace(arrays.case, n=1, h=h, w=w, size=size)
            function = partial(peers.composed, "unfold", case, source)
            results = peers.forward_backward(function, leaves, grad_output)
            index, exact = {}, {}
            for (name, place), result in zip(places.items(), results, strict=True):
                r, c = rows[place], columns[place]
                index[name] = (slice(image, image + 1), slice(None), r.compared, c.compared)
                exact[name] = result[..., r.within, c.within].numpy()
            self.expected.append((index, exact))

    def check(self, names: tuple[str, ...], results: tuple, slack: float = 1) -> None:
        """Raise an AssertionError where a result is wrong; axes are N, C, H, W."""
        for index, exact in self.expected:
            for name, result in zip(names, results, strict=True):
                part = result[index[name]]
                part = part.double().numpy() if isinstance(part, torch.Tensor) else part
                assert_near(part, exact[name], self.dtype, slack)
