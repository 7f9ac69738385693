"""A process that computes items of a step: its task from the parent, and its lines of results."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .results import Results

LOST = 70  # exit status: the device no longer answers; a new process must continue


@dataclass(frozen=True)
class Task:
    """A process's task; the parent passes it in environment variables."""

    results: Path
    step: str
    group: str
    until: float  # seconds since the epoch
    rehearse: bool
    quick: bool

    def environment(self) -> dict[str, str]:
        """Return the variables."""
        return {f"CARAFEPP_GPU_{name.upper()}": str(value) for name, value in vars(self).items()}

    @classmethod
    def of_environment(cls) -> "Task":
        """Read the variables."""
        names = (f"CARAFEPP_GPU_{field.name.upper()}" for field in fields(cls))
        results, step, group, until, rehearse, quick = map(os.environ.__getitem__, names)
        return cls(Path(results), step, group, float(until), rehearse == "True", quick == "True")


class Skip(Exception):
    """The reason why an item cannot run here."""


def device_is_lost() -> bool:
    """Tell whether an error made the device unusable for the libraries of this process."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # fails after a capture that broke off
        if cupy is not None and cupy.cuda.is_available():
            cupy.cuda.runtime.deviceSynchronize()
    except Exception:
        return True
    return False


class Worker:
    """Computes the items that are not finished yet."""

    def __init__(self, is_lost: Callable[[], bool] = device_is_lost):
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
        """Tell whether an item has no result yet and there is time."""
        return item not in self._finished and self.has_time()

    def has_time(self) -> bool:
        """Tell whether the step has time left."""
        return time.time() < self.task.until

    def run(self, items: Iterable[str], compute: Callable[[str], dict[str, Any] | None]) -> None:
        """Compute each item that is due; end the process if the device is lost."""
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
