"""The cost of CARAFE++ in the paper's networks: `python -m benchmarks.networks --help`.

Each network runs without CARAFE++, with it for upsampling, for downsampling, and for both. Tables
tell parameters, operations, time and peak memory as multiples of the network without it. Detectors
leave out RoIAlign and the choice of regions, which no variant changes. BatchNorm runs as in
inference, with gradients too.
"""

import itertools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from carafepp.torch.models import FPN, MaskHead, ResNet, UperNet

from . import modules, report, timing

# The upsampler and the downsampler; None is the network's own.
VARIANTS = {
    "nothing": (None, None),
    "up": ("carafe", None),
    "down": (None, "carafe"),
    "both": ("carafe", "carafe"),
}
# Frames a second as a share of those without CARAFE++, on a Titan XP (Table 5).
PAPER = {"faster_rcnn": {"up": 12.2 / 12.5, "down": 12.1 / 12.5, "both": 11.7 / 12.5}}


class Detector(nn.Module):
    """Faster R-CNN or, with masks, Mask R-CNN; returns all outputs as one vector."""

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
        """Stand in for RoIAlign: return a tensor of the same shape."""
        return F.adaptive_avg_pool2d(level, size).expand(regions, -1, -1, -1)


def resnet50(up: str | None, down: str | None, width: int) -> nn.Module:
    """Return ResNet-50 for classification."""
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


# Each network with the paper's image size.
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
    x = torch.randn(shape, requires_grad=True)
    candidates = []
    for variant, parts in VARIANTS.items():
        if name == "resnet50" and parts[0] is not None:
            continue  # it does not upsample
        torch.manual_seed(0)
        network = make(*parts, width).eval()
        with torch.device("meta"):  # counts without computing
            operations = modules.flops(make(*parts, width).eval(), torch.empty(shape))
        paper = PAPER.get(name, {}).get(variant) if width == 64 else None
        facts = {"network": name, "shape": shape, "width": width, "paper": paper}
        facts |= {"FLOPs": operations, "threads": threads}
        candidates.append(modules.candidate(variant, network, x, pass_, **facts))
        timing.warm_up(candidates[-1])
    timing.measure(candidates, seconds)
    return [one.row() for one in candidates]


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write."""
    parser = report.parser("benchmarks.networks", __doc__, 120)
    names, passes = ",".join(NETWORKS), modules.PASSES
    parser.add_argument("--networks", default=names, type=report.words(NETWORKS), help=names)
    text = " or ".join(passes)
    kind = report.words(passes)
    parser.add_argument("--pass", default="forward", type=kind, dest="passes", help=text)
    parser.add_argument("--scale", default=1, type=float, help="of the paper's image size")
    parser.add_argument(
        "--width", default=64, type=report.count, help="of the ResNet; the paper has 64"
    )
    parser.add_argument("--threads", default=1, type=report.count)
    asked = parser.parse_args(arguments)
    pages = report.Report(times=timing.HOW)
    rows = []
    todo = list(itertools.product(asked.networks, asked.passes))
    for name, pass_ in pages.track(todo, " ".join):
        found = compare(name, pass_, asked.scale, asked.width, asked.threads, asked.seconds)
        more = {
            "FLOPs forward": report.multiple(found, "FLOPs", 1e9, "G"),
            "frames a second": lambda row, base=found[0]: f"{base['seconds'] / row['seconds']:.3f}",
            "in the paper": lambda row: "" if row["paper"] is None else f"{row['paper']:.3f}",
        }
        title = f"{name}: {found[0]['shape']}, {pass_}, float32, threads: {asked.threads}"
        pages.table(title, found, modules.columns(found) | more)
        rows += found
    pages.write(asked, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
