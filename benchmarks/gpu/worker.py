"""A process that computes items of a step: what its parent tells it, and the lines it writes."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Results

LOST = 70  # exit status: the device answers nothing more, a new process has to go on


@dataclass(frozen=True)
class Task:
    """The parent's words to a process, in environment variables."""

    results: Path
    step: str
    group: str
    until: float  # seconds since the epoch
    rehearse: bool
    quick: bool

    def environment(self) -> dict[str, str]:
        """Return the variables."""
        return {
            "CARAFEPP_GPU_RESULTS": str(self.results),
            "CARAFEPP_GPU_STEP": self.step,
            "CARAFEPP_GPU_GROUP": self.group,
            "CARAFEPP_GPU_UNTIL": str(self.until),
            "CARAFEPP_GPU_REHEARSE": str(int(self.rehearse)),
            "CARAFEPP_GPU_QUICK": str(int(self.quick)),
        }

    @classmethod
    def of_environment(cls) -> "Task":
        """Read the variables."""
        value = {
            name: os.environ[f"CARAFEPP_GPU_{name}"]
            for name in ("RESULTS", "STEP", "GROUP", "UNTIL", "REHEARSE", "QUICK")
        }
        return cls(
            Path(value["RESULTS"]),
            value["STEP"],
            value["GROUP"],
            float(value["UNTIL"]),
            value["REHEARSE"] == "1",
            value["QUICK"] == "1",
        )


class Skip(Exception):
    """Raised for an item that cannot run here, with the reason."""


class Worker:
    """Computes items that no line has finished yet."""

    def __init__(self, is_lost: Callable[[], bool] = lambda: False):
        self.task = Task.of_environment()
        self.results = Results(self.task.results)
        self._is_lost = is_lost
        self._finished = self.results.finished(self.task.step)

    def begin(self, item: str) -> None:
        """Write that an item begins."""
        self.results.write(self.task.step, item, "begin", group=self.task.group)

    def end(self, item: str, status: str, **facts: Any) -> None:
        """Write how an item ended."""
        self.results.write(self.task.step, item, status, group=self.task.group, **facts)

    def is_due(self, item: str) -> bool:
        """Tell whether an item has no result yet and there is time for one."""
        return item not in self._finished and self.has_time()

    def has_time(self) -> bool:
        """Tell whether the step's time is not up."""
        return time.time() < self.task.until

    def run(self, items: Iterable[str], compute: Callable[[str], dict[str, Any] | None]) -> None:
        """Compute each item that is due; end the process where the device is lost."""
        for item in items:
            if not self.is_due(item):
                continue
            self.begin(item)
            begin = time.monotonic()
            try:
                facts = compute(item) or {}
                status = "pass"
            except Skip as skip:
                facts, status = {"reason": str(skip)}, "skip"
            except Exception as error:
                traceback.print_exc()
                facts, status = {"error": sentence(error)}, "fail"
            self.end(item, status, **facts, seconds=round(time.monotonic() - begin, 3))
            if status == "fail" and self._is_lost():
                sys.exit(LOST)


def sentence(error: BaseException) -> str:
    """Return the kind of an error and the first lines of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
