"""Times on a GPU, the most important first: carafepp, PyTorch's compositions, mmcv's CARAFE.

All passes and layouts of a problem share arrays, which are drawn on the GPU. A measurement goes
through several sets of them: a pass reads more than twice the level 2 cache. After 60 ms of the
same work, it replays one CUDA graph of at least 16 calls. PyTorch's and mmcv's calls are eager.
Three blocks of each result are checked first.

The floor of a pass moves every input and result once, at the bandwidth of a copy. One copy reads as
much as it writes; another writes three times as much.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import carafepp
from cases import Case
from cases.calls import is_generic

from .. import peers
from ..passes import Pass, as_nchw, in_layout, shape
from ..timing import sample, spread
from ..truth import Truth
from .devices import TorchGpu, TorchHost
from .items import CASES, Item
from .mmcv import built, load_mmcv
from .timing_names import DTYPES, FIRST, FLOORS, LAYOUTS, MMCV, OURS, PASSES
from .worker import Skip, Task, Worker

MOST_SETS = 64
# PyTorch's compositions and mmcv sum in the arrays' dtype.
SLACK = {"float32": 16, "float16": 4, "bfloat16": 2}


def items(listed: Callable[[Item], list[str]], has_mmcv: bool) -> Iterator[Item]:
    """Yield all items, the most important first.

    `listed` returns the implementations that accept an item, best first.
    """
    product = itertools.product

    def chosen(cases, weights="logits", passes=PASSES):
        for case, dtype, layout, pass_ in product(cases, DTYPES, LAYOUTS, passes):
            yield Item(case, dtype, layout, weights, pass_, OURS)

    def of_peers(cases, dtypes):
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
                if dtype == "float32" or not is_generic(name):  # generic ones take seconds
                    yield replace(item, name=name)

    yield from chosen(FIRST)
    yield from of_peers(("fpn2", "s2"), DTYPES[:2])
    yield from named(("fpn2", "s2"))
    yield from chosen([name for name in CASES if name not in FIRST])
    yield from of_peers(("fpn1", "rois"), DTYPES[:2])
    yield from of_peers(FIRST, DTYPES[2:])
    yield from chosen(FIRST, "masks", ("forward", "grad_features", "grad_masks"))


class Arrays:
    """The sets of arrays of one case, dtype and weights, made when a pass needs them."""

    def __init__(self, device: TorchGpu, case: Case, dtype: str, weights: str):
        self.device, self.case, self.dtype, self.weights = device, case, dtype, weights
        self._sets: dict[str, list[dict[str, Any]]] = {layout: [] for layout in LAYOUTS}
        self._generator = device.torch.Generator(device.name)
        self._generator.manual_seed(1)

    def sets(self, layout: str, pass_: Pass) -> list[dict[str, Any]]:
        """Return enough sets that a pass reads more than twice the cache."""
        size = getattr(self.device.torch, self.dtype).itemsize

        def total(names: tuple[str, ...]) -> int:
            return sum(size * math.prod(shape(self.case, name)) for name in names)

        set_bytes = 2 * total(("features", self.weights, "output"))  # each has its gradient
        room = max(1, int(0.4 * self.device.memory / len(LAYOUTS) // max(1, set_bytes)))
        count = min(MOST_SETS, room, -(-2 * self.device.cache // max(1, total(pass_.reads))))
        while len(self._sets[layout]) < count:
            self._sets[layout].append(self._new(layout))
        return self._sets[layout][:count]

    def _new(self, layout: str) -> dict[str, Any]:
        """Draw inputs, with the same first set in each layout; fill results with NaN."""
        torch = self.device.torch
        other_layout = LAYOUTS[layout == LAYOUTS[0]]
        other, number = self._sets[other_layout], len(self._sets[layout])
        made = {}
        for name in ("features", self.weights, "grad_output"):
            if number < len(other):
                nchw = as_nchw(other[number][name], other_layout)
            else:
                dtype = getattr(torch, self.dtype)
                nchw = torch.empty(shape(self.case, name), dtype=dtype, device=self.device.name)
                nchw.normal_(generator=self._generator)
            made[name] = in_layout(nchw, layout).contiguous()
            result = {"grad_output": "output"}.get(name, f"grad_{name}")
            made[result] = torch.full_like(made[name], float("nan"))
        return made

    @cached_property
    def truth(self) -> Truth:
        """The right results of the first set."""
        layout = next(layout for layout in LAYOUTS if self._sets[layout])
        first = self._sets[layout][0]

        def array(name: str) -> Any:
            return as_nchw(first[name], layout)

        return Truth(self.case, self.weights, self.dtype, array)


class Timing:
    """Computes items; keeps the arrays of the last one."""

    def __init__(self, device: TorchGpu, mmcv: Path | None):
        self.device, self._mmcv_tree = device, mmcv
        self._arrays: Arrays | None = None
        self.is_host = isinstance(device, TorchHost)

    def case(self, name: str) -> Case:
        """Return a case, in a rehearsal of a size that can be emulated."""
        case = CASES[name]
        if self.is_host:
            case = replace(case, n=min(case.n, 2), c=8, h=min(case.h, 4), w=min(case.w, 6))
        return case

    def arrays(self, item: Item) -> Arrays:
        """Return the arrays of an item; free those of another case or dtype."""
        last, wanted = self._arrays, (self.case(item.case), item.dtype, item.weights)
        if last is None or (last.case, last.dtype, last.weights) != wanted:
            self._arrays = last = None
            if not self.is_host:
                self.device.torch.cuda.empty_cache()
            self._arrays = Arrays(self.device, *wanted)
        return self._arrays

    def listed(self, item: Item) -> list[str]:
        """Return the implementations that accept an item, best first."""
        arrays = Arrays(self.device, self.case(item.case), item.dtype, item.weights)
        pass_ = item.as_pass(arrays.case)
        first = arrays.sets(item.layout, pass_)[0]
        return pass_.implementations(item.layout, lambda name: self.device.given(first[name]))

    def compute(self, item: Item) -> dict[str, Any]:
        """Check and time one item; return the facts of its line."""
        arrays = self.arrays(item)
        pass_ = item.as_pass(arrays.case)
        sets = arrays.sets(item.layout, pass_)
        is_ours = item.name not in (*peers.COMPOSITIONS, MMCV)
        calls = self._ours(item, pass_, sets) if is_ours else self._peers(item, pass_, sets)

        def check(call: Callable[[], Any]) -> None:
            for name in pass_.results:
                sets[0][name].fill_(float("nan"))
            results = call()
            self.device.synchronize()
            if is_ours:
                results = [as_nchw(sets[0][name], item.layout) for name in pass_.results]
            slack = 1 if is_ours else SLACK[item.dtype]
            arrays.truth.check(dict(zip(pass_.results, results, strict=True)), slack)

        check(calls[0])
        if is_ours:  # peers are slow, and a graph would keep their memory
            calls *= -(-self.device.calls // len(calls))

        def run() -> None:
            for call in calls:
                call()

        if is_ours:
            run = self.device.captured(run)
            check(run)
        samples, clocks = timed(self.device, run)
        samples = [seconds / len(calls) for seconds in samples]
        return {
            "us": round(spread(samples)[1] * 1e6, 3),
            "us_of_samples": [round(seconds * 1e6, 3) for seconds in samples],
            "calls": len(calls),
            "sets": len(sets),
            "graph": is_ours and not self.is_host,
            "megabytes": round(pass_.bytes(item.dtype) / 1e6, 3),
            "clocks": clocks,
        }

    def _ours(self, item: Item, pass_: Pass, sets: list[dict[str, Any]]) -> list[Callable]:
        """Return carafepp's calls; they force the implementation that the item names."""

        def forced(call: Callable[[], Any]) -> None:
            with carafepp.force_implementation(item.name):
                call()

        calls = [
            pass_.call(item.layout, lambda name, one=one: self.device.given(one[name]))
            for one in sets
        ]
        return calls if item.name == OURS else [partial(forced, call) for call in calls]

    def _peers(self, item: Item, pass_: Pass, sets: list[dict[str, Any]]) -> list[Callable]:
        """Return the calls of a composition or of mmcv."""
        if item.name == MMCV:
            function = self._mmcv(pass_)
        else:
            function = partial(peers.composed, item.name, pass_.case, item.weights)

        def call(one: dict[str, Any]) -> tuple:
            inputs = [as_nchw(one[name], item.layout) for name in ("features", item.weights)]
            if item.pass_ == "forward":
                return (peers.forward(function, *inputs),)
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            grad_output = as_nchw(one["grad_output"], item.layout)
            return peers.forward_backward(function, leaves, grad_output)

        return [partial(call, one) for one in sets]

    def _mmcv(self, pass_: Pass) -> Callable:
        if self._mmcv_tree is None or self.is_host:
            raise Skip("mmcv needs a GPU and the files of its tree")
        if reason := built(Path(os.environ["TORCH_EXTENSIONS_DIR"])):
            raise Skip(reason)
        carafe, case = load_mmcv(self._mmcv_tree), pass_.case
        functional = self.device.torch.nn.functional

        def function(features, values):
            masks = values
            if pass_.weights == "logits":
                masks = functional.softmax(functional.pixel_shuffle(values, case.up), 1)
            return carafe(features, masks, case.kernel_size, 1, case.up)

        return function


