"""Layers for features of which some are missing: they take and return a valid map beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .... import _arguments, ops
from ...modules import CARAFE, beyond, go_on


class PartialConv2d(nn.Conv2d):
    """Convolution of what is valid, scaled up where that is less than the whole window.

    ``output = (sum of weight*x over the valid) * size / valid + bias``, where `size` counts the
    elements of a window, `valid` the valid ones among them; 0 where there are none. A position of
    the output is valid if its window has a valid element. What is outside of the picture is not.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        Odd; the padding is that which keeps the size at stride 1.
    stride, dilation : int, default 1
    bias : bool, default True

    Raises
    ------
    TypeError
        A number that is not an integer.
    ValueError
        An even kernel_size; in a call, a valid map that is not one of x.

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
            The second where channels come from several sources, as in a U-Net.
        """
        _check_valid("PartialConv2d", valid, x, (1, self.in_channels))
        how: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        exact = torch.promote_types(x.dtype, torch.float32)  # for counts, which halves do not hold
        per_pixel = valid.expand_as(x).sum(1, keepdim=True, dtype=exact)
        count = F.conv2d(per_pixel, per_pixel.new_ones(1, 1, *self.kernel_size), **how)
        output = F.conv2d(x.where(valid, 0), self.weight, **how)
        output = output.to(exact) * self.weight[0].numel() / count.clamp(min=1)
        if self.bias is not None:
            output = output + self.bias[:, None, None]
        valid = count > 0
        return output.where(valid, 0).to(x.dtype), valid


class PartialCARAFE(nn.Module):
    """CARAFE++ of what is valid: the hole is propagated through the reassembly kernels.

    ``output = reassemble(x * valid, kernels) / reassemble(valid, kernels)``: the kernels, predicted
    from x with zeros in its holes, are reduced to what is valid and normalised again. A position
    of the output is valid if its kernel has weight on something valid; else it is 0.

    Parameters
    ----------
    channels : int
    **options
        Those of `CARAFE`: up, down, kernel_size, ... Its normaliser must be one whose kernels sum
        to 1, and its groups 1.

    Raises
    ------
    ValueError
        Another normaliser, several groups; in a call, a valid map that is not one of x.

    Notes
    -----
    The paper has one sentence on this, "we can conveniently keep the mask propagation in CARAFE++
    by updating the mask with our content-aware reassembly kernels" (section 4.3). The two rules
    that it leaves open are partial convolution's own: the updated map is made binary again, and
    features are divided by the part of the kernel's weight that counted, which for equal weights
    is `PartialConv2d`'s size/valid. So the outside of the picture is a hole here too, unlike in
    `CARAFE`: with a map that is valid everywhere, borders differ from its, and nothing else does.

    Weights below the rounding error of the kernel's sum count as none. The kernels serve twice, so
    unlike in `CARAFE` they are stored.

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

    def forward(
        self, x: Tensor, valid: Tensor, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the output and its valid map.

        Parameters
        ----------
        x : Tensor, (N, C, H, W)
        valid : Tensor of bool, (N, 1, H, W)
        size : (int, int), optional
            That of the output where it is another than the natural one, as for `CARAFE`.
        """
        _check_valid("PartialCARAFE", valid, x, (1,))
        x = x.where(valid, 0)
        masks = self.carafe.masks(x, size)
        weight = self._reassemble(valid.to(masks.dtype), masks)
        valid = weight > torch.finfo(weight.dtype).eps
        output = self._reassemble(x, masks) / weight.where(valid, 1)
        return output.where(valid, 0), valid

    def _reassemble(self, x: Tensor, masks: Tensor) -> Tensor:
        """Return x reassembled to the size of masks, which may be another than its natural one."""
        up, down = self.carafe.up, self.carafe.down
        height, width = size = masks.shape[-2:]
        x = go_on(x, *beyond("PartialCARAFE", x, size, up, down), down)
        if not torch.jit.is_tracing():
            return ops.reassemble(x, masks, up=up, down=down, size=(height, width))
        rows, columns = _arguments.natural_size(x.shape[-2:], up, down)  # which serves every size
        masks = F.pad(masks, (0, columns - width, 0, rows - height))
        return ops.reassemble(x, masks, up=up, down=down)[..., :height, :width]


def _check_valid(name: str, valid: Tensor, x: Tensor, channels: tuple[int, ...]) -> None:
    if torch.jit.is_tracing():  # where sizes are tensors
        return
    shapes = {(x.shape[0], c, *x.shape[2:]) for c in channels}
    if valid.dtype != torch.bool or tuple(valid.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in sorted(shapes))
        raise ValueError(
            f"[{name}] valid must be a tensor of bool of shape {allowed}; "
            f"got {valid.dtype}, {tuple(valid.shape)}."
        )
