"""The list of implementations: ended by the reference, and none that no test can reach."""

import re

import pytest

import carafepp
from cases import CASES, DTYPES, FEW, integer_arrays
from functions import FUNCTIONS, arguments, each_function, in_layout, layout_of, names


def listed(function, case, dtypes, layout="NCHW"):
    arrays, params = arguments(function, case, integer_arrays(case, dtypes))
    arrays = in_layout(arrays, layout)
    return carafepp.list_implementations(function, *arrays, **params, layout=layout)


def legal(function):
    """The pairs of dtypes that make a difference to this function."""
    alone = function.startswith("normalize")
    return [d for d in DTYPES if d.features == d.masks or not alone]


@pytest.mark.parametrize(
    ("case", "dtypes"),
    [
        pytest.param(case, dtypes, id=f"{case.name}-{dtypes}")
        for case in CASES.values()
        for dtypes in DTYPES
        if case in FEW or dtypes == DTYPES[0]
    ],
)
@each_function
def test_the_list_is_the_same_for_every_problem_and_some_reference_accepts_it(
    function, case, dtypes
):
    entries = listed(function, case, dtypes)
    assert [name for name, _ in entries] == names(function)
    assert entries[-1][0].endswith("_ref")
    assert all(reason is None for name, reason in entries if name.endswith("_ref"))
    assert all(reason is None or len(reason) > 3 for _, reason in entries)


@pytest.mark.parametrize(
    ("function", "implementation"), [(f, name) for f in FUNCTIONS for name in names(f)]
)
def test_every_implementation_accepts_some_problem_of_the_table(function, implementation):
    """Otherwise no test ever runs it. Those for CUDA are run by the tests for CUDA."""
    if re.search("_(cuda|sm[0-9]+)", implementation):
        pytest.skip(f"{implementation} takes CUDA arrays")
    for case in CASES.values():
        for dtypes in legal(function):
            entries = dict(listed(function, case, dtypes, layout_of(implementation)))
            reason = entries[implementation]
            if reason is None:
                return
            if "processor" in reason:
                pytest.skip(f"{implementation}: {reason}")
    pytest.fail(f"{implementation} declines every case of the table")


@each_function
def test_names_follow_the_grammar(function):
    """<function>_<layout>_<isa or device>."""
    for name in names(function):
        assert re.fullmatch(
            "(reassemble|reassemble_with_logits|grad_features|grad_masks|grad_logits"
            "|normalize_masks|normalize_masks_backward)"
            "_(any|nchw|nhwc)_(ref|sse2|avx2|avx512|neon|generic|cuda|sm[0-9]+)",
            name,
        ), name
