"""The smoke test: implementations by name, in every dtype that they accept, against the CPU.

    python -m benchmarks.gpu.smoke --list
    python -m benchmarks.gpu.smoke NAME ...

Small integers and the normaliser none make every sum exact: results must equal the CPU's bits. With
random numbers and softmax, they must be near the CPU's results in float64. Results are NaN before a
call. A CUDA graph captures the first call of a kernel in its process.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import carafepp
from cases import DTYPES, Case, Dtypes, double, integer_arrays, random_arrays
from cases.calls import FUNCTIONS, arguments, call, from_layout, in_layout, is_generic

from ..check import assert_near
from .devices import TorchGpu, TorchHost
from .worker import Task, Worker

# Each implementation runs the first four cases that it accepts, in a quick run the first one.
CASES = [
    Case("up2_even", "whole vectors, as boxes have", 2, 64, 6, 16, up=2, kernel_size=5),
    Case("up2_k3_groups", "K=3, groups", 1, 48, 5, 18, up=2, kernel_size=3, groups=2),
    Case("up2_wide", "several tiles of columns", 1, 8, 3, 70, up=2, kernel_size=5),
    Case("up2_crop", "rows are cropped", 1, 24, 7, 6, up=2, kernel_size=5, size=(13, 12)),
    Case("up2_small", "a window that is larger than the map", 2, 16, 2, 4, up=2, kernel_size=5),
    Case("up2_deep", "several blocks of channels", 1, 136, 3, 4, up=2, kernel_size=5),
    Case("down2_even", "whole vectors", 2, 64, 8, 12, down=2, kernel_size=5),
    Case("down2_k3_groups", "K=3, groups", 1, 48, 6, 36, down=2, kernel_size=3, groups=2),
    Case("down2_wide", "several tiles of columns", 1, 8, 4, 140, down=2, kernel_size=5),
    Case("down2_small", "a window that is larger than the map", 2, 16, 2, 4, down=2, kernel_size=5),
    Case("down3_even", "whole vectors", 2, 64, 9, 16, down=3, kernel_size=5),
    Case("down3_wide", "several tiles of columns", 1, 8, 9, 104, down=3, kernel_size=3),
    Case("down4_groups", "K=7, groups", 1, 32, 12, 24, down=4, kernel_size=7, groups=2),
    Case("down4_k5", "K=5, sources that no tap reaches", 1, 16, 16, 28, down=4, kernel_size=5),
    Case("ratio_3_2", "a fraction", 1, 9, 5, 6, up=3, down=2),
    Case("same_even", "whole vectors", 2, 64, 6, 10, kernel_size=5),
    Case("same_k3_groups", "K=3, groups", 1, 48, 5, 18, kernel_size=3, groups=2),
    Case("same_wide", "several tiles of columns", 1, 8, 3, 70, kernel_size=5),
    Case("same_k5_groups", "K=5, groups", 1, 48, 7, 13, kernel_size=5, groups=2),
    Case("same_k7", "K=7, groups", 1, 32, 9, 12, kernel_size=7, groups=2),
    Case("few_up8", "convex upsampling", 2, 2, 6, 10, up=8, kernel_size=3),
    Case("few_up4_wide", "several tiles of columns", 1, 2, 5, 70, up=4, kernel_size=3),
    Case("few_up4_k5", "K=5, groups of two channels", 1, 6, 5, 18, up=4, kernel_size=5, groups=3),
    Case("few_up2_groups", "groups of two channels", 1, 8, 3, 7, up=2, kernel_size=5, groups=4),
]
# The generic implementations accept all cases; these four have every kind of factor.
GENERIC_CASES = ("up2_k3_groups", "up2_crop", "down2_even", "ratio_3_2")


class Problem:
    """One case of a function in one pair of dtypes, on the device."""

    def __init__(
        self, device: TorchGpu, function: str, case: Case, dtypes: Dtypes, layout: str, exact: bool
    ):
        arrays = integer_arrays(case, dtypes) if exact else random_arrays(case, dtypes)
        inputs, params = arguments(function, case, arrays, "none" if exact else "softmax")
        self.device, self.function, self.layout = device, function, layout
        self.exact, self.inputs, self.params = exact, inputs, params
        self.on_device = [device.put(array) for array in in_layout(inputs, layout)]

    def implementations(self) -> list[tuple[str, str | None]]:
        """Return the names, and why each cannot run."""
        given = map(self.device.given, self.on_device)
        outs = self._outs(self.expected(), "")
        params = {**self.params, "layout": self.layout, "out": _out_of(outs, self.device)}
        return carafepp.list_implementations(self.function, *given, **params)

    def expected(self) -> list[np.ndarray]:
        """Return the CPU's results: in the same dtypes for integers, else in float64."""
        if self.exact:
            return list(call(self.function, self.inputs, self.params))
        return list(call(self.function, [double(a) for a in self.inputs], self.params))

    def check(self, name: str, graph: bool = False) -> None:
        """Compute by one implementation, or by its replayed `graph`, and compare."""
        expected = self.expected()
        outs = self._outs(expected, name)
        given = [self.device.given(array) for array in self.on_device]
        params = {**self.params, **_needs(self.function, outs), "layout": self.layout}
        params["out"] = _out_of(outs, self.device)

        def compute() -> None:
            with carafepp.force_implementation(name):
                getattr(carafepp, self.function)(*given, **params)

        if graph:
            self.device.captured(compute)()
        else:
            compute()
        self.device.synchronize()
        for out, exact in zip(outs, expected, strict=True):
            if out is None:
                continue
            (result,) = from_layout((self.device.get(out),), self.layout)
            if self.exact:
                np.testing.assert_array_equal(double(result), double(exact))
            else:
                assert_near(result, exact, str(out.dtype).removeprefix("torch."))

    def _outs(self, expected: list[np.ndarray], name: str) -> list[Any]:
        """Return arrays of NaN for the results that an implementation computes, and None."""
        other = name.startswith(("grad_masks", "grad_logits")), name.startswith("grad_features")
        return [
            None
            if len(expected) == 2 and other[k]
            else self.device.nans(in_layout((exact,), self.layout)[0].shape, dtype)
            for k, (exact, dtype) in enumerate(zip(expected, self._dtypes(), strict=True))
        ]

    def _dtypes(self) -> list[str]:
        """Return the dtypes of the results, which the first and the last input have."""
        first, last = self.inputs[0].dtype.name, self.inputs[-1].dtype.name
        if self.function in ("reassemble_backward", "reassemble_with_logits_backward"):
            return [first, last]
        return [last] if self.function.startswith("normalize") else [first]


