"""The command line: `python -m benchmarks`, from the root of the repository."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import report
from .compare import compare, ratios
from .machine import Machine
from .overhead import one_call
from .passes import BYTES, FLOPS
from .peers import COMPILED
from .problems import PROBLEMS
from .timing import HOW

SECONDS = 10  # time budget of one comparison
QUICK_SECONDS = 120  # time budget of --quick
QUICK_CASES = ["fpn1", "s2", "tiny"]
QUICK_PEERS = ["unfold", "taps", "bmm", "nearest", "avg_pool"]
QUICK_WITHOUT = ("forward+backward", "logits")
HELP = """\
Check carafepp and PyTorch on the same problems, time them in turns, and print tables.
The last line is a summary. Exit status 1 if an answer is wrong."""
SAID = {"forward": "in the forward", "forward+backward": "in forward and backward"}
ORIGIN = "CPU", "commit of this repository"  # of the rows that are summed up together
TIMED = "seconds", "flops", "ceiling_flops"
FACTS = {
    "times": HOW,
    "FLOP": FLOPS,
    "bytes": BYTES,
    "roofline": "share of min(peak, FLOP * bandwidth of a copy of that size / bytes)",
    "best composition": f"of both layouts; {COMPILED} ones run on the first number of threads",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = report.parser("benchmarks", HELP, SECONDS)

    def words(name: str, default, text: str, known=None, kind=str, dest=None) -> None:
        text += f"; default {default}" if default else ""
        kind = report.words(known, kind)
        parser.add_argument(name, type=kind, metavar="A,B", default=default, help=text, dest=dest)

    passes, layouts, weights = "forward,forward+backward", "NCHW,NHWC", "masks,logits"
    dtypes = "float32", "float64", "float16", "bfloat16"
    quick = "take two minutes: fewer problems and peers, nothing compiled; print a summary alone"
    parser.add_argument("--quick", action="store_true", help=quick)
    words("--cases", None, f"any of {', '.join(PROBLEMS)}; default all", PROBLEMS)
    words(
        "--implementations",
        None,
        "parts of names, like avx2; carafepp is the automatic choice",
    )
    words("--peers", None, f"parts of names: unfold, taps, bmm, {COMPILED}, nearest, ..., or none")
    words(
        "--threads",
        "1,2",
        "numbers of threads; --quick takes the first for most rows",
        kind=report.count,
    )
    words("--dtype", "float32,bfloat16", "peers run in the first one only", dtypes)
    words("--pass", passes, "the second adds each gradient alone", passes.split(","), dest="passes")
    words("--layout", layouts, "NHWC: channels_last for PyTorch", layouts.split(","))
    words("--from", weights, "input of the problem", weights.split(","), dest="weights")
    parser.add_argument(
        "--fresh", action="store_true", help="results in fresh memory, without `out=`"
    )
    text = "draw the speeds as bars, a PNG"
    parser.add_argument("--plot", metavar="FILE", type=report.file_to_write, help=text)
    text = "run nothing: sum up and draw the rows that --json wrote, here or in benchmarks.carafe, "
    text += "of the last machine and commit in FILE"
    parser.add_argument("--from-json", metavar="FILE", type=_read_rows, help=text)
    asked, default = parser.parse_args(arguments), vars(parser.parse_args([]))
    for name in ("from_json", "plot", "markdown"):
        default[name] = getattr(asked, name)
    if asked.from_json and (
        ignored := [name for name in default if vars(asked)[name] != default[name]]
    ):
        option = {"passes": "pass", "weights": "from"}.get(ignored[0], ignored[0])
        parser.error(f"--{option} must be left out with --from-json, which runs nothing")
    asked.implementation = _wanted(asked.implementations)
    asked.peer = _wanted(asked.peers or (QUICK_PEERS if asked.quick else None))
    if asked.plot and not asked.seconds:
        parser.error("--plot must be left out with --seconds 0, which times nothing")
    if asked.plot:
        timed = {row["dtype"] for row in asked.from_json or [] if row["samples"]}
        if "float32" not in (timed if asked.from_json else asked.dtype):
            parser.error("--plot draws float32, which must be among the dtypes that are timed")
        report.need("matplotlib")
    return asked


def _read_rows(given: str) -> list[report.Row]:
    """Return the rows of the last machine and commit; of those with the same labels, the last."""
    try:
        found = [json.loads(line) for line in Path(given).read_text().splitlines()]
        found = [row for row in found if "case" in row]
        origins = [[row["run"][key] for key in ORIGIN] for row in found]
        rows = {
            (row["case"], _labels(row)): row
            for row, origin in zip(found, origins, strict=True)
            if origin == origins[-1]
        }
        for row in rows.values():
            timed = row["samples"] and row["kind"] != "operator"
            if not {"chosen", "error", *(TIMED if timed else ())} <= row.keys():
                raise KeyError
            if "x_composition" not in row:  # of `benchmarks.carafe`
                row |= ratios(row, [one for one in rows.values() if one["case"] == row["case"]])
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be read: {given}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise argparse.ArgumentTypeError(f"must have the rows of --json; got {given}") from None
    if not rows:
        raise argparse.ArgumentTypeError(f"must have the rows of --json; got none in {given}")
    return list(rows.values())


def _wanted(parts: list[str] | None) -> Callable[[str], bool]:
    """Return a function that tells whether a name has one of the parts; None accepts all."""
    return lambda name: parts is None or any(part in name for part in parts)


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write; return the exit status."""
    asked = parse(arguments)
    if asked.from_json:
        calls, rows = [], asked.from_json
        pages = report.Report(quiet=True, machine=rows[-1]["run"], **FACTS)
    else:
        pages = report.Report(quiet=asked.quick, **FACTS)
        calls, rows = run(asked, pages)
    pages.quiet = False
    notes = dict.fromkeys(
        f"{row['case']}: {_labels(row)}: {row['error']}" for row in rows if row["error"]
    )
    if notes:
        pages.show("\n".join(f"- {note}" for note in notes))
    summarize(pages, rows)
    if asked.quick:
        pages.show("Tables of all times: --markdown FILE. Every row: --json FILE.")
    pages.say(headline(rows, pages.environment["CPU"]))
    pages.write(asked, [*calls, *rows])
    if asked.plot:
        from . import plot

        try:
            plot.draw(rows, asked.plot)
        except ValueError as error:  # all answers in float32 are wrong
            sys.exit(str(error))
    return 1 if _wrong(rows) else 0


