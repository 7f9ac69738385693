"""The CARAFE++ module beside its like: `python -m benchmarks.modules --help`.

Rivals are the same module composed of PyTorch's functions (pixel_shuffle, softmax and each of the
compositions of `peers`), eager and, of the fastest one, compiled; and the layers that CARAFE++
takes the place of. Time, peak memory, parameters and operations, with the gradients of the input
and of all parameters in "forward+backward".
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import carafepp
from carafepp.torch import CARAFE

from . import memory, peers, report, timing
from .problems import PROBLEMS
from .rivals import Rival

CASES = ["fpn1", "fpn2", "stem", "s2"]
PASSES = ("forward", "forward+backward")
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Of the paper's, for one position of the source (CARAFE, section 3.3: C=256, C_m=64, up x2).
PAPER = {"parameters": 74_000, "FLOPs a position": 199_000}


class Composed(CARAFE):
    """The module with the reassembly composed of PyTorch's functions; masks are stored."""

    def __init__(self, composition: str, case, **options):
        super().__init__(case.c, **options)
        self.reassemble = partial(peers.composed, composition, case, "logits")

    def forward(self, x):  # noqa: D102
        return self.reassemble(x, self.logits(x))


def modules(case) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each module of this factor, by name."""
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


def call(module: nn.Module, x: torch.Tensor, grad_output: torch.Tensor, pass_: str):
    """Run one pass; gradients go to parameters and input, which had none."""
    if pass_ == "forward":
        with torch.no_grad():
            return module(x)
    leaves = [x, *module.parameters()]
    output = module(x)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def flops(module: nn.Module, x: torch.Tensor) -> int:
    """Return the operations of a forward: 2 for each multiplication and addition."""

    def reassembly(features_shape, logits_shape, *args, out_shape, kernel_size=5, **kwargs):
        return 2 * kernel_size**2 * torch.Size(out_shape).numel()

    ours = {torch.ops.carafepp.reassemble_with_logits: reassembly}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ours) as counter:
        module(x)
    return counter.get_total_flops()


def compare(case, layout: str, threads: int, seconds: float, compiled: bool) -> list[dict]:
    """Check the answers, time all rivals, and return a row for each."""
    torch.manual_seed(0)
    memory_format = FORMATS[layout]
    x = torch.randn(case.features_shape).to(memory_format=memory_format).requires_grad_()
    grad_output = torch.randn(case.output_shape).to(memory_format=memory_format)
    made = {name: make().to(memory_format=memory_format) for name, make in modules(case).items()}
    ours = made["carafepp"]
    for module in made.values():
        if isinstance(module, Composed):
            module.load_state_dict(ours.state_dict())
    rivals = {
        (name, pass_): rival(name, module, x, grad_output, pass_, layout, threads)
        for name, module in made.items()
        for pass_ in PASSES
    }
    measure(rivals, ours, x, grad_output, seconds)
    if compiled:
        for pass_ in PASSES:
            composed = [key for key in rivals if key[1] == pass_ and key[0].startswith("composed")]
            best = min(composed, key=lambda key: timing.spread(rivals[key].samples)[1])[0]
            more = {
                (f"compiled {name}", pass_): rival(
                    f"compiled {name}",
                    torch.compile(made[name], dynamic=False),
                    *(x, grad_output, pass_, layout, threads),
                )
                for name in ("carafepp", best)
            }
            # Beside what they are compared with, once more.
            again = {key: rivals[key] for key in (("carafepp", pass_), (best, pass_))}
            measure({**more, **again}, ours, x, grad_output, seconds)
            rivals |= more
    positions = case.n * case.h * case.w
    return [
        {
            "case": case.name,
            "layout": layout,
            "threads": threads,
            "name": name,
            "pass": pass_,
            "seconds": timing.spread(one.samples),
            "memory": one.memory,
            "parameters": sum(p.numel() for p in module.parameters()),
            "FLOPs a position": flops(ours if "compose" in name else module, x) / positions,
        }
        for (name, pass_), one in rivals.items()
        for module in [made[name.removeprefix("compiled ")]]
    ]


def rival(name, module, x, grad_output, pass_, layout, threads) -> Rival:
    """Return one module's pass, ready to be called."""
    return Rival(
        name=name,
        kind="carafepp"
        if "carafepp" in name
        else "composition"
        if "composed" in name
        else "operator",
        pass_=pass_,
        source="x",
        layout=layout,
        dtype="float32",
        threads=threads,
        outputs="fresh",
        call=partial(call, module, x, grad_output, pass_),
        settings=partial(settings, threads),
    )


