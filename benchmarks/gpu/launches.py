"""The process that a sanitizer or a profiler watches: one kernel after the other, through CuPy.

    python -m benchmarks.gpu.launches sanitize
    python -m benchmarks.gpu.launches counters CASE DTYPE

It prints `launch: ITEM` before a launch and `launched: ITEM` behind it, so that what the tool says
in between belongs to the item. `skip=` and a comma-separated list leaves items out.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

import carafepp
from cases import DTYPES, numpy_dtype

from . import smoke
from .devices import CuPyGpu, NumPyHost
from .processes import end_with_parent
from .timing import CASES, Item
from .timing_names import LAYOUTS, PASSES
from .worker import Task

SANITIZED_DTYPES = ("f32", "f16", "bf16")


def launch(item: str, call: Callable[[], Any]) -> None:
    """Run a call between two lines."""
    print(f"launch: {item}", flush=True)
    call()
    print(f"launched: {item}", flush=True)


def sanitized(device: Any, done: set[str], quick: bool) -> None:
    """Launch every kernel in each of three dtypes, and compare with the CPU.

    Each function that has the kernel runs one problem of integers and one with softmax.
    """
    for name in smoke.names(device)[:: 8 if quick else 1]:
        for dtypes in DTYPES:
            item = f"{name} {dtypes}"
            if str(dtypes) not in SANITIZED_DTYPES or item in done:
                continue
            problems = []
            for exact in (True, False):
                of_function: dict[str, list[smoke.Problem]] = {}
                for problem in smoke.problems(device, name, dtypes, exact):
                    of_function.setdefault(problem.function, []).append(problem)
                problems += [taken[1 if exact else 2] for taken in of_function.values()]
            if problems:
                launch(item, lambda p=problems, name=name: [x.check(name) for x in p])


def drawn(shape: tuple[int, ...], dtype: str, name: str) -> np.ndarray:
    """Return random numbers that repeat, since drawing all would take seconds."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.resize(rng.standard_normal(99991, np.float32), shape).astype(numpy_dtype(dtype))


def counted(device: Any, case_name: str, dtype: str, quick: bool) -> Iterator[tuple[str, Callable]]:
    """Yield each kernel that takes a problem, and its call."""
    case = CASES[case_name]
    if isinstance(device, NumPyHost):
        case = replace(case, n=1, c=8, h=min(case.h, 4), w=min(case.w, 6))
    params = {**case.factors, "kernel_size": case.kernel_size}
    for layout in LAYOUTS[: 1 if quick else 2]:
        order = (0, 1, 2, 3) if layout == "NCHW" else (0, 2, 3, 1)
        shapes = {
            name: tuple(shape[axis] for axis in order)
            for name, shape in {
                "grad_output": case.output_shape,
                "features": case.features_shape,
                "logits": case.logits_shape,
            }.items()
        }
        arrays = {name: device.put(drawn(s, dtype, name)) for name, s in shapes.items()}
        results = {name: device.poisoned(s, dtype) for name, s in shapes.items()}
        for pass_ in PASSES[:3]:
            inputs = [arrays["features"], arrays["logits"]]
            options: dict[str, Any] = {**params, "layout": layout}
            function, out = "reassemble_with_logits", results["grad_output"]
            if pass_ != "forward":
                function, inputs = f"{function}_backward", [arrays["grad_output"], *inputs]
                wanted = (pass_ == "grad_features", pass_ == "grad_logits")
                options |= {"need_features": wanted[0], "need_logits": wanted[1]}
                both = (results["features"], results["logits"])
                out = tuple(x if want else None for x, want in zip(both, wanted, strict=True))
            listing = {key: value for key, value in options.items() if "need" not in key}
            for name, reason in carafepp.list_implementations(function, *inputs, **listing):
                of_pass = pass_ == "forward" or name.startswith(f"{pass_}_")
                if reason is not None or not of_pass:
                    continue
                if "_any_" in name and dtype != "float32":  # they take seconds each
                    continue

                def call(name=name, function=function, inputs=inputs, options=options, out=out):
                    with carafepp.force_implementation(name):
                        getattr(carafepp, function)(*inputs, **options, out=out)

                yield str(Item(case_name, dtype, layout, "logits", pass_, name)), call


def main() -> None:
    """Launch what the command line says."""
    end_with_parent()  # the tool in between may be killed
    task = Task.of_environment()
    device = NumPyHost() if task.rehearse else CuPyGpu()
    done = {item for word in sys.argv if word.startswith("skip=") for item in word[5:].split(",")}
    if sys.argv[1] == "sanitize":
        sanitized(device, done, task.quick)
        return
    for item, call in counted(device, *sys.argv[2:4], task.quick):
        launch(item, lambda call=call: device.profile(call))


if __name__ == "__main__":
    main()
