"""The one table of rounding bounds.

    |computed - exact| <= c * eps(dtype) * magnitude + the rounding of the result

`magnitude` is the sum of the magnitudes of the products that the result consists of (reference.py).
float32 and float64 are summed in their own precision: c covers the sums and the exponential.
16-bit results are summed in float32: c covers masks rounded to 16 bits after normalisation.
"""

import numpy as np

from cases import double, numpy_dtype

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}

C = {
    # quantity:                  float64, float32, float16, bfloat16
    "output": (8, 8, 2, 2),
    "grad_features": (8, 8, 2, 2),
    "grad_masks": (8, 8, 2, 2),
    "output_from_logits": (16, 16, 2, 2),
    "grad_features_from_logits": (16, 16, 2, 2),
    "grad_logits": (16, 16, 2, 2),
    "normalized_masks": (16, 16, 0.5, 0.5),
    "normalized_masks_backward": (16, 16, 0.5, 0.5),
}


def assert_within_bound(
    quantity: str, dtype: str, actual, expected: np.ndarray, magnitude: np.ndarray
) -> None:
    """`dtype` is that of the result; for grad_logits that of the features, as masks may have it."""
    actual = double(actual)
    c = dict(zip(EPS, C[quantity], strict=True))[dtype]
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
