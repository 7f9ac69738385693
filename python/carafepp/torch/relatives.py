"""Operators of other papers: convex upsampling, adaptive convolution, involution.

Each takes the arguments of the paper's own code, and calls `carafepp.reassemble` or
`carafepp.reassemble_with_logits`. docs/guides/relatives.md shows what changes in each project.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from .. import _arguments, ops

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def convex_upsample(
    flow: Tensor,
    mask: Tensor,
    factor: int = 8,
    scale: float | None = None,
    *,
    layout: ops.Layout = "NCHW",
) -> Tensor:
    """Upsample flow or disparity by convex combinations of 3 x 3 neighbours, as RAFT does.

    ``output = reassemble_with_logits(scale * flow, mask, up=factor, kernel_size=3)``: a mean of the
    window around each source, weighted by a softmax for every output pixel.

    Parameters
    ----------
    flow : Tensor, (N, C, H, W) or (C, H, W)
        The values to upsample. Flow has two channels and disparity has one; any number is allowed.
    mask : Tensor, (N, 9*factor**2, H, W) or (9*factor**2, H, W)
        The logits. Channel ``t*factor**2 + dy*factor + dx`` is tap t of the output pixel at
        sub-pixel (dy, dx).
    factor : int, default 8
        How many times as large the output is.
    scale : float, default `factor`
        The number that multiplies flow: displacements grow with the map. Give 1 for other values.
    layout : "NCHW" or "NHWC", default "NCHW"
        The order of the axes of flow and of the output. The axes of mask are always
        (N, 9*factor**2, H, W), as in DROID-SLAM.

    Returns
    -------
    Tensor, (N, C, H*factor, W*factor) or (C, H*factor, W*factor)
        The dtype is `torch.promote_types` of those of flow and mask.

    Raises
    ------
    TypeError
        An argument is no tensor or no number, or a dtype is not float32, float64, float16 or
        bfloat16.
    ValueError
        A shape, a device, factor or layout does not fit.

    Notes
    -----
    Autocast does not apply: 16 bits cannot hold a large displacement to a fraction of a pixel.

    References
    ----------
    Z. Teed, J. Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", appendix B.

    Examples
    --------
    >>> flow, mask = torch.ones(1, 2, 5, 6), torch.zeros(1, 9 * 8 * 8, 5, 6)
    >>> output = convex_upsample(flow, mask)
    >>> output.shape, output[0, 0, 20, 24].item()
    (torch.Size([1, 2, 40, 48]), 8.0)
    """
    if _has_proxy(flow, mask):
        output: Tensor = handle_torch_function(
            convex_upsample, (flow, mask), flow, mask, factor, scale, layout=layout
        )
        return output
    factor = _arguments.integer("convex_upsample", "factor", factor)
    scale = factor if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(
            f"[convex_upsample] scale must be a number; got {scale!r} ({type(scale).__name__})."
        )
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"[convex_upsample] layout must be 'NCHW' or 'NHWC'; got {layout!r}.")
    _check_tensors("convex_upsample", flow=flow, mask=mask)
    if flow.dim() not in (3, 4):
        axes = ", ".join(layout)
        raise ValueError(
            f"[convex_upsample] flow must have shape ({axes}) or ({axes[3:]}); "
            f"got {tuple(flow.shape)}."
        )
    if layout == "NHWC":
        flow = flow.movedim(-1, -3)
    if not _is_recorded():
        shape = (*flow.shape[:-3], 9 * factor**2, *flow.shape[-2:])
        if mask.shape != shape:
            batch = "N, " if flow.dim() == 4 else ""
            raise ValueError(
                f"[convex_upsample] mask must have shape ({batch}9*factor**2, H, W) = {shape}; "
                f"got {tuple(mask.shape)}."
            )
    if flow.dtype != mask.dtype:
        dtype = torch.promote_types(flow.dtype, mask.dtype)
        flow, mask = flow.to(dtype), mask.to(dtype)
    if scale != 1:
        flow = scale * flow
    with torch.autocast(flow.device.type, enabled=False) if _is_autocast(flow) else nullcontext():
        output = ops.reassemble_with_logits(flow, mask, up=factor, kernel_size=3)
    return output if layout == "NCHW" else output.movedim(-3, -1)


def adaptive_conv(input: Tensor, filters: Tensor) -> Tensor:
    """Filter a padded map with a filter of its own for every output pixel, as FeatUp does.

    ``output[n,c,i,j] = sum over a,b of filters[n,i,j,a,b] * input[n, c, i+a, j+b]``, which is
    ``reassemble(input, masks, padding=0)`` with the filters as masks.

    Parameters
    ----------
    input : Tensor, (N, C, H+K-1, W+K-1) or (C, H+K-1, W+K-1)
        A map that the caller has padded by K//2 rows and columns on each side.
    filters : Tensor, (N, H, W, K, K) or (H, W, K, K)
        K odd, 1 to 31. The dtype of input or, with half input, float32.

    Returns
    -------
    Tensor, (N, C, H, W) or (C, H, W)
        In the dtype of input.

    Raises
    ------
    TypeError
        An argument is no tensor, or a dtype does not fit.
    ValueError
        A shape or a device does not fit.

    Notes
    -----
    Filters are not copied if their last two axes can be viewed as one. Contiguous filters can, and
    so can FeatUp's, which are a permuted tensor with the taps as channels. A transpose of the last
    two axes cannot.

    References
    ----------
    S. Fu, M. Hamilton et al., "FeatUp: A Model-Agnostic Framework for Features at Any Resolution".

    Examples
    --------
    >>> input = torch.nn.functional.pad(torch.ones(1, 4, 5, 6), [1] * 4, mode="reflect")
    >>> output = adaptive_conv(input, torch.full((1, 5, 6, 3, 3), 1 / 9))
    >>> output.shape, bool(torch.allclose(output, torch.ones(())))
    (torch.Size([1, 4, 5, 6]), True)
    """
    if _has_proxy(input, filters):
        output: Tensor = handle_torch_function(adaptive_conv, (input, filters), input, filters)
        return output
    _check_tensors("adaptive_conv", input=input, filters=filters)
    if input.dim() not in (3, 4):
        raise ValueError(
            "[adaptive_conv] input must have shape (N, C, H+K-1, W+K-1) or (C, H+K-1, W+K-1); "
            f"got {tuple(input.shape)}."
        )
    if not torch.jit.is_tracing():
        _check_filters(input, filters)
    return ops.reassemble(input, filters.flatten(-2).movedim(-1, -3), padding=0)


class AdaptiveConv:
    """`adaptive_conv` by the name and the method of FeatUp's ``torch.autograd.Function``."""

    apply = staticmethod(adaptive_conv)


