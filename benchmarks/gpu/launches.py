"""The process that a sanitizer or a profiler watches: one kernel after the other, through CuPy.

    python -m benchmarks.gpu.launches sanitize
    python -m benchmarks.gpu.launches counters CASE DTYPE

It prints `launch: ITEM` before a launch and `launched: ITEM` after it. The lines that the tool
prints in between belong to the item. `skip=` leaves out items, separated by commas.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

import carafepp
from cases import DTYPES, numpy_dtype
from cases.calls import is_generic

from ..passes import Pass, in_layout, shape
from . import smoke
from .devices import CuPyGpu, NumPyHost
from .items import CASES, Item
from .processes import end_with_parent
from .timing_names import LAYOUTS, PASSES
from .worker import Task

SANITIZED_DTYPES = ("f32", "f16", "bf16")


def launch(item: str, call: Callable[[], Any]) -> None:
    """Run a call between two lines."""
    print(f"launch: {item}", flush=True)
    call()
    print(f"launched: {item}", flush=True)


def sanitized(device: Any, done: set[str]) -> None:
    """Launch every kernel in each of three dtypes, and compare with the CPU.

    Each function of the kernel runs one problem of integers and one with softmax.
    """
    for name in smoke.names(device):
        for dtypes in DTYPES:
            item = f"{name} {dtypes}"
            if str(dtypes) not in SANITIZED_DTYPES or item in done:
                continue
            problems = []
            for exact in (True, False):
                by_function: dict[str, list[smoke.Problem]] = {}
                for problem in smoke.problems(device, name, dtypes, exact, most=1 if exact else 3):
                    by_function.setdefault(problem.function, []).append(problem)
                problems += [taken[-1] for taken in by_function.values()]
            if problems:
                launch(item, lambda p=problems, name=name: [x.check(name) for x in p])


def drawn(shape: tuple[int, ...], dtype: str, name: str) -> np.ndarray:
    """Return random numbers that repeat: to draw all of them would take seconds."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.resize(rng.standard_normal(99991, np.float32), shape).astype(numpy_dtype(dtype))


def counted(device: Any, case_name: str, dtype: str, quick: bool) -> Iterator[tuple[str, Callable]]:
    """Yield an item for each kernel that accepts a problem, and its call."""
    case = CASES[case_name]
    if isinstance(device, NumPyHost):
        case = replace(case, n=1, c=8, h=min(case.h, 4), w=min(case.w, 6))
    for layout in LAYOUTS[: 1 if quick else 2]:
        arrays = {}
        for name in ("features", "logits", "grad_output"):
            values = in_layout(drawn(shape(case, name), dtype, name), layout)
            arrays[name] = device.put(np.ascontiguousarray(values))
            result = {"grad_output": "output"}.get(name, f"grad_{name}")
            arrays[result] = device.nans(values.shape, dtype)
        for pass_name in PASSES[:3]:
            pass_ = Pass(case, "logits", pass_name)
            call = pass_.call(layout, arrays.__getitem__)
            for name in pass_.implementations(layout, arrays.__getitem__):
                if is_generic(name) and dtype != "float32":  # they take seconds each
                    continue

                def forced(name=name, call=call):
                    with carafepp.force_implementation(name):
                        call()

                yield str(Item(case_name, dtype, layout, "logits", pass_name, name)), forced


def main() -> None:
    """Launch the kernels that the command line asks for."""
    end_with_parent()  # even if the tool in between is killed
    task = Task.of_environment()
    device = NumPyHost() if task.rehearse else CuPyGpu()
    done = {item for word in sys.argv if word.startswith("skip=") for item in word[5:].split(",")}
    if sys.argv[1] == "sanitize":
        sanitized(device, done)
        return
    for item, call in counted(device, *sys.argv[2:4], task.quick):
        launch(item, lambda call=call: device.profile(call))


if __name__ == "__main__":
    main()
