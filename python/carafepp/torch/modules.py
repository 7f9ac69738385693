"""The CARAFE++ module: kernels predicted from features, and the features reassembled by them."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from .operators import natural_size


def reset_as_authors(module: nn.Module, content_encoder: nn.Conv2d) -> None:
    """Set all parameters of a module to what they begin with in the authors' code."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    nn.init.normal_(content_encoder.weight, std=0.001)


class CARAFE(nn.Module):
    """Rescale features by up/down with kernels predicted from their own content.

    ``output = reassemble_with_logits(x, content_encoder(channel_compressor(x)))``: a 1x1
    convolution compresses the channels, a convolution of stride `down` predicts
    ``groups*kernel_size**2*up**2`` logits at each of its positions, a normaliser makes kernels of
    them, and every output pixel is a sum over a window of x, weighted by its own kernel. The
    kernels are never stored.

    Parameters
    ----------
    channels : int
        C, of the input and of the output.
    up, down : int, default 1
        The factor up/down: up=2 doubles the size, down=2 halves it, up=3, down=2 makes it half as
        large again.
    kernel_size : int, default 5
        The side of the windows, k_reassembly in the paper: odd, 1 to 31.
    groups : int, default 1
        How many groups of channels have kernels of their own; `channels` is divisible by it.
    compressed_channels : int or None, optional
        C_m, what the compressor leaves; by default 64, or 16 where down > up. None: no compressor
        ("N/A" in Table 11).
    encoder_kernel_size : int, default 3
        k_encoder in the paper: odd, 1 to 31.
    encoder_dilation : int, default 1
        The dilation of the content encoder.
    batch_norm : bool, default False
        Whether BatchNorm and ReLU follow the compressor (section 5.1, image classification).
    normalizer : {"softmax", "sigmoid", "sigmoid_normalized", "none"}, default "softmax"
        The kernel normaliser (Table 14).
    ceil_mode : bool, default True
        Whether sizes that `down` does not divide are rounded up, as by a strided convolution with
        padding, or down, as by a pooling layer.
    device, dtype : optional
        Those of the parameters.

    Raises
    ------
    ValueError
        A number out of its range.

    Notes
    -----
    Input: (N, C, H, W) or (C, H, W). Output: (N, C, H', W') or (C, H', W'), in the memory format
    of the input, of size (ceil(H*up/down), ceil(W*up/down)) or, with ceil_mode=False,
    (H*up//down, W*up//down).

    Weights begin as in the authors' code: Xavier's uniform ones in the compressor, normal ones of
    standard deviation 0.001 in the encoder, biases 0. With the softmax this is nearly an average.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", section 3.

    Examples
    --------
    >>> x = torch.randn(2, 32, 15, 20)
    >>> CARAFE(32, up=2)(x).shape
    torch.Size([2, 32, 30, 40])
    >>> CARAFE(32, up=2)(x, size=(29, 40)).shape
    torch.Size([2, 32, 29, 40])
    >>> CARAFE(32, down=2)(x).shape
    torch.Size([2, 32, 8, 10])
    """

    def __init__(
        self,
        channels: int,
        *,
        up: int = 1,
        down: int = 1,
        kernel_size: int = 5,
        groups: int = 1,
        compressed_channels: int | Literal["auto"] | None = "auto",
        encoder_kernel_size: int = 3,
        encoder_dilation: int = 1,
        batch_norm: bool = False,
        normalizer: str = "softmax",
        ceil_mode: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if compressed_channels == "auto":
            compressed_channels = 16 if down > up else 64
        self.channels = channels
        self.up = up
        self.down = down
        self.kernel_size = kernel_size
        self.groups = groups
        self.compressed_channels = compressed_channels
        self.encoder_kernel_size = encoder_kernel_size
        self.encoder_dilation = encoder_dilation
        self.batch_norm = batch_norm
        self.normalizer = normalizer
        self.ceil_mode = ceil_mode
        self._check()

        place = {"device": device, "dtype": dtype}
        self.channel_compressor: nn.Module = nn.Identity()
        if compressed_channels is not None:
            self.channel_compressor = nn.Conv2d(
                channels, compressed_channels, 1, bias=not batch_norm, **place
            )
        if batch_norm:
            self.channel_compressor = nn.Sequential(
                self.channel_compressor, nn.BatchNorm2d(compressed_channels, **place), nn.ReLU()
            )
        self.content_encoder = nn.Conv2d(
            channels if compressed_channels is None else compressed_channels,
            groups * kernel_size**2 * up**2,
            encoder_kernel_size,
            stride=down,
            padding=encoder_dilation * (encoder_kernel_size // 2),
            dilation=encoder_dilation,
            **place,
        )
        self.reset_parameters()

    def _check(self) -> None:
        positive = ("channels", "up", "down", "groups", "compressed_channels", "encoder_dilation")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"[CARAFE] {name} must be at least 1; got {value}.")
        for name in ("kernel_size", "encoder_kernel_size"):
            value = getattr(self, name)
            if not 1 <= value <= 31 or value % 2 == 0:
                raise ValueError(f"[CARAFE] {name} must be odd, from 1 to 31; got {value}.")
        if self.channels % self.groups:
            raise ValueError(
                f"[CARAFE] channels must be divisible by groups={self.groups}; got {self.channels}."
            )
        if self.batch_norm and self.compressed_channels is None:
            raise ValueError("[CARAFE] batch_norm must be False without a compressor; got True.")
        ops.check_normalizer("CARAFE", self.normalizer)

    def reset_parameters(self) -> None:
        """Set all parameters to what they begin with."""
        reset_as_authors(self, self.content_encoder)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Rescale x.

        Parameters
        ----------
        x : Tensor, (N, C, H, W) or (C, H, W)
        size : (int, int), optional
            (H', W') where it is to be smaller than the natural size: that of a skip connection.
        """
        output: Tensor = ops.reassemble_with_logits(
            x, self.logits(x), down=self.down, size=size or self._rounded(x), **self._how()
        )
        return output

    def masks(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the kernels that `forward` uses: (N, groups*kernel_size**2, H', W')."""
        size = size or self._rounded(x) or natural_size(x.shape[-2:], self.up, self.down)
        masks: Tensor = ops.normalize_masks(self.logits(x), size=size, **self._how())
        return masks

    def logits(self, x: Tensor) -> Tensor:
        """Return the kernels before the normaliser and the pixel shuffle."""
        logits: Tensor = self.content_encoder(self.channel_compressor(x))
        return logits

    def _rounded(self, x: Tensor) -> tuple[int, int] | None:
        if self.ceil_mode:
            return None
        height, width = x.shape[-2:]
        return height * self.up // self.down, width * self.up // self.down

    def _how(self) -> dict[str, Any]:
        return {
            "up": self.up,
            "kernel_size": self.kernel_size,
            "groups": self.groups,
            "normalizer": self.normalizer,
        }

    def extra_repr(self) -> str:
        """Return what differs from the default, for `print`."""
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(CARAFE).parameters.items()
            if name in vars(self)
        }
        del defaults["channels"]
        values = {name: getattr(self, name) for name in defaults}
        differ = [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
        return ", ".join([str(self.channels), *differ])
