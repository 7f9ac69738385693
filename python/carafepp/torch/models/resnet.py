"""ResNet with CARAFE++, or another downsampler, instead of its strides (Figure 4)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ... import _arguments
from .resampling import downsampler as make_downsampler


def resnet50(**options: Any) -> ResNet:
    """Return a `ResNet` of 50 layers (Table 2); options are arguments of `ResNet`."""
    return ResNet((3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """Return a `ResNet` of 101 layers (Table 2); options are arguments of `ResNet`."""
    return ResNet((3, 4, 23, 3), **options)


class ResNet(nn.Module):
    """The backbone of sections 4.1 and 4.2: a stem, Res-1, and four stages of bottlenecks.

    A downsampler is used seven times. One replaces the max pooling of the stem. The first
    bottlenecks of Res-3, Res-4 and Res-5 have two each. They stand before the 3x3 convolution of
    the main path and the 1x1 convolution of the shortcut. These convolutions lose their stride.

    Parameters
    ----------
    layers : sequence of int, default (3, 4, 6, 3)
        The number of bottlenecks of Res-2 to Res-5.
    width : int, default 64
        The channels of the stem; Res-2 to Res-5 have 4, 8, 16 and 32 times as many.
    num_classes : int or None, default 1000
        With None there is no classifier, and `forward` returns its input.
    downsampler : str, optional
        One of `DOWNSAMPLERS` (Table 3). By default, and with "strided_conv", this is the plain
        ResNet: max pooling in the stem, convolutions with strides.
    deformable : collection of int, optional
        The stages whose 3x3 convolutions are deformable (torchvision's DCNv2); (2, 3, 4) in Table
        1. A downsampler and a plain convolution replace those with a stride.
    **options
        Further arguments of the downsampler; "carafe" has batch_norm=True by default.

    Raises
    ------
    ValueError
        A number is out of its range, or the downsampler is unknown.
    TypeError
        A number is not an integer, or the downsampler does not have an option.
    ImportError
        `deformable` needs torchvision.

    Notes
    -----
    Parameters have torchvision's names, so torchvision's weights load. With downsamplers, use
    ``load_state_dict(weights, strict=False)``. As in torchvision, the 3x3 convolution of a
    bottleneck has the stride, and the stem's convolution is 7x7 (section 4.1 says 3x3).

    References
    ----------
    K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

    Examples
    --------
    >>> import torch
    >>> backbone = ResNet((1, 1, 1, 1), width=8, downsampler="carafe")
    >>> [tuple(level.shape) for level in backbone.features(torch.zeros(1, 3, 64, 64))]
    [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)]
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        width: int = 64,
        num_classes: int | None = 1000,
        downsampler: str | None = None,
        deformable: Collection[int] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        rule = "four numbers from 1"
        layers = _arguments.integers("ResNet", "layers", layers, rule, least=4, most=4)
        width = _arguments.integer("ResNet", "width", width)
        if num_classes is not None:
            num_classes = _arguments.integer("ResNet", "num_classes", num_classes)
        if not set(deformable) <= {2, 3, 4, 5}:
            raise ValueError(f"[ResNet] deformable must be of 2, 3, 4, 5; got {tuple(deformable)}.")
        down: Callable[[int], nn.Module] | None = None
        if downsampler not in (None, "strided_conv"):
            if downsampler == "carafe":
                options = {"batch_norm": True, **options}
            down = partial(make_downsampler, downsampler, **options)
        elif options:
            raise TypeError(
                f"[ResNet] options must be none without a downsampler; got {', '.join(options)}."
            )

        self.conv1 = _conv(3, width, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if down is None else down(width)
        self.channels = [width * 4 * 2**stage for stage in range(4)]  # C2 to C5
        channels = width
        for stage, (blocks, out_channels) in enumerate(zip(layers, self.channels, strict=True), 1):
            bottlenecks = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                is_deformable = stage + 1 in deformable
                bottlenecks.append(Bottleneck(channels, out_channels, stride, down, is_deformable))
                channels = out_channels
            self.add_module(f"layer{stage}", nn.Sequential(*bottlenecks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Identity() if num_classes is None else nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return C2, C3, C4 and C5 at strides of 4, 8, 16 and 32, with `self.channels`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        levels = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            levels.append(x)
        return levels

    def forward(self, x: Tensor) -> Tensor:
        """Classify: (N, 3, H, W) -> (N, num_classes)."""
        return self.fc(self.avgpool(self.features(x)[-1]).flatten(1))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 beside a shortcut (Figure 4), with or without `down`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        down: Callable[[int], nn.Module] | None = None,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        width = out_channels // 4
        self.down: nn.Module = nn.Identity()
        self.shortcut_down: nn.Module = nn.Identity()
        if stride > 1 and down is not None:
            self.down, self.shortcut_down = down(width), down(in_channels)
            stride, deformable = 1, False
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = (DeformConv if deformable else _conv)(width, width, 3, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None  # the name that torchvision gives the shortcut
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                _conv(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(self.down(y))))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(self.shortcut_down(x))
        return self.relu(y + x)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class DeformConv(nn.Conv2d):
    """Deformable convolution, DCNv2: samples at predicted offsets, scaled by a mask.

    X. Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019. Offsets are
    initialised as 0 and the mask as 1/2. Parameters have the names and the order of mmcv's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        try:
            ops = importlib.import_module("torchvision.ops")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another PyTorch
            raise ImportError(
                "[ResNet] deformable needs the operators of torchvision, which does not import: "
                f"{error}"
            ) from error
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.deform_conv2d = ops.deform_conv2d
        self.taps = kernel_size**2
        self.conv_offset = nn.Conv2d(in_channels, 3 * self.taps, kernel_size, stride, padding)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))."""
        offsets, mask = self.conv_offset(x).split((2 * self.taps, self.taps), 1)
        return self.deform_conv2d(
            x,
            offsets,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            mask=mask.sigmoid(),
        )
