"""The operators that the paper compares with CARAFE++ (Tables 3, 4 and 6), behind one interface.

====================  ==========================================================  ================
upsampler             method                                                      after
====================  ==========================================================  ================
nearest, bilinear     interpolation
nearest_conv,         interpolation, then a 3x3 convolution
bilinear_conv
deconv                transposed 3x3 convolution                                  Noh 2015
pixel_shuffle         3x3 convolution to C*factor**2 channels, reordered          Shi 2016
gum                   bilinear interpolation at positions moved by predicted      Mazzini 2018
                      offsets
spatial_attention     bilinear interpolation, scaled by a predicted map           Chen 2017
carafe                `carafepp.torch.CARAFE`
====================  ==========================================================  ================

====================  ==========================================================  ================
downsampler           method                                                      after
====================  ==========================================================  ================
strided_conv          3x3 convolution with a stride
max, average          pooling of 3x3 windows
dpp                   average weighted by how much a value stands out             Saeedan 2018
lip                   average weighted by a predicted importance                  Gao 2019
carafe                `carafepp.torch.CARAFE`
====================  ==========================================================  ================

Options set the sizes that the paper leaves open (kernels, widths). Defaults are the usual choices.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _arguments
from ..modules import CARAFE

Size = tuple[int, int]


def upsampler(name: str, channels: int, *, factor: int = 2, **options: Any) -> nn.Module:
    """Return an upsampling module by its name (Tables 4 and 6).

    Parameters
    ----------
    name : str
        One of `UPSAMPLERS`.
    channels : int
        C, for the input and the output.
    factor : int, default 2
        At least 2.
    **options
        Further arguments of the module; for "carafe", arguments of `CARAFE`.

    Returns
    -------
    Module
        ``module(x, size=None)`` takes (N, C, H, W) and returns (N, C, H*factor, W*factor) or, given
        a size, ``(N, C, *size)``. Interpolations interpolate to that size; the others are cropped.
        The size may be larger by less than `factor`. "carafe" then continues as `CARAFE` describes;
        other upsamplers repeat their last row or column.

    Raises
    ------
    ValueError
        The name is unknown, or a number is out of its range.
    TypeError
        A number is not an integer, or the module does not have an option.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(1, 16, 5, 7)
    >>> upsampler("deconv", 16)(x, size=(9, 14)).shape
    torch.Size([1, 16, 9, 14])
    """
    return _make("upsampler", UPSAMPLERS, name, channels, factor, options)


def downsampler(name: str, channels: int, *, factor: int = 2, **options: Any) -> nn.Module:
    """Return a downsampling module by its name (Table 3).

    Parameters
    ----------
    name : str
        One of `DOWNSAMPLERS`.
    channels : int
        C, for the input and the output.
    factor : int, default 2
        At least 2.
    **options
        Further arguments of the module; for "carafe", arguments of `CARAFE`.

    Returns
    -------
    Module
        ``module(x)`` takes (N, C, H, W) and returns (N, C, ceil(H/factor), ceil(W/factor)).

    Raises
    ------
    ValueError
        The name is unknown, or a number is out of its range.
    TypeError
        A number is not an integer, or the module does not have an option.

    Examples
    --------
    >>> import torch
    >>> downsampler("lip", 16)(torch.randn(1, 16, 5, 7)).shape
    torch.Size([1, 16, 3, 4])
    """
    return _make("downsampler", DOWNSAMPLERS, name, channels, factor, options)


def _make(
    function: str,
    modules: dict[str, type[nn.Module]],
    name: str,
    channels: int,
    factor: int,
    options: dict[str, Any],
) -> nn.Module:
    if name not in modules:
        raise ValueError(f"[{function}] name must be one of {', '.join(modules)}; got {name!r}.")
    channels = _arguments.integer(function, "channels", channels)
    factor = _arguments.integer(function, "factor", factor, least=2)
    module, direction = modules[name], "factor"
    if module is CARAFE:
        direction = "up" if function == "upsampler" else "down"
    parameters = inspect.signature(module).parameters
    allowed = [
        option for option in parameters if option not in ("channels", "factor", "up", "down")
    ]
    for option in options:
        if option not in allowed:
            raise TypeError(
                f"[{function}] options of {name!r} must be of {', '.join(allowed) or 'none'}; "
                f"got {option}."
            )
    return module(channels, **{direction: factor}, **options)


# ------------------------------------------------------------------------------------- upsamplers


def _size(x: Tensor, factor: int, size: Size | None) -> Size:
    """Return the size of an upsampler's output."""
    height, width = x.shape[-2] * factor, x.shape[-1] * factor
    if size is None:
        return height, width
    size = _arguments.pair("upsampler", size)
    if torch.jit.is_tracing():  # sizes are tensors, and may differ in later calls
        return size
    most = height + factor - 1, width + factor - 1
    if not (1 <= size[0] <= most[0] and 1 <= size[1] <= most[1]):
        raise ValueError(
            f"[upsampler] size must be from (1, 1) to {most}, {factor} times that of the input "
            f"and less than {factor} more; got {tuple(size)}."
        )
    return size


