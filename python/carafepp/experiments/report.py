"""A table in Markdown and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .tables import MEASURES, Measure, Table
from .trainings import Line


def markdown(table: Table, lines: Sequence[Line], preset: str) -> str:
    """Return a table with means and standard deviations; the best mean of each measure is bold."""
    measures = MEASURES[table.task]
    columns = [_cells(measure, lines) for measure in measures]
    headings = [
        "",
        *(measure.heading for measure in measures),
        "parameters",
        "training (s)",
        f"the paper's: {table.paper}",
    ]
    rows = [
        [
            line.row.label,
            *cells,
            f"{line.values('parameters')[0]:,}",
            f"{statistics.fmean(line.values('seconds')):.1f}",
            f"{line.row.paper:g}",
        ]
        for line, *cells in zip(lines, *columns, strict=True)
    ]
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    grid = "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ruler, *rows))
    return f"## {table.name}\n\n{table.question}\n\n{grid}\n\n{footnote(lines, preset)}\n"


def _cells(measure: Measure, lines: Sequence[Line]) -> list[str]:
    means = [statistics.fmean(line.values(measure.key)) for line in lines]
    best = max(means) if measure.more_is_better else min(means)
    cells = []
    for line, mean in zip(lines, means, strict=True):
        cell = f"**{mean:.{measure.digits}f}**" if mean == best else f"{mean:.{measure.digits}f}"
        values = line.values(measure.key)
        if len(values) > 1:
            cell += f" ± {statistics.stdev(values):.{measure.digits}f}"
        cells.append(cell)
    return cells


def footnote(lines: Sequence[Line], preset: str) -> str:
    """Return the sentence on the seeds, the machine, the date and the commit of the numbers."""
    seeds = len(lines[0].entries)
    what = "One seed" if seeds == 1 else f"Mean ± standard deviation of {seeds} seeds"
    of_all = [entry for line in lines for entry in line.entries]
    where, when, commit = (
        ", ".join(sorted({entry[key] for entry in of_all})) for key in ("machine", "date", "commit")
    )
    steps = of_all[0]["arguments"]["steps"]
    return f"{what}; preset {preset}, {steps} steps; {where}; {when}; commit {commit}."


def plot(table: Table, lines: Sequence[Line], path: Path) -> None:
    """Write a PNG: the main measure of each row, a dot for each seed, and the paper's number."""
    main = MEASURES[table.task][0]
    figure = Figure(figsize=(8, 1.3 + 0.3 * len(lines)), layout="constrained")
    ours, papers = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    for y, line in enumerate(lines):
        values = line.values(main.key)
        ours.plot(values, [y] * len(values), "o", color="C0", alpha=0.45, mec="none")
        ours.plot(statistics.fmean(values), y, "|", color="C0", ms=14, mew=2.5)
        papers.plot(line.row.paper, y, "D", color="0.4", ms=5)
    ours.set_yticks(range(len(lines)), [line.row.label for line in lines])
    ours.set_ylim(len(lines) - 0.4, -0.6)
    ours.set_xlabel(f"here: {main.heading}, seeds and mean")
    papers.set_xlabel(f"the paper's {table.paper.split(',')[0]}")
    for axes in (ours, papers):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
    figure.suptitle(table.question, fontsize=10)
    figure.savefig(path, dpi=90)
