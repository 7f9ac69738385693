"""The functions and their implementations, to parametrize and force them in tests."""

import contextlib
import functools
from collections.abc import Iterator

import pytest

import carafepp
from cases import CASES, DTYPES, Case, integer_arrays
from cases.calls import FUNCTIONS, INPUTS, RESULTS, arguments, call, from_layout, in_layout
from products import product


def _each(table) -> dict[str, tuple[str, int]]:
    return {
        f"{function}-{name}": (function, index)
        for function, names in table.items()
        for index, name in enumerate(names)
    }


EACH_INPUT = _each(INPUTS)  # (function, index among its inputs)
EACH_RESULT = _each(RESULTS)
each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_input = pytest.mark.parametrize(("function", "index"), EACH_INPUT.values(), ids=EACH_INPUT)
each_result = pytest.mark.parametrize(("function", "index"), EACH_RESULT.values(), ids=EACH_RESULT)


def call_into(function: str, inputs, params, outs) -> None:
    """Call with `out=`, and check that the call returns the outs themselves."""
    results = call(function, inputs, {**params, "out": tuple(outs) if len(outs) == 2 else outs[0]})
    for given, returned in zip(outs, results, strict=True):
        assert returned is given


def names(function: str) -> list[str]:
    """Return all implementations of the function in this build."""
    case, dtypes = CASES["up2"], DTYPES[0]
    arrays, params = arguments(function, case, integer_arrays(case, dtypes))
    return [name for name, _ in carafepp.list_implementations(function, *arrays, **params)]


def _isas() -> list[str]:
    """Return the instruction sets that this processor has, and `ref`."""
    case = CASES["up2"]
    arrays, params = arguments("reassemble", case, integer_arrays(case, DTYPES[0]))
    entries = carafepp.list_implementations("reassemble", *arrays, **params)
    isas = {name.rpartition("_")[2]: reason for name, reason in entries}
    return [isa for isa, reason in isas.items() if "processor" not in (reason or "")]


LAYOUTS_OF_KERNELS = ["few_nchw", "few_nhwc", "runs_any", "nhwc", "nchw", "any"]
ISAS = _isas()


def kernel_name(function: str, result: str, layout: str, isa: str) -> str:
    """Return the name of the implementation that gives one result of a function."""
    if "backward" in function and "reassemble" in function:
        function = f"grad_{result}"
    return f"{function}_{layout}_{isa}"


@functools.cache
def _declines(function: str, case: Case, layout: str) -> dict[str, str | None]:
    inputs, params = arguments(function, case, integer_arrays(case, DTYPES[0]))
    inputs = in_layout(inputs, layout)
    return dict(carafepp.list_implementations(function, *inputs, **params, layout=layout))


def takes(function: str, result: str):
    """Return a function that tells whether a kernel takes a case, in float32."""

    def valid(case: Case, layout: str, isa: str) -> bool:
        name = kernel_name(function, result, layout, isa)
        # Some names are in no list, like nhwc_ref.
        return _declines(function, case, layout_of(name)).get(name, "not there") is None

    return valid


def each_kernel(function: str, result: str, case, layouts=LAYOUTS_OF_KERNELS, **options):
    """Parametrize a test by cases and the kernels that take them; options are those of product."""
    axes = {"case": case, "layout": layouts, "isa": ISAS}
    return product(**axes, **options, valid=takes(function, result))


def layout_of(implementation: str) -> str:
    """Return the layout that an implementation is for: NCHW for one that takes any."""
    return "NHWC" if "_nhwc_" in implementation else "NCHW"


@contextlib.contextmanager
def forced(implementation: str, function: str, arrays, params) -> Iterator[None]:
    """Run the function by this implementation; skip, with its reason, if it declines."""
    reasons = dict(carafepp.list_implementations(function, *arrays, **params))
    reason = reasons.get(implementation, "its function has no such kernel")
    if reason is not None:
        pytest.skip(f"{implementation} declines: {reason}")
    with carafepp.force_implementation(implementation):
        yield


@contextlib.contextmanager
def one_that_accepts(choice: int, function: str, arrays, params, out=None) -> Iterator[None]:
    """Run the function by any implementation that accepts the problem, chosen by a number."""
    if out is None:
        out = getattr(carafepp, function)(*arrays, **params)
    entries = carafepp.list_implementations(function, *arrays, **params, out=out)
    accepting = [name for name, reason in entries if reason is None]
    with carafepp.force_implementation(accepting[choice % len(accepting)]):
        yield


def run(
    function: str,
    result: str,
    layout: str,
    isa: str,
    case: Case,
    arrays,
    normalizer: str = "softmax",
):
    """Return one result of a function, by one kernel: no other gradient is computed."""
    implementation = kernel_name(function, result, layout, isa)
    layout = layout_of(implementation)
    inputs, params = arguments(function, case, arrays, normalizer)
    inputs, params = in_layout(inputs, layout), {**params, "layout": layout}
    results = RESULTS[function]
    needs = {f"need_{other}": other == result for other in results} if len(results) == 2 else {}
    with forced(implementation, function, inputs, params):
        (computed,) = (a for a in call(function, inputs, {**params, **needs}) if a is not None)
    return from_layout((computed,), layout)[0]
