"""The operator of the paper beside its bars: float32, K=5, recycled results, from logits.

- Each pass reaches some share of the roofline, the forward also beside nearest interpolation or
  average pooling, forward and backward beside the best eager composition of any layout.
- 16 bits take at most 0.8 times the time of float32 where memory limits it, 1.1 times elsewhere.
- Two threads compute outputs of 1 MB and more 1.7 times as fast as one.
- A call on a tiny map takes at most 6 times np.empty and np.multiply, on tensors without gradient 4
  times torch.mul.
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
from .passes import Pass
from .problems import Arrays
from .timing import Candidate

DTYPE = "float32"
CACHED = ("cached_up", "cached_down")
LARGE = 1e6  # bytes of an output that two threads share
NAMES = ("cached_up", "fpn1", "fpn2", "cached_down", "s2", "stem")
TINY = Case("tiny_call", "a filter of one tap", 1, 16, 8, 8, kernel_size=1)

# Shares of the roofline in NHWC and in NCHW: of passes, by the direction; in the caches and beyond.
SHARES = {
    ("forward", "up"): ((0.85, 0.75), (0.75, 0.6)),
    ("forward", "down"): (None, (0.75, 0.65)),
    ("grad", "up"): ((0.65, 0.55),) * 2,
    ("grad", "down"): ((0.55, 0.45),) * 2,
    ("forward+backward", "up"): ((0.6, 0.5),) * 2,
}


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
        base, nhwc = mine[pass_, layout, DTYPE, 1], layout == "NHWC"
        if threads > 1:
            times = base["seconds"] / row["seconds"]
            work = f"two threads, {where}, {pass_}"
            bars.note(row, Bar(work, "times as fast as one", ".2f", times, 1.7, True))
        elif row is not base:
            times = row["seconds"] / base["seconds"]
            limit = 0.8 if base["limited_by"] == "memory" else 1.1
            work = f"16 bits, {pass_}, where {base['limited_by']} limits float32"
            bars.note(row, Bar(work, "times float32's time", ".2f", times, limit, False))
        else:
            shares = SHARES.get((pass_.partition("_")[0], direction))
            if shares and shares[not cached]:
                limit = shares[not cached][not nhwc]
                work = f"{pass_}, {where}"
                bars.note(row, Bar(work, "of the roofline", ".0%", row["share"], limit, True))
            _beside_pytorch(row, rows, where, cached)


def _beside_pytorch(row: report.Row, rows: Rows, where: str, cached: bool) -> None:
    """Compare with another operator of the same layout, and with compositions of any."""
    nhwc, up = row["layout"] == "NHWC", where.startswith("up")
    if row["pass"] == "forward" and not cached:
        rival = next(r for r in rows if r["kind"] == "operator" and r["layout"] == row["layout"])
        times = row["seconds"] / rival["seconds"]
        limit = (2 if nhwc else 1) if up else (1.2 if nhwc else 1)
        enough = nhwc and up and row["limited_by"] == "FMA" and row["share"] >= 0.8
        if not enough:  # 80% of the FMA's peak serve as well
            bar = Bar(f"forward, {where}", f"times {rival['name']}", ".2f", times, limit, False)
            bars.note(row, bar)
    compositions = [other["seconds"] for other in rows if other["kind"] == "composition"]
    if row["pass"] == "forward+backward" and compositions:
        times = min(compositions) / row["seconds"]
        work, limit = f"forward+backward, {where}", 15 if nhwc else 12
        bars.note(row, Bar(work, "times as fast as PyTorch", ".1f", times, limit, True))


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
    ]


def _reach_of_calls(rows: Rows) -> None:
    for row, rival, limit in zip(rows[::2], rows[1::2], (6, 4), strict=True):
        times = row["seconds"] / rival["seconds"]
        bars.note(row, Bar("a tiny call", f"times {rival['name']}", ".1f", times, limit, False))


PARTS = {
    passes: {name: problems.PROBLEMS[name] for name in NAMES},
    tiny_call: {TINY.name: TINY},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    return bars.main("benchmarks.carafe", __doc__, PARTS, arguments, threads=(1, 2))


if __name__ == "__main__":
    sys.exit(main())
