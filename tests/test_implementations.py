"""The list of implementations: ended by the reference, and none that no test can reach."""

import os
import re
import subprocess
import sys

import pytest

import carafepp
from cases import CASES, DTYPES, FEW, integer_arrays
from cases.calls import FUNCTIONS, arguments, in_layout
from functions import each_function, layout_of, names
from products import product


def listed(function, case, dtypes, layout="NCHW"):
    arrays, params = arguments(function, case, integer_arrays(case, dtypes))
    arrays = in_layout(arrays, layout)
    return carafepp.list_implementations(function, *arrays, **params, layout=layout)


def legal(function):
    """The pairs of dtypes that make a difference to this function."""
    alone = function.startswith("normalize")
    return [d for d in DTYPES if d.features == d.masks or not alone]


@product(case=CASES, by_default={"case": FEW}, turns={"function": FUNCTIONS, "dtypes": DTYPES})
def test_the_list_is_the_same_for_every_problem_and_some_reference_accepts_it(
    case, function, dtypes
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
            if "processor" in reason or "CARAFEPP_ISA" in reason:
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


LIST = """
import numpy as np, carafepp
arrays = np.ones((1, 16, 8, 8), "f4"), np.ones((1, 9, 16, 16), "f4")
for name, reason in carafepp.list_implementations("reassemble", *arrays, up=2):
    print(name, reason, sep=": ")
"""
RUN = LIST + "carafepp.reassemble(*arrays, up=2)"
FORCE = (
    LIST
    + """
with carafepp.force_implementation({!r}):
    carafepp.reassemble(*arrays, up=2)
"""
)
ISAS = ["sse2", "avx2", "avx512"] if "sse2" in names("reassemble")[-2] else ["neon"]


def capped(isa: str, program: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CARAFEPP_ISA": isa, "CARAFEPP_LOG": "debug"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_caps_the_instruction_set(isa):
    done = capped(isa, RUN)
    assert done.returncode == 0, done.stderr
    reasons = dict(line.split(": ") for line in done.stdout.splitlines())
    for k, above in enumerate(ISAS):
        reason = reasons[f"reassemble_nchw_{above}"]
        if k > ISAS.index(isa):
            assert reason == f"CARAFEPP_ISA allows no more than {isa}" or "processor" in reason
        else:
            assert reason == "None" or "processor" in reason
    chosen = re.match(r"carafepp: \[reassemble\] (\w+)", done.stderr)[1]
    assert reasons[chosen] == "None"
    assert not chosen.endswith("_ref")


@pytest.mark.skipif(len(ISAS) == 1, reason="one instruction set")
def test_an_implementation_beyond_the_cap_cannot_be_forced():
    done = capped(ISAS[0], FORCE.format(f"reassemble_nchw_{ISAS[-1]}"))
    assert "NotImplementedError: [reassemble] implementation reassemble_nchw_" in done.stderr
    assert "declines: " in done.stderr


def test_an_empty_cap_is_none():
    reasons = [line.split(": ")[1] for line in capped("", RUN).stdout.splitlines()]
    assert not any("CARAFEPP_ISA" in reason for reason in reasons)


def test_an_unknown_cap_is_an_error():
    last = capped("mmx", RUN).stderr.splitlines()[-1]
    known = " or ".join(filter(None, [", ".join(ISAS[:-1]), ISAS[-1]]))
    sentence = f"the environment variable CARAFEPP_ISA must be {known}; got mmx."
    assert last.endswith(sentence)
    assert last.startswith("ValueError: [reassemble] ")
