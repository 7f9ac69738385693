"""carafepp's candidates: its own choice, and each implementation forced by its name."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from .passes import Pass
from .problems import PROBLEMS, Arrays
from .timing import Candidate, peak

CHOICE = "carafepp"  # the candidate that chooses its implementation itself


def candidates(arrays: Arrays, weights: str, pass_: str, asked) -> Iterator[Candidate]:
    """Yield carafepp's own choice and the implementations that are asked for.

    Forward and backward together are only timed by the choice; implementations compute one
    gradient. With --quick, only the choice runs every dtype and every number of threads.
    """
    case = arrays.case
    first = arrays.dtype == asked.dtype[0] or not asked.quick
    names = ["grad_features", f"grad_{weights}"] if pass_ == "forward+backward" else []
    passes = [Pass(case, weights, name) for name in [pass_, *names]]
    for layout in asked.layout:
        for one in passes:
            accepting = one.implementations(layout, partial(arrays, layout=layout))
            for name in [CHOICE, *accepting]:
                if not asked.implementation(name) or not (first or name == CHOICE):
                    continue
                every = name == CHOICE or not asked.quick
                for threads in asked.threads if every else asked.threads[:1]:
                    yield candidate(one, arrays, layout, name, threads, asked.fresh)


def candidate(
    pass_: Pass, arrays: Arrays, layout: str, name: str, threads: int, fresh: bool
) -> Candidate:
    """Return carafepp's candidate for one pass; `name` is CHOICE or an implementation."""
    labels = {
        "kind": "carafepp",
        "pass": pass_.name,
        "weights": pass_.weights,
        "layout": layout,
        "dtype": arrays.dtype,
        "outputs": "fresh" if fresh else "recycled",
        "chosen": name == CHOICE,
    }
    call = pass_.call(layout, partial(arrays, layout=layout), fresh)
    forced = None if name == CHOICE else name
    return Candidate(name, call, threads, forced, labels, pass_.results)


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def memory_of_first_call(candidate: Candidate, case: str) -> int | None:
    """Return the bytes that carafepp's first call in a process takes, beside its results.

    A later call would find what the first one keeps: scratch and the stacks of threads.
    """
    with ProcessPoolExecutor(1, _processes) as pool:
        how = (candidate.name, candidate.threads, candidate.labels)
        return pool.submit(_memory, case, *how).result()


def _memory(case: str, name: str, threads: int, labels: dict) -> int | None:
    arrays = Arrays(PROBLEMS[case], labels["dtype"], constant=True)
    pass_ = Pass(arrays.case, labels["weights"], labels["pass"])
    fresh = labels["outputs"] == "fresh"
    first = candidate(pass_, arrays, labels["layout"], name, threads, fresh)
    with first.settings():
        return peak(first.call)[1]
