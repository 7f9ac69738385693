"""The operator of the paper beside its bars: float32, K=5, from logits (grad_masks: from masks).

- Most passes reach some share of the roofline. Beyond the caches the forward is compared with
  nearest interpolation or average pooling too; up x2 in NHWC may reach 80% of the FMA's peak
  instead. Forward and backward are compared with the fastest eager composition of the layouts that
  are timed.
- 16 bits take at most 0.8 times the time of float32 where memory limits it, 1.1 times elsewhere.
- Two threads compute outputs of 1 MB and more 1.7 times as fast as one.
- A call on a tiny map, K=1 and from masks, takes at most 6 times np.empty and np.multiply, on
  tensors without gradient 4 times torch.mul, under JAX's jit 12 us more than x + 1.

carafepp writes into recycled results, but for the tiny call. Compositions with a backward allocate
theirs.
"""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

import carafepp
from cases import Case

from . import bars, implementations, peers, problems, report
from .bars import Bar, Rows, Table, composed, operator, ours
from .overhead import JAX, calls_on_jax
from .passes import Pass
from .problems import Arrays
from .timing import Candidate

DTYPE = "float32"
CACHED = ("cached_up", "cached_down")
LARGE = 1e6  # bytes of an output that two threads share
NAMES = ("cached_up", "fpn1", "fpn2", "cached_down", "s2", "stem")
TINY = Case("tiny_call", "a filter of one tap", 1, 16, 8, 8, kernel_size=1)

# The least shares of the roofline, of passes by the direction.
SHARES = {
    ("forward", "up"): {"NHWC": 0.75, "NCHW": 0.6},
    ("forward", "down"): {"NHWC": 0.75, "NCHW": 0.65},
    ("grad", "up"): {"NHWC": 0.65, "NCHW": 0.55},
    ("grad", "down"): {"NHWC": 0.55, "NCHW": 0.45},
    ("forward+backward", "up"): {"NHWC": 0.6, "NCHW": 0.5},
}
SHARES_IN_CACHES = {
    **SHARES,
    ("forward", "up"): {"NHWC": 0.85, "NCHW": 0.75},
    ("forward", "down"): {},
}
MOST_TIMES = {  # of the rival's time
    "nearest": {"NHWC": 2, "NCHW": 1},
    "avg_pool": {"NHWC": 1.2, "NCHW": 1},
}
LEAST_SPEEDUP = {"NHWC": 15, "NCHW": 12}  # of forward+backward


def passes(cases: list[Case], layouts: list[str]) -> Iterator[Table]:
    """Yield a table for each problem."""
    for case in cases:
        arrays, halves = Arrays(case, DTYPE), [Arrays(case, d) for d in ("float16", "bfloat16")]
        rival = "nearest" if case.up > 1 else "avg_pool"
        large = np.prod(case.output_shape) * 4 >= LARGE
        timed = []
        for layout in layouts:
            alone = "forward", "grad_features", "grad_logits", "forward+backward"
            timed += [ours(arrays, "logits", pass_, layout) for pass_ in alone]
            timed.append(ours(arrays, "masks", "grad_masks", layout))
            timed += [ours(half, "logits", "forward", layout) for half in halves]
            shared = ("forward", "forward+backward") if large else ()
            timed += [ours(arrays, "logits", pass_, layout, threads=2) for pass_ in shared]
            timed.append(operator(rival, arrays, layout))
            if case.up > 1:
                how = arrays, "logits", "forward+backward", layout
                timed += [composed(name, *how) for name in peers.compositions(case)]
        factor = f"up x{case.up}" if case.up > 1 else f"down x{case.down}"
        title = f"{case.name}: {case.reason}, {case.features_shape}, {factor}, K={case.kernel_size}"
        yield title, timed, partial(_reach, case)


