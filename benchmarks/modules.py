"""The CARAFE++ module beside other modules: `python -m benchmarks.modules --help`.

The same module is composed of PyTorch's functions: pixel_shuffle, softmax and each composition of
`peers`. The fastest one is also compiled. Other candidates are the layers that CARAFE++ replaces.
Tables tell time, peak memory, parameters and operations. "forward+backward" computes the gradients
of the input and of all parameters.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from carafepp.torch import CARAFE

from . import peers, report, timing
from .problems import PROBLEMS
from .timing import Candidate

CASES = "fpn1,fpn2,stem,s2"
PASSES = ("forward", "forward+backward")


class Composed(CARAFE):
    """The module with a reassembly composed of PyTorch's functions; it stores the masks."""

    def __init__(self, composition: str, case, **options):
        super().__init__(case.c, **options)
        self.reassemble = partial(peers.composed, composition, case, "logits")

    def forward(self, x):  # noqa: D102
        return self.reassemble(x, self.logits(x))


def modules(case) -> dict[str, Callable[[], nn.Module]]:
    """Return a constructor of each module for this factor, by name."""
    c, factor = case.c, {"up": case.up, "down": case.down}
    made = {"carafepp": partial(CARAFE, c, **factor)}
    for name in peers.compositions(case):
        made[f"composed: {name}"] = partial(Composed, name, case, **factor)
    if case.up > 1:
        s = case.up
        made |= {
            "nearest": partial(nn.Upsample, scale_factor=s),
            "bilinear": partial(nn.Upsample, scale_factor=s, mode="bilinear"),
            "conv_transpose": partial(nn.ConvTranspose2d, c, c, s, s),
        }
    else:
        s = case.down
        made |= {
            "max_pool": partial(nn.MaxPool2d, s, ceil_mode=True),
            "conv 3x3, stride": partial(nn.Conv2d, c, c, 3, s, 1),
        }
    return made


def candidate(name: str, module: nn.Module, x: torch.Tensor, pass_: str, **labels) -> Candidate:
    """Return one module's pass; its gradients are those of the parameters and of the input."""
    labels = {"pass": pass_, "parameters": sum(p.numel() for p in module.parameters()), **labels}
    threads = labels.pop("threads")
    if pass_ == "forward":
        return Candidate(name, partial(peers.forward, module, x), threads, labels=labels)
    leaves = [x, *module.parameters()]
    output = peers.forward(module, x)
    torch.manual_seed(1)  # the same values for each memory format
    grad_output = torch.empty_like(output).copy_(torch.randn(output.shape))
    call = partial(peers.forward_backward, lambda x, *_: module(x), leaves, grad_output)
    return Candidate(name, call, threads, labels=labels)


def flops(module: nn.Module, x: torch.Tensor) -> int:
    """Return the operations of a forward: 2 for each multiplication and addition."""

    def reassembly(features_shape, logits_shape, *args, out_shape, kernel_size=5, **kwargs):
        return 2 * kernel_size**2 * torch.Size(out_shape).numel()

    ours = {torch.ops.carafepp.reassemble_with_logits: reassembly}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ours) as counter:
        module(x)
    return counter.get_total_flops()


def compare(case, layout: str, pass_: str, threads: int, seconds: float, compiled: bool) -> list:
    """Check the answers and time all candidates; return a row for each, carafepp's first."""
    torch.manual_seed(0)
    memory_format = peers.FORMATS[layout]
    x = torch.randn(case.features_shape).to(memory_format=memory_format).requires_grad_()
    made = {name: make().to(memory_format=memory_format) for name, make in modules(case).items()}
    ours = made["carafepp"]
    same = {"carafepp", *(name for name in made if name.startswith("composed"))}
    for name in same:
        made[name].load_state_dict(ours.state_dict())
    shape = {"case": case.name, "layout": layout, "threads": threads}
    positions = case.n * case.h * case.w
    candidates, expected = [], None

    def add(name: str, module: nn.Module, operations: int) -> None:
        nonlocal expected
        facts = {**shape, "FLOPs a position": operations / positions}
        candidates.append(candidate(name, module, x, pass_, **facts))
        candidates[-1].compiles = name.startswith("compiled")
        results = timing.warm_up(candidates[-1])
        expected = results if name == "carafepp" else expected
        if name.removeprefix("compiled ") in same:
            message = partial("{} is wrong: {}".format, name)
            torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-3, msg=message)

    for name, module in made.items():
        add(name, module, flops(ours if name in same else module, x))
    if compiled:
        best = min(
            (one for one in candidates if one.name in same - {"carafepp"}),
            key=lambda one: one.warm_up,
        ).name
        add(f"compiled {best}", torch.compile(made[best], dynamic=False), flops(ours, x))
    timing.measure(candidates, seconds)
    return [one.row() for one in candidates]


def columns(rows: list[dict]) -> dict[str, Callable[[dict], str]]:
    """Return the columns of one comparison; amounts are multiples of the first row's."""
    return {
        "": lambda row: row["name"],
        "time": report.multiple(rows, "seconds", 1e-3, "ms"),
        "median, q3, ms": report.interval,
        "n": lambda row: str(row["samples"]),
        "peak memory": report.multiple(rows, "memory", 2**20, "MiB"),
        "parameters": lambda row: f"{row['parameters']:,}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write."""
    parser = report.parser("benchmarks.modules", __doc__, 10)
    words = report.words
    parser.add_argument("--cases", default=CASES, type=words(PROBLEMS), help=", ".join(PROBLEMS))
    text = "NHWC: channels_last"
    parser.add_argument("--layout", default="NCHW,NHWC", type=words(peers.FORMATS), help=text)
    parser.add_argument("--threads", default=1, type=report.count)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    asked = parser.parse_args(arguments)
    pages = report.Report(times=timing.HOW)
    rows = []
    todo = list(itertools.product(asked.cases, asked.layout, PASSES))
    for case, layout, pass_ in pages.track(todo, " ".join):
        if not asked.eager:
            peers.forget_compiled()
        problem = PROBLEMS[case]
        found = compare(problem, layout, pass_, asked.threads, asked.seconds, not asked.eager)
        factor = f"up x{problem.up}" if problem.up > 1 else f"down x{problem.down}"
        title = f"{case}: {factor}, {problem.features_shape}, {layout}, float32, {pass_}"
        per_position = {"FLOPs a position": lambda row: f"{row['FLOPs a position']:,.0f}"}
        pages.table(f"{title}, threads: {asked.threads}", found, columns(found) | per_position)
        rows += found
    pages.write(asked, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
