"""One comparison: all candidates for a pass of a problem, checked, then timed in turns."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from cases import Case

from . import implementations, machine, peers, timing
from .machine import Machine, Peaks
from .passes import Pass, as_nchw
from .problems import Arrays
from .timing import Candidate
from .truth import Truth

OPERATORS = ("nearest", "avg_pool")  # the operator of each direction in the ratios
# PyTorch's compositions sum in the arrays' dtype: their tolerance is so many times ours.
SLACK = {"float64": 4, "float32": 4, "float16": 4, "bfloat16": 2}


def compare(
    case: Case, weights: str, pass_: str, asked, seconds: float, computer: Machine
) -> list[dict[str, Any]]:
    """Return a row for each candidate; a row with a wrong answer has an "error" and no time.

    Parameters
    ----------
    case : Case
    weights : "masks" or "logits"
    pass_ : "forward" or "forward+backward"
    asked : argparse.Namespace
        The options of `python -m benchmarks`.
    seconds : float
        The time budget; 0 only checks the answers.
    computer : Machine
        Computes the peaks that limit the candidates.
    """
    arrays = {dtype: Arrays(case, dtype) for dtype in asked.dtype}
    truths = {
        dtype: Truth(case, weights, dtype, partial(made, layout="NCHW"))
        for dtype, made in arrays.items()
    }
    found = [
        candidate
        for made in arrays.values()
        for candidate in implementations.candidates(made, weights, pass_, asked)
    ]
    first = arrays[asked.dtype[0]]
    found += peers.candidates(first, weights, pass_, asked)
    errors: dict[Candidate, str] = {}

    def check(candidate: Candidate) -> None:
        labels = candidate.labels
        try:
            results = answer(candidate, arrays[labels["dtype"]])
            slack = 1 if labels["kind"] == "carafepp" else SLACK[labels["dtype"]]
            truths[labels["dtype"]].check(results, slack)
            first_row = (labels["dtype"], candidate.threads) == (asked.dtype[0], asked.threads[0])
            if labels["chosen"] and seconds and (first_row or not asked.quick):
                candidate.memory = implementations.memory_of_first_call(candidate, case.name)
        except AssertionError as error:
            errors[candidate] = f"wrong: {error}"
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".splitlines()[0]
            how = "wrong" if labels["kind"] == "carafepp" else "left out"
            errors[candidate] = f"{how}: {sentence}"

    for candidate in found:
        check(candidate)
    right = [candidate for candidate in found if candidate not in errors]
    if asked.peer(peers.COMPILED) and peers.compositions(case):
        peers.forget_compiled()
        how = (weights, pass_, asked.threads[0], asked.fresh)
        for candidate in _compiled(first, right, asked.layout, *how):
            check(candidate)
            found.append(candidate)
    peaks: dict[int, Peaks] = {}
    if seconds:
        for candidate in [one for count in asked.threads for one in _ranked(right, count)[:2]]:
            if candidate.warm_up > timing.SLOW:
                timing.warm_up(candidate)  # again: ratios need a warm best composition
        right = [candidate for candidate in found if candidate not in errors]
        peaks = measure([(case, candidate) for candidate in right], seconds, computer)
    rows = [
        described(case, candidate, peaks) | {"error": errors.get(candidate)} for candidate in found
    ]
    for row in rows:
        row |= ratios(row, rows)
    return rows


def measure(
    timed: Iterable[tuple[Case, Candidate]], seconds: float, computer: Machine
) -> dict[int, Peaks]:
    """Time candidates and the peaks that limit them in turns; return the peaks."""
    timed = list(timed)
    calls = [
        (candidate.threads, _pass(case, candidate).bytes(candidate.labels["dtype"]))
        for case, candidate in timed
        if candidate.labels["kind"] != "operator"
    ]
    limits = computer.limits(calls)
    timing.measure([*(candidate for _, candidate in timed), *limits], seconds)
    return machine.peaks(limits)


def _pass(case: Case, candidate: Candidate) -> Pass:
    return Pass(case, candidate.labels["weights"], candidate.labels["pass"])


def answer(candidate: Candidate, arrays: Arrays) -> dict[str, Any]:
    """Return the results by name, axes N, C, H, W; recycled results are NaN before the call."""
    layout = candidate.labels["layout"]
    if candidate.labels["outputs"] == "recycled":
        for name in candidate.results:
            arrays(name, layout).fill(float("nan"))
    ours = candidate.labels["kind"] == "carafepp"
    results = timing.warm_up(candidate, memory=not ours)
    results = results if isinstance(results, tuple) else (results,)
    if ours:
        results = tuple(as_nchw(array, layout) for array in results if array is not None)
    return dict(zip(candidate.results, results[: len(candidate.results)], strict=True))


def _ranked(right: list[Candidate], threads: int, layouts=("NCHW", "NHWC")) -> list[Candidate]:
    """Return the compositions, best first."""
    found = [
        candidate
        for candidate in right
        if (candidate.labels["kind"], candidate.threads) == ("composition", threads)
        and candidate.labels["layout"] in layouts
    ]
    return sorted(found, key=lambda candidate: candidate.warm_up)


def _compiled(arrays: Arrays, right: list[Candidate], layouts, weights, pass_, threads, fresh):
    """Yield the best composition of each layout, and the loop over taps, compiled."""
    for layout in layouts:
        best = [candidate.name for candidate in _ranked(right, threads, [layout])[:1]]
        for name in dict.fromkeys([*best, "taps"]):
            how = (arrays, weights, pass_, layout, threads, fresh)
            yield peers.composition(name, *how, compiled=True)


def described(case: Case, candidate: Candidate, peaks: dict[int, Peaks]) -> dict[str, Any]:
    """Return a row with its rates; operators compute something else and have none."""
    shapes = {"shape": case.features_shape, "output_shape": case.output_shape}
    row = {"case": case.name, **shapes, **candidate.row()}
    if candidate.samples and row["kind"] != "operator":
        pass_ = _pass(case, candidate)
        operations, traffic = pass_.flops, pass_.bytes(row["dtype"])
        limits = peaks[candidate.threads]
        ceiling = limits.ceiling(operations, traffic, row["dtype"])
        row["limited_by"] = "memory" if ceiling < limits.peak(row["dtype"]) else "FMA"
        row |= {"flops": operations / row["seconds"], "bytes": traffic / row["seconds"]}
        row |= {"intensity": operations / traffic, "ceiling_flops": ceiling}
        row["share"] = row["flops"] / ceiling
        row["limits"] = vars(limits)
    return row


def ratios(row: dict, rows: list[dict]) -> dict[str, float | None]:
    """Return the times of the best alternatives by this one's, None if there is none."""
    alike = [
        other
        for other in rows
        if "seconds" in other
        and all(other[key] == row[key] for key in ("pass", "dtype", "threads"))
    ]
    compositions = [other for other in alike if other["kind"] == "composition"]
    in_its_layout = [other for other in alike if other["layout"] == row["layout"]]
    alternatives = {
        "x_composition": compositions,
        "x_same_layout": [other for other in in_its_layout if other["kind"] == "composition"],
        "x_operator": [other for other in in_its_layout if other["name"] in OPERATORS],
    }
    return {
        key: min(other["seconds"] for other in others) / row["seconds"]
        if others and "seconds" in row
        else None
        for key, others in alternatives.items()
    }
