"""Networks that fill holes: Global&Local's generator, plain and with partial convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .... import _arguments
from ..resampling import downsampler as make_downsampler
from ..resampling import upsampler as make_upsampler
from .partial import PartialCARAFE, PartialConv2d


def compose(image: Tensor, hole: Tensor, prediction: Tensor) -> Tensor:
    """Return ``y = (1 - M)*x + M*prediction``: the picture with its hole filled."""
    return prediction.where(hole, image)


class GlobalLocalGenerator(nn.Module):
    """Global&Local's generator: down, dilated convolutions, up.

    ========  ====================================================================
    first     convolution 5x5 to `width` channels
    down      `depth` times: half the size and twice the channels; convolution
    middle    convolution, one of each dilation, two convolutions
    up        `depth` times: twice the size and half the channels; convolution
    head      convolution to 3 channels, tanh
    ========  ====================================================================

    Convolutions are 3x3 by default, with BatchNorm and ReLU. The last one before the head halves
    the channels.

    Parameters
    ----------
    width : int, default 64
    depth : int, default 2
    dilations : sequence of int, default (2, 4, 8, 16)
    downsampler : str, default "strided_conv"
        "strided_conv" is the original: a convolution of stride 2. Other names of
        `carafepp.torch.models.downsampler`, such as "carafe", stand for that layer and
        the convolution without its stride (section 4.3).
    upsampler : str, default "deconv"
        "deconv" is the original: a transposed convolution 4x4 of stride 2. Other names of
        `carafepp.torch.models.upsampler` stand for that layer and a convolution, which
        changes the number of channels.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is below 1, or a name is unknown.

    References
    ----------
    S. Iizuka et al., "Globally and Locally Consistent Image Completion", 2017, Table 1.
    J. Wang et al., "CARAFE++", sections 4.3 and 5.1.

    Examples
    --------
    >>> generator = GlobalLocalGenerator(width=8, downsampler="carafe", upsampler="carafe")
    >>> image, hole = torch.zeros(1, 3, 30, 33), torch.zeros(1, 1, 30, 33, dtype=torch.bool)
    >>> generator(image, hole).shape
    torch.Size([1, 3, 30, 33])
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depth: int = 2,
        dilations: Sequence[int] = (2, 4, 8, 16),
        downsampler: str = "strided_conv",
        upsampler: str = "deconv",
    ) -> None:
        super().__init__()
        width, depth = _arguments.positive("GlobalLocalGenerator", width=width, depth=depth)
        dilations = _arguments.integers(
            "GlobalLocalGenerator", "dilations", dilations, "numbers from 1"
        )
        widths = [width * 2**level for level in range(depth + 1)]
        deepest = widths[-1]
        self.first = _convolution(4, width, 5)
        self.down = nn.ModuleList(
            nn.Sequential(
                *_down(downsampler, widths[level], widths[level + 1]),
                _convolution(widths[level + 1], widths[level + 1]),
            )
            for level in range(depth)
        )
        self.middle = nn.Sequential(
            _convolution(deepest, deepest),
            *(_convolution(deepest, deepest, dilation=dilation) for dilation in dilations),
            _convolution(deepest, deepest),
            _convolution(deepest, deepest),
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                *_up(upsampler, widths[level + 1], widths[level]),
                _convolution(widths[level], widths[level] if level else max(1, width // 2)),
            )
            for level in reversed(range(depth))
        )
        self.head = nn.Conv2d(max(1, width // 2), 3, 3, padding=1)

    def forward(self, image: Tensor, hole: Tensor) -> Tensor:
        """Return a whole picture, (N, 3, H, W); the values of `image` in the hole do not matter."""
        x = self.first(torch.cat([image.where(~hole, 0), hole.to(image.dtype)], 1))
        sizes = []
        for down in self.down:
            sizes.append(x.shape[-2:])
            x = down(x)
        x = self.middle(x)
        for up, (height, width) in zip(self.up, reversed(sizes), strict=True):
            x = up(x)[..., :height, :width]
        return torch.tanh(self.head(x))


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1
) -> nn.Module:
    padding = dilation * (kernel_size // 2)
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _down(name: str, in_channels: int, out_channels: int) -> list[nn.Module]:
    if name == "strided_conv":
        return [_convolution(in_channels, out_channels, stride=2)]
    return [make_downsampler(name, in_channels), _convolution(in_channels, out_channels)]


def _up(name: str, in_channels: int, out_channels: int) -> list[nn.Module]:
    if name == "deconv":
        deconvolution = nn.ConvTranspose2d(
            in_channels, out_channels, 4, stride=2, padding=1, bias=False
        )
        return [deconvolution, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return [make_upsampler(name, in_channels), _convolution(in_channels, out_channels)]


class PartialConvUNet(nn.Module):
    """Global&Local's generator with partial convolutions, which also transform the hole.

    ========  ====================================================================
    first     partial convolution 5x5 to `width` channels
    down      `depth` times: half the size and twice the channels; partial convolution
    middle    partial convolution, one of each dilation, two partial convolutions
    up        `depth` times: twice the size and, with `skips`, concatenated features of the way
              down; partial convolution to half the channels; another
    head      partial convolution to 3 channels, tanh
    ========  ====================================================================

    Partial convolutions are 3x3 by default, with BatchNorm and ReLU. The last one before the head
    halves the channels.

    Parameters
    ----------
    width : int, default 64
    depth : int, default 2
    dilations : sequence of int, default (2, 4, 8, 16)
    skips : bool, default True
        True concatenates features of the way down and their valid maps on the way up, as in Liu et
        al.'s U-Net. The paper "substitutes the convolution layers with the official Partial Conv
        module in our generator". That generator has no such connections, as with False.
    downsampler : {"strided_conv", "carafe"}, default "strided_conv"
        A partial convolution of stride 2, or `PartialCARAFE` and a partial convolution.
    upsampler : {"nearest", "carafe"}, default "nearest"
        Nearest neighbours of features and valid map, or `PartialCARAFE`; then a partial
        convolution. Liu et al. use nearest neighbours, since a transposed convolution has no
        partial form.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is below 1, or a name is unknown.

    References
    ----------
    G. Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018.
    J. Wang et al., "CARAFE++", sections 4.3 and 5.1.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depth: int = 2,
        dilations: Sequence[int] = (2, 4, 8, 16),
        skips: bool = True,
        downsampler: str = "strided_conv",
        upsampler: str = "nearest",
    ) -> None:
        super().__init__()
        width, depth = _arguments.positive("PartialConvUNet", width=width, depth=depth)
        rule = "numbers from 1"
        dilations = _arguments.integers("PartialConvUNet", "dilations", dilations, rule)
        _check_name("downsampler", downsampler, ("strided_conv", "carafe"))
        _check_name("upsampler", upsampler, ("nearest", "carafe"))
        self.skips = skips
        widths = [width * 2**level for level in range(depth + 1)]
        deepest = widths[-1]
        self.first = _PartialBlock(3, width, kernel_size=5)
        self.down = nn.ModuleList(
            _PartialSequential(
                _partial_down(downsampler, widths[level], widths[level + 1]),
                _PartialBlock(widths[level + 1], widths[level + 1]),
            )
            for level in range(depth)
        )
        self.middle = _PartialSequential(
            _PartialBlock(deepest, deepest),
            *(_PartialBlock(deepest, deepest, dilation=dilation) for dilation in dilations),
            _PartialBlock(deepest, deepest),
            _PartialBlock(deepest, deepest),
        )
        self.up = nn.ModuleList(
            _PartialSequential(
                _partial_up(
                    upsampler, widths[level + 1], widths[level] if skips else 0, widths[level]
                ),
                _PartialBlock(widths[level], widths[level] if level else max(1, width // 2)),
            )
            for level in reversed(range(depth))
        )
        self.head = PartialConv2d(max(1, width // 2), 3, 3)

    def forward(self, image: Tensor, hole: Tensor) -> Tensor:
        """Return a whole picture, (N, 3, H, W); the values of `image` in the hole do not matter.

        A pixel that no valid feature reaches is 0.
        """
        x, valid = self.first(image, ~hole)
        levels = []
        for down in self.down:
            levels.append((x, valid))
            x, valid = down(x, valid)
        x, valid = self.middle(x, valid)
        for up, (skip, skip_valid) in zip(self.up, reversed(levels), strict=True):
            beside = (skip, skip_valid) if self.skips else None
            x, valid = up(x, valid, skip.shape[-2:], beside)
        return torch.tanh(self.head(x, valid)[0])


class _PartialSequential(nn.Sequential):
    """A sequence of layers; further arguments go to the first one."""

    def forward(self, x: Tensor, valid: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        for layer in self:
            x, valid = layer(x, valid, *others)
            others = ()
        return x, valid


class _PartialBlock(nn.Module):
    """Optional resampler and skip connection, then partial convolution, BatchNorm and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        resampler: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resampler = resampler
        self.convolution = PartialConv2d(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(
        self,
        x: Tensor,
        valid: Tensor,
        size: tuple[int, int] | None = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.resampler is not None:
            x, valid = self.resampler(x, valid, size)
        if beside is not None:
            skip, skip_valid = beside
            valid = torch.cat([valid.expand_as(x), skip_valid.expand_as(skip)], 1)
            x = torch.cat([x, skip], 1)
        x, valid = self.convolution(x, valid)
        return F.relu(self.norm(x)), valid


class _PartialNearest(nn.Module):
    """Nearest neighbours to twice the size, or to a row or column less."""

    def forward(self, x: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x, valid = (t.repeat_interleave(2, -2).repeat_interleave(2, -1) for t in (x, valid))
        return x[..., : size[0], : size[1]], valid[..., : size[0], : size[1]]


def _partial_down(name: str, in_channels: int, out_channels: int) -> _PartialBlock:
    if name == "strided_conv":
        return _PartialBlock(in_channels, out_channels, stride=2)
    return _PartialBlock(in_channels, out_channels, resampler=PartialCARAFE(in_channels, down=2))


def _partial_up(name: str, channels: int, beside: int, out_channels: int) -> _PartialBlock:
    resampler = PartialCARAFE(channels, up=2) if name == "carafe" else _PartialNearest()
    return _PartialBlock(channels + beside, out_channels, resampler=resampler)


def _check_name(argument: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(
            f"[PartialConvUNet] {argument} must be one of {', '.join(map(repr, names))}; "
            f"got {name!r}."
        )
