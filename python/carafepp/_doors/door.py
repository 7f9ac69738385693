"""The interface of an array library, and the computation that all libraries share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from .. import _core
from .._arguments import NORMALIZERS, check_normalizer, integer, padding_pair, pair

_LAYOUTS = {"NCHW": False, "NHWC": True}

forced_implementation: ContextVar[str | None] = ContextVar("implementation", default=None)


class Function(NamedTuple):
    """A function of the core. It has the same name in carafepp, in `_core` and in carafepp.h.

    `like` has, for each result, the index of the input with its device and dtype. With
    `same_shape`, the result has the shape of that input too. `out` has the caller's names of the
    results.
    """

    number: int  # in carafepp.h
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    like: tuple[int, ...] = (0,)
    same_shape: bool = False
    out: tuple[str, ...] = ("out",)


FUNCTIONS = {
    "reassemble": Function(
        number=_core.REASSEMBLE,
        inputs=("features", "masks"),
        results=("output",),
    ),
    "reassemble_backward": Function(
        number=_core.REASSEMBLE_BACKWARD,
        inputs=("grad_output", "features", "masks"),
        results=("grad_features", "grad_masks"),
        like=(1, 2),
        same_shape=True,
        out=("out[0]", "out[1]"),
    ),
    "reassemble_with_logits": Function(
        number=_core.REASSEMBLE_WITH_LOGITS,
        inputs=("features", "logits"),
        results=("output",),
    ),
    "reassemble_with_logits_backward": Function(
        number=_core.REASSEMBLE_WITH_LOGITS_BACKWARD,
        inputs=("grad_output", "features", "logits"),
        results=("grad_features", "grad_logits"),
        like=(1, 2),
        same_shape=True,
        out=("out[0]", "out[1]"),
    ),
    "normalize_masks": Function(
        number=_core.NORMALIZE_MASKS,
        inputs=("logits",),
        results=("masks",),
    ),
    "normalize_masks_backward": Function(
        number=_core.NORMALIZE_MASKS_BACKWARD,
        inputs=("grad_masks", "logits"),
        results=("grad_logits",),
        like=(1,),
        same_shape=True,
    ),
}


class Door:
    """An array library: how to recognise, read and make its arrays.

    A library implements the first four methods. A library with operators of its own (differentiable
    or traced) overrides `call`. Only `compute` needs `view`, `empty` and `stream`.
    """

    cast = ""  # how the library casts an array {} to a dtype {}, for errors

    def recognise(self, array: Any) -> str | None:
        """Return the name of the library if the array belongs to it, else None."""
        raise NotImplementedError

    def view(self, function: str, name: str, array: Any) -> Any:
        """Return an array as `_core` takes it: itself, a DLPack capsule, or (array, dtype)."""
        raise NotImplementedError

    def empty(self, function: str, like: Any, shape: Sequence[int]) -> Any:
        """Return an uninitialised result with the device and the dtype of `like`."""
        raise NotImplementedError

    def stream(self, array: Any) -> int:
        """Return the CUDA stream to queue the work on; 0 is the legacy default stream."""
        raise NotImplementedError

    def compute(
        self,
        function: str,
        inputs: tuple[Any, ...],
        params: Mapping[str, Any],
        out: tuple[Any, ...] = (None, None),
        needed: tuple[bool, ...] = (True, True),
    ) -> tuple[Any, ...]:
        """Run a function of the core, and return its results.

        `out` has an array to write each result into, or None for a new one. A result that is not
        needed is None.
        """
        spec = FUNCTIONS[function]
        core_params = params_of(function, **params)
        views: list[Any] = []
        for k, name in enumerate(spec.inputs):
            views += [self.view(function, name, inputs[k])]
        results: list[Any] = []
        for k, name in enumerate(spec.out):
            result = out[k]
            if result is None and needed[k]:
                try:
                    shape = result_shape(function, core_params, params, inputs, k)
                    result = self.empty(function, inputs[spec.like[k]], shape)
                except (MemoryError, RuntimeError, ValueError):
                    self._check_inputs(function, inputs, core_params)
                    raise
            results += [result]
            views += [None if result is None else self.view(function, name, result)]
        try:
            getattr(_core, function)(core_params, *views, self.stream(inputs[0]))
        except (TypeError, ValueError, NotImplementedError) as error:
            error.args = (self._in_callers_words(function, str(error)),)
            raise
        return tuple(results)

    call = compute  # a library with operators of its own overrides call

    def _in_callers_words(self, function: str, sentence: str) -> str:
        """Return an error sentence of the core with the caller's names of results, and a cast."""
        spec = FUNCTIONS[function]
        names = dict(zip(spec.results, spec.out, strict=True))
        pattern = rf"(\] |share memory with )({'|'.join(names)})\b"
        sentence = re.sub(pattern, lambda match: match[1] + names[match[2]], sentence)
        sentence = sentence.partition(" In C, ")[0]
        cast = re.search(r"Cast (\w+) to (float\d+)\.$", sentence)
        if cast is None or not self.cast:
            return sentence
        return f"{sentence[:-1]}: {self.cast.format(*cast.groups())}."

    def _check_inputs(
        self, function: str, inputs: tuple[Any, ...], core_params: _core.Params
    ) -> None:
        """Let the core refuse inputs: a result may be too large because an argument is wrong."""
        spec = FUNCTIONS[function]
        views = [self.view(function, spec.inputs[k], array) for k, array in enumerate(inputs)]
        try:
            _core.list_implementations(core_params, views, [None for _ in spec.results])
        except (TypeError, ValueError, NotImplementedError) as error:
            error.args = (self._in_callers_words(function, str(error)),)
            raise error from None


