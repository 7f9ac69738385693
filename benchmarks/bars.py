"""Timed calls beside their bars: what `benchmarks.carafe` and `benchmarks.relatives` share.

The candidates of a table, PyTorch's compositions too, are checked, then take turns in one process.
A bar is a limit of a number that a row reaches. The bars are listed, and summed up by the work that
they are for.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from cases import Case

from . import implementations, peers, report, timing
from .compare import SLACK, answer, described, measure
from .machine import Machine, Peaks
from .passes import BYTES, FLOPS, Pass
from .problems import Arrays
from .timing import Candidate
from .truth import Truth

LAYOUTS = ("NCHW", "NHWC")
FACTS = {
    "times": timing.HOW,
    "FLOP": FLOPS,
    "bytes": BYTES,
    "roofline": "share of min(peak, FLOP * bandwidth of a copy of that size / bytes)",
    "exp": "logits a second, divided by the exponentials that one thread computes in a second",
}

Timed = list[tuple[Arrays, Candidate]]
Rows = list[report.Row]
Table = tuple[str, Timed, Callable[[Rows], None]]  # title; candidates; notes what rows reach
Part = Callable[[list[Case], list[str]], Iterator[Table]]  # of problems, in layouts


@dataclass(frozen=True)
class Bar:
    """A number that a row reaches, and its limit.

    Parameters
    ----------
    work : str
        A line of the summary.
    unit : str
        The words behind the numbers, as "of the roofline".
    form : str
        How they are written, as ".0%".
    reached, limit : float
    least : bool
        The limit is the least; otherwise it is the most.
    """

    work: str
    unit: str
    form: str
    reached: float
    limit: float
    least: bool

    @property
    def met(self) -> bool:
        """Tell whether the limit is kept."""
        return self.reached >= self.limit if self.least else self.reached <= self.limit

    @property
    def asked(self) -> str:
        """Return the limit, without its unit."""
        return f"at {'least' if self.least else 'most'} {self.limit:{self.form}}"

    @property
    def answer(self) -> str:
        """Return the number that is reached, with its unit."""
        return f"{self.reached:{self.form}} {self.unit}"


def note(row: report.Row, bar: Bar, counts: bool = True) -> None:
    """Note what a row reaches. The bar of a row that is there to compare with does not count."""
    row.setdefault("reached", []).append(bar.answer)
    row.setdefault("bars", []).extend([bar] if counts else [])


# Candidates


def ours(
    arrays: Arrays, weights: str, pass_: str, layout: str, threads: int = 1
) -> tuple[Arrays, Candidate]:
    """Return carafepp's own choice."""
    one = Pass(arrays.case, weights, pass_)
    choice = implementations.CHOICE
    return arrays, implementations.candidate(one, arrays, layout, choice, threads, fresh=False)


def composed(name: str, arrays: Arrays, *how: str) -> tuple[Arrays, Candidate]:
    """Return a composition on one thread; `how` tells its input, pass and layout."""
    return arrays, peers.composition(name, arrays, *how, 1, False)


def operator(name: str, arrays: Arrays, layout: str) -> tuple[Arrays, Candidate]:
    """Return another operator of the same output shape, forward on one thread."""
    return arrays, peers.operator(name, arrays, "masks", "forward", layout, 1, False)


# Tables


def main(
    command: str,
    description: str,
    parts: dict[Part, dict[str, Case]],
    arguments: list[str] | None,
    **facts: str,
) -> int:
    """Run a command; return the exit status, 1 if an answer is wrong.

    `parts` maps functions that yield tables to the problems that they take, by name.
    """
    problems = [name for known in parts.values() for name in known]
    parser = report.parser(command, description, 10)
    names = ", ".join(problems)
    parser.add_argument("--cases", default=problems, type=report.words(problems), help=names)
    parser.add_argument("--layout", default=LAYOUTS, type=report.words(LAYOUTS))
    parser.add_argument("--alone", action="store_true", help="without PyTorch's compositions")
    asked = parser.parse_args(arguments)
    pages = report.Report(**FACTS, **facts)
    computer = Machine()
    rows: Rows = []
    for part, known in parts.items():
        cases = [case for name, case in known.items() if name in asked.cases]
        for title, timed, reach in part(cases, asked.layout):
            if asked.alone:
                timed = [one for one in timed if one[1].labels["kind"] != "composition"]
            found = compare(timed, reach, asked.seconds, computer)
            pages.table(title, found, COLUMNS)
            pages.limits(found)
            rows += [row | {"table": title} for row in found]
    show(pages, rows)
    for row in rows:
        row["bars"] = [vars(bar) | {"met": bar.met} for bar in row.get("bars", [])]
    pages.write(asked, rows)
    return 1 if any(row["error"] for row in rows) else 0


