"""A pass of a problem: the arrays it takes, its least cost, and carafepp's call."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import carafepp
from cases import Case, numpy_dtype

FLOPS = "2 K^2 N C H' W' for the output and for each gradient; taps beyond the border count too"
MIXED = "NCHW, masks NHWC"  # axes N, C, H, W; the memory of masks is channels last
BYTES = "each input and each result of a pass once; forward+backward: the sum of the two passes"


@dataclass(frozen=True)
class Pass:
    """A pass of a problem, from masks or from logits.

    Parameters
    ----------
    case : Case
    weights : "masks" or "logits"
    name : str
        "forward", "forward+backward", or a gradient: "grad_features", "grad_masks", "grad_logits".
    """

    case: Case
    weights: str
    name: str

    @property
    def results(self) -> tuple[str, ...]:
        """Return the names of the results."""
        both = ("output", "grad_features", f"grad_{self.weights}")
        return {"forward": both[:1], "forward+backward": both}.get(self.name, (self.name,))

    @property
    def reads(self) -> tuple[str, ...]:
        """Return the names of the inputs that are read."""
        return {
            "forward": ("features", self.weights),
            "grad_features": ("grad_output", self.weights),
            "grad_masks": ("grad_output", "features"),
        }.get(self.name, ("grad_output", "features", self.weights))

    @property
    def flops(self) -> int:
        """Return the operations: see FLOPS."""
        return 2 * self.case.terms * len(self.results)

    def bytes(self, dtype: str) -> int:
        """Return the bytes that have to move: see BYTES."""
        names = [*self.reads, *self.results]
        if self.name == "forward+backward":
            names += ["features", self.weights]  # each pass reads them
        elements = sum(math.prod(shape(self.case, name)) for name in names)
        return elements * numpy_dtype(dtype).itemsize

    def implementations(self, layout: str, array: Callable[[str], Any]) -> list[str]:
        """Return the implementations that accept this pass, best first; none of two passes.

        `array` returns an input by its name, with the axes of the layout.
        """
        function, params = self._function(layout)
        names = ["features", self.weights]
        if self.name == "forward":
            params |= self.case.crop
        else:
            function, names = f"{function}_backward", ["grad_output", *names]
        listed = carafepp.list_implementations(function, *map(array, names), **params)
        prefix = "" if self.name == "forward" else f"{self.name}_"
        return [name for name, reason in listed if reason is None and name.startswith(prefix)]

    def call(self, layout: str, array: Callable[[str], Any], fresh: bool = False) -> Callable:
        """Return carafepp's call, with results in `out=` or in fresh memory."""
        function, params = self._function(layout)
        inputs = [array("features"), array(self.weights)]
        outs = {name: None if fresh else array(name) for name in self.results}
        forward = partial(
            getattr(carafepp, function),
            *inputs,
            **params,
            **self.case.crop,
            out=outs.get("output"),
        )
        if self.name == "forward":
            return forward
        gradients = "grad_features", f"grad_{self.weights}"
        backward = partial(
            getattr(carafepp, f"{function}_backward"),
            array("grad_output"),
            *inputs,
            **params,
            **{f"need_{name.removeprefix('grad_')}": name in outs for name in gradients},
            out=tuple(map(outs.get, gradients)),
        )
        return backward if self.name in gradients else lambda: (forward(), *backward())

    def _function(self, layout: str) -> tuple[str, dict[str, Any]]:
        """Return the name of the forward function, and the parameters of both passes."""
        params = {**self.case.factors, "layout": "NHWC" if layout == "NHWC" else "NCHW"}
        if self.weights == "masks":
            return "reassemble", params
        return "reassemble_with_logits", {**params, "kernel_size": self.case.kernel_size}


def shape(case: Case, name: str) -> tuple[int, int, int, int]:
    """Return the shape of an array by its name, axes N, C, H, W, for a gradient too."""
    return getattr(case, f"{name.removeprefix('grad_')}_shape")


def as_nchw(array: Any, layout: str) -> Any:
    """Return a view with the axes N, C, H, W of an array or a tensor in the layout."""
    return array.swapaxes(2, 3).swapaxes(1, 2) if layout == "NHWC" else array


def in_layout(array: Any, layout: str) -> Any:
    """Return a view with the axes of the layout of an array or a tensor N, C, H, W."""
    return array.swapaxes(1, 2).swapaxes(2, 3) if layout == "NHWC" else array
