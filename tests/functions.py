"""The functions and their implementations, to parametrize and force them in tests."""

import contextlib
from collections.abc import Iterator

import pytest

import carafepp
from cases import CASES, DTYPES, Case, integer_arrays
from cases.calls import FUNCTIONS, INPUTS, RESULTS, arguments, call, from_layout, in_layout


def _each(table):
    return pytest.mark.parametrize(
        ("function", "index"),
        [
            pytest.param(function, index, id=f"{function}-{name}")
            for function, names in table.items()
            for index, name in enumerate(names)
        ],
    )


each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_input = _each(INPUTS)
each_result = _each(RESULTS)


def call_into(function: str, inputs, params, outs) -> None:
    """Call with `out=`, and check that what is returned are the outs themselves."""
    results = call(function, inputs, {**params, "out": tuple(outs) if len(outs) == 2 else outs[0]})
    for given, returned in zip(outs, results, strict=True):
        assert returned is given


def names(function: str) -> list[str]:
    """All implementations of the function in this build, whatever problems they accept."""
    case, dtypes = CASES["up2"], DTYPES[0]
    arrays, params = arguments(function, case, integer_arrays(case, dtypes))
    return [name for name, _ in carafepp.list_implementations(function, *arrays, **params)]


def layout_of(implementation: str) -> str:
    """Return the layout that an implementation is for: NCHW for one that takes any."""
    return "NHWC" if "_nhwc_" in implementation else "NCHW"


@contextlib.contextmanager
def forced(implementation: str, function: str, arrays, params) -> Iterator[None]:
    """Run the function by this implementation; skip, with its reason, if it declines."""
    reasons = dict(carafepp.list_implementations(function, *arrays, **params))
    if reasons[implementation] is not None:
        pytest.skip(f"{implementation} declines: {reasons[implementation]}")
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


def run(implementation: str, function: str, case: Case, arrays, **options):
    """The result of one implementation. `options` are normalizer or parameters of the call."""
    layout = layout_of(implementation)
    normalizer = options.pop("normalizer", "softmax")
    inputs, params = arguments(function, case, arrays, normalizer)
    inputs, params = in_layout(inputs, layout), {**params, **options, "layout": layout}
    with forced(implementation, function, inputs, params):
        results = from_layout(call(function, inputs, params), layout)
    return results if len(results) > 1 else results[0]
