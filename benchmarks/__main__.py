"""The command line: `python -m benchmarks`, from the root of the repository."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import bars, machine, report
from .compare import Comparison, Options, peers
from .problems import PROBLEMS

SECONDS = 10  # timing of one comparison
QUICK_SECONDS = 120  # of --quick, for everything
QUICK_CASES = ["fpn1", "s2", "tiny"]
QUICK_PEERS = ["unfold", "taps", "bmm", "nearest", "avg_pool"]
QUICK_WITHOUT = {("forward+backward", "logits")}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time carafepp beside PyTorch, check every answer, print tables and the bars. "
        "Exit status 1 if an answer is wrong.",
    )

    def words(name: str, default: str | None, text: str, choices=None, kind=str) -> None:
        def split(given: str) -> list:
            found = [kind(word.strip()) for word in given.split(",")]
            for word in found:
                if choices and word not in choices:
                    raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
            return found

        text += f"; default {default}" if default else ""
        parser.add_argument(name, type=split, metavar="A,B", default=default, help=text)

    def flag(name: str, text: str) -> None:
        parser.add_argument(name, action="store_true", help=text)

    def file(name: str, text: str) -> None:
        parser.add_argument(name, metavar="FILE", type=Path, help=text)

    dtypes = ("float32", "float64", "float16", "bfloat16")
    passes = ("forward", "forward+backward")
    layouts, sources = ("NCHW", "NHWC"), ("masks", "logits")
    flag("--quick", "two minutes in all: fewer problems and peers, nothing compiled")
    words("--cases", None, f"of {', '.join(PROBLEMS)}; default all", PROBLEMS)
    words("--implementations", None, "parts of names, as avx2; carafepp is its own choice")
    words("--peers", None, "parts of names: unfold, taps, bmm, compiled, nearest, ...; or none")
    words("--threads", "1,2", "numbers, of which --quick takes the first for most rows", kind=int)
    words("--dtype", "float32,bfloat16", "the first is for peers too", dtypes)
    words("--pass", "forward,forward+backward", "the second brings the gradients alone", passes)
    words("--layout", "NCHW,NHWC", "NHWC: channels_last for PyTorch", layouts)
    words("--from", "masks,logits", "what the problem is given", sources)
    flag("--fresh", "results in fresh memory too, not only in recycled `out=`")
    text = f"of timing for one comparison; default {SECONDS}"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=text)
    file("--json", "write everything as data")
    file("--markdown", "write what is printed")
    file("--plot", "write the roofline picture, a PNG")
    flag("--check-only", "check the answers and time nothing")
    return parser.parse_args(arguments)


def wanted(parts: list[str] | None) -> Callable[[str], bool]:
    """Return whether a name has one of the parts; without parts all have."""
    return lambda name: parts is None or any(part in name for part in parts)


def comparisons(asked: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return (case, pass, source) of everything to be compared."""
    cases = asked.cases or (QUICK_CASES if asked.quick else list(PROBLEMS))
    found = itertools.product(cases, getattr(asked, "pass"), getattr(asked, "from"))
    return [one for one in found if not (asked.quick and one[1:] in QUICK_WITHOUT)]


class Lines:
    """What is being done, a line for each comparison; results go to the standard output."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def begin(self, title: str) -> None:
        """Tell that a comparison begins."""
        self.done += 1
        elapsed = time.monotonic() - self.start
        text = f"[{self.done}/{self.total}, {elapsed:.0f} s] {title}"
        print(text, file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Tell what is being done in it."""

    def show(self, text: str) -> None:
        """Print a result."""
        print(text + "\n", flush=True)


class Bar(Lines):
    """The same on a terminal: a progress bar by rich."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("", total=total, completed=-1)
        self.title = ""

    def begin(self, title: str) -> None:  # noqa: D102
        self.title = title
        self.bar.start()
        self.bar.update(self.task, advance=1, description=title)

    def tell(self, text: str) -> None:  # noqa: D102
        self.bar.update(self.task, description=f"{self.title}: {text}")

    def show(self, text: str) -> None:  # noqa: D102
        self.bar.stop()
        super().show(text)


def progress(total: int) -> Lines:
    """Return the bar where there is a terminal and rich."""
    if sys.stderr.isatty():
        with suppress(ImportError):
            return Bar(total)
    return Lines(total)


class Budget:
    """Seconds for the timing of one comparison; with --quick what is left, shared out."""

    def __init__(self, asked: argparse.Namespace, total: int):
        self.seconds, self.quick, self.left = asked.seconds, asked.quick, total
        self.end = time.monotonic() + QUICK_SECONDS

    def next(self) -> float:
        """Return the seconds for the comparison whose answers have just been checked."""
        share = (self.end - time.monotonic()) / self.left / 2  # the other half is for checks
        self.left -= 1
        return max(0.5, min(self.seconds, share)) if self.quick else self.seconds


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write; return the exit status."""
    asked = parse(arguments)
    todo = comparisons(asked)
    budget = Budget(asked, len(todo))
    options = Options(
        layouts=asked.layout,
        dtypes=asked.dtype,
        threads=asked.threads,
        implementation=wanted(asked.implementations),
        peer=wanted(asked.peers or (QUICK_PEERS if asked.quick else None)),
        fresh=asked.fresh,
        quick=asked.quick,
        check_only=asked.check_only,
    )
    limits = {} if asked.check_only else machine.measure(asked.threads)
    printed: list[str] = []
    rows: list[report.Row] = []
    doing = progress(len(todo))

    def show(text: str) -> None:
        printed.append(text)
        doing.show(text)

    show(report.head_markdown(limits))
    for name, group in itertools.groupby(todo, key=lambda one: one[0]):
        of_case = []
        for _, pass_, source in group:
            doing.begin(f"{name} {pass_} from {source}")
            comparison = Comparison(PROBLEMS[name], source, pass_, options, doing.tell)
            comparison.check()
            if not asked.check_only:
                comparison.time(budget.next())
            comparison.release()
            of_case += report.rows_of(comparison.case, comparison.rivals, limits)
        show(report.table_markdown(of_case))
        rows += of_case
    notes = [f"left out: {note}" for note in options.notes]
    if peers is None:
        notes.append("left out: every peer, because PyTorch is not installed")
    found = bars.evaluate(rows)
    if not asked.check_only:
        show(report.bars_markdown(found))
    bad = [row for row in rows if row.rival.error]
    wrong = [f"WRONG: {row.case.name}: {row.rival}: {row.rival.error}" for row in bad]
    for text in (notes, wrong):
        if text:
            show("\n".join(f"- {line}" for line in text))
    write(asked, rows, limits, found, notes, printed)
    return 1 if wrong else 0


def write(asked, rows, limits, found, notes, printed) -> None:
    """Write the files that are asked for."""
    if asked.json:
        asked.json.write_text(json.dumps(report.as_json(rows, limits, found, notes), indent=1))
    if asked.markdown:
        asked.markdown.write_text("\n\n".join(printed) + "\n")
    if asked.plot and not asked.check_only:
        from . import plot

        plot.draw(rows, asked.plot)


if __name__ == "__main__":
    sys.exit(main())
