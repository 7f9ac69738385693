"""The check of an answer before it is timed: the tests' definition in float64, on three windows.

The windows are blocks of source pixels in the first corner of the first image, in the middle of the
middle one and in the last corner of the last one, with all channels. The definition runs on such a
block with a margin, and the results are compared where the margin cannot matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import reference as ref
from cases import Case, double
from tolerances import assert_within_bound

from .problems import Arrays

_BLOCK = 6  # source pixels along each axis, at least

# The quantity of tests/tolerances.py for each result, from masks and from logits.
_QUANTITIES = {
    "output": ("output", "output_from_logits"),
    "grad_features": ("grad_features", "grad_features_from_logits"),
    "grad_masks": ("grad_masks", None),
    "grad_logits": (None, "grad_logits"),
}


@dataclass(frozen=True)
class _Part:
    """A stretch of one axis: what the definition sees, and within it what is compared."""

    seen: slice
    compared: slice


def _parts(case: Case, length: int, out_length: int, place: str) -> dict[str, _Part]:
    """Cut one axis of features, output and logits. Blocks begin at multiples of down."""
    up, down, r = case.up, case.down, case.kernel_size // 2
    block = -(-_BLOCK // down) * down
    margin = -(-r // down) * down
    last = max(0, (length - block) // down * down)
    begin = {"first": 0, "middle": last // 2 // down * down, "last": last}[place]
    end = length if place == "last" else min(length, begin + block)
    low, high = max(0, begin - margin), min(length, end + margin)

    def part(scale_up: int, scale_down: int, limit: int) -> _Part:
        ends = (min(limit, -(-x * scale_up // scale_down)) for x in (low, high, begin, end))
        low_, high_, begin_, end_ = ends
        return _Part(slice(low_, high_), slice(begin_, end_))

    return {
        "features": part(1, 1, length),
        "output": part(up, down, out_length),
        "logits": part(1, down, -(-length // down)),
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
        self.windows = [self._window(inputs, *where, names) for where in self._places()]

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

    def _places(self) -> Iterator[tuple[int, dict[str, _Part], dict[str, _Part]]]:
        case = self.case
        for image, place in [(0, "first"), (case.n // 2, "middle"), (case.n - 1, "last")]:
            rows = _parts(case, case.h, case.output_size[0], place)
            columns = _parts(case, case.w, case.output_size[1], place)
            yield image, rows, columns

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
            inner = (..., _within(r), _within(c))
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


def _within(part: _Part) -> slice:
    """Return where the compared stretch lies in the seen one."""
    return slice(part.compared.start - part.seen.start, part.compared.stop - part.seen.start)
