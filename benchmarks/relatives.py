"""Operators of other papers, other factors and kernel sizes beside their bars, on one thread.

- convex: convex upsampling from logits. The unit is the time of copying logits and output once. The
  forward takes at most 2 units, and with the backward at most 5.
- roofline: involution, AdaptiveConv and a kernel for every channel, from masks. The forward reaches
  at least 60% of the roofline.
- factors: other factors and kernel sizes. Up x2 with K=5 reaches some share of the roofline on the
  same map. This is at most 1.5 times the share that the forward reaches.

The candidates of a table, PyTorch's compositions too, take turns in one process. Other passes have
no bar.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from cases import Case

from . import implementations, machine, peers, problems, report, timing
from .compare import SLACK, answer, described
from .passes import BYTES, FLOPS, MIXED, Pass
from .problems import Arrays
from .timing import Candidate
from .truth import Truth

DTYPE = "float32"
LAYOUTS = ("NCHW", "NHWC")
FACTS = {
    "times": timing.HOW,
    "FLOP": FLOPS,
    "bytes": BYTES,
    "roofline": "share of min(peak, FLOP * bandwidth of a copy of that size / bytes)",
    "exp": "logits a second, divided by the exponentials that one thread computes in a second",
    MIXED: "masks have the memory of FeatUp's, (N, H', W', K, K)",
}

Timed = list[tuple[Arrays, Candidate]]
Rows = list[report.Row]
Table = tuple[str, Timed, Callable[[Rows], None]]  # title; candidates; compares them with the bar


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
PROBLEMS = {name: case for table in PARTS.values() for name, case in table.items()}


def _arrays(cases: Iterable[Case]) -> Iterator[Arrays]:
    return (Arrays(case, DTYPE) for case in cases)


def _title(case: Case) -> str:
    words = [f"{case.name}: {case.reason}", str(case.features_shape)]
    params = {**case.factors, "kernel_size": case.kernel_size}
    words += [f"{name}={value}" for name, value in params.items() if value != 1]
    return ", ".join(words)


# Candidates


def ours(arrays: Arrays, weights: str, pass_: str, layout: str) -> tuple[Arrays, Candidate]:
    """Return carafepp's own choice."""
    one = Pass(arrays.case, weights, pass_)
    choice = implementations.CHOICE
    return arrays, implementations.candidate(one, arrays, layout, choice, threads=1, fresh=False)


def composed(name: str, arrays: Arrays, *how: str) -> tuple[Arrays, Candidate]:
    """Return a composition; `how` tells its input, pass and layout."""
    return arrays, peers.composition(name, arrays, *how, 1, False)


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


# Bars


def in_copies(rows: Rows) -> None:
    """Compare with the time of the copy, the first row."""
    limits = {"forward": 2, "forward+backward": 5}
    for row in rows[1:]:
        limit, copies = limits[row["pass"]], row["seconds"] / rows[0]["seconds"]
        _reach(row, f"{copies:.2f} copies", f"at most {limit}", copies <= limit)


def in_roofline(rows: Rows) -> None:
    """Tell the shares of the roofline."""
    for row in rows:
        _reach(row, f"{row['share']:.0%} of the roofline", "at least 60%", row["share"] >= 0.6)


def in_shares_of(base: str, rows: Rows) -> None:
    """Divide the share of the base by the share of each row, for the same pass."""
    mine = [row for row in rows if row["kind"] == "carafepp"]
    shares = {row["pass"]: row["share"] for row in mine if row["case"] == base}
    for row in mine:
        times = shares[row["pass"]] / row["share"]
        if row["case"] != base:
            _reach(row, f"{times:.2f} times below {base}", "at most 1.5", times <= 1.5)


def _reach(row: report.Row, reached: str, bar: str, met: bool) -> None:
    """Note what a row reaches; only carafepp's forward and forward+backward have a bar."""
    row["reached"] = reached
    if row["kind"] == "carafepp" and row["pass"].startswith("forward"):
        row |= {"bar": bar, "met": met}


def compare(timed: Timed, reach: Callable[[Rows], None], seconds: float, peaks) -> Rows:
    """Check and time candidates; return a row for each, with an "error" if its answer is wrong.

    If an answer is wrong, or `seconds` is 0, nothing is timed and no row has a bar.
    """
    truths: dict[tuple[Case, str], Truth] = {}
    errors = {}
    for arrays, candidate in timed:
        key = arrays.case, candidate.labels["weights"]
        if key not in truths:
            truths[key] = Truth(*key, DTYPE, partial(arrays, layout="NCHW"))
        slack = 1 if candidate.labels["kind"] == "carafepp" else SLACK[DTYPE]
        try:
            truths[key].check(answer(candidate, arrays), slack)
        except AssertionError as error:
            errors[candidate] = f"wrong: {error}"
    if seconds and not errors:
        timing.measure([candidate for _, candidate in timed], seconds)
    rows = [
        described(arrays.case, candidate, peaks) | {"error": errors.get(candidate)}
        for arrays, candidate in timed
    ]
    for row in rows:
        if "flops" in row and row["weights"] == "logits":
            logits = math.prod(PROBLEMS[row["case"]].logits_shape)
            row["exp"] = logits / row["seconds"] / peaks[1].exponentials
    if seconds and not errors:
        reach(rows)
    return rows


COLUMNS = {
    "problem": lambda row: row["case"],
    "implementation": lambda row: row["name"],
    "pass": lambda row: row["pass"],
    "from": lambda row: row["weights"],
    "layout": lambda row: row["layout"],
    **report.MEASURED,
    "exp": report.number("exp", 1, ".0%"),
    "reached": lambda row: row.get("reached", "-"),
    "bar": lambda row: row.get("bar", "-"),
    "met": lambda row: {True: "yes", False: "no", None: "-"}[row.get("met")],
}
KEYS = ("problem", "pass", "from", "layout", "ms", "reached", "bar", "met")
BARS = {key: COLUMNS[key] for key in KEYS}


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write; return the exit status, 1 if an answer is wrong."""
    parser = report.parser("benchmarks.relatives", __doc__, 10)
    names = ", ".join(PROBLEMS)
    parser.add_argument("--cases", default=PROBLEMS, type=report.words(PROBLEMS), help=names)
    parser.add_argument("--layout", default=LAYOUTS, type=report.words(LAYOUTS))
    parser.add_argument("--alone", action="store_true", help="without PyTorch's compositions")
    asked = parser.parse_args(arguments)
    peaks = machine.measure([1]) if asked.seconds else {}
    limits = {f"peaks, threads: {count}": str(peak) for count, peak in peaks.items()}
    pages = report.Report(**FACTS, **limits)
    rows: Rows = []
    for part, known in PARTS.items():
        cases = [case for name, case in known.items() if name in asked.cases]
        for title, timed, reach in part(cases, asked.layout):
            if asked.alone:
                timed = [one for one in timed if one[1].labels["kind"] != "composition"]
            found = compare(timed, reach, asked.seconds, peaks)
            pages.table(title, found, COLUMNS)
            rows += [row | {"table": title} for row in found]
    barred = [row for row in rows if "bar" in row]
    if barred:
        met = sum(row["met"] for row in barred)
        pages.table(f"Bars: {met} of {len(barred)} are met", barred, BARS)
    pages.write(asked, limits={count: vars(peak) for count, peak in peaks.items()}, rows=rows)
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