def timed(device: TorchGpu, call: Callable[[], Any]) -> tuple[list[float], list[int | None]]:
    """Return samples of the seconds of a call, and the clocks before and after them.

    The same work runs before the samples until the clocks settle.
    """
    call()
    once = max(device.seconds(call), 1e-7)
    end = time.perf_counter() + device.spin
    while time.perf_counter() < end:
        once = min(once, device.seconds(call))
    calls = max(1, int(device.sample_seconds / once))
    clock = device.clock()
    samples = [sample(call, calls, device.seconds) for _ in range(device.samples)]
    return samples, [clock, device.clock()]


def copy_bandwidth(device: TorchGpu, writes: int) -> float:
    """Return the bytes a second of a copy that writes each value `writes` times."""
    torch = device.torch
    rows = (1 << 30 if device.name == "cuda" else 1 << 16) // (1 + writes) // 4096
    original = torch.ones(rows, 1, 1024, device=device.name)
    copies = torch.empty(rows, writes, 1024, device=device.name)
    samples, _ = timed(device, lambda: copies.copy_(original.expand_as(copies)))
    return (original.nbytes + copies.nbytes) / spread(samples)[1]


def main() -> None:
    """Measure the floors, then time the items until the time is up."""
    tree = os.environ.get("CARAFEPP_GPU_MMCV")
    device = TorchHost() if Task.of_environment().rehearse else TorchGpu()
    worker = Worker()
    timing = Timing(device, Path(tree) if tree else None)
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
