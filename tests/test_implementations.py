"""The list of implementations: ended by the reference, and none that no test can reach."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import carafepp
from cases import CASES, DTYPES, FEW, Case, integer_arrays, random_arrays
from cases.calls import FUNCTIONS, arguments, call, in_layout
from cuda_libraries import EMULATED
from foreign import PretendedCUDA
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
    """Otherwise no test ever runs it. test_cuda.py runs the kernels for CUDA."""
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


GRAMMAR = (
    "(reassemble|reassemble_with_logits|grad_features|grad_masks|grad_logits"
    "|normalize_masks|normalize_masks_backward)"
    "(_up2|_down2)?_(any|nchw|nhwc)(_mma)?_(ref|avx2|avx512|neon|generic|cuda)"
)


@each_function
def test_names_follow_the_grammar(function):
    """carafepp.h has the grammar."""
    for name in names(function):
        assert re.fullmatch(GRAMMAR, name), name


@pytest.mark.skipif(not EMULATED, reason="a list for CUDA needs CUDA arrays")
@each_function
def test_names_of_cuda_kernels_follow_the_grammar(function):
    arrays, params = arguments(function, CASES["up2"], integer_arrays(CASES["up2"], DTYPES[0]))
    on_device = map(PretendedCUDA, arrays)
    listed = [name for name, _ in carafepp.list_implementations(function, *on_device, **params)]
    assert listed
    for name in listed:
        assert re.fullmatch(GRAMMAR, name), name
        assert name.endswith("_cuda")


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
ISAS = ["sse2", "avx2", "avx512"] if "avx2" in names("reassemble")[-2] else ["neon"]


def capped(isa: str, program: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CARAFEPP_ISA": isa, "CARAFEPP_LOG": "debug"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


NARROW = Case("narrow", "few columns, many channels", 1, 64, 5, 7, up=2)


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if "normalize" not in f])
def test_a_slower_kernel_can_be_forced(function):
    """Rows so narrow are transposed to pixels: a choice, which says nothing of what can run."""
    arrays, params = arguments(function, NARROW, random_arrays(NARROW, DTYPES[0]))
    expected = call(function, arrays, params)
    for name, reason in carafepp.list_implementations(function, *arrays, **params):
        if "_nchw_" not in name or (reason or "").startswith("this processor"):
            continue
        assert reason is None
        with carafepp.force_implementation(name):
            for result, other in zip(call(function, arrays, params), expected, strict=True):
                np.testing.assert_allclose(result, other, rtol=1e-4, atol=1e-4)


def test_the_log_tells_why_a_kernel_that_can_run_is_not_chosen():
    program = (
        "import numpy as np, carafepp\n"
        'carafepp.reassemble(np.ones((1, 64, 5, 7), "f4"), np.ones((1, 9, 10, 14), "f4"), up=2)'
    )
    log = capped("", program).stderr
    assert re.match(r"carafepp: \[reassemble\] reassemble_any_\w+; ", log)
    assert re.search(r"reassemble_nchw_\w+ is slower: rows so narrow, with so many channels", log)


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_caps_the_instruction_set(isa):
    done = capped(isa, RUN)
    assert done.returncode == 0, done.stderr
    reasons = dict(line.split(": ") for line in done.stdout.splitlines())
    for k, above in enumerate(ISAS):
        if above == "sse2":  # has no kernels
            continue
        reason = reasons[f"reassemble_nchw_{above}"]
        if k > ISAS.index(isa):
            assert reason == f"CARAFEPP_ISA allows no more than {isa}" or "processor" in reason
        else:
            assert reason == "None" or "processor" in reason
    chosen = re.match(r"carafepp: \[reassemble\] (\w+)", done.stderr)[1]
    assert reasons[chosen] == "None"
    fast = [allowed for allowed in ISAS if reasons.get(f"reassemble_nchw_{allowed}") == "None"]
    assert chosen.rpartition("_")[2] == (fast or ["ref"])[-1]


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
