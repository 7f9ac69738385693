"""The table of a run: a summary of its results in at most sixty lines."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .results import FINISHED, Results
from .timing_names import DTYPES, FIRST, LAYOUTS, MMCV, OURS, PASSES

LINES = 60
_FAILURES = 12  # lines of failures; steps share them
_WIDTH = 150  # characters per line


def counts(results: Results, step: str) -> str:
    """Count the items of a step by their status, in words."""
    statuses = [record["status"] for record in results.last(step).values()]
    words = {"pass": "passed", "fail": "failed", "skip": "skipped"}
    found = [f"{statuses.count(how)} {word}" for how, word in words.items() if how in statuses]
    if left := sum(status not in (*FINISHED, "fact") for status in statuses):
        found.append(f"{left} not ended")
    return ", ".join(found) or "nothing"


def has_failures(results: Results, steps: Iterable[str]) -> bool:
    """Tell whether an item of these steps failed."""
    return any(
        record["status"] == "fail" for step in steps for record in results.last(step).values()
    )


def table(results: Results) -> str:
    """Return the table."""
    lines = [*_facts(results), "", *_steps(results), *_failures(results), ""]
    lines += [*_timing(results), *_counters(results)]
    return "\n".join(map(_shortened, lines[:LINES])) + "\n"


def _shortened(line: str) -> str:
    """Return a line without its middle if it is long: errors end with their cause."""
    line = line.rstrip()
    if len(line) <= _WIDTH:
        return line
    return f"{line[: _WIDTH // 2]} ... {line[-(_WIDTH // 2 - 5) :]}"


def _facts(results: Results) -> Iterator[str]:
    """Yield lines about the machine of the last run."""
    machine = next((r for r in reversed(results.records("facts")) if r["item"] == "machine"), {})
    hidden = ("step", "item", "status", "time")
    texts = [f"{name} {value}" for name, value in machine.items() if name not in hidden]
    line = ""
    for text in texts:
        if line and len(line) + len(text) > _WIDTH - 2:
            yield line
            line = ""
        line += f"{', ' if line else ''}{text}"
    if line:
        yield line
    floors = [record for name, record in results.last("time").items() if name.startswith("floor")]
    texts = [f"{r['item'].split()[1]} {r['GB_per_s']:.0f} GB/s" for r in floors if "GB_per_s" in r]
    if texts:
        yield "bandwidth, read plus written: " + ", ".join(texts)


def _steps(results: Results) -> Iterator[str]:
    """Yield a line for each step that began."""
    ends = [record for record in results.records() if not record["item"]]
    for step in dict.fromkeys(record["step"] for record in ends):
        last = [record for record in ends if record["step"] == step]
        seconds = sum(record.get("seconds", 0) for record in last)
        done = "" if last[-1]["status"] == "done" else "; NOT ALL RAN"
        yield f"{step:9} {seconds:5.0f} s  {counts(results, step)}{done}"


def _failures(results: Results) -> Iterator[str]:
    """Yield a line for each of the first failures of a step, and the number of the others."""
    found = {
        step: [r for r in results.last(step).values() if r["status"] == "fail"]
        for step in dict.fromkeys(record["step"] for record in results.records())
    }
    found = {step: failed for step, failed in found.items() if failed}
    for step, failed in found.items():
        room = max(1, _FAILURES // len(found))
        shown = failed if len(failed) <= room else failed[: max(1, room - 1)]
        for record in shown:
            error = record.get("error", "")
            error = error if isinstance(error, str) else "; ".join(error)
            yield f"FAIL {step}: {record['item']}: {' '.join(error.split())}"
        if len(failed) > len(shown):
            yield f"FAIL {step}: {len(failed) - len(shown)} more"


def _timing(results: Results) -> Iterator[str]:
    """Yield a line for each case, dtype and layout: each pass beside its floor and its peers."""
    last = results.last("time")
    rows = {item: r for item, r in last.items() if "us" in r}
    rate = last.get("floor copy_1_to_1", {}).get("GB_per_s")
    if not rows:
        return
    yield "us in a graph (floor of a 1:1 copy / us; best composition of PyTorch / us; mmcv / us)"
    yield "from logits; passes: " + ", ".join(PASSES)
    for case, dtype, layout in itertools.product(FIRST, DTYPES, LAYOUTS):
        texts = [_pass(rows, f"{case} {dtype}", layout, pass_, rate) for pass_ in PASSES]
        if any(text != "-" for text in texts):
            yield f"{case:5} {dtype:9} {layout}  " + "  ".join(f"{text:30}" for text in texts)


def _pass(rows: dict[str, Any], problem: str, layout: str, pass_: str, rate: float | None) -> str:
    ours = rows.get(f"{problem} {layout} logits {pass_} {OURS}")
    if ours is None:
        return "-"
    floor = ours["megabytes"] / rate * 1e3 if rate else float("nan")  # MB / (GB/s) is ms
    text = f"{ours['us']:.0f} ({floor / ours['us']:.0%}"
    others = {
        item.split()[-1]: record["us"]
        for item, record in rows.items()
        if item.startswith(f"{problem} ") and f" logits {pass_} " in item
    }
    compositions = [
        us for name, us in others.items() if not name.startswith((OURS, MMCV, "reass", "grad_"))
    ]
    for times in (compositions, [us for name, us in others.items() if name == MMCV]):
        text += f"; {min(times) / ours['us']:.1f}" if times else "; -"
    return text + ")"


def _counters(results: Results) -> Iterator[str]:
    """Yield a line for each counted kernel, while there is room."""
    rows = [(item, r) for item, r in results.last("counters").items() if "kernel" in r]
    if not rows:
        return
    yield (
        "counters: us, DRAM MB read + written, level 2 sectors read, instructions, % issue, waves, "
        "largest stall"
    )
    room = LINES // 4
    for item, r in rows if len(rows) <= room else rows[: room - 1]:
        stalls = {k.removeprefix("stall_"): v for k, v in r.items() if k.startswith("stall_")}
        worst = max(stalls, key=lambda name: stalls[name]) if stalls else "-"

        def get(name: str, scale: float = 1, r=r) -> float:
            return r.get(name, float("nan")) / scale

        yield (
            f"{item.replace(' logits', '')}: {get('us'):.0f} us, "
            f"{get('dram_read', 1e6):.0f} + {get('dram_write', 1e6):.0f}, "
            f"{get('l2_read_sectors', 1e6):.1f} M, {get('instructions', 1e6):.1f} M, "
            f"{get('issue_active'):.0f}%, {get('waves'):.1f}, {worst}"
        )
    if len(rows) > room:
        yield f"{results.path.name} has {len(rows) - room + 1} more"
