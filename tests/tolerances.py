"""The one table of rounding bounds.

    |computed - exact| <= c * eps(dtype) * magnitude + the rounding of the result

`magnitude` sums the magnitudes of the products that the result consists of (reference.py).
Sums of float32 and float64 keep their precision: c covers them, and the exponential.
Sums of 16-bit results are float32: c covers masks that are rounded to 16 bits.
A normaliser makes c grow with K: it sums K*K positive exponentials. Their rounding errors add up
like the steps of a random walk, to the square root of their number.
"""

import numpy as np

from cases import double, numpy_dtype

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}

# quantity: (c of float64 and float32, how much of it for each unit of K, c of float16 and bfloat16)
C = {
    "output": (6, 0, 2),
    "grad_features": (6, 0, 2),
    "grad_masks": (6, 0, 2),
    "output_from_logits": (8, 2, 2),
    "grad_features_from_logits": (8, 2, 2),
    "grad_logits": (8, 2, 2),
    "normalized_masks": (8, 2, 0.5),
    "normalized_masks_backward": (8, 2, 0.5),
}


def assert_within_bound(
    quantity: str,
    dtype: str,
    kernel_size: int,
    actual,
    expected: np.ndarray,
    magnitude: np.ndarray,
) -> None:
    """`dtype` is that of the result; for grad_logits that of the features, as masks may have it."""
    actual = double(actual)
    c, c_per_k, c_of_16_bits = C[quantity]
    c = c_of_16_bits if dtype in ("float16", "bfloat16") else c + c_per_k * kernel_size
    bound = EPS[dtype] * (c * magnitude + np.abs(expected) / 2) + SMALLEST[dtype]
    error = np.abs(actual - expected)
    wrong = ~(error <= bound)  # NaN is wrong
    if wrong.any():
        worst = np.unravel_index(np.nanargmax(np.where(wrong, error / bound, 0)), error.shape)
        raise AssertionError(
            f"{quantity}: {wrong.sum()} of {wrong.size} elements beyond {c} eps({dtype}); worst at "
            f"{tuple(map(int, worst))}: got {actual[worst]!r}, expected {expected[worst]!r}, "
            f"error {error[worst]:.3g}, bound {bound[worst]:.3g}"
        )


def assert_exact(actual, expected: np.ndarray, dtype: str) -> None:
    """Equal to the exact result rounded once to the dtype; NaN equals NaN."""
    np.testing.assert_array_equal(double(actual), double(expected.astype(numpy_dtype(dtype))))