def settings(threads: int):
    """Set the threads of both."""
    carafepp.set_num_threads(threads)
    return peers.settings(threads)


def measure(rivals: dict, ours: nn.Module, x, grad_output, seconds: float) -> None:
    """Check what has an answer, then take samples; raise if an answer is wrong."""
    for (name, pass_), one in rivals.items():
        with one.settings():
            one.call()  # whatever a first call does, compiling say, is not measured
            results, one.memory = memory.peak(one.call)
            if one.kind != "operator":
                expected = call(ours, x, grad_output, pass_)
                message = partial("{} is wrong: {}".format, name)
                torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-3, msg=message)
    timing.measure(list(rivals.values()), seconds)


def markdown(rows: list[dict]) -> str:
    """Return a table of one comparison: times and memory as multiples of carafepp's."""
    ours = {row["pass"]: row for row in rows if row["name"] == "carafepp"}
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {(row["name"], row["pass"]): row for row in rows}

    def of(name: str, pass_: str, quantity: str) -> str:
        row = found.get((name, pass_))
        if row is None or row[quantity] is None:
            return ""
        if quantity == "memory":
            return f"{row[quantity] / 2**20:.0f} MiB"
        own, other = (one["seconds"][1] for one in (ours[pass_], row))
        return f"{own * 1e3:.2f} ms" if row is ours[pass_] else f"x {other / own:.2f}"

    head = [
        "",
        "forward",
        "with backward",
        "memory",
        "with backward",
        "parameters",
        "FLOPs a position",
    ]
    cells = []
    for name in names:
        row = next(row for row in rows if row["name"] == name)
        cells.append(
            [
                name,
                *(of(name, pass_, "seconds") for pass_ in PASSES),
                *(of(name, pass_, "memory") for pass_ in PASSES),
                f"{row['parameters']:,}",
                f"{row['FLOPs a position']:,.0f}",
            ]
        )
    first = rows[0]
    case = PROBLEMS[first["case"]]
    factor = f"up x{case.up}" if case.up > 1 else f"down x{case.down}"
    title = f"### {case.name}: {factor}, {case.features_shape}, {first['layout']}, float32, "
    title += f"{first['threads']} thread" + "s" * (first["threads"] > 1)
    return f"{title}\n\n{report.table(head, cells)}"


def bars(rows: list[dict]) -> str:
    """Return what was to be shown: half the memory, the paper's parameters and operations."""
    lines = []
    for row in rows:
        if row["name"] != "carafepp" or row["pass"] != "forward+backward" or not row["memory"]:
            continue
        composed = [
            other["memory"]
            for other in rows
            if "composed" in other["name"]
            and all(other[key] == row[key] for key in ("case", "layout", "pass"))
        ]
        if composed:
            share = row["memory"] / min(composed)
            lines.append(
                f"- {row['case']} {row['layout']}: peak memory with backward {share:.0%} of the "
                "leanest composed module's (wanted: at most 50%)"
            )
        case = PROBLEMS[row["case"]]
        if row["layout"] == "NCHW" and (case.c, case.up) == (256, 2):
            told = ", ".join(f"{row[key]:,.0f} {key} (paper: {PAPER[key]:,})" for key in PAPER)
            lines.append(f"- {row['case']}: {told}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modules", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(PROBLEMS)}")
    parser.add_argument("--layout", default="NCHW,NHWC", help="NHWC: channels_last")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--seconds", default=20, type=float, help="of timing for a comparison")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    asked = parser.parse_args(arguments)
    todo = [(case, layout) for case in asked.cases.split(",") for layout in asked.layout.split(",")]
    pages = report.Pages()
    rows = []
    for number, (case, layout) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {case} {layout}", file=sys.stderr, flush=True)
        peers.forget_compiled()
        found = compare(PROBLEMS[case], layout, asked.threads, asked.seconds, not asked.eager)
        pages.show(markdown(found))
        rows += found
    pages.show(bars(rows))
    pages.write(rows, asked.json, asked.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
