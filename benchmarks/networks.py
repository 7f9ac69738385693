"""What CARAFE++ costs in the paper's networks: `python -m benchmarks.networks --help`.

Each network without it, with it for upsampling, for downsampling and for both: parameters,
operations, time and peak memory, as multiples of the network without. Detectors are what they
compute by convolutions and matrices; RoIAlign and the choice of regions, which no variant changes,
are left out. BatchNorm is as in inference, also with gradients.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from carafepp.torch.models import FPN, MaskHead, ResNet, UperNet

from . import memory, modules, report, timing

# The upsampler, or the network's own, and the downsampler.
VARIANTS = {
    "nothing": (None, None),
    "up": ("carafe", None),
    "down": (None, "carafe"),
    "both": ("carafe", "carafe"),
}
# Frames a second as a share of those without CARAFE++, on a Titan XP (Table 5).
PAPER = {"faster_rcnn": {"up": 12.2 / 12.5, "down": 12.1 / 12.5, "both": 11.7 / 12.5}}


class Detector(nn.Module):
    """Faster R-CNN or, with masks, Mask R-CNN; all outputs as one row of numbers."""

    regions, masked = 1000, 100

    def __init__(self, up: str | None, down: str | None, width: int, masks: bool = False):
        super().__init__()
        channels = 4 * width
        self.backbone = ResNet(width=width, num_classes=None, downsampler=down)
        self.fpn = FPN(self.backbone.channels, channels, upsampler=up or "nearest", extra_levels=1)
        self.rpn = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 3 + 12, 1)
        )
        self.boxes = nn.Sequential(
            *(nn.Flatten(), nn.Linear(49 * channels, 4 * channels), nn.ReLU()),
            *(nn.Linear(4 * channels, 4 * channels), nn.ReLU()),
            nn.Linear(4 * channels, 81 + 80 * 4),
        )
        self.masks = MaskHead(channels, channels, upsampler=up or "deconv") if masks else None

    def forward(self, x):  # noqa: D102
        pyramid = self.fpn(self.backbone.features(x))
        outputs = [self.rpn(level) for level in pyramid]
        outputs.append(self.boxes(self._pooled(pyramid[0], self.regions, 7)))
        if self.masks is not None:
            outputs.append(self.masks(self._pooled(pyramid[0], self.masked, 14)))
        return torch.cat([output.flatten() for output in outputs])

    def _pooled(self, level, regions: int, size: int):
        """Stand in for RoIAlign: what it makes has this size."""
        return F.adaptive_avg_pool2d(level, size).expand(regions, -1, -1, -1)


def resnet50(up: str | None, down: str | None, width: int) -> nn.Module:
    """Return ResNet-50, which classifies."""
    return ResNet(width=width, downsampler=down)


def faster_rcnn(up: str | None, down: str | None, width: int) -> nn.Module:
    """Return Faster R-CNN with ResNet-50."""
    return Detector(up, down, width)


def mask_rcnn(up: str | None, down: str | None, width: int) -> nn.Module:
    """Return Mask R-CNN with ResNet-50."""
    return Detector(up, down, width, masks=True)


def upernet(up: str | None, down: str | None, width: int) -> nn.Module:
    """Return UperNet with ResNet-50."""
    backbone = ResNet(width=width, num_classes=None, downsampler=down)
    return UperNet(backbone, channels=8 * width, upsampler=up or "bilinear")


# And the size of a picture in the paper.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, int]]] = {
    "resnet50": (resnet50, (224, 224)),
    "faster_rcnn": (faster_rcnn, (800, 1333)),
    "mask_rcnn": (mask_rcnn, (800, 1333)),
    "upernet": (upernet, (450, 600)),
}


def compare(name: str, pass_: str, scale: float, width: int, threads: int, seconds: float) -> list:
    """Time the variants of a network in turns; return a row for each."""
    make, size = NETWORKS[name]
    shape = (1, 3, *(round(scale * n) for n in size))
    variants = {
        variant: parts
        for variant, parts in VARIANTS.items()
        if name != "resnet50" or parts[0] is None  # which does not upsample
    }
    x = torch.randn(shape, requires_grad=True)
    rivals, rows = [], []
    for variant, parts in variants.items():
        torch.manual_seed(0)
        network = make(*parts, width).eval()
        with torch.no_grad():
            grad_output = torch.ones_like(network(x))
        rival = modules.rival(variant, network, x, grad_output, pass_, "NCHW", threads)
        with rival.settings():
            rival.call()  # whatever a first call does is not measured
            rival.memory = memory.peak(rival.call)[1]
        rivals.append(rival)
        with torch.device("meta"):  # where nothing is computed, only counted
            operations = modules.flops(make(*parts, width).eval(), torch.empty(shape))
        rows.append(
            {
                "network": name,
                "variant": variant,
                "pass": pass_,
                "shape": shape,
                "width": width,
                "threads": threads,
                "parameters": sum(p.numel() for p in network.parameters()),
                "FLOPs": operations,
                "memory": rival.memory,
                "paper": PAPER.get(name, {}).get(variant) if width == 64 else None,
            }
        )
    timing.measure(rivals, seconds)
    for row, rival in zip(rows, rivals, strict=True):
        row |= {"seconds": timing.spread(rival.samples), "samples": len(rival.samples)}
    return rows


def markdown(rows: list[dict]) -> str:
    """Return a table of one comparison, of multiples of the first row's numbers."""
    base = rows[0]
    cells = []
    for row in rows:
        low, median, high = (t / base["seconds"][1] for t in row["seconds"])
        absolute = row is base
        peak = base["memory"] and row["memory"] / base["memory"]
        cells.append(
            [
                row["variant"],
                f"{row['parameters'] / 1e6:.2f} M" if absolute else _times(row, base, "parameters"),
                f"{row['FLOPs'] / 1e9:.4g} G" if absolute else _times(row, base, "FLOPs"),
                f"{median * base['seconds'][1]:.3g} s" if absolute else f"x{median:.3f}",
                f"{low:.3f}-{high:.3f}",
                str(row["samples"]),
                f"{1 / median:.3f}",
                "" if row["paper"] is None else f"{row['paper']:.3f}",
                ""
                if peak is None
                else f"{base['memory'] / 2**20:.0f} MiB"
                if absolute
                else f"x{peak:.3f}",
            ]
        )
    head = ["CARAFE++ in", "parameters", "FLOPs forward", "time", "p10-p90", "n", "frames a second"]
    title = f"### {base['network']}: {base['shape']}, {base['pass']}, float32, "
    title += f"{base['threads']} thread" + "s" * (base["threads"] > 1)
    return f"{title}\n\n{report.table([*head, 'in the paper', 'peak memory'], cells)}"