def run(
    asked: argparse.Namespace, pages: report.Report
) -> tuple[list[report.Row], list[report.Row]]:
    """Compare all problems; return the rows of single calls, and those of the problems."""
    cases = asked.cases or (QUICK_CASES if asked.quick else PROBLEMS)
    todo = [
        one
        for one in itertools.product(cases, asked.passes, asked.weights)
        if not (asked.quick and one[1:] == QUICK_WITHOUT)
    ]
    end = time.monotonic() + QUICK_SECONDS
    computer = Machine()
    calls = one_call(min(asked.seconds, 1)) if asked.seconds else []
    rows: list[report.Row] = []
    if calls:
        pages.table("One call on arrays of one value", calls, CALL_COLUMNS)
    for number, one in enumerate(pages.track(todo, " ".join)):
        name, pass_, weights = one
        seconds = asked.seconds
        if asked.quick and seconds:
            share = (end - time.monotonic()) / (len(todo) - number)
            seconds = max(0.5, min(seconds, share / 2))  # checks take the other half
        case = PROBLEMS[name]
        found = compare(case, weights, pass_, asked, seconds, computer)
        factor = f"up x{case.up}" if case.up > 1 else f"down x{case.down}"
        crop = f", cropped to {case.size}" if case.size else ""
        title = (
            f"{name}: {case.reason}, {case.features_shape}, {factor}{crop}, K={case.kernel_size}"
        )
        pages.table(f"{title}: {pass_} from {weights}", sorted(found, key=_order), COLUMNS)
        pages.limits(found)
        rows += found
    return calls, rows


