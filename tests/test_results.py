"""Each result of each kernel of the CPU against the definition: cases, dtypes, normalizers.

Integers give exact results, without a normalizer (None); random numbers stay within the bound of
tolerances.py.
"""

import functools

from cases import CASES, DTYPES, FEW, Case, Dtypes, integer_arrays, random_arrays
from expected import assert_result
from functions import ISAS, each_kernel, run, takes
from products import product
from reference import NORMALIZERS

MASKS = {"masks-exact": ("", None), "masks-random": ("", "none")}
SMALL = [case for case in CASES.values() if case.terms < 10**6]  # large ones only by default
LOGITS = {"logits-exact": ("_with_logits", None)} | {
    f"logits-{normalizer}": ("_with_logits", normalizer) for normalizer in NORMALIZERS
}


def check(
    function: str,
    result: str,
    layout: str,
    isa: str,
    case: Case,
    dtypes: Dtypes,
    normalizer: str | None,
) -> None:
    arrays = (integer_arrays if normalizer is None else random_arrays)(case, dtypes)
    actual = run(function, result, layout, isa, case, arrays, normalizer or "none")
    assert_result(function, result, case, dtypes, actual, normalizer)


by_each_kernel = functools.partial(
    each_kernel,
    case=SMALL,
    by_default={"case": CASES},
    turns={"dtypes": DTYPES, "given": MASKS | LOGITS},
)


@by_each_kernel("reassemble", "output")
def test_output(case, layout, isa, dtypes, given):
    source, normalizer = given
    check(f"reassemble{source}", "output", layout, isa, case, dtypes, normalizer)


@by_each_kernel("reassemble_backward", "features")
def test_grad_features(case, layout, isa, dtypes, given):
    source, normalizer = given
    check(f"reassemble{source}_backward", "features", layout, isa, case, dtypes, normalizer)


@by_each_kernel("reassemble_backward", "masks")
def test_grad_masks_and_logits(case, layout, isa, dtypes, given):
    source, normalizer = given
    result = "logits" if source else "masks"
    check(f"reassemble{source}_backward", result, layout, isa, case, dtypes, normalizer)


@product(
    case=CASES,
    isa=ISAS,
    by_default={"case": FEW},
    valid=lambda case, isa: takes("normalize_masks", "masks")(case, "any", isa),
    turns={
        "which": {
            "masks": ("normalize_masks", "masks"),
            "logits": ("normalize_masks_backward", "logits"),
        },
        "dtypes": [dtypes for dtypes in DTYPES if dtypes.features == dtypes.masks],
        "normalizer": {"exact": None} | {name: name for name in NORMALIZERS},
    },
)
def test_normalized_masks_and_their_gradient(case, isa, which, dtypes, normalizer):
    check(*which, "any", isa, case, dtypes, normalizer)
