"""Operators of other papers, other factors and kernel sizes beside their bars, on one thread.

- convex: convex upsampling from logits. The unit is the time of copying logits and output once. The
  forward takes at most 2 units, and with the backward at most 5.
- roofline: involution, AdaptiveConv and a kernel for every channel, from masks. The forward reaches
  at least 60% of the roofline.
- factors: other factors and kernel sizes. Up x2 with K=5 reaches some share of the roofline on the
  same map. This is at most 1.5 times the share that the forward reaches. A slower up x2 would make
  these bars easier: look at its share too.

The candidates of a table, PyTorch's compositions too, take turns in one process. Other passes have
no bar.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from cases import Case

from . import bars, peers, problems, report
from .bars import Bar, Rows, Table, composed, ours
from .passes import MIXED
from .problems import Arrays
from .timing import Candidate

DTYPE = "float32"


def convex(cases: list[Case], layouts: list[str]) -> Iterator[Table]:
    """Yield a table for each problem."""
    for arrays in _arrays(cases):
        timed = [copy(arrays)]
        for pass_ in ("forward", "forward+backward"):
            timed += [ours(arrays, "logits", pass_, layout) for layout in layouts]
            timed.append(composed("convex", arrays, "logits", pass_, "NCHW"))
        yield _title(arrays.case), timed, in_copies


def roofline(cases: list[Case], layouts: list[str]) -> Iterator[Table]:
    """Yield a table for each problem."""
    for arrays in _arrays(cases):
        case, timed = arrays.case, []
        for layout in [MIXED] if case.name == "adaptive_conv" else layouts:
            passes = "forward", "grad_features", "grad_masks"
            timed += [ours(arrays, "masks", pass_, layout) for pass_ in passes]
        names = peers.compositions(case)
        timed += [composed(name, arrays, "masks", "forward", "NCHW") for name in names]
        yield _title(case), timed, in_roofline


def factors(cases: list[Case], layouts: list[str]) -> Iterator[Table]:
    """Yield a table for each map, layout and input; up x2 with K=5 comes first."""
    for features in dict.fromkeys(case.features_shape for case in cases):
        alike = [case for case in problems.FACTORS.values() if case.features_shape == features]
        listed = list(_arrays(case for case in alike if case in cases or case == alike[0]))
        for layout in layouts:
            for weights in ("masks", "logits"):
                timed = []
                for arrays in listed:
                    passes = "forward", "grad_features", f"grad_{weights}"
                    timed += [ours(arrays, weights, pass_, layout) for pass_ in passes]
                    name = "taps" if "taps" in peers.compositions(arrays.case) else "gathered"
                    timed.append(composed(name, arrays, weights, "forward", layout))
                title = f"{features}, {layout}, from {weights}"
                yield title, timed, partial(in_shares_of, alike[0].name)


PARTS = {convex: problems.CONVEX, roofline: problems.ROOFLINE, factors: problems.FACTORS}


def _arrays(cases: Iterable[Case]) -> Iterator[Arrays]:
    return (Arrays(case, DTYPE) for case in cases)


def _title(case: Case) -> str:
    words = [f"{case.name}: {case.reason}", str(case.features_shape)]
    params = {**case.factors, "kernel_size": case.kernel_size}
    words += [f"{name}={value}" for name, value in params.items() if value != 1]
    return ", ".join(words)


def copy(arrays: Arrays) -> tuple[Arrays, Candidate]:
    """Return the copy of logits and output: what a forward reads and writes at least."""
    originals = [arrays(name, "NCHW") for name in ("logits", "output")]
    copies = [np.empty_like(original) for original in originals]

    def call() -> None:
        for pair in zip(copies, originals, strict=True):
            np.copyto(*pair)

    labels = {"kind": "operator", "weights": "logits", "dtype": DTYPE, "outputs": "recycled"}
    labels |= {"pass": "copy", "layout": "NCHW", "chosen": False}
    return arrays, Candidate("logits and output", call, labels=labels)


# Bars: only carafepp's forward and forward+backward have one.


def in_copies(rows: Rows) -> None:
    """Compare with the time of the copy, the first row."""
    limits = {"forward": 2, "forward+backward": 5}
    for row in rows[1:]:
        copies, limit = row["seconds"] / rows[0]["seconds"], limits[row["pass"]]
        work = f"convex upsampling, {row['pass']}"
        _note(row, Bar(work, "copies", ".2f", copies, limit, least=False))


def in_roofline(rows: Rows) -> None:
    """Tell the shares of the roofline."""
    for row in rows:
        _note(row, Bar(row["case"], "of the roofline", ".0%", row["share"], 0.6, least=True))


def in_shares_of(base: str, rows: Rows) -> None:
    """Divide the share of the base by the share of each row, for the same pass."""
    mine = [row for row in rows if row["kind"] == "carafepp"]
    shares = {row["pass"]: row["share"] for row in mine if row["case"] == base}
    for row in mine:
        if row["case"] != base:
            times = shares[row["pass"]] / row["share"]
            work = f"other factors and K, from {row['weights']}"
            _note(row, Bar(work, f"times below {base}", ".2f", times, 1.5, least=False))


def _note(row: report.Row, bar: Bar) -> None:
    bars.note(row, bar, row["kind"] == "carafepp" and row["pass"].startswith("forward"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    mixed = {MIXED: "masks have the memory of FeatUp's, (N, H', W', K, K)"}
    return bars.main("benchmarks.relatives", __doc__, PARTS, arguments, **mixed)


if __name__ == "__main__":
    sys.exit(main())
