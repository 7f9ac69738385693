"""Feature pyramid and mask head with CARAFE++, or any other upsampler (Figure 5, section 4.1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import _arguments
from .resampling import upsampler as make_upsampler
from .resnet import ResNet


class FPN(nn.Module):
    """Feature pyramid network: a level is its lateral plus the level above, upsampled (Figure 5).

    Parameters
    ----------
    in_channels : sequence of int
        Channels of the levels, finest first. Each level has half the size of the level before,
        rounded up or down.
    channels : int, default 256
        The channels of every level of the result.
    upsampler : str, default "carafe"
        One of `UPSAMPLERS` (Table 4). Every level but the coarsest has its own. "nearest" is the
        original.
    batch_norm : bool, default False
        Whether BatchNorm and ReLU follow every convolution, as in UperNet.
    extra_levels : int, default 0
        The number of coarser levels to add. Each has every second pixel of the level before. Faster
        and Mask R-CNN add one (P6).
    **options
        Further arguments of the upsamplers.

    Raises
    ------
    ValueError
        A number is out of its range, or the upsampler is unknown. In `forward`: the number of
        levels is another, or a level is not half of the one before.
    TypeError
        A number is not an integer, or the upsampler does not have an option.

    References
    ----------
    T.-Y. Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.

    Examples
    --------
    >>> import torch
    >>> levels = [torch.zeros(1, 8, 13, 10), torch.zeros(1, 16, 7, 5)]
    >>> [tuple(level.shape) for level in FPN([8, 16], 32)(levels)]
    [(1, 32, 13, 10), (1, 32, 7, 5)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        *,
        upsampler: str = "carafe",
        batch_norm: bool = False,
        extra_levels: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        rule = "two numbers from 1, or more"
        in_channels = _arguments.integers("FPN", "in_channels", in_channels, rule, least=2)
        channels = _arguments.integer("FPN", "channels", channels)
        extra_levels = _arguments.integer("FPN", "extra_levels", extra_levels, least=0)
        self.channels = channels
        self.extra_levels = extra_levels
        self.laterals = nn.ModuleList(conv(c, channels, 1, batch_norm) for c in in_channels)
        self.upsamplers = nn.ModuleList(
            make_upsampler(upsampler, channels, **options) for _ in in_channels[1:]
        )
        self.outputs = nn.ModuleList(conv(channels, channels, 3, batch_norm) for _ in in_channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid, finest level first: (N, channels, H, W) for each (N, C, H, W)."""
        if len(levels) != len(self.laterals):
            raise ValueError(f"[FPN] levels must be {len(self.laterals)}; got {len(levels)}.")
        laterals = [lateral(x) for lateral, x in zip(self.laterals, levels, strict=True)]
        merged = [laterals[-1]]
        for lateral, upsampler in zip(laterals[-2::-1], self.upsamplers[::-1], strict=True):
            merged.insert(0, lateral + upsampler(merged[0], size=lateral.shape[-2:]))
        pyramid = [output(x) for output, x in zip(self.outputs, merged, strict=True)]
        for _ in range(self.extra_levels):
            pyramid.append(F.max_pool2d(pyramid[-1], 1, stride=2))
        return pyramid


class ResNetFPN(nn.Module):
    """ResNet and FPN as a backbone for torchvision's FasterRCNN and MaskRCNN (Table 5).

    Parameters
    ----------
    backbone : ResNet
    fpn : FPN
        The default anchors of a torchvision pyramid need five levels: extra_levels=1.

    Examples
    --------
    >>> backbone = ResNet(num_classes=None, downsampler="carafe")
    >>> backbone = ResNetFPN(backbone, FPN(backbone.channels, extra_levels=1))
    >>> # detector = torchvision.models.detection.FasterRCNN(backbone, num_classes=91)
    """

    def __init__(self, backbone: ResNet, fpn: FPN) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.out_channels = fpn.channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return P2, P3, ... of a picture, named "0" to "3" and "pool", as torchvision does."""
        pyramid = self.fpn(self.backbone.features(x))
        names = [str(i) for i in range(len(pyramid))]
        if self.fpn.extra_levels:
            names[len(self.fpn.laterals)] = "pool"
        return OrderedDict(zip(names, pyramid, strict=True))


class MaskHead(nn.Module):
    """The mask head of Mask R-CNN: convolutions, an upsampler from 14x14 to 28x28, a prediction.

    In torchvision's MaskRCNN, it replaces ``roi_heads.mask_head``. Replace
    ``roi_heads.mask_predictor`` by an ``nn.Identity()``.

    Parameters
    ----------
    in_channels : int, default 256
    channels : int, default 256
    num_classes : int, default 80
    convs : int, default 4
        The number of 3x3 convolutions before the upsampler.
    upsampler : str, default "carafe"
        One of `UPSAMPLERS` (Table 6). "deconv" is the original; its kernel_size is 2 by default.
    **options
        Further arguments of the upsampler.

    Raises
    ------
    ValueError
        A number is out of its range, or the upsampler is unknown.
    TypeError
        A number is not an integer, or the upsampler does not have an option.

    References
    ----------
    K. He et al., "Mask R-CNN", ICCV 2017.

    Examples
    --------
    >>> import torch
    >>> MaskHead(16, 16, num_classes=3)(torch.zeros(5, 16, 14, 14)).shape
    torch.Size([5, 3, 28, 28])
    """

    def __init__(
        self,
        in_channels: int = 256,
        channels: int = 256,
        num_classes: int = 80,
        *,
        convs: int = 4,
        upsampler: str = "carafe",
        **options: Any,
    ) -> None:
        super().__init__()
        in_channels, channels, num_classes, convs = _arguments.positive(
            "MaskHead",
            in_channels=in_channels,
            channels=channels,
            num_classes=num_classes,
            convs=convs,
        )
        if upsampler == "deconv":
            options = {"kernel_size": 2, **options}
        self.convs = nn.Sequential()
        for i in range(convs):
            self.convs.append(conv(channels if i else in_channels, channels, 3))
            self.convs.append(nn.ReLU())
        self.upsampler = make_upsampler(upsampler, channels, **options)
        self.relu = nn.ReLU()
        self.predictor = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for each class: (regions, C, H, W) -> (regions, num_classes, 2*H, 2*W)."""
        return self.predictor(self.relu(self.upsampler(self.convs(x))))


def conv(
    in_channels: int, out_channels: int, kernel_size: int, batch_norm: bool = False
) -> nn.Module:
    """Return a convolution that keeps sizes, with a bias or followed by BatchNorm and ReLU."""
    layer = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not batch_norm
    )
    if batch_norm:
        return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU())
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer
