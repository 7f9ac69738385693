"""Semantic segmentation of drawn scenes, with any resampling operator in the backbone and the FPN.

The network is the paper's ResNet and FPN, with fewer layers and smaller widths. Its head upsamples
the finest level twice by the operator of the FPN, and classifies every pixel. Only the operator
sharpens contours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from ..torch.models import FPN, ResNet
from ..torch.models import upsampler as make_upsampler
from .scenes import CLASSES, Scenes, make_scenes

Array = NDArray[Any]

TRAINING_SCENES, TEST_SCENES = 1024, 128
CONTOUR = 1  # pixels, the width of the inner contour of a region, for the boundary IoU

# Widths of the paper's networks, and the inner widths of their operators
PAPER_WIDTH, PAPER_CHANNELS = 64, 256  # the stem and the FPN
INNER_UP: dict[str, dict[str, Any]] = {"carafe": {"compressed_channels": 64}, "gum": {"hidden": 64}}
INNER_DOWN: dict[str, dict[str, Any]] = {
    "carafe": {"compressed_channels": 16},
    "lip": {"bottleneck": 128},
}


class SegmentationNet(nn.Module):
    """ResNet, FPN, and a head of two upsamplers and a 1x1 convolution.

    Parameters
    ----------
    upsampler, downsampler : str
        Names of `carafepp.torch.models.UPSAMPLERS` and `DOWNSAMPLERS`.
    up_options, down_options : mapping, optional
        Further arguments of the operators. Inner widths (C_m) are for the paper's networks; here
        they are scaled by channels/256 and width/64.
    width, channels : int
        The width of the ResNet's stem, and the channels of the FPN.
    """

    def __init__(
        self,
        upsampler: str = "nearest",
        downsampler: str = "strided_conv",
        *,
        up_options: Mapping[str, Any] | None = None,
        down_options: Mapping[str, Any] | None = None,
        width: int = 16,
        channels: int = 32,
    ) -> None:
        super().__init__()
        up = scaled({**INNER_UP.get(upsampler, {}), **(up_options or {})}, channels, PAPER_CHANNELS)
        down = {**INNER_DOWN.get(downsampler, {}), **(down_options or {})}
        down = scaled(down, width, PAPER_WIDTH)
        self.backbone = ResNet(
            (1, 1, 1, 1), width=width, num_classes=None, downsampler=downsampler, **down
        )
        self.fpn = FPN(self.backbone.channels, channels, upsampler=upsampler, **up)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            make_upsampler(upsampler, channels, **up),
            make_upsampler(upsampler, channels, **up),
            nn.Conv2d(channels, len(CLASSES), 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: (N, 3, H, W) -> (N, 6, H, W), H and W divisible by 4."""
        logits: Tensor = self.head(self.fpn(self.backbone.features(x))[0])
        return logits


