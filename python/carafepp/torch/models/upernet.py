"""UperNet with CARAFE++, or any other upsampler, in PPM, FPN and FUSE (section 4.2, Table 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _arguments
from .fpn import FPN, conv
from .resampling import upsampler as make_upsampler
from .resnet import ResNet


class UperNet(nn.Module):
    """Semantic segmentation: backbone, pyramid pooling, feature pyramid, fusion, classifier.

    Parameters
    ----------
    backbone : ResNet
        A backbone with num_classes=None, with CARAFE++ or without ("Backbone" in Table 9).
    num_classes : int, default 150
        The default is for ADE20k.
    channels : int, default 512
        The channels of PPM and of the pyramid.
    upsampler : str, default "carafe"
        One of `UPSAMPLERS`. "bilinear" is the original.
    ppm, fpn, fuse : str, optional
        Another upsampler for one component (Table 9).
    **options
        Further arguments of the upsamplers named by `upsampler`.

    Raises
    ------
    ValueError
        A number is out of its range, or the upsampler is unknown.
    TypeError
        A number is not an integer, or the upsampler does not have an option.

    References
    ----------
    T. Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018.

    Examples
    --------
    >>> backbone = ResNet((1, 1, 1, 1), width=8, num_classes=None, downsampler="carafe")
    >>> UperNet(backbone, num_classes=5, channels=16).eval()(torch.zeros(1, 3, 65, 70)).shape
    torch.Size([1, 5, 65, 70])
    """

    def __init__(
        self,
        backbone: ResNet,
        num_classes: int = 150,
        channels: int = 512,
        *,
        upsampler: str = "carafe",
        ppm: str | None = None,
        fpn: str | None = None,
        fuse: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()

        num_classes, channels = _arguments.positive(
            "UperNet", num_classes=num_classes, channels=channels
        )

        def of(component: str | None) -> dict[str, Any]:
            if component is None or component == upsampler:
                return {"upsampler": upsampler, **options}
            return {"upsampler": component}

        self.backbone = backbone
        self.fpn = FPN(backbone.channels, channels, batch_norm=True, **of(fpn))
        # PPM is the lateral of the coarsest level; that level is P5 without a convolution.
        self.fpn.laterals[-1] = PPM(backbone.channels[-1], channels, **of(ppm))
        self.fpn.outputs[-1] = nn.Identity()
        self.fuse = FUSE(channels, len(backbone.channels), **of(fuse))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, bilinearly enlarged 4 times: (N, 3, H, W) -> (N, num_classes, H, W)."""
        logits = self.classifier(self.fuse(self.fpn(self.backbone.features(x))))
        return F.interpolate(logits, x.shape[-2:], mode="bilinear")


class PPM(nn.Module):
    """Pyramid pooling module: averages at several scales, concatenated with the features.

    Each average is upsampled in two steps: bilinearly to half the size, then by 2 with the
    upsampler. The original, "bilinear", takes one step.

    H. Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        scales: Sequence[int] = (1, 2, 3, 6),
        upsampler: str = "carafe",
        **options: Any,
    ) -> None:
        super().__init__()
        in_channels, channels = _arguments.positive(
            "PPM", in_channels=in_channels, channels=channels
        )
        scales = _arguments.integers("PPM", "scales", scales, "numbers from 1", least=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv(in_channels, channels, 1, True))
            for scale in scales
        )
        upsamplers = [make_upsampler(upsampler, channels, **options) for _ in scales]
        self.upsamplers = nn.ModuleList([] if upsampler == "bilinear" else upsamplers)
        self.output = conv(in_channels + len(scales) * channels, channels, 3, True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H, W)."""
        height, width = size = x.shape[-2:]
        half = ((height + 1) // 2, (width + 1) // 2)
        pooled = [branch(x) for branch in self.branches]
        if self.upsamplers:
            halves = [F.interpolate(y, half, mode="bilinear") for y in pooled]
            whole = [up(y, size=size) for up, y in zip(self.upsamplers, halves, strict=True)]
        else:
            whole = [F.interpolate(y, size, mode="bilinear") for y in pooled]
        return self.output(torch.cat([x, *whole], dim=1))


class FUSE(nn.Module):
    """Multi-level feature fusion: upsample and concatenate, from P5 to P2, then a convolution."""

    def __init__(
        self, channels: int, levels: int = 4, *, upsampler: str = "carafe", **options: Any
    ) -> None:
        super().__init__()
        channels, levels = _arguments.positive("FUSE", channels=channels, levels=levels)
        self.upsamplers = nn.ModuleList(  # coarsest level first: their channels grow
            make_upsampler(upsampler, channels * level, **options) for level in range(1, levels)
        )
        self.output = conv(channels * levels, channels, 3, True)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """(N, channels, H, W) for each level, finest first -> (N, channels, H, W) of the finest."""
        x = pyramid[-1]
        for level, upsampler in zip(pyramid[-2::-1], self.upsamplers, strict=True):
            x = torch.cat([level, upsampler(x, size=level.shape[-2:])], dim=1)
        return self.output(x)
