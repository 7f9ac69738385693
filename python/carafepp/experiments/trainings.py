"""A file of finished trainings, and the training of the missing rows of a table."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

import carafepp

from .inpainting import train_inpainting
from .segmentation import train_segmentation
from .tables import BASELINES, PRESETS, Row, Table

Arguments = dict[str, Any]
Entry = dict[str, Any]

TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "segmentation": train_segmentation,
    "inpainting": train_inpainting,
}


class Trainings:
    """A file of finished trainings: one JSON object a line, identified by its arguments.

    Parameters
    ----------
    path : Path
        The file need not exist. An incomplete last line, as after a full disk, is removed.

    Raises
    ------
    ValueError
        Another line is not a training.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Entry] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]))
            del lines[-1]
        try:
            for line in lines:
                entry = json.loads(line)
                self._entries[_key(entry["arguments"])] = entry
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"[experiments] {path} must be one training a line; line "
                f"{lines.index(line) + 1} is {line[:40]!r}."
            ) from None

    def __getitem__(self, arguments: Arguments) -> Entry:
        """Return the line of the training with exactly these arguments."""
        return self._entries[_key(arguments)]

    def __contains__(self, arguments: Arguments) -> bool:
        """Tell whether the file has a training with exactly these arguments."""
        return _key(arguments) in self._entries

    def add(self, arguments: Arguments, results: dict[str, Any]) -> None:
        """Append the numbers among the results, with the machine, the date and the commit."""
        numbers = {name: x for name, x in results.items() if isinstance(x, int | float)}
        entry = {
            "arguments": arguments,
            "results": numbers,
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._entries[_key(arguments)] = entry


def _key(arguments: Arguments) -> str:
    return json.dumps(arguments, sort_keys=True)


def machine() -> str:
    """Return the kind of processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def commit() -> str:
    """Return the commit of carafepp's source tree, or else the version of the package."""
    tree = Path(__file__).resolve().parents[3]  # python/carafepp/experiments/trainings.py

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", tree, *command], capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        # An installed package may lie within the repository of its user.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == tree:
            return git("describe", "--always", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        pass
    return f"of version {carafepp.__version__}"


@dataclass(frozen=True)
class Line:
    """A row of a table, and its trainings, one for each seed."""

    row: Row
    entries: list[Entry]

    def values(self, key: str) -> list[float]:
        """Return one number of all trainings."""
        return [entry["results"][key] for entry in self.entries]


def choose_rows(
    table: Table, *, upsampler: Sequence[str] = (), downsampler: Sequence[str] = ()
) -> Table:
    """Return a table with the rows for some operators of one direction.

    If the rows name operators of that direction, keep the rows with the given names. If no row
    does, repeat every row with each of the given names.

    Raises
    ------
    ValueError
        Only some rows name an operator, or no row is left.
    """
    for direction, names in (("upsampler", upsampler), ("downsampler", downsampler)):
        if not names:
            continue
        naming = [direction in row.arguments for row in table.rows]
        if all(naming):
            rows = [row for row in table.rows if row.arguments[direction] in names]
        elif any(naming):
            raise ValueError(
                f"[experiments] --{direction} must be left out for {table.name}, which compares "
                f"CARAFE++ with a baseline; got {','.join(names)}."
            )
        else:
            rows = [
                Row(f"{row.label}, {name}", row.paper, {**row.arguments, direction: name})
                for row in table.rows
                for name in names
            ]
        if not rows:
            raise ValueError(
                f"[experiments] --{direction} must be that of some row of {table.name}; "
                f"got {','.join(names)}."
            )
        table = replace(table, rows=rows)
    return table


def train_table(
    table: Table,
    trainings: Trainings,
    *,
    preset: str = "small",
    seeds: int = 3,
    steps: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Line]:
    """Train the missing rows of a table, and return its lines.

    All rows with one seed come before the rows with the next seed. `steps` overrides the preset.
    """
    preset_arguments = PRESETS[preset][table.task]
    if steps is not None:
        preset_arguments = {**preset_arguments, "steps": steps}
    given = {
        (i, seed): {
            **BASELINES[table.task],
            **preset_arguments,
            **row.arguments,
            "seed": seed,
            "device": device,
        }
        for seed in range(seeds)
        for i, row in enumerate(table.rows)
    }
    keys = {
        row_and_seed: {"task": table.task, **arguments} for row_and_seed, arguments in given.items()
    }
    progress = progress or Progress(disable=True)
    bar = progress.add_task(table.name, total=len(given))
    for (i, seed), arguments in given.items():
        label = f"{table.name}: {table.rows[i].label}, seed {seed}"

        def tell(step: int, loss: float, label: str = label) -> None:
            progress.update(bar, description=f"{label}, step {step + 1}, loss {loss:.3f}")

        if keys[i, seed] not in trainings:
            trainings.add(keys[i, seed], TASKS[table.task](**arguments, progress=tell))
        progress.advance(bar)
    progress.update(bar, description=table.name)
    return [
        Line(row, [trainings[keys[i, seed]] for seed in range(seeds)])
        for i, row in enumerate(table.rows)
    ]