def _wrong(rows: list[report.Row]) -> int:
    return sum((row["error"] or "").startswith("wrong") for row in rows)


def _labels(row: report.Row) -> str:
    keys = ("name", "pass", "weights", "layout", "dtype", "threads")
    return " ".join(str(row[key]) for key in keys)


def _order(row: report.Row) -> tuple:
    kind = ["carafepp", "composition", "operator"].index(row["kind"])
    problem = row["pass"], row["dtype"], row["threads"]
    return *problem, kind, row["layout"], not row["chosen"], row.get("seconds", 0)


COLUMNS = {
    **{key: lambda row, key=key: str(row[key]) for key in ("pass", "dtype", "threads", "layout")},
    "implementation": lambda row: row["name"],
    **report.MEASURED,
    "x best composition": report.number("x_composition"),
    "in its layout": report.number("x_same_layout"),
    "x nearest or avg_pool": report.number("x_operator"),
    "extra MB": report.number("memory", 1e6, ".1f"),
}
CALL_COLUMNS = {
    "arrays": lambda row: row["arrays"],
    "call": lambda row: row["name"],
    "us": report.number("seconds", 1e-6),
    "median, q3": lambda row: report.interval(row, 1e-6),
    "carafepp's time / this one's": report.number("ratio"),
}


def _compared(rows: list[report.Row]) -> list[report.Row]:
    """Return carafepp's rows beside compositions: of the first dtype, on the first threads."""
    first = {key: rows[0][key] for key in ("dtype", "threads")} if rows else {}
    return [
        row
        for row in rows
        if row["chosen"] and row["x_composition"] and first.items() <= row.items()
    ]


def headline(rows: list[report.Row], cpu: str) -> str:
    """Return the sentence that a user wants."""
    wrong, compared = _wrong(rows), _compared(rows)
    answers = f"{wrong} answers are wrong" if wrong else "all answers are right"
    factors = []
    for pass_, words in SAID.items():
        found = sorted(row["x_composition"] for row in compared if row["pass"] == pass_)
        if found:
            ends = dict.fromkeys(f"{factor:.1f}" for factor in (found[0], found[-1]))
            factors.append(f"{' to '.join(ends)} times as fast {words}")
    if not factors:
        return f"Nothing was timed beside PyTorch; {answers}."
    compiled = any(row["name"].startswith(COMPILED) and row["samples"] for row in rows)
    threads = f"{rows[0]['threads']} thread" + "s" * (rows[0]["threads"] > 1)
    return (
        f"carafepp is {' and '.join(factors)} as the best {'' if compiled else 'eager '}"
        f"composition of PyTorch's functions on this machine ({cpu}, {threads}, "
        f"{rows[0]['dtype']}); {answers}."
    )


def summarize(pages: report.Report, rows: list[report.Row]) -> None:
    """Print how many times as fast as the best composition carafepp is, for each problem."""
    compared = _compared(rows)
    if not compared:
        return
    problems: dict[str, dict[tuple, float]] = {}
    for row in compared:
        key = row["pass"], row["layout"], row["weights"]
        problems.setdefault(row["case"], {})[key] = row["x_composition"]
    passes, layouts, inputs = (
        list(dict.fromkeys(row[key] for row in compared)) for key in ("pass", "layout", "weights")
    )

    def column(pass_: str, layout: str) -> Callable[[report.Row], str]:
        keys = [(pass_, layout, weights) for weights in inputs]
        return lambda row: " / ".join(f"{row[key]:.1f}" if key in row else "-" for key in keys)

    columns = {f"{one}, {layout}": column(one, layout) for one in passes for layout in layouts}
    listed = [{"case": name, **found} for name, found in problems.items()]
    title = f"Speedup over the best composition, from {' / '.join(inputs)}"
    title += f", {rows[0]['dtype']}, threads: {rows[0]['threads']}"
    pages.table(title, listed, {"problem": lambda row: row["case"], **columns})


if __name__ == "__main__":
    sys.exit(main())