def _reach(case: Case, rows: Rows) -> None:
    """Note what carafepp's rows reach."""
    direction, cached = "up" if case.up > 1 else "down", case.name in CACHED
    where = f"{direction} x2, {'in' if cached else 'beyond'} the caches"
    mine = {
        (row["pass"], row["layout"], row["dtype"], row["threads"]): row
        for row in rows
        if row["kind"] == "carafepp"
    }
    for (pass_, layout, _, threads), row in mine.items():
        base = mine[pass_, layout, DTYPE, 1]
        if threads > 1:
            times = base["seconds_passed"] / row["seconds"]
            work = f"two threads, {where}, {pass_}"
            bars.note(row, Bar(work, "times as fast as one", ".2f", times, 1.7, least=True))
        elif row is not base:
            times = row["seconds"] / base["seconds"]
            limit = 0.8 if base["limited_by"] == "memory" else 1.1
            work = f"16 bits, {pass_}, where {base['limited_by']} limits float32"
            bars.note(row, Bar(work, "times float32's time", ".2f", times, limit, least=False))
        else:
            shares = SHARES_IN_CACHES if cached else SHARES
            limit = shares.get((pass_.partition("_")[0], direction), {}).get(layout)
            if limit is not None:
                work, share = f"{pass_}, {where}", row["share"]
                bars.note(row, Bar(work, "of the roofline", ".0%", share, limit, least=True))
            if pass_ == "forward" and not cached:
                _beside_rival(row, rows, where)
            if pass_ == "forward+backward":
                _beside_compositions(row, rows, where)


def _beside_rival(row: report.Row, rows: Rows, where: str) -> None:
    """Compare with the other operator in this layout, or in its stead with the FMA's peak."""
    layout = row["layout"]
    rival = next(r for r in rows if (r["kind"], r["layout"]) == ("operator", layout))
    name, times = rival["name"], row["seconds"] / rival["seconds"]
    work, limit = f"forward, {where}", MOST_TIMES[name][layout]
    bar = Bar(work, f"times {name}", ".2f", times, limit, least=False)
    nearest_nhwc = (name, layout) == ("nearest", "NHWC")
    if nearest_nhwc and row["limited_by"] == "FMA" and row["share"] >= 0.8:
        bar = Bar(work, "of the FMA's peak", ".0%", row["share"], 0.8, least=True)
    bars.note(row, bar)


def _beside_compositions(row: report.Row, rows: Rows, where: str) -> None:
    compositions = [other["seconds"] for other in rows if other["kind"] == "composition"]
    if compositions:
        times, limit = min(compositions) / row["seconds"], LEAST_SPEEDUP[row["layout"]]
        work = f"{row['pass']}, {where}"
        bars.note(row, Bar(work, "times as fast as PyTorch", ".1f", times, limit, least=True))


def tiny_call(cases: list[Case], layouts: list[str]) -> Iterator[Table]:
    """Yield a table of calls on NumPy arrays and on tensors, results in fresh memory."""
    for case in cases:
        arrays = Arrays(case, DTYPE)
        timed = [(arrays, call) for call in _calls(arrays)]
        yield f"{case.name}: {case.reason}, {case.features_shape}", timed, _reach_of_calls


def _calls(arrays: Arrays) -> list[Candidate]:
    """Return carafepp's call and its rival, of NumPy and of PyTorch."""
    case, pass_ = arrays.case, Pass(arrays.case, "masks", "forward")
    mine = implementations.candidate(pass_, arrays, "NCHW", implementations.CHOICE, 1, fresh=True)
    features, masks = (arrays(name, "NCHW") for name in ("features", "masks"))
    tensors = torch.from_numpy(features), torch.from_numpy(masks)

    def product() -> np.ndarray:
        return np.multiply(features, masks, out=np.empty(case.output_shape, DTYPE))

    theirs = mine.labels | {"kind": "operator", "chosen": False}
    return [
        mine,
        Candidate("np.empty, np.multiply", product, labels=theirs),
        Candidate(
            "carafepp on tensors",
            partial(carafepp.reassemble, *tensors),
            labels=mine.labels,
            results=mine.results,
        ),
        Candidate("torch.mul", partial(torch.mul, *tensors), labels=theirs),
        *[Candidate(f"{name}, {JAX}", call, labels=theirs) for _, name, call in calls_on_jax()],
    ]


def _reach_of_calls(rows: Rows) -> None:
    of_arrays, arrays_rival, of_tensors, tensors_rival, *on_jax = rows
    for row, rival, limit in [(of_arrays, arrays_rival, 6), (of_tensors, tensors_rival, 4)]:
        times = row["seconds"] / rival["seconds"]
        bars.note(row, Bar("a tiny call", f"times {rival['name']}", ".1f", times, limit, False))
    if on_jax:
        more = (on_jax[0]["seconds"] - on_jax[1]["seconds"]) * 1e6
        work = f"one call, {JAX}"
        bars.note(on_jax[0], Bar(work, "us more than x + 1", ".1f", more, 12, least=False))


PARTS = {
    passes: {name: problems.PROBLEMS[name] for name in NAMES},
    tiny_call: {TINY.name: TINY},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    return bars.main("benchmarks.carafe", __doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
