"""Times on a GPU: carafepp's kernels beside PyTorch's compositions and mmcv's CARAFE.

    python -m benchmarks.gpu_timing [--cases A,B] [--mmcv TREE] [--json FILE] [--markdown FILE]

Each rival is checked, then timed by events around calls that go through several sets of arrays,
together more than twice the level 2 cache, so that what is read comes from memory; where PyTorch
can capture them, the calls are one CUDA graph, without the price of a call. The floor is every
input and result once, at the bandwidth of a copy of 1 GiB measured in the same run. With
--device cpu everything but the figures' meaning is the same: the machinery runs without a GPU.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import carafepp
from cases import Case

from . import peers
from .mmcv_carafe import load_mmcv
from .problems import PROBLEMS, Arrays, touched_bytes
from .report import environment, table
from .truth import Truth

CASES = [
    PROBLEMS["fpn1"],
    PROBLEMS["fpn2"],
    Case("fpn3", "the largest level of an FPN", 2, 256, 200, 304, up=2, kernel_size=5),
    Case("rois", "the mask head on 1000 RoIs", 1000, 256, 14, 14, up=2, kernel_size=5),
    Case("stem", "the pooling of a ResNet stem", 64, 64, 112, 112, down=2, kernel_size=5),
    Case("s2", "a stride-2 stage of a ResNet", 64, 256, 56, 56, down=2, kernel_size=5),
    Case("s3", "a deep stage", 64, 512, 28, 28, down=2, kernel_size=5),
    PROBLEMS["tiny"],
]
PASSES = {  # from what, and the results
    "forward": ("logits", "masks"),
    "grad_features": ("masks",),
    "grad_masks": ("masks",),
    "grad_logits": ("logits",),
    "forward+backward": ("masks",),
}
SAMPLE = 5e-3  # seconds of calls in one sample
FEWEST, MOST = 5, 31  # samples of each rival
MOST_SETS = 64


@dataclass
class Timed:
    """One rival of one problem."""

    case: str
    pass_: str
    source: str
    dtype: str
    layout: str
    name: str
    kind: str  # carafepp, mmcv, composition or operator
    floor: float  # seconds
    samples: list[float] = field(default_factory=list)  # seconds a call
    captured: bool = False  # in a CUDA graph
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.samples)


class Device:
    """Where arrays are, and its clock."""

    def __init__(self, name: str):
        self.name = name
        self.is_gpu = name == "cuda"
        if self.is_gpu and not torch.cuda.is_available():
            sys.exit("PyTorch finds no GPU; --device cpu tries the machinery without one")
        self.cache = 1 << 20
        if self.is_gpu:
            self.cache = torch.cuda.get_device_properties(0).L2_cache_size

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the time of a call, until all that it queued is done."""
        if not self.is_gpu:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """Return the replay of what a call queues, or None where that cannot be captured."""
        if not self.is_gpu:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # PyTorch wants what is captured to have run before
                call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay

    def bandwidth(self) -> float:
        """Return the bytes a second that a copy reads and writes."""
        size = 1 << 30 if self.is_gpu else 1 << 24
        source = torch.ones(size, dtype=torch.uint8, device=self.name)
        target = torch.empty_like(source)
        times = [self.seconds(lambda: target.copy_(source)) for _ in range(9)]
        return 2 * size / statistics.median(times)