def _out_of(outs: list[Any], device: TorchGpu) -> Any:
    """Return `out=` for results on the device."""
    given = [None if out is None else device.given(out) for out in outs]
    return tuple(given) if len(given) == 2 else given[0]


def _needs(function: str, outs: list[Any]) -> dict[str, bool]:
    """Return the parameters that ask for one of two gradients, or for both."""
    if len(outs) == 1:
        return {}
    weights = "need_logits" if "logits" in function else "need_masks"
    return {"need_features": outs[0] is not None, weights: outs[1] is not None}


def _layouts(name: str) -> tuple[str, ...]:
    """Return the layouts of an implementation."""
    if "_any_" in name:
        return ("NCHW", "NHWC")
    return ("NHWC",) if "_nhwc_" in name else ("NCHW",)


def names(device: TorchGpu) -> list[str]:
    """Return all implementations of all functions."""
    found: dict[str, None] = {}
    for function in FUNCTIONS:
        problem = Problem(device, function, CASES[0], DTYPES[0], "NCHW", exact=True)
        found |= dict.fromkeys(name for name, _ in problem.implementations())
    return list(found)


def problems(
    device: TorchGpu, name: str, dtypes: Dtypes, exact: bool, most: int
) -> Iterator[Problem]:
    """Yield problems of these dtypes that an implementation accepts, so many per function."""
    cases = [case for case in CASES if case.name in GENERIC_CASES or not is_generic(name)]
    for function in FUNCTIONS:
        accepted = 0
        for k, case in enumerate(cases):
            layouts = _layouts(name)
            problem = Problem(device, function, case, dtypes, layouts[k % len(layouts)], exact)
            listed = dict(problem.implementations())
            if name not in listed:
                break
            if listed[name] is None:
                accepted += 1
                yield problem
            if accepted == most:
                break


def compute(device: TorchGpu, name: str, item: str, most: int) -> dict[str, Any]:
    """Run an item: an implementation in one pair of dtypes, captured or called."""
    _, text, how = item.split()
    dtypes = next(d for d in DTYPES if str(d) == text)
    count = 0
    if how == "graph":
        for problem in problems(device, name, dtypes, exact=False, most=1):
            problem.check(name, graph=True)
            count += 1
        return {"cases": count}
    for exact in (True, False):
        for problem in problems(device, name, dtypes, exact, most):
            try:
                problem.check(name)
            except AssertionError as error:
                call = f"{problem.function} {problem.params} {problem.layout}"
                raise AssertionError(f"{call}: {error}") from error
            count += 1
    assert count >= 2 * most, f"it accepts only {count} cases"
    return {"cases": count}


def main() -> None:
    """List the implementations, or compute the items of the named ones."""
    task = Task.of_environment()
    device = TorchHost() if task.rehearse else TorchGpu()
    if sys.argv[1] == "--list":
        print("implementations:", json.dumps(names(device)))
        return
    worker = Worker()
    most = 1 if task.quick else 4
    for name in sys.argv[1:]:
        items = []
        for dtypes in DTYPES:
            if any(problems(device, name, dtypes, exact=True, most=1)):
                items += [f"{name} {dtypes} graph", f"{name} {dtypes} calls"]
        if not items:
            worker.end(name, "fail", error="it accepts no case of any dtype")
        worker.run(items, lambda item, name=name: compute(device, name, item, most))


if __name__ == "__main__":
    main()
