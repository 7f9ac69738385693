"""The rivals that are carafepp's: each implementation, forced by name, and its own choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import carafepp

from .problems import Arrays
from .rivals import Rival

CHOICE = "carafepp"  # the name of a row for what is chosen by itself


@contextmanager
def settings(threads: int, implementation: str | None) -> Iterator[None]:
    """Set the number of threads and, if one is named, force an implementation."""
    carafepp.set_num_threads(threads)
    try:
        if implementation is None:
            yield
        else:
            with carafepp.force_implementation(implementation):
                yield
    finally:
        carafepp.set_num_threads(0)


class Calls:
    """The calls of carafepp for one problem on arrays of one dtype and layout."""

    def __init__(self, arrays: Arrays, dtype: str, layout: str):
        self.arrays, self.dtype, self.layout = arrays, dtype, layout
        case, inputs = arrays.case, arrays.inputs(dtype, layout)
        self.inputs = inputs.features, inputs.weights
        self.backward_inputs = inputs.grad_output, *self.inputs
        self.params = {**case.factors, "layout": layout}
        self.crop = case.crop
        self.function = "reassemble"
        if arrays.source == "logits":
            self.function = "reassemble_with_logits"
            self.params["kernel_size"] = case.kernel_size
        self.gradients = "grad_features", f"grad_{arrays.source}"

    def forward(self, out) -> Callable[[], Any]:
        """Return a call that computes into `out`, or into fresh memory where that is None."""
        function = getattr(carafepp, self.function)
        return partial(function, *self.inputs, **self.params, **self.crop, out=out)

    def backward(self, outs: dict[str, Any]) -> Callable[[], tuple]:
        """Return a call that computes these gradients, into arrays or into fresh memory (None)."""
        needed = {
            f"need_{gradient.removeprefix('grad_')}": gradient in outs
            for gradient in self.gradients
        }
        pair = tuple(outs.get(gradient) for gradient in self.gradients)
        function = getattr(carafepp, f"{self.function}_backward")
        return partial(function, *self.backward_inputs, **self.params, **needed, out=pair)

    def implementations(self, pass_: str) -> dict[str, list[str]]:
        """Return those that accept the problem, best first: {pass: names}.

        "forward+backward" has none for the whole, and those of its gradients.
        """
        if pass_ == "forward":
            return {pass_: self._accepting(self.function, self.inputs, self.crop)}
        found: dict[str, list[str]] = {pass_: []}
        for name in self._accepting(f"{self.function}_backward", self.backward_inputs, {}):
            of = [gradient for gradient in self.gradients if name.startswith(f"{gradient}_")]
            found.setdefault(of[0] if of else "backward", []).append(name)
        return found

    def _accepting(self, function: str, inputs: tuple, crop: dict) -> list[str]:
        entries = carafepp.list_implementations(function, *inputs, **self.params, **crop)
        return [name for name, reason in entries if reason is None]

    def results(self, pass_: str) -> tuple[str, ...]:
        """Return the names of the results of a pass."""
        several = {
            "forward": ("output",),
            "backward": self.gradients,
            "forward+backward": ("output", *self.gradients),
        }
        return several.get(pass_, (pass_,))

    def call(self, pass_: str, outs: tuple) -> Callable[[], Any]:
        """Return what is to be timed: an array or a tuple of them comes back."""
        if pass_ == "forward":
            return self.forward(outs[0])
        if pass_ == "forward+backward":
            forward = self.forward(outs[0])
            backward = self.backward(dict(zip(self.gradients, outs[1:], strict=True)))
            return lambda: (forward(), *backward())
        return self.backward(dict(zip(self.results(pass_), outs, strict=True)))

    def rival(
        self, pass_: str, name: str, *, chosen: bool, threads: int, outputs: str = "recycled"
    ) -> Rival:
        """Return one rival; `name` is that of an implementation, or CHOICE."""
        names = self.results(pass_)
        outs = tuple(self.arrays.result(key, self.dtype, self.layout) for key in names)
        if outputs == "fresh":
            outs = (None,) * len(names)
        return Rival(
            name=name,
            kind="carafepp",
            pass_=pass_,
            source=self.arrays.source,
            layout=self.layout,
            dtype=self.dtype,
            threads=threads,
            outputs=outputs,
            call=self.call(pass_, outs),
            settings=lambda: settings(threads, None if name == CHOICE else name),
            results=names,
            outs=outs if outputs == "recycled" else (),
            chosen=chosen,
            twin=outputs == "fresh",
        )


def rivals(calls: Calls, pass_: str, threads: list[int], wanted, fresh: bool, quick: bool):
    """Return carafepp's rivals for a pass.

    Forward and backward together are carafepp's own choice; each implementation of a gradient is
    timed alone.

    Parameters
    ----------
    calls : Calls
    pass_ : "forward" or "forward+backward"
    threads : list of int
    wanted : function of a name
        Whether an implementation is to be timed.
    fresh : bool
        Whether carafepp's own choice is timed with results in fresh memory too.
    quick : bool
        Whether other thread counts than the first are for carafepp's own choice alone.
    """
    found = []
    for part, names in calls.implementations(pass_).items():
        choice = names[0] if len(names) == 1 else CHOICE
        for name in dict.fromkeys([choice, *names]):
            chosen = name == choice
            if not (wanted(name) or (chosen and wanted(CHOICE))):
                continue
            for count in threads if chosen or not quick else threads[:1]:
                for outputs in ["recycled", "fresh"] if chosen and fresh else ["recycled"]:
                    kinds = {"chosen": chosen, "threads": count, "outputs": outputs}
                    found.append(calls.rival(part, name, **kinds))
    return found