def _fit(y: Tensor, x: Tensor, factor: int, size: Size | None) -> Tensor:
    """Crop an output y of x to a size; if the size is larger, repeat the last row or column."""
    if size is None:
        return y
    height, width = _size(x, factor, size)
    rows = columns = factor - 1
    if not torch.jit.is_tracing():
        rows, columns = max(0, height - y.shape[-2]), max(0, width - y.shape[-1])
    if rows or columns:
        y = F.pad(y, (0, columns, 0, rows), mode="replicate")
    return _crop(y, (height, width))


def _crop(x: Tensor, size: Size) -> Tensor:
    return x[..., : size[0], : size[1]]


class Nearest(nn.Module):
    """Interpolation by the nearest neighbour."""

    mode = "nearest"

    def __init__(self, channels: int, *, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H*factor, W*factor) or `size`."""
        return F.interpolate(x, _size(x, self.factor, size), mode=self.mode)

    def extra_repr(self) -> str:
        """Return the factor, for `print`."""
        return f"factor={self.factor}"


class Bilinear(Nearest):
    """Bilinear interpolation; pixels are squares (align_corners=False)."""

    mode = "bilinear"


class NearestConv(Nearest):
    """Interpolation by the nearest neighbour, then a convolution."""

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, factor=factor)
        kernel_size = _arguments.integer(type(self).__name__, "kernel_size", kernel_size)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding="same")

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H*factor, W*factor) or `size`."""
        return self.conv(super().forward(x, size))


class BilinearConv(NearestConv):
    """Bilinear interpolation, then a convolution."""

    mode = "bilinear"


class Deconv(nn.Module):
    """Transposed convolution; its kernel is 2*factor - 1 wide by default, 3x3 for a factor of 2.

    H. Noh et al., "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015.
    """

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int | None = None) -> None:
        super().__init__()
        self.factor = factor
        kernel_size = 2 * factor - 1 if kernel_size is None else kernel_size
        kernel_size = _arguments.integer("Deconv", "kernel_size", kernel_size, least=0)
        if kernel_size < factor:
            raise ValueError(
                f"[Deconv] kernel_size must be at least factor={factor}; got {kernel_size}."
            )
        overlap = kernel_size - factor
        self.conv = nn.ConvTranspose2d(
            channels,
            channels,
            kernel_size,
            stride=factor,
            padding=(overlap + 1) // 2,
            output_padding=overlap % 2,
        )

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H*factor, W*factor) or `size`."""
        return _fit(self.conv(x), x, self.factor, size)


class PixelShuffle(nn.Module):
    """Convolution to factor**2 times the channels, which become a block of pixels.

    W. Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
    Convolutional Neural Network", CVPR 2016.
    """

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        self.factor = factor
        kernel_size = _arguments.integer("PixelShuffle", "kernel_size", kernel_size)
        self.conv = nn.Conv2d(channels, channels * factor**2, kernel_size, padding="same")

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H*factor, W*factor) or `size`."""
        return _fit(F.pixel_shuffle(self.conv(x), self.factor), x, self.factor, size)


class GUM(nn.Module):
    """Guided upsampling: bilinear interpolation at positions moved by predicted offsets.

    D. Mazzini, "Guided Upsampling Network for Real-Time Semantic Segmentation", BMVC 2018. This is
    the "large-RF" guidance module, which uses only these features. A transposed convolution to
    `hidden` channels and a convolution give two offsets, in pixels of the input. It is initialised
    as bilinear interpolation.
    """

    def __init__(self, channels: int, *, factor: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.factor = factor
        hidden = _arguments.integer("GUM", "hidden", hidden)
        self.guidance = nn.Sequential(
            nn.ConvTranspose2d(channels, hidden, factor, stride=factor),
            nn.ReLU(),
            nn.Conv2d(hidden, 2, 3, padding=1),
        )
        nn.init.zeros_(self.guidance[-1].weight)
        nn.init.zeros_(self.guidance[-1].bias)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H*factor, W*factor) or `size`."""
        offsets = self.guidance(x).permute(0, 2, 3, 1)  # (N, H*factor, W*factor, 2): x, y
        height, width = offsets.shape[1:3]
        rows, columns = (
            (torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) * 2 / n - 1
            for n in (height, width)
        )
        regular = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        pixel = regular.new_tensor([2 * self.factor / width, 2 * self.factor / height])
        moved = F.grid_sample(
            x, regular + pixel * offsets, padding_mode="border", align_corners=False
        )
        return _fit(moved, x, self.factor, size)


class SpatialAttention(nn.Module):
    """Bilinear interpolation, each position scaled by a predicted number from 0 to 1.

    L. Chen et al., "SCA-CNN: Spatial and Channel-wise Attention in Convolutional Networks for Image
    Captioning", CVPR 2017.
    """

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        self.upsample = Bilinear(channels, factor=factor)
        kernel_size = _arguments.integer("SpatialAttention", "kernel_size", kernel_size)
        self.attention = nn.Conv2d(channels, 1, kernel_size, padding="same")

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H*factor, W*factor) or `size`."""
        x = self.upsample(x, size)
        return x * self.attention(x).sigmoid()


