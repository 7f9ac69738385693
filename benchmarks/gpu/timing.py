"""Times on a GPU, the most important first: carafepp, PyTorch's compositions, mmcv's CARAFE.

The arrays of a problem are drawn on the GPU and kept for all passes and layouts. A measurement goes
through several sets of them: what a pass reads exceeds twice the level 2 cache. It replays one CUDA
graph of at least 16 calls, after 60 ms of the same work. PyTorch's and mmcv's calls are eager.
Three windows of each result are checked first. The floor moves every input and result once. Its
bandwidth is that of a copy: one that reads as much as it writes, and one that writes three times as
much.
"""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import carafepp
from cases import Case, numpy_dtype

from .. import peers
from ..problems import PROBLEMS, touched_bytes
from .check import Windows
from .devices import TorchGpu, TorchHost, copy_bandwidth, timed
from .mmcv import built, load_mmcv
from .timing_names import DTYPES, FIRST, FLOORS, LAYOUTS, MMCV, OURS, PASSES
from .worker import Skip, Task, Worker

CASES = {
    case.name: case
    for case in (
        PROBLEMS["fpn2"],
        PROBLEMS["fpn1"],
        Case("s2", "a stride-2 stage of a ResNet", 64, 256, 56, 56, down=2, kernel_size=5),
        Case("rois", "the mask head on 1000 RoIs", 1000, 256, 14, 14, up=2, kernel_size=5),
        Case("stem", "the pooling of a ResNet stem", 64, 64, 112, 112, down=2, kernel_size=5),
        Case("s3", "a deep stage", 64, 512, 28, 28, down=2, kernel_size=5),
        Case("fpn1_up4", "a factor of the generic kernels", 2, 256, 50, 76, up=4, kernel_size=5),
        PROBLEMS["tiny"],
    )
}
MOST_SETS = 64

# The arrays that a pass reads.
_READS = {
    "forward": ("features", "weights"),
    "grad_features": ("weights", "grad_output"),
    "grad_masks": ("features", "grad_output"),
    "grad_logits": ("features", "weights", "grad_output"),
    "forward+backward": ("features", "weights", "grad_output"),
}


@dataclass(frozen=True)
class Item:
    """One measurement. Items of the same arrays follow each other within a tier."""

    case: str
    dtype: str
    layout: str
    source: str
    pass_: str
    name: str  # carafepp: its own choice; an implementation; a composition of PyTorch; mmcv

    def __str__(self) -> str:  # noqa: D105
        name = self.name.replace(" ", "_")
        return f"{self.case} {self.dtype} {self.layout} {self.source} {self.pass_} {name}"


def items(listed: Callable[[Item], list[str]], has_mmcv: bool) -> Iterator[Item]:
    """Yield all items, the most important first.

    `listed` returns the implementations that take an item, best first.
    """
    product = itertools.product

    def chosen(cases, source="logits", passes=PASSES):
        for case, dtype, layout, pass_ in product(cases, DTYPES, LAYOUTS, passes):
            yield Item(case, dtype, layout, source, pass_, OURS)

    def rivals(cases, dtypes):
        for case, dtype, layout in product(cases, dtypes, LAYOUTS):
            names = list(peers.compositions(CASES[case]))
            if has_mmcv and layout == "NCHW" and CASES[case].up > 1 and dtype != "bfloat16":
                names.append(MMCV)
            for pass_, name in product(("forward", "forward+backward"), names):
                yield Item(case, dtype, layout, "logits", pass_, name)

    def named(cases):
        for case, dtype, layout, pass_ in product(cases, DTYPES, LAYOUTS, PASSES[:3]):
            item = Item(case, dtype, layout, "logits", pass_, OURS)
            for name in listed(item)[1:]:  # the first is carafepp's own choice
                yield replace(item, name=name)

    yield from chosen(FIRST)
    yield from rivals(("fpn2", "s2"), DTYPES[:2])
    yield from named(("fpn2", "s2"))
    yield from rivals(("fpn1", "rois"), DTYPES[:2])
    yield from chosen([name for name in CASES if name not in FIRST])
    yield from rivals(FIRST, DTYPES[2:])
    yield from chosen(FIRST, "masks", ("forward", "grad_features", "grad_masks"))