def _check_filters(input: Tensor, filters: Tensor) -> None:
    """Check the shapes of filters and input, and the dtype of filters beside that of input.

    In a recorded graph, only the taps: 1 x 9 of them look like 3 x 3 to the operator.
    """
    shape = tuple(filters.shape)
    taps = shape[-1] if shape else 0
    if filters.dim() != input.dim() + 1 or shape[-2] != taps or taps % 2 == 0 or taps > 31:
        raise ValueError(
            "[adaptive_conv] filters must have shape (N, H, W, K, K) with an odd K, from 1 to 31, "
            f"for an input of shape (N, C, H+K-1, W+K-1); got {shape}."
        )
    if _is_recorded():
        return
    padded = tuple(length + taps - 1 for length in shape[-4:-2])
    if shape[:-4] != input.shape[:-3] or padded != input.shape[-2:]:
        expected = ", ".join(map(str, (*shape[:-4], "C", *padded)))
        batch = "N, " if len(shape) == 5 else ""
        raise ValueError(
            f"[adaptive_conv] input must have shape ({batch}C, H+K-1, W+K-1) = ({expected}) for "
            f"filters of shape ({batch}H, W, K, K) = {shape}; got {tuple(input.shape)}."
        )
    half = input.dtype in (torch.float16, torch.bfloat16)
    allowed = {input.dtype} | ({torch.float32} if half else set())
    cast = _is_autocast(input) and input.dtype != torch.float64
    if filters.dtype not in allowed and not cast:
        raise TypeError(
            f"[adaptive_conv] filters must have the dtype of input, {input.dtype}"
            f"{', or torch.float32' if half else ''}; got {filters.dtype}."
        )


