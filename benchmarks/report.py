"""Options, tables, progress and files of all commands."""

import argparse
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import commit


def need(*packages: str) -> None:
    """Exit with a sentence if a package is missing."""
    if missing := [name for name in packages if util.find_spec(name) is None]:
        sys.exit(f'[benchmarks] run pip install ".[benchmarks]" first; got no {missing[0]}.')


need("rich", "torch", "ml_dtypes")
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from .machine import Peaks  # noqa: E402

Row = dict[str, Any]
OUTPUTS = {"--json": "append each row as a line of JSON", "--markdown": "write all tables"}


def words(
    known: Iterable[str] | None = None, kind: Callable[[str], Any] = str
) -> Callable[[str], list]:
    """Return the type of an option that takes words separated by commas."""

    def split(given: str) -> list:
        found = [kind(word.strip()) for word in given.split(",")]
        for word in found:
            if known is not None and word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return found

    return split


def count(given: str) -> int:
    """Return the number of an option, 1 or more."""
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1; got {given!r}")
    return int(given)


def file_to_write(given: str) -> Path:
    """Return the path of an option, whose folder must exist."""
    path = Path(given)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists; got {given}")
    return path


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0; got {given!r}")
    return seconds


def parser(command: str, description: str, seconds: float | None) -> argparse.ArgumentParser:
    """Return the options of every command; `seconds` is None where nothing is timed."""
    made = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if seconds is not None:
        text = f"time budget of one comparison, 0 only checks the answers; default {seconds}"
        made.add_argument("--seconds", type=_seconds, default=seconds, help=text)
    for option, text in OUTPUTS.items():
        made.add_argument(option, metavar="FILE", type=file_to_write, help=text)
    return made


class Report:
    """Prints the environment of a run, then tables; keeps the text for the files.

    A quiet one prints nothing but what `say` is given.
    """

    def __init__(self, quiet: bool = False, machine: dict[str, str] | None = None, **facts: str):
        self.quiet = quiet
        self.console = Console(markup=False, highlight=False)
        self.texts: list[str] = []
        self.environment = machine or environment()
        facts = {**self.environment, **facts}
        self.show("\n".join(f"- {key}: {value}" for key, value in facts.items()))

    def show(self, text: str) -> None:
        """Print a paragraph."""
        self.texts.append(text)
        self._print(text + "\n", text + "\n")

    def say(self, text: str) -> None:
        """Print a paragraph, which is the first one of the files."""
        self.texts.insert(0, text)
        print(text, flush=True)

    def table(self, title: str, rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> None:
        """Print a table under a title; `columns` maps a heading to a function of a row."""
        table = Table(*columns, box=box.MARKDOWN)
        for row in rows:
            table.add_row(*(text(row) for text in columns.values()))
        wide = Console(file=io.StringIO(), width=1000, markup=False)
        wide.print(table)
        lines = wide.file.getvalue().strip().splitlines()
        markdown = "\n".join([f"### {title}\n", *map(str.rstrip, lines)])
        self.texts.append(markdown)
        table.title, table.title_justify, table.box = title, "left", box.SIMPLE_HEAD
        self._print(table, markdown + "\n")

    def limits(self, rows: list[Row]) -> None:
        """Print the peaks that limit the rows of a table."""
        found = {row["threads"]: Peaks(**row["limits"]) for row in rows if "limits" in row}
        if found:
            lines = [f"- peaks, threads: {count}: {found[count]}" for count in sorted(found)]
            self.show("\n".join(lines))

    def _print(self, on_terminal: Any, elsewhere: str) -> None:
        if self.quiet:
            return
        if self.console.is_terminal:
            self.console.print(on_terminal)
        else:
            print(elsewhere, flush=True)

    def track(self, todo: list, name: Callable[[Any], str]) -> Iterator[Any]:
        """Yield each item; show the progress on a terminal."""
        console = self.console if self.console.is_terminal else Console(stderr=True)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        options = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        options |= {"transient": True, "disable": not console.is_terminal}
        with Progress(*columns, console=console, **options) as progress:
            task = progress.add_task("", total=len(todo))
            for done, one in enumerate(todo):
                # Refresh here: a thread that refreshes would disturb the times.
                progress.update(task, description=name(one), completed=done, refresh=True)
                yield one

    def write(self, asked: argparse.Namespace, rows: list[Row]) -> None:
        """Write the files that the options ask for: tables, and rows with what they share.

        A line of JSON has a row and its "run": the machine and the commit. So rows of many runs and
        machines can share a file.
        """
        if asked.json:
            lines = [json.dumps({**row, "run": self.environment}) + "\n" for row in rows]
            with asked.json.open("a") as file:
                file.writelines(lines)
        if asked.markdown:
            asked.markdown.write_text("\n\n".join(self.texts) + "\n")


def multiple(rows: list[Row], key: str, scale: float = 1, unit: str = "") -> Callable[[Row], str]:
    """Return a column: an amount in the first row, its multiples in the other rows."""
    base = rows[0][key]

    def text(row: Row) -> str:
        if not (base and row[key]):
            return "-"
        return f"{base / scale:.4g} {unit}" if row is rows[0] else f"x{row[key] / base:.3f}"

    return text


def number(key: str, scale: float = 1, form: str = ".3g") -> Callable[[Row], str]:
    """Return a column: an amount in units of `scale`."""
    return lambda row: "-" if row.get(key) is None else format(row[key] / scale, form)


def milliseconds(row: Row) -> str:
    """Return the time, or else what the check of the answer found."""
    return f"{row['seconds'] * 1e3:.4g}" if "seconds" in row else row["error"] or "right"


def interval(row: Row, scale: float = 1e-3) -> str:
    """Return the median and the third quartile, in milliseconds."""
    return f"{row['seconds_median'] / scale:.4g}, {row['seconds_q3'] / scale:.4g}"


def environment() -> dict[str, str]:
    """Return the machine and the versions of this run."""
    return {
        "CPU": _cpu(),
        "cores that the process may use": str(len(os.sched_getaffinity(0))),
        "commit of this repository": commit(),
        **{name: metadata.version(name) for name in ("carafepp", "numpy", "torch")},
        "Python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# The columns that tables of timed rows share.
MEASURED = {
    "ms": milliseconds,
    "median, q3": lambda row: interval(row) if "seconds" in row else "-",
    "n": lambda row: str(row["samples"]),
    "GFLOP/s": number("flops", 1e9, ".1f"),
    "roofline": number("share", 1, ".0%"),
}