class Arrays:
    """The sets of arrays of one case, dtype and source, made when a pass needs them."""

    def __init__(self, device: TorchGpu, case: Case, dtype: str, source: str):
        self.device, self.case, self.dtype, self.source = device, case, dtype, source
        self._sets: dict[str, list[dict[str, Any]]] = {layout: [] for layout in LAYOUTS}
        self._generator = device.torch.Generator(device.name)
        self._generator.manual_seed(1)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        case = self.case
        weights = case.logits_shape if self.source == "logits" else case.masks_shape
        return {
            "features": case.features_shape,
            "weights": weights,
            "grad_output": case.output_shape,
        }

    def sets(self, layout: str, pass_: str) -> list[dict[str, Any]]:
        """Return as many sets as make what a pass reads exceed twice the cache."""
        size = numpy_dtype(self.dtype).itemsize
        shapes = self._shapes()
        read = sum(math.prod(shapes[name]) * size for name in _READS[pass_])
        all_bytes = 2 * sum(math.prod(shape) * size for shape in shapes.values())
        room = max(1, int(0.4 * self.device.memory / len(LAYOUTS) // max(1, all_bytes)))
        count = min(MOST_SETS, room, -(-2 * self.device.cache // max(1, read)))
        while len(self._sets[layout]) < count:
            self._sets[layout].append(self._new(layout))
        return self._sets[layout][:count]

    def _new(self, layout: str) -> dict[str, Any]:
        """Draw inputs, the first set the same in each layout, and make results of NaN."""
        torch = self.device.torch
        other = self._sets[LAYOUTS[layout == LAYOUTS[0]]]
        number = len(self._sets[layout])
        made = {}
        for name, shape in self._shapes().items():
            if number < len(other):
                nchw = as_nchw(other[number][name], LAYOUTS[layout == LAYOUTS[0]])
            else:
                dtype = getattr(torch, self.dtype)
                nchw = torch.empty(shape, dtype=dtype, device=self.device.name)
                nchw.normal_(generator=self._generator)
            made[name] = in_layout(nchw, layout).contiguous()
        result_of = {"output": "grad_output", "grad_features": "features"}
        result_of[f"grad_{self.source}"] = "weights"
        for result, name in result_of.items():
            made[result] = torch.full_like(made[name], float("nan"))
        return made

    @cached_property
    def truth(self) -> Windows:
        """The expected results, for the first set."""
        layout = next(layout for layout in LAYOUTS if self._sets[layout])
        first = self._sets[layout][0]
        inputs = (as_nchw(first[name], layout) for name in ("features", "weights", "grad_output"))
        return Windows(self.case, self.source, *inputs)


def in_layout(tensor: Any, layout: str) -> Any:
    """Return a view with the axes of a layout of a tensor N, C, H, W."""
    return tensor if layout == "NCHW" else tensor.permute(0, 2, 3, 1)


def as_nchw(tensor: Any, layout: str) -> Any:
    """Return a view with the axes N, C, H, W."""
    return tensor if layout == "NCHW" else tensor.permute(0, 3, 1, 2)


class Timing:
    """Computes items; keeps the arrays of the last one."""

    def __init__(self, device: TorchGpu, worker: Worker, mmcv: Path | None):
        self.device, self.worker, self._mmcv_tree = device, worker, mmcv
        self._arrays: Arrays | None = None
        self.is_host = isinstance(device, TorchHost)

    def case(self, name: str) -> Case:
        """Return a case, in a rehearsal of a size that can be emulated."""
        case = CASES[name]
        if self.is_host:
            case = replace(case, n=min(case.n, 2), c=8, h=min(case.h, 4), w=min(case.w, 6))
        return case

    def arrays(self, item: Item) -> Arrays:
        """Return the arrays of an item; those of another case or dtype are freed."""
        last, case = self._arrays, self.case(item.case)
        if last is None or (last.case, last.dtype, last.source) != (case, item.dtype, item.source):
            self._arrays = last = None
            if not self.is_host:
                self.device.torch.cuda.empty_cache()
            self._arrays = Arrays(self.device, case, item.dtype, item.source)
        return self._arrays

    def listed(self, item: Item) -> list[str]:
        """Return the implementations that take an item, best first."""
        case, given = self.case(item.case), self.device.given
        arrays = Arrays(self.device, case, item.dtype, item.source)
        first = arrays.sets(item.layout, "forward")[0]
        inputs = [given(first[name]) for name in ("features", "weights")]
        function, params = _function(case, item.source)
        options: dict[str, Any] = {"layout": item.layout, **params}
        if item.pass_ != "forward":
            function, inputs = f"{function}_backward", [given(first["grad_output"]), *inputs]
        entries = carafepp.list_implementations(function, *inputs, **options)
        return [
            name
            for name, reason in entries
            if reason is None and (item.pass_ == "forward" or name.startswith(f"{item.pass_}_"))
        ]

    def compute(self, item: Item) -> dict[str, Any]:
        """Check and time one item; return the facts of its line."""
        arrays = self.arrays(item)
        sets = arrays.sets(item.layout, item.pass_)
        call = self._call(item, arrays.case)
        self._check(item, arrays, call)
        calls = len(sets)
        captured = item.name not in peers.COMPOSITIONS and item.name != MMCV
        if captured:  # others are slow, and their memory would stay with the graph
            calls *= -(-self.device.calls // len(sets))

        def run() -> None:
            for k in range(calls):
                call(sets[k % len(sets)])

        if captured:
            run = self.device.captured(run)
            self._check(item, arrays, lambda _: run())
        samples, clocks = timed(self.device, run)
        samples = [seconds / calls for seconds in samples]
        traffic = touched_bytes(arrays.case, item.pass_, item.source, item.dtype)
        return {
            "us": round(statistics.median(samples) * 1e6, 3),
            "us_of_samples": [round(seconds * 1e6, 3) for seconds in samples],
            "calls": calls,
            "sets": len(sets),
            "graph": captured and not self.is_host,
            "megabytes": round(traffic / 1e6, 3),
            "clocks": clocks,
        }

    def _check(self, item: Item, arrays: Arrays, call: Callable) -> None:
        first = arrays.sets(item.layout, item.pass_)[0]
        names = {
            "forward": ["output"],
            "forward+backward": ["output", "grad_features", f"grad_{item.source}"],
        }.get(item.pass_, [item.pass_])
        ours = item.name not in peers.COMPOSITIONS and item.name != MMCV
        # PyTorch's compositions and mmcv sum in 16 bits.
        slack = 1 if ours else {"float32": 16, "float16": 4, "bfloat16": 2}[item.dtype]
        for name in names:
            first[name].fill_(float("nan"))
        results = call(first)
        self.device.synchronize()
        for k, name in enumerate(names):
            result = as_nchw(first[name], item.layout) if ours else results[k]
            try:
                arrays.truth.check(name, result, item.dtype, slack)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    def _call(self, item: Item, case: Case) -> Callable[[dict[str, Any]], Any]:
        """Return a function of one set."""
        if item.name == MMCV:
            return partial(_differentiated, self._mmcv(case, item.source), item)
        if item.name in peers.COMPOSITIONS:
            function = partial(peers.composed, item.name, case, item.source)
            return partial(_differentiated, function, item)
        return self._ours(item, case)

    def _ours(self, item: Item, case: Case) -> Callable[[dict[str, Any]], Any]:
        function, params = _function(case, item.source)
        forward = partial(getattr(carafepp, function), layout=item.layout, **params)
        backward = partial(getattr(carafepp, f"{function}_backward"), layout=item.layout, **params)
        features = item.pass_ in ("grad_features", "forward+backward")
        weights = item.pass_ in (f"grad_{item.source}", "forward+backward")
        needs = {"need_features": features, f"need_{item.source}": weights}
        given = self.device.given

        def call(arrays: dict[str, Any]) -> None:
            x, m = given(arrays["features"]), given(arrays["weights"])
            if item.pass_ in ("forward", "forward+backward"):
                forward(x, m, out=given(arrays["output"]))
            if features or weights:
                outs = (
                    given(arrays["grad_features"]) if features else None,
                    given(arrays[f"grad_{item.source}"]) if weights else None,
                )
                backward(given(arrays["grad_output"]), x, m, **needs, out=outs)

        if item.name == OURS:
            return call

        def forced(arrays: dict[str, Any]) -> None:
            with carafepp.force_implementation(item.name):
                call(arrays)

        return forced

    def _mmcv(self, case: Case, source: str) -> Callable:
        if self._mmcv_tree is None or self.is_host:
            raise Skip("mmcv needs a GPU and the files of its tree")
        if reason := built(Path(os.environ["TORCH_EXTENSIONS_DIR"])):
            raise Skip(reason)
        carafe = load_mmcv(self._mmcv_tree)
        functional = self.device.torch.nn.functional

        def function(features, weights):
            masks = weights
            if source == "logits":
                masks = functional.softmax(functional.pixel_shuffle(weights, case.up), 1)
            return carafe(features, masks, case.kernel_size, 1, case.up)

        return function


def _function(case: Case, source: str) -> tuple[str, dict[str, Any]]:
    """Return the forward function's name and the parameters that its backward has too."""
    if source == "masks":
        return "reassemble", dict(case.factors)
    return "reassemble_with_logits", {**case.factors, "kernel_size": case.kernel_size}


def _differentiated(function: Callable, item: Item, arrays: dict[str, Any]) -> tuple:
    """Run a forward, or a forward and its gradients, of PyTorch's; return the results."""
    import torch

    inputs = [as_nchw(arrays[name], item.layout) for name in ("features", "weights")]
    if item.pass_ == "forward":
        with torch.no_grad():
            return (function(*inputs),)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    grad_output = as_nchw(arrays["grad_output"], item.layout)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def main() -> None:
    """Measure the floors, then time the items until the time is up."""
    tree = os.environ.get("CARAFEPP_GPU_MMCV")
    device = TorchHost() if Task.of_environment().rehearse else TorchGpu()
    worker = Worker(device.is_lost)
    timing = Timing(device, worker, Path(tree) if tree else None)
    worker.run(FLOORS, lambda item: {"GB_per_s": copy_bandwidth(device, int(item[-1])) / 1e9})

    def listed(item: Item) -> list[str]:
        name = f"{item} listed"  # an item of its own: a failure here must not end the step
        worker.run([name], lambda _: {"names": timing.listed(item)})
        return worker.results.last(worker.task.step)[name].get("names", [])

    due = items(listed, bool(tree))
    for item in itertools.islice(due, 9) if worker.task.quick else due:
        if not worker.has_time():
            break
        worker.run([str(item)], lambda _, item=item: timing.compute(item))


if __name__ == "__main__":
    main()