class Sets:
    """Several sets of the inputs and results of one problem, the first with the checked values."""

    def __init__(self, device: Device, arrays: Arrays, dtype: str, layout: str):
        self.case, self.source, self.dtype, self.layout = arrays.case, arrays.source, dtype, layout
        inputs = arrays.inputs(dtype, "NCHW")
        memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        first = {
            name: peers.tensor(getattr(inputs, name), "NCHW").to(
                device.name, memory_format=memory_format, copy=True
            )
            for name in ("features", "weights", "grad_output")
        }
        first["output"] = torch.empty_like(first["grad_output"])
        first["grad_features"] = torch.empty_like(first["features"])
        first["grad_weights"] = torch.empty_like(first["weights"])
        size = sum(tensor.nbytes for tensor in first.values())
        count = min(MOST_SETS, 1 + 2 * device.cache // size)
        self.sets = [first]
        for _ in range(count - 1):
            self.sets.append({name: tensor.clone() for name, tensor in first.items()})


# Rivals: {name: function of a set, which returns the results}.


def carafepp_calls(sets: Sets, pass_: str) -> dict[str, Callable]:
    """Return the choice for whole passes, and every implementation that accepts for the others."""
    case, function = sets.case, "reassemble"
    params: dict[str, Any] = {**case.factors}
    if sets.source == "logits":
        function, params["kernel_size"] = "reassemble_with_logits", case.kernel_size
    forward = partial(getattr(carafepp, function), **params, **case.crop)
    backward = partial(getattr(carafepp, f"{function}_backward"), **params)

    def call_forward(s):
        return (forward(s["features"], s["weights"], out=s["output"]),)

    def call_backward(s, features=True, weights=True):
        outs = s["grad_features"] if features else None, s["grad_weights"] if weights else None
        needed = {"need_features": features, f"need_{sets.source}": weights}
        results = backward(s["grad_output"], s["features"], s["weights"], **needed, out=outs)
        return tuple(result for result in results if result is not None)

    whole = {
        "forward": call_forward,
        "grad_features": partial(call_backward, weights=False),
        f"grad_{sets.source}": partial(call_backward, features=False),
        "forward+backward": lambda s: (*call_forward(s), *call_backward(s)),
    }[pass_]
    calls = {"carafepp": whole}
    if pass_ == "forward+backward":
        return calls
    first = sets.sets[0]
    inputs, options = [first["features"], first["weights"]], case.crop
    if pass_ != "forward":
        function, inputs, options = f"{function}_backward", [first["grad_output"], *inputs], {}
    for name, reason in carafepp.list_implementations(function, *inputs, **params, **options):
        if reason is None and (pass_ == "forward" or name.startswith(f"{pass_}_")):
            calls[name] = partial(_forced, name, whole)
    return calls


def _forced(name: str, call: Callable, arrays):
    with carafepp.force_implementation(name):
        return call(arrays)


def torch_calls(sets: Sets, pass_: str) -> dict[str, Callable]:
    """Return PyTorch's compositions, eager and one compiled."""
    functions = {
        name: partial(peers.composed, name, sets.case, sets.source)
        for name in peers.compositions(sets.case)
    }
    if "taps" in functions:
        functions["compiled taps"] = torch.compile(functions["taps"], dynamic=False)
    return {name: partial(_differentiated, f, pass_) for name, f in functions.items()}


def mmcv_calls(sets: Sets, pass_: str, carafe) -> dict[str, Callable]:
    """Return mmcv's CARAFE with PyTorch's preparation of its masks, where it has one."""
    case = sets.case
    if carafe is None or case.down > 1 or case.crop or sets.dtype == "bfloat16":
        return {}
    if sets.layout != "NCHW":
        return {}  # it would take the memory for that of NCHW

    def function(features, weights):
        masks = weights
        if sets.source == "logits":
            shuffled = torch.nn.functional.pixel_shuffle(weights, case.up)
            masks = torch.nn.functional.softmax(shuffled, 1)
        return carafe(features, masks, case.kernel_size, 1, case.up)

    return {"mmcv": partial(_differentiated, function, pass_)}


def _differentiated(function: Callable, pass_: str, arrays):
    """Run a forward, or a forward and its gradients, in fresh memory."""
    if pass_ == "forward":
        with torch.no_grad():
            return (function(arrays["features"], arrays["weights"]),)
    leaves = [arrays[name].detach().requires_grad_() for name in ("features", "weights")]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, arrays["grad_output"])


# One comparison


