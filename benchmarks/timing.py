"""The harness: rivals take turns in one process until a time budget is spent."""

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import carafepp

SAMPLE = 200e-6  # seconds: shorter calls are repeated within one sample
TURN = 20e-3  # seconds of samples in one turn, if the fewest fit in
TURN_SAMPLES = (2, 5)  # fewest, most
PATIENCE = 0.25  # seconds that a call may take and still be timed often, whatever the budget
SLOW = 0.5  # seconds of a call that is not warmed up twice

HOW = (
    "medians; rivals take turns in one process, in a new order every round; a turn is an untimed "
    f"call and {TURN_SAMPLES[0]} to {TURN_SAMPLES[1]} samples; every rival gets the same time; "
    f"a call longer than that and than {PATIENCE} s is timed once"
)


@dataclass(eq=False)
class Rival:
    """One thing to be timed, and what is measured of it."""

    name: str
    call: Callable[[], Any]
    threads: int = 1
    implementation: str | None = None  # of carafepp, forced by name
    labels: dict[str, Any] = field(default_factory=dict)  # go into the row as they are
    results: tuple[str, ...] = ()  # names of the arrays that the call returns, but None
    compiles: bool = False  # in the first call

    warm_up: float = 0  # seconds of the last warm-up call
    memory: int | None = None  # bytes: peak during that call beyond what was resident
    samples: list[float] = field(default_factory=list)  # seconds a call

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set the threads of carafepp and PyTorch, and force the implementation."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        carafepp.set_num_threads(self.threads)
        name = self.implementation
        try:
            with carafepp.force_implementation(name) if name else nullcontext():
                yield
        finally:
            torch.set_num_threads(before)
            carafepp.set_num_threads(0)

    def row(self) -> dict[str, Any]:
        """Return all that is known, as plain data; times in seconds, memory in bytes."""
        row = {"name": self.name, **self.labels, "threads": self.threads, "memory": self.memory}
        row["samples"] = len(self.samples)
        if self.samples:
            low, median, high = spread(self.samples)
            row |= {"seconds": median, "seconds_p10": low, "seconds_p90": high}
        return row


def warm_up(rival: Rival, memory: bool = True) -> Any:
    """Call twice, or once if that is slow and compiles nothing; note time and memory.

    The result of the last call is returned.
    """

    def timed() -> Any:
        begin = time.perf_counter()
        result = rival.call()
        rival.warm_up = time.perf_counter() - begin
        return result

    with rival.settings():
        for _ in range(2):
            result, rival.memory = peak(timed) if memory else (timed(), None)
            if rival.warm_up > SLOW and not rival.compiles:
                break
    return result


def measure(rivals: list[Rival], budget: float) -> None:
    """Take samples of all rivals, which have been warmed up, for so many seconds."""
    for rival in rivals:
        if rival.warm_up > max(PATIENCE, budget / len(rivals)):
            rival.samples.append(rival.warm_up)
    rivals = [rival for rival in rivals if not rival.samples]
    spent = dict.fromkeys(rivals, 0.0)
    order = random.Random(0)
    end = time.perf_counter() + budget
    while rivals and (time.perf_counter() < end or not all(rival.samples for rival in rivals)):
        fair = sum(spent.values()) / len(rivals)
        for rival in order.sample(rivals, len(rivals)):
            over = time.perf_counter() > end and rival.samples
            if spent[rival] <= fair and not over:
                spent[rival] += _turn(rival)


def _turn(rival: Rival) -> float:
    """Take some samples; return how long it took."""
    begin = time.perf_counter()
    with rival.settings():
        calls = max(1, math.ceil(SAMPLE / _seconds(rival.call, 1)))
        turn_end = time.perf_counter() + TURN
        for k in range(TURN_SAMPLES[1]):
            if k >= TURN_SAMPLES[0] and time.perf_counter() > turn_end:
                break
            rival.samples.append(_seconds(rival.call, calls))
    return time.perf_counter() - begin


def _seconds(call: Callable[[], Any], calls: int) -> float:
    """Return the mean time of some calls in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Return the 10th percentile, the median and the 90th percentile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[0], statistics.median(samples), tenths[-1]


def peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """Call; return the result, and the bytes at the peak beyond those resident before.

    Pages of files do not count, as they are code that runs for the first time. None is returned
    where the system does not tell.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # restarts the peak
        before, files = _status("VmRSS"), _status("RssFile")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before - (_status("RssFile") - files))


def _status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")
