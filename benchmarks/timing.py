"""The harness: candidates take turns in one process until a time budget is spent."""

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

Clock = Callable[[Callable[[], Any]], float]  # seconds of a call

SAMPLE = 1e-3  # seconds; a sample repeats a shorter call
WARM = 4e-3  # seconds of untimed calls before samples: a core is slow for one or two
TURN = 20e-3  # seconds of samples in a turn
TURN_SAMPLES = (2, 5)  # fewest and most samples in a turn
PATIENCE = 0.25  # seconds; a shorter call is sampled often, whatever the budget
LEAST = 1e-9  # seconds; a coarse clock may tell 0
SLOW = 0.5  # seconds; a slower call is warmed up once

HOW = (
    "on one thread the time on the processor, which other processes cannot take; on more threads "
    "the time that passes; first quartiles, then median and third quartile; candidates take turns "
    f"in one process, in a new order every round; a turn is {WARM * 1e3:g} ms of untimed calls, "
    f"then {TURN_SAMPLES[0]} to {TURN_SAMPLES[1]} samples; all candidates get the same time; a "
    f"call longer than that and than {PATIENCE} s is timed once"
)


@dataclass(eq=False)
class Candidate:
    """A call to time, and its measurements."""

    name: str
    call: Callable[[], Any]
    threads: int = 1
    implementation: str | None = None  # name of a forced implementation of carafepp
    labels: dict[str, Any] = field(default_factory=dict)  # more columns of the row
    results: tuple[str, ...] = ()  # names of the arrays that the call returns
    compiles: bool = False  # compilation in the first call

    warm_up: float = 0  # seconds of the last warm-up call
    memory: int | None = None  # bytes at the peak of that call, beyond the resident ones
    samples: list[float] = field(default_factory=list)  # seconds per call, by the clock
    passed: list[float] = field(default_factory=list)  # the time that passed meanwhile, per call

    @property
    def clock(self) -> Clock:
        """The time on the processor on one thread, the time that passes on more."""
        return clock(self.threads)

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
        """Return all measurements as plain data: times in seconds, memory in bytes."""
        row = {"name": self.name, **self.labels, "threads": self.threads, "memory": self.memory}
        row["samples"] = len(self.samples)
        if self.samples:
            low, median, high = spread(self.samples)
            row |= {"seconds": low, "seconds_median": median, "seconds_q3": high}
            row["seconds_passed"] = spread(self.passed)[0]
        return row


def warm_up(candidate: Candidate, memory: bool = True) -> Any:
    """Call twice, or once if that is slow and compiles nothing; note time and memory.

    Return the result of the last call.
    """
    result = None

    def kept() -> None:
        nonlocal result
        result = candidate.call()

    def timed() -> None:
        candidate.warm_up = candidate.clock(kept)

    with candidate.settings():
        for _ in range(2):
            if memory:
                _, candidate.memory = peak(timed)
            else:
                timed()
            if candidate.warm_up > SLOW and not candidate.compiles:
                break
    return result


def measure(candidates: list[Candidate], budget: float) -> None:
    """Take samples of warm candidates for so many seconds."""
    for candidate in candidates:
        if candidate.warm_up > max(PATIENCE, budget / len(candidates)):
            candidate.samples.append(candidate.warm_up)
            candidate.passed.append(candidate.warm_up)
    candidates = [candidate for candidate in candidates if not candidate.samples]
    spent = dict.fromkeys(candidates, 0.0)
    order = random.Random(0)
    end = time.perf_counter() + budget
    while candidates and (time.perf_counter() < end or not all(c.samples for c in candidates)):
        fair = sum(spent.values()) / len(candidates)
        for candidate in order.sample(candidates, len(candidates)):
            over = time.perf_counter() > end and candidate.samples
            if spent[candidate] <= fair and not over:
                spent[candidate] += _turn(candidate)


def _turn(candidate: Candidate) -> float:
    """Take some samples; return the seconds of the turn."""
    begin = time.perf_counter()
    with candidate.settings():
        seconds = wall_time(candidate.call)
        while time.perf_counter() < begin + WARM:
            seconds = wall_time(candidate.call)
        calls = max(1, math.ceil(SAMPLE / seconds))
        turn_end = time.perf_counter() + TURN
        for k in range(TURN_SAMPLES[1]):
            if k >= TURN_SAMPLES[0] and time.perf_counter() > turn_end:
                break
            sample_begin = time.perf_counter()
            candidate.samples.append(sample(candidate.call, calls, candidate.clock))
            candidate.passed.append((time.perf_counter() - sample_begin) / calls)
    return time.perf_counter() - begin


def wall_time(call: Callable[[], Any]) -> float:
    """Return the seconds that pass during a call."""
    begin = time.perf_counter()
    call()
    return max(time.perf_counter() - begin, LEAST)


def processor_time(call: Callable[[], Any]) -> float:
    """Return the seconds of a call that this process, with all its threads, has a processor."""
    begin = time.process_time()
    call()
    return max(time.process_time() - begin, LEAST)


def clock(threads: int) -> Clock:
    """Return the clock for calls on so many threads."""
    return processor_time if threads == 1 else wall_time


def sample(call: Callable[[], Any], calls: int, clock: Clock = wall_time) -> float:
    """Return the mean seconds of some calls in a row."""

    def repeated() -> None:
        for _ in range(calls):
            call()

    return clock(repeated) / calls


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


def peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """Call; return the result, and the bytes at the peak beyond the resident ones before.

    Pages of files do not count: they are code that runs for the first time. A system that does not
    tell gives None.
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
