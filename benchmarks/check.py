"""The check that a result is near the exact one."""

import numpy as np

from cases import double

# Relative to the value plus the root mean square of all: sums in float32, or masks of 16 bits.
TOLERANCE = {"float64": 2.0**-46, "float32": 2.0**-17, "float16": 2.0**-7, "bfloat16": 2.0**-4}


def assert_near(result: np.ndarray, exact: np.ndarray, dtype: str, slack: float = 1) -> None:
    """Raise an AssertionError unless all values are near the exact ones; NaN never is.

    `slack` multiplies the tolerance of the dtype.
    """
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
