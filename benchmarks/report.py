"""Rows with what follows from their times, and how they are shown: Markdown and JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import carafepp
from cases import Case

from . import ROOT, timing
from .machine import Limits
from .problems import BYTES, FLOPS, flops, touched_bytes
from .rivals import Rival


@dataclass(eq=False)
class Row:
    """One rival of one problem, its time in seconds, and how that compares."""

    case: Case
    rival: Rival
    limits: Limits | None  # None where nothing is timed
    low: float = 0  # seconds: 10th percentile
    median: float = 0
    high: float = 0  # 90th percentile
    x_composition: float | None = None  # time of the best composition by this one
    x_same_layout: float | None = None  # the same, of the best on tensors of the same layout
    x_operator: float | None = None  # time of nearest or avg_pool by this one

    @property
    def flops(self) -> float:
        """Operations a second."""
        return flops(self.case, self.rival.pass_) / self.median

    @property
    def bytes(self) -> float:
        """Bytes a second, each touched once."""
        return self._traffic / self.median

    @property
    def ceiling(self) -> float:
        """Operations a second that the roofline allows."""
        peak = self.limits.flops(self.rival.name, self.rival.dtype)
        operations = flops(self.case, self.rival.pass_)
        memory = self._traffic / self.limits.bandwidth(self._traffic)
        return operations / max(operations / peak, memory)

    @property
    def share(self) -> float:
        """Share of the roofline."""
        return self.flops / self.ceiling

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return flops(self.case, self.rival.pass_) / self._traffic

    @property
    def _traffic(self) -> int:
        rival = self.rival
        return touched_bytes(self.case, rival.pass_, rival.source, rival.dtype)


def rows_of(case: Case, rivals: list[Rival], limits: dict[int, Limits]) -> list[Row]:
    """Return a row for each rival of one comparison."""
    rows = [Row(case, rival, limits.get(rival.threads)) for rival in rivals]
    timed = [row for row in rows if row.rival.samples]
    for row in timed:
        row.low, row.median, row.high = timing.spread(row.rival.samples)
    for row in timed:
        compositions = _peers(row, timed, "composition")
        row.x_composition = _times_faster(row, compositions)
        same_layout = [peer for peer in compositions if peer.rival.layout == row.rival.layout]
        row.x_same_layout = _times_faster(row, same_layout)
        for peer in _peers(row, timed, "operator", layout=row.rival.layout):
            if peer.rival.name == ("nearest" if case.up > 1 else "avg_pool"):
                row.x_operator = peer.median / row.median
    return rows


def _times_faster(row: Row, peers: list[Row]) -> float | None:
    """Return the time of the best of them by that of this row."""
    return min(peer.median for peer in peers) / row.median if peers else None


def _peers(row: Row, rows: list[Row], kind: str, layout: str | None = None) -> list[Row]:
    """Return the rows of a kind with the same pass, dtype and threads; in any layout if None."""
    return [
        other
        for other in rows
        if (other.rival.kind, other.rival.twin) == (kind, False)
        and other.rival.pass_ == row.rival.pass_
        and other.rival.dtype == row.rival.dtype
        and other.rival.threads == row.rival.threads
        and layout in (None, other.rival.layout)
    ]


def environment() -> dict[str, str]:
    """Return where and with what this run is made."""
    return {
        "CPU": _cpu(),
        "cores that the process may use": str(len(os.sched_getaffinity(0))),
        "carafepp": f"{carafepp.__version__}, as installed",
        "commit of this repository": _commit(),
        "numpy": metadata.version("numpy"),
        "torch": _torch(),
        "Python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "times": timing.HOW,
        "FLOP": FLOPS,
        "bytes": BYTES,
        "roofline": "max(FLOP / peak, bytes / bandwidth of a copy of that size) by the time",
        "best composition": "of all layouts, of the same number of threads; compiled: of the first",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of this folder, or why it is not known."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (" with changes" if changed else "")


def _torch() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "not installed: no peers"


def as_json(rows: list[Row], limits: dict[int, Limits], bars: list, notes: list[str]) -> dict:
    """Return everything as plain data; times in seconds, memory in bytes."""
    return {
        "environment": environment(),
        "limits": {count: vars(limit) for count, limit in limits.items()},
        "rows": [_plain(row) for row in rows],
        "bars": [vars(bar) for bar in bars],
        "notes": notes,
    }


_RATIOS = ("x_composition", "x_same_layout", "x_operator")


def _plain(row: Row) -> dict[str, Any]:
    rival, case = row.rival, row.case
    labels = ("kind", "layout", "source", "dtype", "threads", "outputs", "chosen", "error")
    plain = {
        "case": case.name,
        "shape": case.features_shape,
        "output_shape": case.output_shape,
        "implementation": rival.name,
        "pass": rival.pass_,
        **{label: getattr(rival, label) for label in labels},
        "samples": len(rival.samples),
        "memory": rival.memory,
    }
    if not rival.samples:
        return plain
    plain.update(seconds=row.median, seconds_p10=row.low, seconds_p90=row.high)
    plain.update({key: getattr(row, key) for key in _RATIOS})
    if rival.kind != "operator":
        plain.update(flops=row.flops, bytes=row.bytes, intensity=row.intensity)
        plain.update(ceiling_flops=row.ceiling, share=row.share)
    return plain


def head_markdown(limits: dict[int, Limits]) -> str:
    """Return the first lines: where, with what, how, and the limits of the machine."""
    lines = [f"- {key}: {value}" for key, value in environment().items()]
    for count, limit in limits.items():
        peaks = [f"{_width(w)} {peak / 1e9:.0f} GFLOP/s" for w, peak in limit.peak.items()]
        copies = [f"{_size(size)} {rate / 1e9:.0f}" for size, rate in limit.copy.items()]
        lines.append(f"- {_threads(count)}: {limit.how}: {', '.join(peaks)}")
        lines.append(f"- {_threads(count)}: copy, GB/s read plus written, of {', '.join(copies)}")
    return "\n".join(lines)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _width(width: int) -> str:
    return f"{8 * width}-bit" if width else "float32"


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


_COLUMNS = [
    *("pass", "from", "dtype", "threads", "layout", "implementation", "outputs"),
    *("ms", "p10-p90", "n", "GFLOP/s", "GB/s", "roofline"),
    *("x best composition", "in its layout", "x nearest or avg_pool", "extra MB"),
]


def table_markdown(rows: list[Row]) -> str:
    """Return a heading and a table for each problem."""
    texts = []
    for case in dict.fromkeys(row.case for row in rows):
        factor = f"up {case.up}" if case.up > 1 else f"down {case.down}"
        crop = f", cropped to {case.size}" if case.size else ""
        head = f"### {case.name}: {case.features_shape}, {factor}{crop}, K={case.kernel_size}"
        mine = sorted((row for row in rows if row.case is case), key=_order)
        texts.append(f"{head}: {case.reason}\n\n{table(_COLUMNS, map(_cells, mine))}")
    return "\n\n".join(texts)


def _order(row: Row) -> tuple:
    rival = row.rival
    kind = ["carafepp", "composition", "operator"].index(rival.kind)
    problem = rival.pass_, rival.source, rival.dtype, rival.threads
    return *problem, kind, rival.layout, not rival.chosen, row.median


def _cells(row: Row) -> list[str]:
    rival = row.rival
    source = "-" if rival.kind == "operator" else rival.source
    name = f"**{rival.name}**" if rival.chosen else rival.name
    problem = [rival.pass_, source, rival.dtype, str(rival.threads)]
    memory = "-" if rival.memory is None else f"{rival.memory / 1e6:.1f}"
    labels = [*problem, rival.layout, name, rival.outputs]
    if not rival.samples:
        what = f"wrong: {rival.error}" if rival.error else "right"
        return [*labels, what, *["-"] * 8, memory]
    rates = [f"{row.flops / 1e9:.1f}", f"{row.bytes / 1e9:.1f}", f"{row.share:.0%}"]
    return [
        *labels,
        *(f"{row.median * 1e3:.4g}", f"{row.low * 1e3:.4g}-{row.high * 1e3:.4g}"),
        str(len(rival.samples)),
        *(["-"] * 3 if rival.kind == "operator" else rates),
        *(_ratio(getattr(row, key)) for key in _RATIOS),
        memory,
    ]


def _ratio(ratio: float | None) -> str:
    """Return three digits, or more before the point."""
    if ratio is None:
        return "-"
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def bars_markdown(bars: list) -> str:
    """Return the table of bars."""
    met = {True: "met", False: "**missed**", None: "-"}
    head = ["bar", "wanted", "reached (worst row)", "", "best row", "in its layout", "worst row"]
    cells = [
        [bar.what, bar.wanted, bar.reached, met[bar.met], bar.best, bar.same_layout, bar.worst]
        for bar in bars
    ]
    return "### The bars\n\n" + table(head, cells)


class Pages:
    """What a comparison of modules or networks prints as it goes, and writes at the end."""

    def __init__(self):
        about = ("CPU", "commit of this repository", "torch", "date")
        where = environment()
        self.where = {key: where[key] for key in about}
        self.texts: list[str] = []
        self.show(", ".join(f"{key} {value}" for key, value in self.where.items()))

    def show(self, text: str) -> None:
        """Print a paragraph or a table."""
        self.texts.append(text)
        print(text + "\n", flush=True)

    def write(self, rows: list[dict], json_to: Path | None, markdown_to: Path | None) -> None:
        """Write the rows as JSON, what was printed as Markdown."""
        if json_to:
            json_to.write_text(json.dumps({"environment": self.where, "rows": rows}, indent=1))
        if markdown_to:
            markdown_to.write_text("\n\n".join(self.texts) + "\n")


def table(head: list[str], cells: Iterable[list[str]]) -> str:
    """Return a Markdown table, aligned for reading as it is."""
    lines = [[*head], *cells]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
