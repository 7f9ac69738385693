"""Nsight Compute's counters of one launch of each kernel.

    python -m benchmarks.gpu.counters

An item is a case and a dtype: one run of the profiler. A finished run keeps its counters when the
time is up. Each launch becomes a line.
"""

import csv
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .processes import end_with_parent
from .worker import Worker

GROUPS = [
    f"{case} {dtype}"
    for dtype, case in itertools.product(("float32", "bfloat16", "float16"), ("fpn2", "s2"))
]
_STALLS = ("long_scoreboard", "barrier", "mio_throttle", "lg_throttle", "short_scoreboard")
METRICS = {
    "us": "gpu__time_duration.sum",  # nanoseconds
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "l2_read_sectors": "lts__t_sectors_op_read.sum",
    "l2_write_sectors": "lts__t_sectors_op_write.sum",
    "l1_wavefronts": "l1tex__data_pipe_lsu_wavefronts.sum",
    "cycles_per_second": "smsp__cycles_elapsed.avg.per_second",  # the clock
    "instructions": "smsp__inst_executed.sum",  # per warp
    "issue_active": "smsp__issue_active.avg.pct_of_peak_sustained_active",  # %
    "warps_active": "sm__warps_active.avg.pct_of_peak_sustained_active",  # %
    "waves": "launch__waves_per_multiprocessor",
    **{
        f"stall_{name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
        for name in (*_STALLS, "math_pipe_throttle")
    },
}
_UNKNOWN = re.compile(r"Failed to find metric \W*(?:regex:)?\W*([\w.]+)")


def command(metrics: list[str], log: Path, group: str) -> list[str]:
    """Return the command line of the profiler."""
    case, dtype = group.split()
    options = ["--clock-control", "none", "--profile-from-start", "off"]
    options += ["--csv", "--page", "raw", "--print-units", "base"]
    options += ["--log-file", str(log), "--metrics", ",".join(metrics)]
    launches = [sys.executable, "-m", "benchmarks.gpu.launches", "counters", case, dtype]
    return ["ncu", *options, *launches]


def parsed(text: str) -> list[dict[str, Any]]:
    """Return a row for each launch in the profiler's log: the kernel's name and the counters."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = []
    for row in csv.DictReader(lines):
        if not row.get("ID"):  # the line of units
            continue
        values = {name: _number(row.get(metric)) for name, metric in METRICS.items()}
        values = {name: value for name, value in values.items() if value is not None}
        if "us" in values:
            values["us"] /= 1e3
        rows.append({"kernel": row["Kernel Name"], **values})
    return rows


def _number(text: str | None) -> float | None:
    """Parse a number with commas between its thousands; n/a gives None."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def count(worker: Worker, group: str) -> dict[str, Any]:
    """Run the profiler on a group and write a line for each launch."""
    metrics = list(METRICS.values())
    while True:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log.csv")
            done = subprocess.run(
                command(metrics, log, group),
                capture_output=True,
                text=True,
                preexec_fn=end_with_parent,
            )
            text = log.read_text() if log.exists() else ""
        unknown = set(_UNKNOWN.findall(text + done.stdout))
        left = [metric for metric in metrics if metric not in unknown]
        if len(left) == len(metrics) or not left:
            break
        metrics = left
    print(done.stdout, done.stderr, text, sep="\n", flush=True)
    launches = re.findall(r"(?m)^launched: (.*)$", done.stdout)
    rows = parsed(text)
    for item, row in zip(launches, rows, strict=False):
        worker.end(item, "pass", **row)
    errors = re.findall(r"(?m)^==ERROR== (.*)$", text + done.stdout)
    assert done.returncode == 0, f"{done.returncode}: {errors or done.stderr[-300:]}"
    assert launches, "nothing was launched"
    assert len(rows) == len(launches), f"{len(launches)} launches, {len(rows)} were counted"
    return {"launches": len(rows)}


def main() -> None:
    """Count group by group until the time is up."""
    worker = Worker()
    groups = GROUPS[:1] if worker.task.quick else GROUPS
    worker.run(groups, lambda group: count(worker, group))


if __name__ == "__main__":
    main()
