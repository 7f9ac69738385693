"""carafepp's rivals: its own choice and each implementation, forced by name."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import carafepp

from .problems import PROBLEMS, Arrays
from .timing import Rival, peak

CHOICE = "carafepp"  # the name of a rival that is chosen by itself


class Calls:
    """carafepp's calls for one problem, from masks or logits (`source`), in one layout."""

    def __init__(self, arrays: Arrays, source: str, layout: str):
        self.arrays, self.source, self.layout = arrays, source, layout
        case = arrays.case
        self.gradients = "grad_features", f"grad_{source}"
        self.inputs = [arrays(name, layout) for name in ("features", source)]
        self.grad_inputs = [arrays("grad_output", layout), *self.inputs]
        function, params = "reassemble", {**case.factors, "layout": layout}
        if source == "logits":
            function, params["kernel_size"] = "reassemble_with_logits", case.kernel_size
        self.function, self.params, self.crop = function, params, case.crop

    def passes(self, pass_: str) -> dict[str, list[str]]:
        """Return what is timed for a pass, and the implementations that accept each, best first.

        Forward and backward together are carafepp's own choice; each gradient is timed alone.
        """
        if pass_ == "forward":
            return {pass_: self._accepting(self.function, self.inputs, self.crop)}
        names = self._accepting(f"{self.function}_backward", self.grad_inputs, {})
        found = {
            gradient: [name for name in names if name.startswith(gradient)]
            for gradient in self.gradients
        }
        return {pass_: [], **found}

    def _accepting(self, function: str, inputs: list, crop: dict) -> list[str]:
        entries = carafepp.list_implementations(function, *inputs, **self.params, **crop)
        return [name for name, reason in entries if reason is None]

    def rival(self, pass_: str, name: str, threads: int, fresh: bool) -> Rival:
        """Return one rival, with results in `out=` or in fresh memory."""
        names = {
            "forward": ("output",),
            "forward+backward": ("output", *self.gradients),
        }.get(pass_, (pass_,))
        outs = {key: None if fresh else self.arrays(key, self.layout) for key in names}
        forward = partial(
            getattr(carafepp, self.function),
            *self.inputs,
            **self.params,
            **self.crop,
            out=outs.get("output"),
        )
        backward = partial(
            getattr(carafepp, f"{self.function}_backward"),
            *self.grad_inputs,
            **self.params,
            **{f"need_{key.removeprefix('grad_')}": key in outs for key in self.gradients},
            out=tuple(map(outs.get, self.gradients)),
        )
        calls = {"forward": forward, "forward+backward": lambda: (forward(), *backward())}
        return Rival(
            name,
            calls.get(pass_, backward),
            threads,
            None if name == CHOICE else name,
            {
                "kind": "carafepp",
                "pass": pass_,
                "source": self.source,
                "layout": self.layout,
                "dtype": self.arrays.dtype,
                "outputs": "fresh" if fresh else "recycled",
                "chosen": name == CHOICE,
            },
            names,
        )


def rivals(arrays: Arrays, source: str, pass_: str, asked) -> Iterator[Rival]:
    """Yield carafepp's rivals for a pass: of its own choice all, of the others what is asked for.

    With --quick, other dtypes and numbers of threads than the first are for its own choice alone.
    """
    first = arrays.dtype == asked.dtype[0] or not asked.quick
    for layout in asked.layout:
        calls = Calls(arrays, source, layout)
        for part, names in calls.passes(pass_).items():
            for name in [CHOICE, *names]:
                if not asked.implementation(name) or not (first or name == CHOICE):
                    continue
                every = name == CHOICE or not asked.quick
                for threads in asked.threads if every else asked.threads[:1]:
                    yield calls.rival(part, name, threads, asked.fresh)


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def memory_of_first_call(rival: Rival, case: str) -> int | None:
    """Return the bytes that carafepp's first call in a process takes, beside its results.

    A later one would find what the first one keeps: scratch of threads, and their stacks.
    """
    with ProcessPoolExecutor(1, _processes) as pool:
        return pool.submit(_memory, case, rival.name, rival.threads, rival.labels).result()


def _memory(case: str, name: str, threads: int, labels: dict) -> int | None:
    arrays = Arrays(PROBLEMS[case], labels["dtype"], constant=True)
    calls = Calls(arrays, labels["source"], labels["layout"])
    rival = calls.rival(labels["pass"], name, threads, labels["outputs"] == "fresh")
    with rival.settings():
        return peak(rival.call)[1]