class Involution2d(nn.Module):
    """Filter a map with kernels predicted from each pixel and shared by groups of 16 channels.

    ``output = reassemble(x, conv2(conv1(avgpool(x))), down=stride, groups=channels//16)``

    `avgpool` averages over stride x stride pixels. `conv1` is a 1x1 convolution to a quarter of the
    channels, with BatchNorm and ReLU. `conv2` is a 1x1 convolution that predicts
    ``channels//16 * kernel_size**2`` weights. There is no normaliser.

    Parameters
    ----------
    channels : int
        C, for the input and the output: divisible by 16.
    kernel_size : int
        K: odd, 1 to 31.
    stride : int, default 1
        The output has every stride-th row and column.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is out of its range.

    Notes
    -----
    The input is (N, C, H, W). The output is (N, C, H//stride, W//stride).

    Arguments, attributes and keys of the state_dict are those of ``involution`` in the authors'
    code (d-li14/involution): its checkpoints load. Weights are initialised as there, by
    `torch.nn.init.kaiming_normal_`.

    References
    ----------
    D. Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition",
    section 3.

    Examples
    --------
    >>> Involution2d(32, 7, stride=2)(torch.randn(1, 32, 12, 14)).shape
    torch.Size([1, 32, 6, 7])
    """

    group_channels = 16
    reduction = 4

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride = _arguments.positive(
            "Involution2d", channels=channels, stride=stride
        )
        self.kernel_size = kernel_size = _arguments.odd("Involution2d", "kernel_size", kernel_size)
        _arguments.divisible(
            "Involution2d", "channels", channels, "group_channels", self.group_channels
        )
        self.groups = channels // self.group_channels
        hidden = channels // self.reduction
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, hidden, 1, bias=False),
                bn=nn.BatchNorm2d(hidden),
                activate=nn.ReLU(),
            )
        )
        self.conv2 = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(hidden, self.groups * kernel_size**2, 1))
        )
        if stride > 1:
            self.avgpool = nn.AvgPool2d(stride)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters."""
        for convolution in (self.conv1.conv, self.conv2.conv):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv2.conv.bias)
        self.conv1.bn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Filter x."""
        weight = self.conv2(self.conv1(self.avgpool(x) if self.stride > 1 else x))
        size = weight.shape[-2:] if self.stride > 1 else None  # rounded down, as avgpool does
        output: Tensor = ops.reassemble(x, weight, down=self.stride, groups=self.groups, size=size)
        return output


def _has_proxy(*values: Any) -> bool:
    """Tell whether a trace of torch.fx has put an object, which has no shape, in a tensor's place.

    `has_torch_function` would also be True in an export, which would then not see autocast change.
    """
    return any(hasattr(v, "__torch_function__") and not isinstance(v, Tensor) for v in values)


def _check_tensors(function: str, **tensors: Any) -> None:
    """Check that arguments are tensors of the right dtypes on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"[{function}] {name} must be a PyTorch tensor; got {type(tensor).__name__}."
            )
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"[{function}] {name} must be float32, float64, float16 or bfloat16; "
                f"got {tensor.dtype}."
            )
    (first, features), (name, kernels) = tensors.items()
    if features.device != kernels.device:
        raise ValueError(
            f"[{function}] {name} must be on the device of {first} ({features.device}); "
            f"got {kernels.device}."
        )


def _is_autocast(tensor: Tensor) -> bool:
    device = tensor.device.type
    return bool(device != "meta" and torch.is_autocast_enabled(device))


def _is_recorded() -> bool:
    """Tell whether PyTorch records a graph for other sizes; the operator checks them then."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_compiling())