# ----------------------------------------------------------------------------------- downsamplers


class StridedConv(nn.Conv2d):
    """Convolution with a stride: the baseline of Table 3."""

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int = 3) -> None:
        _check_odd("StridedConv", kernel_size)
        super().__init__(channels, channels, kernel_size, factor, padding=kernel_size // 2)


class MaxPool(nn.MaxPool2d):
    """Maximum of windows 2*factor - 1 wide, as in the stem of ResNet."""

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int | None = None) -> None:
        kernel_size = 2 * factor - 1 if kernel_size is None else kernel_size
        _check_odd("MaxPool", kernel_size)
        super().__init__(kernel_size, factor, padding=kernel_size // 2)


class AveragePool(nn.AvgPool2d):
    """Average of windows 2*factor - 1 wide; at the border, of the pixels inside the picture."""

    def __init__(self, channels: int, *, factor: int = 2, kernel_size: int | None = None) -> None:
        kernel_size = 2 * factor - 1 if kernel_size is None else kernel_size
        _check_odd("AveragePool", kernel_size)
        super().__init__(kernel_size, factor, padding=kernel_size // 2, count_include_pad=False)


class DPP(nn.Module):
    """Detail-preserving pooling: an average of blocks that prefers values far from the mean.

    ``weight = alpha + sqrt(difference**2 + epsilon**2)**lambda``. The difference is from the
    average of the block ("lite"); with symmetric=False, a negative difference counts as 0. alpha
    and lambda are positive, and learnt for each channel.

    F. Saeedan et al., "Detail-Preserving Pooling in Deep Networks", CVPR 2018.
    """

    epsilon = 1e-3

    def __init__(self, channels: int, *, factor: int = 2, symmetric: bool = True) -> None:
        super().__init__()
        self.factor = factor
        self.symmetric = symmetric
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_lambda = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H/factor), ceil(W/factor))."""
        around = F.interpolate(self._average(x), scale_factor=float(self.factor))
        difference = x - _crop(around, x.shape[-2:])
        if not self.symmetric:
            difference = difference.clamp(min=0)
        detail = (difference**2 + self.epsilon**2).sqrt() ** self.log_lambda.exp()
        weight = self.log_alpha.exp() + detail
        return self._average(weight * x) / self._average(weight)

    def _average(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor, ceil_mode=True)


class LIP(nn.Module):
    """Local importance-based pooling: an average of windows, weighted by predicted importances.

    ``weight = exp(12 * sigmoid(logits))``. A bottleneck of 1x1, 3x3 and 1x1 convolutions with
    instance normalisation predicts the logits of every value. It is `bottleneck` channels wide, 128
    in the LIP-ResNets; None means a single 3x3 convolution. It is initialised as an average. (In
    the LIP-ResNets, main path and shortcut share all but the last of these convolutions.)

    Z. Gao et al., "LIP: Local Importance-based Pooling", ICCV 2019.
    """

    gate = 12

    def __init__(self, channels: int, *, factor: int = 2, bottleneck: int | None = 128) -> None:
        super().__init__()
        self.factor = factor
        layers: list[nn.Module] = []
        if bottleneck is None:
            last = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        else:
            bottleneck = _arguments.integer("LIP", "bottleneck", bottleneck)
            for inner in (
                nn.Conv2d(channels, bottleneck, 1, bias=False),
                nn.Conv2d(bottleneck, bottleneck, 3, padding=1, bias=False),
            ):
                layers += [inner, nn.InstanceNorm2d(bottleneck, affine=True), nn.ReLU()]
            last = nn.Conv2d(bottleneck, channels, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.logits = nn.Sequential(*layers, last, nn.InstanceNorm2d(channels, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H/factor), ceil(W/factor))."""
        # A factor of exp(-12) cancels in the quotient and keeps weights within float16.
        weight = (self.gate * (self.logits(x).sigmoid() - 1)).exp()
        return self._average(weight * x) / self._average(weight)

    def _average(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * self.factor - 1, self.factor, padding=self.factor - 1)


def _check_odd(name: str, kernel_size: int) -> None:
    """Raise a ValueError for an even width: only odd windows give outputs of ceil(H/factor)."""
    if _arguments.integer(name, "kernel_size", kernel_size, least=0) % 2 == 0:
        raise ValueError(f"[{name}] kernel_size must be odd and at least 1; got {kernel_size}.")


UPSAMPLERS: dict[str, type[nn.Module]] = {
    "nearest": Nearest,
    "bilinear": Bilinear,
    "nearest_conv": NearestConv,
    "bilinear_conv": BilinearConv,
    "deconv": Deconv,
    "pixel_shuffle": PixelShuffle,
    "gum": GUM,
    "spatial_attention": SpatialAttention,
    "carafe": CARAFE,
}
DOWNSAMPLERS: dict[str, type[nn.Module]] = {
    "strided_conv": StridedConv,
    "max": MaxPool,
    "average": AveragePool,
    "dpp": DPP,
    "lip": LIP,
    "carafe": CARAFE,
}