def compare(timed: Timed, reach: Callable[[Rows], None], seconds: float, computer: Machine) -> Rows:
    """Check and time candidates; return a row for each, with an "error" if its answer is wrong.

    If an answer is wrong, or `seconds` is 0, nothing is timed and no row has a bar.
    """
    truths: dict[tuple[Case, str, str], Truth] = {}
    errors = {}
    peaks: dict[int, Peaks] = {}
    for arrays, candidate in timed:
        labels = candidate.labels
        if labels["kind"] == "operator":  # computes something else
            timing.warm_up(candidate)
            continue
        key = arrays.case, labels["weights"], arrays.dtype
        if key not in truths:
            truths[key] = Truth(*key, partial(arrays, layout="NCHW"))
        slack = 1 if labels["kind"] == "carafepp" else SLACK[arrays.dtype]
        try:
            truths[key].check(answer(candidate, arrays), slack)
        except AssertionError as error:
            errors[candidate] = f"wrong: {error}"
    if seconds and not errors:
        slow = [one for _, one in timed if one.warm_up > timing.SLOW]
        for candidate in sorted(slow, key=lambda one: one.warm_up)[:2]:
            timing.warm_up(candidate)  # again: its only sample must not be a cold call
        peaks = measure([(made.case, one) for made, one in timed], seconds, computer)
    rows = [
        described(arrays.case, candidate, peaks) | {"error": errors.get(candidate)}
        for arrays, candidate in timed
    ]
    for row, (arrays, _) in zip(rows, timed, strict=True):
        if "flops" in row and row["weights"] == "logits":
            logits = math.prod(arrays.case.logits_shape)
            row["exp"] = logits / row["seconds"] / row["limits"]["exponentials"]
    if seconds and not errors:
        reach(rows)
    return rows


COLUMNS = {
    "problem": lambda row: row["case"],
    "implementation": lambda row: row["name"],
    **{key: lambda row, key=key: str(row[key]) for key in ("pass", "dtype", "threads")},
    "from": lambda row: row["weights"],
    "layout": lambda row: row["layout"],
    **report.MEASURED,
    "exp": report.number("exp", 1, ".0%"),
    "reached": lambda row: "; ".join(row.get("reached", [])) or "-",
    "bar": lambda row: "; ".join(bar.asked for bar in row.get("bars", [])) or "-",
    "met": lambda row: "; ".join(_yes(bar) for bar in row.get("bars", [])) or "-",
}


def _yes(bar: Bar) -> str:
    return "yes" if bar.met else "no"


_KEYS = ("problem", "implementation", "pass", "dtype", "threads", "from", "layout", "ms")
LISTED = {
    **{key: COLUMNS[key] for key in _KEYS},
    "reached": lambda row: row["bar"].answer,
    "bar": lambda row: row["bar"].asked,
    "met": lambda row: _yes(row["bar"]),
}


def show(pages: report.Report, rows: Rows) -> None:
    """Print all bars, then their summary; nothing if there are none."""
    barred = [row | {"bar": bar} for row in rows for bar in row.get("bars", [])]
    if not barred:
        return
    pages.table("Every bar", barred, LISTED)
    met = sum(row["bar"].met for row in barred)
    works: dict[str, dict[str, list[Bar]]] = {}
    for row in barred:
        work = f"{row['bar'].work}: {row['bar'].unit}"
        layouts = works.setdefault(work, {layout: [] for layout in LAYOUTS})
        layouts[row["layout"].partition(",")[0]].append(row["bar"])
    columns = {"work": lambda row: row[0]}
    columns |= {layout: lambda row, key=layout: _summary(row[1][key]) for layout in LAYOUTS}
    title = f"Bars: {met} of {len(barred)} are met. What is reached (the bar): how many are met"
    pages.table(title, list(works.items()), columns)


def _summary(bars: list[Bar]) -> str:
    """Return the range that is reached, and how many bars are met."""
    if not bars:
        return "-"
    numbers = sorted(bar.reached for bar in bars)
    ends = dict.fromkeys(f"{number:{bars[0].form}}" for number in (numbers[0], numbers[-1]))
    met = sum(bar.met for bar in bars)
    limits = ", ".join(dict.fromkeys(bar.asked for bar in bars))
    return f"{' to '.join(ends)} ({limits}): {met} of {len(bars)}"
