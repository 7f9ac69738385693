"""Times of rivals that take turns in one process, until a time budget is spent."""

import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from .rivals import Rival

SAMPLE = 200e-6  # seconds: shorter calls are repeated within one sample
TURN = 20e-3  # seconds of samples in one turn, if the fewest fit in
TURN_SAMPLES = (3, 5)  # fewest, most

HOW = (
    "medians; the rivals of one comparison take turns in one process, in a new order every round, "
    f"a turn being an untimed call and {TURN_SAMPLES[0]} to {TURN_SAMPLES[1]} samples; every rival "
    "gets the same time; one whose first calls take more than that (and than a second, for "
    "carafepp's own choice, other operators and the two best compositions of each layout) has no "
    "other sample; outputs recycled unless `fresh`"
)


def seconds(call: Callable[[], Any], calls: int = 1) -> float:
    """Return the time of one call, averaged over some."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def measure(rivals: list[Rival], budget: float) -> None:
    """Take samples of all rivals, fewer of one that has an early sample already.

    Parameters
    ----------
    rivals : list of Rival
    budget : float
        Seconds for all; everyone gets at least one sample, whatever it costs.
    """
    spent = {rival: sum(rival.samples) for rival in rivals}
    order = random.Random(0)
    end = time.perf_counter() + budget
    while time.perf_counter() < end or not all(rival.samples for rival in rivals):
        fair = sum(spent.values()) / len(rivals)
        for rival in order.sample(rivals, len(rivals)):
            over = time.perf_counter() > end and rival.samples
            if spent[rival] <= fair and not over:
                spent[rival] += _turn(rival)


def _turn(rival: Rival) -> float:
    """Take some samples; return how long it took."""
    begin = time.perf_counter()
    with rival.settings():
        calls = max(1, math.ceil(SAMPLE / seconds(rival.call)))
        turn_end = time.perf_counter() + TURN
        for k in range(TURN_SAMPLES[1]):
            if k >= TURN_SAMPLES[0] and time.perf_counter() > turn_end:
                break
            rival.samples.append(seconds(rival.call, calls))
    return time.perf_counter() - begin


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Return the 10th percentile, the median and the 90th percentile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[0], statistics.median(samples), tenths[-1]
