"""The check of a result on a GPU: carafepp's own on the CPU, in float64, on a few windows."""

from typing import Any

import numpy as np

import carafepp
from cases import Case, double

from ..windows import windows

# Relative to a value and the root mean square of all: sums in float32, or masks of 16 bits.
TOLERANCE = {"float64": 2.0**-46, "float32": 2.0**-17, "float16": 2.0**-7, "bfloat16": 2.0**-4}


def assert_near(result: np.ndarray, exact: np.ndarray, dtype: str, slack: float = 1) -> None:
    """Raise an AssertionError unless all values are near the exact ones, which NaN never is."""
    if exact.size == 0:
        return
    size = np.abs(exact) + np.sqrt(np.mean(exact**2))
    error = np.abs(double(result) - exact) / np.maximum(size, 1e-30)
    worst = error.max()
    limit = slack * TOLERANCE[dtype]
    if not worst <= limit:
        wrong = int(np.sum(~(error <= limit)))
        raise AssertionError(
            f"{wrong} of {exact.size} values are wrong; the worst error is {worst:.2g} of the "
            f"size, {limit:.2g} is allowed"
        )


class Windows:
    """The right results of one problem, in three windows.

    Parameters
    ----------
    case : Case
    source : "masks" or "logits"
    features, weights, grad_output : torch.Tensor
        Axes N, C, H, W, any device and dtype. Only windows are copied to the host.
    """

    def __init__(self, case: Case, source: str, features: Any, weights: Any, grad_output: Any):
        self.expected: list[tuple[dict[str, tuple], dict[str, np.ndarray]]] = []
        function, params = "reassemble", dict(case.factors)
        if source == "logits":
            function, params["kernel_size"] = "reassemble_with_logits", case.kernel_size
        of_weights = "logits" if source == "logits" else "output"
        kinds = {"output": "output", "grad_features": "features", f"grad_{source}": of_weights}
        for image, rows, columns in windows(case):

            def seen(tensor: Any, kind: str, image=image, rows=rows, columns=columns):
                part = tensor[image : image + 1, :, rows[kind].seen, columns[kind].seen]
                return part.double().cpu().numpy()

            x, m = seen(features, "features"), seen(weights, of_weights)
            d = seen(grad_output, "output")
            size = {"size": d.shape[2:]} if source == "logits" else {}
            forward = getattr(carafepp, function)(x, m, **params, **size)
            gradients = getattr(carafepp, f"{function}_backward")(d, x, m, **params)
            index, exact = {}, {}
            for name, array in zip(kinds, (forward, *gradients), strict=True):
                r, c = rows[kinds[name]], columns[kinds[name]]
                index[name] = (slice(image, image + 1), slice(None), r.compared, c.compared)
                exact[name] = array[..., r.within, c.within]
            self.expected.append((index, exact))

    def check(self, name: str, result: Any, dtype: str, slack: float = 1) -> None:
        """Raise an AssertionError where a result, a tensor with the axes N, C, H, W, is wrong."""
        for index, exact in self.expected:
            assert_near(result[index[name]].double().cpu().numpy(), exact[name], dtype, slack)
