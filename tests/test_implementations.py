"""The list of implementations: ended by the reference, and none that no test can reach."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import carafepp
from carafepp import _core
from carafepp._doors.door import params_of
from cases import CASES, DTYPES, FEW, Case, integer_arrays, random_arrays
from cases.calls import FUNCTIONS, RESULTS, arguments, call, in_layout
from cuda_libraries import EMULATED
from foreign import PretendedCUDA
from functions import ISAS as KERNELS
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


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@product(case=CASES, by_default={"case": FEW}, turns={"function": FUNCTIONS, "dtypes": DTYPES})
def test_a_result_that_is_not_given_counts_as_the_one_that_a_call_makes(
    case, function, dtypes, layout
):
    arrays = integer_arrays(case, dtypes)
    inputs, params = arguments(function, case, arrays)
    results = [
        getattr(arrays, {"output": "grad_output"}.get(name, name)) for name in RESULTS[function]
    ]
    place = PretendedCUDA if EMULATED else np.asarray
    inputs = [place(array) for array in in_layout(inputs, layout)]
    results = [place(np.zeros_like(array)) for array in in_layout(results, layout)]
    out = tuple(results) if len(results) == 2 else results[0]
    listed = carafepp.list_implementations(function, *inputs, **params, layout=layout)
    assert listed == carafepp.list_implementations(
        function, *inputs, **params, layout=layout, out=out
    )


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
    "|normalize_masks|normalize_masks_backward|backward)"
    "(_up1|_up2|_down2|_down|_few|_runs)?_(any|nchw|nhwc)(_mma)?_(ref|avx2|avx512|neon|generic|cuda)"
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


def case(reason, c, w, **params):
    return Case(reason.replace(" ", "_"), reason, 1, c, 5, w, **params)


FEW_CHANNELS = case("few channels", 3, 21, up=2)
FEW_CELLS = case("few cells", 3, 3, up=2)
ONE_TAP = case("one tap", 5, 21, kernel_size=1)
STRIDE_2 = case("runs of masks that are staged", 16, 21, down=2)
STRIDE_3 = case("runs of adjacent channels", 16, 21, down=3)
STRIDE_OF_FEW = case("runs of few outputs", 16, 13, down=3)
MANY_CHANNELS = case("masks of many channels", 272, 7, kernel_size=7)
NARROW = case("few columns, many channels", 64, 7, up=2)
DEINTERLEAVED = case("many channels, a factor down", 16, 21, down=2)
LARGE_TILE = case("a large tile", 5, 5, up=16, kernel_size=7)
LARGE_CELL = case("a large cell", 5, 2, up=9, kernel_size=5)
LARGE_ROWS = case("rows of large cells", 5, 3, up=4, kernel_size=9)
LARGE_BLOCK = case("a block of large cells", 5, 5, up=8, kernel_size=7)
BOTH = "reassemble", "reassemble_with_logits"
MASKS = "grad_masks", "grad_logits"
NORMALIZE = "normalize_masks", "normalize_masks_backward"
# Reasons for which another kernel is chosen, which say nothing of what can run: a problem, the
# layout of its arrays and of the kernels, and the results for which the reason holds.
SLOWER = {
    "many channels in a group are worth register tiles": [
        (NARROW, "NCHW", "few_nchw", (*BOTH, "grad_features", *MASKS)),
    ],
    "the masks of a group would be read again for every 16 of more than 256 channels": [
        (MANY_CHANNELS, "NCHW", "runs_any", ("reassemble",)),
    ],
    "down is less than 3 and masks are staged": [
        (STRIDE_2, "NCHW", "runs_any", BOTH),
    ],
    "channels of features are adjacent, so nothing is transposed": [
        (STRIDE_3, "NHWC", "runs_any", BOTH),
    ],
    "fewer than 8 columns of outputs, of staged masks": [
        (STRIDE_OF_FEW, "NCHW", "runs_any", BOTH),
    ],
    "columns of masks or logits are not adjacent": [
        (FEW_CHANNELS, "any", "few_nchw", (*BOTH, "grad_features", *MASKS)),
    ],
    "too few channels in a group to fill vectors": [
        (FEW_CHANNELS, "NHWC", "nhwc", (*BOTH, *MASKS)),
        (FEW_CHANNELS, "any", "any", MASKS),
    ],
    "too few channels in a group to make up for staging masks": [
        (FEW_CHANNELS, "NHWC", "nhwc", ("grad_features",)),
    ],
    "fewer than 4 cells in a row": [
        (FEW_CELLS, "NCHW", "nchw", ("grad_features", *MASKS)),
        (FEW_CELLS, "NCHW", "any", NORMALIZE),
    ],
    "kernel_size is 1 and columns are not adjacent": [
        (ONE_TAP, "any", "nchw", ("grad_features",)),
    ],
    "rows so narrow, with so many channels, are better transposed to pixels": [
        (NARROW, "NCHW", "nchw", (*BOTH, "grad_features", *MASKS)),
    ],
    "so many channels are better transposed to pixels than deinterleaved": [
        (DEINTERLEAVED, "NCHW", "nchw", BOTH),
    ],
    "the masks of a tile take more than 512 KiB": [
        (LARGE_TILE, "NHWC", "nhwc", BOTH),
        (LARGE_TILE, "NCHW", "any", NORMALIZE),
    ],
    "the masks of a cell are more than 1600": [
        (LARGE_CELL, "NCHW", "any", MASKS),
    ],
    "the masks of the outputs that touch a few rows take more than 768 KiB": [
        (LARGE_ROWS, "NCHW", "any", ("grad_features",)),
    ],
    "the masks of the outputs that touch a few pixels take more than 1 MiB": [
        (LARGE_BLOCK, "NHWC", "nhwc", ("grad_features",)),
    ],
}


def result_of(name):
    """Return the result that a name without instruction set begins with."""
    return name.rpartition("_")[0].removesuffix("_few").removesuffix("_runs")


def problems(reason):
    """Yield (name without instruction set, function, arrays, params) of each call of a reason."""
    for case, layout, kernels, results in SLOWER[reason]:
        for result in results:
            backward = {"grad_features": "", "grad_masks": "", "grad_logits": "_with_logits"}
            function = result
            if result in backward:
                function = f"reassemble{backward[result]}_backward"
            arrays, params = arguments(function, case, random_arrays(case, DTYPES[0]))
            if layout == "any":
                arrays = tuple(np.repeat(array, 2, axis=-1)[..., ::2] for array in arrays)
            else:
                arrays = in_layout(arrays, layout)
                params["layout"] = layout
            yield f"{result}_{kernels}", function, arrays, params


@pytest.mark.parametrize("isa", [isa for isa in KERNELS if isa != "ref"])
@pytest.mark.parametrize("reason", SLOWER)
def test_a_slower_kernel_can_be_forced(reason, isa):
    for name, function, arrays, params in problems(reason):
        with carafepp.force_implementation(f"{result_of(name)}_any_ref"):
            expected = call(function, arrays, params)
        with carafepp.force_implementation(f"{name}_{isa}"):
            actual = call(function, arrays, params)
        for result, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(result, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(KERNELS == ["ref"], reason="no kernels for this processor")
@pytest.mark.parametrize("reason", SLOWER)
def test_in_the_list_of_the_fastest_a_slower_kernel_declines(reason):
    for name, function, arrays, params in problems(reason):
        core_params = params_of(function, **params)
        results = call(function, arrays, params)
        listed = _core.list_implementations(core_params, arrays, results, fastest=True)
        assert dict(listed)[f"{name}_{KERNELS[0]}"] in SLOWER


@pytest.mark.skipif(KERNELS == ["ref"], reason="no kernels for this processor")
def test_the_log_tells_why_a_kernel_that_can_run_is_not_chosen():
    program = ["import numpy as np, carafepp"]
    sentences = []
    for reason in SLOWER:
        for name, function, arrays, params in problems(reason):
            views = [
                f"np.ones({(*a.shape[:-1], 2 * a.shape[-1])}, 'f4')[..., ::2]"
                if a.strides[-1] != a.itemsize
                else f"np.ones({a.shape}, 'f4')"
                for a in arrays
            ]
            program.append(f"carafepp.{function}({', '.join(views)}, **{params})")
            sentences.append(f"{name}_{KERNELS[0]} is slower: {reason}")
    log = capped("", "\n".join(program)).stderr.splitlines()
    chosen = [line for line in log if line.startswith("carafepp: [")]
    for sentence in sentences:
        assert any(sentence in line for line in chosen), sentence


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
    known = " or ".join(filter(None, [", ".join(ISAS[:0:-1]), ISAS[0]]))
    sentence = f"the environment variable CARAFEPP_ISA must be {known}; got mmx."
    assert last.endswith(sentence)
    assert last.startswith("ValueError: [reassemble] ")
