"""Layers for features with missing values: they take and return features and a valid map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .... import _arguments, ops
from ...modules import CARAFE, exceeds, pad_beyond


class PartialConv2d(nn.Conv2d):
    """Convolution of the valid elements of a window, scaled up for the missing ones.

    ``output = (sum of weight*x over valid elements) * size / valid + bias``. `size` is the number
    of elements of a window and `valid` the number of valid ones. The output is 0 if there are none.
    A position of the output is valid if its window has a valid element. Elements outside the
    picture are not valid.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        Odd. The padding keeps the size at stride 1.
    stride, dilation : int, default 1
    bias : bool, default True

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        kernel_size is even. In a call: the valid map does not fit x.

    References
    ----------
    G. Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018,
    equations 1 and 2.

    Examples
    --------
    >>> valid = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    >>> valid[..., 4:] = True
    >>> output, valid = PartialConv2d(3, 16, 3)(torch.randn(1, 3, 8, 8), valid)
    >>> output.shape, valid[0, 0, 0].tolist()
    (torch.Size([1, 16, 8, 8]), [False, False, False, True, True, True, True, True])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        in_channels, out_channels, kernel_size, stride, dilation = _arguments.positive(
            "PartialConv2d",
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
        )
        if kernel_size % 2 == 0:
            raise ValueError(f"[PartialConv2d] kernel_size must be odd; got {kernel_size}.")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=bias,
        )

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and its valid map.

        Parameters
        ----------
        x : Tensor, (N, C, H, W)
        valid : Tensor of bool, (N, 1, H, W) or (N, C, H, W)
            The second form is for channels from several sources, as in a U-Net.
        """
        _check_valid("PartialConv2d", valid, x, (1, self.in_channels))
        how: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        exact = torch.promote_types(x.dtype, torch.float32)  # halves cannot hold the counts
        per_pixel = valid.expand_as(x).sum(1, keepdim=True, dtype=exact)
        count = F.conv2d(per_pixel, per_pixel.new_ones(1, 1, *self.kernel_size), **how)
        output = F.conv2d(x.where(valid, 0), self.weight, **how)
        output = output.to(exact) * self.weight[0].numel() / count.clamp(min=1)
        if self.bias is not None:
            output = output + self.bias[:, None, None]
        valid = count > 0
        return output.where(valid, 0).to(x.dtype), valid


class PartialCARAFE(nn.Module):
    """CARAFE++ of the valid features; the reassembly kernels propagate the hole.

    ``output = reassemble(x * valid, kernels) / reassemble(valid, kernels)``: the kernels are
    predicted from x with zeros in its holes, restricted to the valid features and normalised again.
    A position of the output is valid if its kernel has weight on a valid feature; else it is 0.

    Parameters
    ----------
    channels : int
    **options
        Arguments of `CARAFE`: up, down, kernel_size, ... The kernels of its normaliser must sum to
        1, groups must be 1, and padding and padding_mode must be the defaults.

    Raises
    ------
    ValueError
        The normaliser or the padding is another, or there are several groups. In a call: the valid
        map does not fit x.

    Notes
    -----
    The paper has one sentence on this: "we can conveniently keep the mask propagation in CARAFE++
    by updating the mask with our content-aware reassembly kernels" (section 4.3). Two rules follow
    partial convolution. The updated map is binary again. Features are divided by the kernel's
    weight on valid features; for equal weights this is `PartialConv2d`'s size/valid. Unlike in
    `CARAFE`, the outside of the picture is a hole. So a map that is valid everywhere changes the
    borders.

    A weight below the rounding error of the kernel's sum counts as 0. The kernels are used twice,
    so they are stored, unlike in `CARAFE`.

    Examples
    --------
    >>> valid = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    >>> valid[..., 4:] = True
    >>> output, valid = PartialCARAFE(16, down=2)(torch.randn(1, 16, 8, 8), valid)
    >>> output.shape, valid[0, 0, 0].tolist()
    (torch.Size([1, 16, 4, 4]), [False, True, True, True])
    """

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.carafe = CARAFE(channels, **options)
        if self.carafe.normalizer not in ("softmax", "sigmoid_normalized"):
            raise ValueError(
                "[PartialCARAFE] normalizer must make kernels that sum to 1, 'softmax' or "
                f"'sigmoid_normalized'; got {self.carafe.normalizer!r}."
            )
        if self.carafe.groups != 1:
            raise ValueError(f"[PartialCARAFE] groups must be 1; got {self.carafe.groups}.")
        for name in ("padding", "padding_mode"):
            value, default = getattr(self.carafe, name), getattr(CARAFE, name)
            if value != default:
                raise ValueError(
                    f"[PartialCARAFE] {name} must be {default!r}: the outside of the picture is a "
                    f"hole; got {value!r}."
                )

    def forward(
        self, x: Tensor, valid: Tensor, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the output and its valid map.

        Parameters
        ----------
        x : Tensor, (N, C, H, W)
        valid : Tensor of bool, (N, 1, H, W)
        size : (int, int), optional
            Another size of the output than the natural one, as in `CARAFE`.
        """
        _check_valid("PartialCARAFE", valid, x, (1,))
        x = x.where(valid, 0)
        masks = self.carafe.masks(x, size)
        weight = self._reassemble(valid.to(masks.dtype), masks)
        valid = weight > torch.finfo(weight.dtype).eps
        output = self._reassemble(x, masks) / weight.where(valid, 1)
        return output.where(valid, 0), valid

    def _reassemble(self, x: Tensor, masks: Tensor) -> Tensor:
        """Return x reassembled to the size of masks, which may differ from the natural size."""
        up, down = self.carafe.up, self.carafe.down
        height, width = size = masks.shape[-2:]
        x = pad_beyond(x, *exceeds("PartialCARAFE", x.shape[-2:], size, up, down), down)
        if not torch.jit.is_tracing():
            return ops.reassemble(x, masks, up=up, down=down, size=(height, width))
        rows, columns = _arguments.natural_size(x.shape[-2:], up, down)  # right for every size
        masks = F.pad(masks, (0, columns - width, 0, rows - height))
        return ops.reassemble(x, masks, up=up, down=down)[..., :height, :width]


def _check_valid(name: str, valid: Tensor, x: Tensor, channels: tuple[int, ...]) -> None:
    if torch.jit.is_tracing():  # sizes are tensors
        return
    shapes = {(x.shape[0], c, *x.shape[2:]) for c in channels}
    if valid.dtype != torch.bool or tuple(valid.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in sorted(shapes))
        raise ValueError(
            f"[{name}] valid must be a tensor of bool of shape {allowed}; "
            f"got {valid.dtype}, {tuple(valid.shape)}."
        )