def compare(device: Device, problem: tuple, wanted: Callable, carafe, bandwidth: float):
    """Check and time all rivals of a pass of a problem; return a list of Timed."""
    case, pass_, source, dtype, layout = problem
    arrays = Arrays(case, source)
    sets = Sets(device, arrays, dtype, layout)
    gradients = ("grad_features", f"grad_{source}")
    names = {"forward": ("output",), "forward+backward": ("output", *gradients)}
    results = names.get(pass_, (pass_,))
    truth = Truth(arrays, dtype, results)
    floor = touched_bytes(case, pass_, source, dtype) / bandwidth
    found = []
    kinds = {"carafepp": carafepp_calls(sets, pass_)}
    if pass_ in names:  # one gradient alone is nobody else's
        kinds["composition"] = torch_calls(sets, pass_)
        kinds["mmcv"] = mmcv_calls(sets, pass_, carafe)
    for kind, calls in kinds.items():
        slack = 1 if kind == "carafepp" else 2 if dtype == "float32" else case.kernel_size**2
        for name, call in calls.items():
            if not wanted(name):
                continue
            row = Timed(case.name, pass_, source, dtype, layout, name, kind, floor)
            found.append(row)
            try:
                answers = tuple(result.cpu() for result in call(sets.sets[0]))
                truth.check(results, answers, slack)
                row.captured = _time(device, call, sets.sets, row.samples)
            except (AssertionError, RuntimeError, NotImplementedError) as error:
                row.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _time(device: Device, call: Callable, sets: list, samples: list[float]) -> bool:
    """Take samples; return whether the calls were captured in a CUDA graph."""

    def all_sets():
        for arrays in sets:
            call(arrays)

    graph = device.captured(all_sets)
    run = graph or all_sets
    run()
    rounds = max(1, int(SAMPLE / max(device.seconds(run), 1e-6)))

    def sample():
        for _ in range(rounds):
            run()

    end = time.perf_counter() + 0.3
    while len(samples) < FEWEST or (time.perf_counter() < end and len(samples) < MOST):
        samples.append(device.seconds(sample) / rounds / len(sets))
    return graph is not None


# Report


def rows_of(found: list[Timed]) -> Iterator[list[str]]:
    """Yield the cells of the table: times, and how they compare within a problem's pass."""
    key = lambda row: (row.case, row.pass_, row.source, row.dtype)  # noqa: E731
    for _, group in itertools.groupby(found, key):
        rows = list(group)
        for row in rows:
            cells = [row.case, row.pass_, row.source, row.dtype, row.layout, row.name]
            if row.error:
                yield [*cells, row.error, "", "", "", "", ""]
                continue
            low, *_, high = statistics.quantiles(row.samples, n=10, method="inclusive")
            yield [
                *cells,
                f"{row.median * 1e6:.1f}",
                f"{low * 1e6:.1f}-{high * 1e6:.1f}",
                f"{row.floor / row.median:.0%}",
                _ratio(row, [r for r in rows if r.kind == "composition"]),
                _ratio(row, [r for r in rows if r.kind == "mmcv"]),
                "graph" if row.captured else "calls",
            ]


def _ratio(row: Timed, others: list[Timed]) -> str:
    times = [other.median for other in others if other.samples]
    return f"{min(times) / row.median:.2f}" if times else "-"


HEADER = ["case", "pass", "from", "dtype", "layout", "implementation", "us", "p10-p90"]
HEADER += ["of the floor", "x best composition", "x mmcv", "timed as"]


def main() -> None:
    """Run what is asked for; exit with 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [case.name for case in CASES]
    for option, default in (
        ("cases", names),
        ("dtypes", ["float32", "float16", "bfloat16"]),
        ("layouts", ["NCHW", "NHWC"]),
        ("passes", list(PASSES)),
        ("rivals", []),
    ):
        parser.add_argument(f"--{option}", type=lambda text: text.split(","), default=default)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--mmcv", type=Path, help="a source tree of mmcv, to build its CARAFE from")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    device = Device(asked.device)
    carafe = load_mmcv(asked.mmcv) if asked.mmcv else None
    bandwidth = device.bandwidth()
    facts = {**environment(), "copy": f"{bandwidth / 1e9:.0f} GB/s read plus written"}
    if device.is_gpu:
        facts["GPU"] = torch.cuda.get_device_name()
    found = []
    problems = [
        (case, pass_, source, dtype, layout)
        for case in CASES
        if case.name in asked.cases
        for pass_ in asked.passes
        for source in PASSES[pass_]
        for dtype in asked.dtypes
        for layout in asked.layouts
    ]
    for k, problem in enumerate(problems):
        case, *rest = problem
        print(f"[{k + 1}/{len(problems)}]", case.name, *rest, file=sys.stderr, flush=True)
        found += compare(
            device,
            problem,
            lambda name: not asked.rivals or any(part in name for part in asked.rivals),
            carafe,
            bandwidth,
        )
        peers.forget_compiled()
    text = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    text += "\n\n" + table(HEADER, list(rows_of(found))) + "\n"
    print(text)
    if asked.markdown:
        asked.markdown.write_text(text)
    if asked.json:
        asked.json.write_text(json.dumps({"facts": facts, "rows": [asdict(r) for r in found]}))
    sys.exit(any(row.error.startswith("AssertionError") for row in found))


if __name__ == "__main__":
    main()
