"""One comparison: all rivals for a pass of a problem, checked, then timed in turns."""

from typing import Any

from cases import Case

from . import peers, rivals, timing
from .machine import Peaks
from .problems import Arrays, as_nchw, flops, touched_bytes
from .timing import Rival
from .truth import Truth

OPERATORS = ("nearest", "avg_pool")  # the one of each direction that ratios are told for
# How many times the bound PyTorch's compositions may be off: they sum in the arrays' dtype.
SLACK = {"float64": 4, "float32": 4, "float16": 4, "bfloat16": 2}


def compare(
    case: Case, source: str, pass_: str, asked, seconds: float, peaks: dict[int, Peaks]
) -> list[dict[str, Any]]:
    """Return a row for each rival; a row with a wrong answer has an "error" and no time.

    Parameters
    ----------
    case : Case
    source : "masks" or "logits"
    pass_ : "forward" or "forward+backward"
    asked : argparse.Namespace
        The options of `python -m benchmarks`.
    seconds : float
        Timing in all; answers are only checked if 0.
    peaks : dict
        The machine's peaks for each number of threads; empty if nothing is timed.
    """
    arrays = {dtype: Arrays(case, dtype) for dtype in asked.dtype}
    truths = {dtype: Truth(of, source) for dtype, of in arrays.items()}
    found = [rival for of in arrays.values() for rival in rivals.rivals(of, source, pass_, asked)]
    first = arrays[asked.dtype[0]]
    found += peers.rivals(first, source, pass_, asked)
    errors: dict[Rival, str] = {}

    def check(rival: Rival) -> None:
        labels = rival.labels
        try:
            results = _answer(rival, arrays[labels["dtype"]])
            slack = 1 if labels["kind"] == "carafepp" else SLACK[labels["dtype"]]
            truths[labels["dtype"]].check(rival.results, results, slack)
            first_row = (labels["dtype"], rival.threads) == (asked.dtype[0], asked.threads[0])
            if labels["chosen"] and seconds and (first_row or not asked.quick):
                rival.memory = rivals.memory_of_first_call(rival, case.name)
        except AssertionError as error:
            errors[rival] = f"wrong: {error}"
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".splitlines()[0]
            errors[rival] = f"{'wrong' if labels['kind'] == 'carafepp' else 'left out'}: {sentence}"

    for rival in found:
        check(rival)
    right = [rival for rival in found if rival not in errors]
    if asked.peer(peers.COMPILED) and peers.compositions(case):
        peers.forget_compiled()
        how = (source, pass_, asked.threads[0], asked.fresh)
        for rival in _compiled(first, right, asked.layout, *how):
            check(rival)
            found.append(rival)
    if seconds:
        for rival in [one for threads in asked.threads for one in _ranked(right, threads)[:2]]:
            if rival.warm_up > timing.SLOW:
                timing.warm_up(rival)  # again, as ratios are told to the best composition
        timing.measure([rival for rival in found if rival not in errors], seconds)
    rows = [_row(case, rival, peaks) | {"error": errors.get(rival)} for rival in found]
    for row in rows:
        row |= _ratios(row, rows)
    return rows


def _answer(rival: Rival, arrays: Arrays) -> tuple:
    """Return the results that have names, axes N, C, H, W; recycled ones have been NaN before."""
    layout = rival.labels["layout"]
    if rival.labels["outputs"] == "recycled":
        for name in rival.results:
            arrays(name, layout).fill(float("nan"))
    ours = rival.labels["kind"] == "carafepp"
    results = timing.warm_up(rival, memory=not ours)
    results = results if isinstance(results, tuple) else (results,)
    if ours:
        return tuple(as_nchw(array, layout) for array in results if array is not None)
    return results[: len(rival.results)]


def _ranked(right: list[Rival], threads: int, layouts=("NCHW", "NHWC")) -> list[Rival]:
    """Return the compositions, best first."""
    found = [
        rival
        for rival in right
        if (rival.labels["kind"], rival.threads) == ("composition", threads)
        and rival.labels["layout"] in layouts
    ]
    return sorted(found, key=lambda rival: rival.warm_up)


def _compiled(arrays: Arrays, right: list[Rival], layouts, source, pass_, threads, fresh):
    """Yield the best composition of each layout, and the loop over taps, compiled."""
    for layout in layouts:
        best = [rival.name for rival in _ranked(right, threads, [layout])[:1]]
        for name in dict.fromkeys([*best, "taps"]):
            how = (arrays, source, pass_, layout, threads, fresh)
            yield peers.composition(name, *how, compiled=True)


def _row(case: Case, rival: Rival, peaks: dict[int, Peaks]) -> dict[str, Any]:
    """Return a row with its rates; operators compute something else and have none."""
    shapes = {"shape": case.features_shape, "output_shape": case.output_shape}
    row = {"case": case.name, **shapes, **rival.row()}
    if rival.samples and row["kind"] != "operator":
        operations = flops(case, row["pass"])
        traffic = touched_bytes(case, row["pass"], row["source"], row["dtype"])
        ceiling = peaks[rival.threads].ceiling(operations, traffic, row["dtype"])
        row |= {"flops": operations / row["seconds"], "bytes": traffic / row["seconds"]}
        row |= {"intensity": operations / traffic, "ceiling_flops": ceiling}
        row["share"] = row["flops"] / ceiling
    return row


def _ratios(row: dict, rows: list[dict]) -> dict[str, float | None]:
    """Return the times of the best alternatives by this one's, None if there is none."""
    alike = [
        other
        for other in rows
        if "seconds" in other
        and all(other[key] == row[key] for key in ("pass", "dtype", "threads"))
    ]
    compositions = [other for other in alike if other["kind"] == "composition"]
    here = [other for other in alike if other["layout"] == row["layout"]]
    of = {
        "x_composition": compositions,
        "x_same_layout": [other for other in here if other["kind"] == "composition"],
        "x_operator": [other for other in here if other["name"] in OPERATORS],
    }
    return {
        key: min(other["seconds"] for other in others) / row["seconds"]
        if others and "seconds" in row
        else None
        for key, others in of.items()
    }