def scaled(options: Mapping[str, Any], width: int, paper_width: int) -> dict[str, Any]:
    """Return options with inner widths scaled from the paper's network to this one."""
    inner = ("compressed_channels", "hidden", "bottleneck")
    return {
        name: max(1, value * width // paper_width) if name in inner and value is not None else value
        for name, value in options.items()
    }


def train_segmentation(
    upsampler: str = "nearest",
    downsampler: str = "strided_conv",
    *,
    up_options: Mapping[str, Any] | None = None,
    down_options: Mapping[str, Any] | None = None,
    steps: int = 150,
    seed: int = 0,
    size: int = 64,
    width: int = 16,
    channels: int = 32,
    batch: int = 8,
    learning_rate: float = 0.004,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a `SegmentationNet`, and measure it on test scenes, the same in every call.

    Parameters
    ----------
    upsampler, downsampler, up_options, down_options, width, channels
        As for `SegmentationNet`.
    steps, seed, size, batch : int
        The number of steps; the seed of the weights and of the order of scenes; the side of the
        scenes, divisible by 4; the number of scenes in a step.
    learning_rate : float, default 0.004
        The highest learning rate of AdamW.
    device : str, default "cpu"
        An argument of `torch.device`. On the CPU, the seed and the number of threads determine the
        results.
    progress : function of (step, loss), optional
        Called after each step.

    Returns
    -------
    dict
        ``miou``, ``boundary_iou``, ``pixel_accuracy`` (%); ``parameters``; ``seconds`` of the
        training (on the CPU, the processor time of this process); ``network``, trained.

    Raises
    ------
    ValueError
        A name is unknown, or a number is out of its range.
    """
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"[train_segmentation] {name} must be at least 1; got {value}.")
    if size < 32 or size % 4:
        raise ValueError(
            f"[train_segmentation] size must be at least 32 and divisible by 4; got {size}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SegmentationNet(
            upsampler,
            downsampler,
            up_options=up_options,
            down_options=down_options,
            width=width,
            channels=channels,
        ).to(device)
    scenes = load_scenes(TRAINING_SCENES, size, seed=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    rng = np.random.default_rng(seed)
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    for step in range(steps):
        images, classes = _batch(scenes, batch, rng)
        logits = network(torch.from_numpy(images).to(device))
        loss = F.cross_entropy(logits, torch.from_numpy(classes).long().to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    seconds = clock() - start
    test = load_scenes(TEST_SCENES, size, seed=2)
    return {
        **measure(predict(network, test.images, device), test.classes),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seconds": seconds,
        "network": network,
    }


@cache
def load_scenes(count: int, size: int, seed: int) -> Scenes:
    """Return the scenes of `make_scenes`, cached."""
    return make_scenes(count, size, seed)


def _batch(scenes: Scenes, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return random scenes, each mirrored or not in both directions: images and classes."""
    chosen = rng.integers(len(scenes.images), size=batch)
    images, classes = scenes.images[chosen], scenes.classes[chosen]
    for i, (upside_down, mirrored) in enumerate(rng.integers(2, size=(batch, 2))):
        flip = np.s_[..., :: 1 - 2 * upside_down, :: 1 - 2 * mirrored]
        images[i], classes[i] = images[i][flip].copy(), classes[i][flip].copy()
    return images, classes


def predict(network: nn.Module, images: Array, device: str = "cpu", batch: int = 32) -> Array:
    """Return the classes that a network sees: [N, H, W] of uint8."""
    network.eval()
    with torch.no_grad():
        return np.concatenate(
            [
                network(torch.from_numpy(images[i : i + batch]).to(device)).argmax(1).byte().cpu()
                for i in range(0, len(images), batch)
            ]
        )


def measure(predicted: Array, true: Array) -> dict[str, float]:
    """Return the mean IoU, the mean boundary IoU and the pixel accuracy, in %.

    The IoU of a class is over all pixels of all scenes. The boundary IoU is the IoU of the inner
    contours, `CONTOUR` pixels wide, of the predicted and the true regions (B. Cheng et al.,
    "Boundary IoU", CVPR 2021). A class that is never predicted and never true does not count.

    Parameters
    ----------
    predicted, true : array of int, [N, H, W]
    """
    if predicted.shape != true.shape:
        raise ValueError(
            f"[measure] predicted and true must have one shape; got {predicted.shape} and "
            f"{true.shape}."
        )
    regions, contours = [], []
    for label in np.union1d(predicted, true):
        a, b = predicted == label, true == label
        regions.append(_iou(a, b))
        contours.append(_iou(contour(a), contour(b)))
    return {
        "miou": 100 * float(np.mean(regions)),
        "boundary_iou": 100 * float(np.mean(contours)),
        "pixel_accuracy": 100 * float((predicted == true).mean()),
    }


def contour(region: Array) -> Array:
    """Return the pixels of regions with pixels outside within `CONTOUR`, diagonals too: [N, H, W].

    The last pixels are repeated beyond the border.
    """
    width = 2 * CONTOUR + 1
    inner: Array = ndimage.minimum_filter(region, size=(1, width, width), mode="nearest")
    return region & ~inner


def _iou(a: Array, b: Array) -> float:
    """Return the intersection over the union; 1 for two empty regions."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0
