"""Errors of the results, and extreme logits: the tables of docs/numerics.md.

    PYTHONPATH=. python tests/accuracy.py [CASE ...]

Every implementation of this build for this processor computes every case of cases/, or those named.
All take minutes. tests/test_numbers.py compares the page with these tables.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, Case, Dtypes, double, numpy_dtype, random_arrays
from cases.calls import FUNCTIONS, RESULTS
from expected import dtype_of, random_result
from functions import ISAS, LAYOUTS_OF_KERNELS, kernel_name, names, run
from tolerances import EPS, SMALLEST, C

STORED = ("float32", "float64", "float16", "bfloat16")

EXTREME_LOGITS = {
    "all_minus_inf": [-np.inf] * 9,
    "one_minus_inf": [-np.inf] + [0.5] * 8,
    "one_finite": [-np.inf] * 4 + [0.5] + [-np.inf] * 4,
    "one_plus_inf": [np.inf] + [0.5] * 8,
    "all_plus_inf": [np.inf] * 9,
    "plus_and_minus_inf": [np.inf, -np.inf] + [0.5] * 7,
    "nan": [np.nan] + [0.5] * 8,
    "huge": [1e30, -1e30] + [0.0] * 7,
    "all_huge": [1e30] * 9,
    "all_hugely_negative": [-1e30] * 9,
    "one_large": [200.0] + [0.0] * 8,
    "all_large_and_negative": [-200.0] * 9,
    "denormal": [1e-40] + [-1e-40] * 8,
}


def errors(function: str, case: Case, dtypes: Dtypes) -> Iterator[tuple[str, str, float]]:
    """(quantity, dtype, worst error in units of eps * magnitude) of each result, of all kernels."""
    for result, layout, isa in itertools.product(RESULTS[function], LAYOUTS_OF_KERNELS, ISAS):
        if kernel_name(function, result, layout, isa) not in names(function):
            continue
        try:
            actual = run(function, result, layout, isa, case, random_arrays(case, dtypes))
        except pytest.skip.Exception:  # declined
            continue
        quantity, exact, magnitude = random_result(function, result, case, dtypes, "softmax")
        dtype = dtype_of(result, dtypes)
        if quantity == "grad_logits":  # a sum of products of features
            dtype = dtypes.features
        error = np.abs(double(actual) - exact)
        error = np.maximum(error - SMALLEST[dtype], 0)[magnitude > 0] / magnitude[magnitude > 0]
        yield quantity, dtype, float(error.max(initial=0) / EPS[dtype])


def worst_errors(cases: Iterable[Case]) -> dict[tuple[str, str], float]:
    """Return the worst error by quantity and dtype of the result."""
    worst = defaultdict(float)
    for case, function, dtypes in itertools.product(cases, FUNCTIONS, DTYPES):
        if function.startswith("normalize") and dtypes.features != dtypes.masks:
            continue
        for quantity, dtype, error in errors(function, case, dtypes):
            worst[quantity, dtype] = max(worst[quantity, dtype], error)
    return dict(worst)


def bound(quantity: str, dtype: str) -> str:
    """Return the bound of tolerances.py, with the rounding of the result."""
    c, c_per_k, c_of_16_bits = C[quantity]
    if dtype in ("float16", "bfloat16"):
        return f"{c_of_16_bits + 0.5:g}"
    return f"{c + 0.5:g}" + (f" + {c_per_k} K" if c_per_k else "")


def rows(table: list[list[str]]) -> str:
    """Return a table of Markdown. The first row is its head."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([head, "|---" * len(table[0]) + "|", *rest])


def rounding_table(worst: dict[tuple[str, str], float]) -> str:
    table = [["", *STORED]]
    for quantity in C:
        cells = [f"{worst[quantity, d]:.2f} of {bound(quantity, d)}" for d in STORED]
        table.append([quantity, *cells])
    return rows(table)


def shown(values: np.ndarray) -> str:
    """Return runs of equal numbers: `1, 0 (8 times)`."""
    runs = [(text, len(list(run))) for text, run in itertools.groupby(f"{v:.3g}" for v in values)]
    if len(runs) == 1:
        return f"all {runs[0][0]}"
    return ", ".join(text if times == 1 else f"{text} ({times} times)" for text, times in runs)


def extreme_masks(logits: list[float], dtype: str, normalizer: str) -> np.ndarray:
    """The nine masks of one output pixel."""
    with np.errstate(over="ignore"):  # 1e30 is Inf in float16
        array = np.array(logits).astype(numpy_dtype(dtype)).reshape(1, 9, 1, 1)
    return double(carafepp.normalize_masks(array, kernel_size=3, normalizer=normalizer)).ravel()


def extreme_table() -> str:
    columns = [("float32", normalizer) for normalizer in ref.NORMALIZERS if normalizer != "none"]
    columns.append(("float16", "softmax"))
    table = [["the nine logits", *(f"{normalizer}, {dtype}" for dtype, normalizer in columns)]]
    for logits in EXTREME_LOGITS.values():
        cells = [shown(extreme_masks(logits, *column)) for column in columns]
        table.append([shown(np.array(logits)), *cells])
    return rows(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE")
    chosen = parser.parse_args().cases or CASES
    print(rounding_table(worst_errors(CASES[name] for name in chosen)), extreme_table(), sep="\n\n")
