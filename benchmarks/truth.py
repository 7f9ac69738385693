"""The check of an answer before it is timed: the tests' definition in float64, on three windows.

The definition runs on a window of windows.py with its margin, and the results are compared where
the margin cannot matter.
"""

import numpy as np

import reference as ref
from cases import double
from tolerances import assert_within_bound

from .problems import Arrays
from .windows import windows

# The quantity of tests/tolerances.py for each result, from masks and from logits.
_QUANTITIES = {
    "output": ("output", "output_from_logits"),
    "grad_features": ("grad_features", "grad_features_from_logits"),
    "grad_masks": ("grad_masks", None),
    "grad_logits": (None, "grad_logits"),
}


class Truth:
    """Expected results of one problem for inputs of one dtype.

    Parameters
    ----------
    arrays : Arrays
    dtype : str
        The inputs are rounded to it first.
    names : tuple of str
        The results to be known: output, grad_features, grad_masks, grad_logits.
    """

    def __init__(self, arrays: Arrays, dtype: str, names: tuple[str, ...]):
        self.case, self.dtype = arrays.case, dtype
        self.from_logits = arrays.source == "logits"
        inputs = arrays.inputs(dtype, "NCHW")
        self.windows = [self._window(inputs, *where, names) for where in windows(arrays.case)]

    def check(self, names: tuple[str, ...], results: tuple, slack: float = 1) -> None:
        """Raise an AssertionError where a result is wrong.

        Parameters
        ----------
        names : tuple of str
        results : tuple of arrays, axes N, C, H, W
        slack : float
            How many times the bound of the tests is allowed.
        """
        for name, result in zip(names, results, strict=True):
            for index, expected in self.windows:
                exact, magnitude = expected[name]
                actual = result[index[name]]
                if not isinstance(actual, np.ndarray):
                    actual = actual.detach().double().numpy()
                assert_within_bound(
                    _QUANTITIES[name][self.from_logits],
                    self.dtype,
                    self.case.kernel_size,
                    actual,
                    exact,
                    slack * magnitude,
                )

    def _window(self, inputs, image, rows, columns, names) -> tuple[dict, dict]:
        """Return, for each result, where to look, and what is expected there."""

        def seen(array, kind: str) -> np.ndarray:
            return double(array[image : image + 1, :, rows[kind].seen, columns[kind].seen])

        x, d = seen(inputs.features, "features"), seen(inputs.grad_output, "output")
        weights = seen(inputs.weights, "logits" if self.from_logits else "output")
        index, expected = {}, {}
        for name, pair in self._expected(x, d, weights, names).items():
            kind = {"grad_features": "features", "grad_logits": "logits"}.get(name, "output")
            r, c = rows[kind], columns[kind]
            index[name] = (slice(image, image + 1), slice(None), r.compared, c.compared)
            inner = (..., r.within, c.within)
            expected[name] = tuple(array[inner] for array in pair)
        return index, expected

    def _expected(self, x, d, weights, names) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Run the definition: {name: (result, sum of the magnitudes of its products)}."""
        case = self.case
        masks = weights
        if self.from_logits:
            masks = ref.normalize(weights, up=case.up, groups=case.groups, size=d.shape[2:])
        expected = {}
        if "output" in names:
            call = (x, masks)
            expected["output"] = (
                ref.reassemble(*call, **case.factors),
                ref.reassemble_magnitude(*call, **case.factors),
            )
        if "grad_features" in names:
            call = (d, masks, x.shape[2:])
            expected["grad_features"] = (
                ref.grad_features(*call, **case.factors),
                ref.grad_features_magnitude(*call, **case.factors),
            )
        if {"grad_masks", "grad_logits"} & set(names):
            call = (d, x, case.kernel_size)
            gradient = ref.grad_masks(*call, **case.factors)
            magnitude = ref.grad_masks_magnitude(*call, **case.factors)
            expected["grad_masks"] = gradient, magnitude
        if "grad_logits" in names:
            options = {"up": case.up, "groups": case.groups}
            expected["grad_logits"] = (
                ref.normalize_backward(gradient, weights, **options),
                ref.normalize_backward_magnitude(magnitude, weights, **options),
            )
            del expected["grad_masks"]
        return expected
