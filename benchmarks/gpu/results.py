"""The file of results: several processes write lines, and read them again.

A line is a JSON object with `step`, `item`, `status` and facts. An item begins with the status
`begin` and ends with `pass`, `fail` or `skip`; `stopped` says that its time was up. Facts about
the machine have the status `fact`. A step ends with the item "" and the status `done`, or `stopped`
if items are left.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

FINISHED = ("pass", "fail", "skip")


class Results:
    """The file of lines; several threads and processes may write to it at once."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()  # a signal may arrive while this thread holds it
        self._offset = 0
        self._records: list[dict[str, Any]] = []
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            self._append(b"\n")  # a killed process left half a line

    def write(self, step: str, item: str, status: str, **facts: Any) -> None:
        """Append a line."""
        record = {"step": step, "item": item, "status": status, **facts, "time": time.time()}
        self._append(json.dumps(record, default=str).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        """Write a line at once, so that lines of several processes do not mix."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def records(self, step: str | None = None) -> list[dict[str, Any]]:
        """Return the records of all complete lines, or of one step."""
        with self._lock:
            if self.path.exists():
                with self.path.open("rb") as file:
                    file.seek(self._offset)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                self._offset += len(whole)
                self._records += filter(None, map(_parsed, whole.splitlines()))
            return [r for r in self._records if step is None or r["step"] == step]

    def last(self, step: str) -> dict[str, dict[str, Any]]:
        """Return the last line of each item of a step."""
        return {record["item"]: record for record in self.records(step) if record["item"]}

    def finished(self, step: str) -> set[str]:
        """Return the items of a step that need not run again."""
        return {item for item, record in self.last(step).items() if record["status"] in FINISHED}

    def recover(self, step: str, item: str) -> None:
        """Write that an item passed which failed in an earlier run."""
        if self.last(step).get(item, {}).get("status") == "fail":
            self.write(step, item, "pass")

    def is_done(self, step: str) -> bool:
        """Tell whether a step ended with no item left."""
        ends = [record for record in self.records(step) if not record["item"]]
        return bool(ends) and ends[-1]["status"] == "done"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line's record; None if it is no record, as after a killed process."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and {"step", "item", "status"} <= record.keys()
    return record if whole else None