def result_shape(
    function: str,
    core_params: _core.Params,
    params: Mapping[str, Any],
    inputs: tuple[Any, ...],
    k: int,
) -> Sequence[int]:
    """Return the shape of result k of a function."""
    spec = FUNCTIONS[function]
    shape: Sequence[int] = inputs[spec.like[k]].shape
    if spec.same_shape:
        return shape
    if function == "reassemble" and params.get("padding") is not None:
        # The natural size depends on kernel_size, which only the masks tell.
        axes = slice(-3, -1) if params.get("layout") == "NHWC" else slice(-2, None)
        shape = [*shape]
        shape[axes] = inputs[1].shape[axes]
        return shape
    return _core.output_shape(core_params, shape)


def not_an_array(function: str, name: str, value: Any) -> TypeError:
    """Return the error for a value that no library recognises."""
    return TypeError(
        f"[{function}] {name} must be an array: of NumPy, PyTorch or another library that speaks "
        f"DLPack; got {type(value).__name__}."
    )


def params_of(
    function: str,
    *,
    up: int = 1,
    down: int = 1,
    kernel_size: int = 0,
    groups: int = 1,
    normalizer: str = "none",
    size: tuple[int, int] | None = None,
    layout: str = "NCHW",
    padding: int | tuple[int, int] | None = None,
) -> _core.Params:
    """Return the parameters as the core takes them: words become numbers."""
    if not (type(up) is type(down) is type(groups) is type(kernel_size) is int):
        numbers = {"up": up, "down": down, "groups": groups, "kernel_size": kernel_size}
        up, down, groups, kernel_size = [  # the core checks their ranges
            integer(function, name, value, least=None) for name, value in numbers.items()
        ]
    if size is not None:
        size = pair(function, size)
    if padding is not None:
        padding = padding_pair(function, padding)
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise ValueError(f"[{function}] layout must be 'NCHW' or 'NHWC'; got {layout!r}.")
    check_normalizer(function, normalizer)
    return _core.Params(
        function,
        FUNCTIONS[function].number,
        up,
        down,
        kernel_size,
        groups,
        NORMALIZERS[normalizer],
        size,
        padding,
        _LAYOUTS[layout],
        forced_implementation.get(),
    )