def _times(row: dict, base: dict, quantity: str) -> str:
    return f"x{row[quantity] / base[quantity]:.4f}"


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    names = ", ".join(NETWORKS)
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {names}")
    parser.add_argument("--pass", default="forward", dest="passes", help=f"of {modules.PASSES}")
    parser.add_argument("--scale", default=1, type=float, help="of the paper's pictures")
    parser.add_argument("--width", default=64, type=int, help="of the ResNet; 64 is the paper's")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--seconds", default=120, type=float, help="of timing for a comparison")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    asked = parser.parse_args(arguments)
    todo = [
        (name, pass_) for name in asked.networks.split(",") for pass_ in asked.passes.split(",")
    ]
    for name, pass_ in todo:
        if name not in NETWORKS:
            parser.error(f"--networks: {name!r} is none of {names}")
        if pass_ not in modules.PASSES:
            parser.error(f"--pass: {pass_!r} is none of {', '.join(modules.PASSES)}")
    pages = report.Pages()
    rows = []
    for number, (name, pass_) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {name} {pass_}", file=sys.stderr, flush=True)
        options = asked.scale, asked.width, asked.threads, asked.seconds
        found = compare(name, pass_, *options)
        pages.show(markdown(found))
        rows += found
    pages.write(rows, asked.json, asked.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
