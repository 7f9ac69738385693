"""What mmcv.ops has of CARAFE, with its names, signatures, parameters and state_dict keys.

``from carafepp.torch.mmcv import CARAFEPack`` in place of ``from mmcv.ops import CARAFEPack`` is
all that a model needs: checkpoints load strictly, outputs are the same.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .modules import reset_as_authors


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Upsample features, (N, C, H, W), with masks, (N, group_size*kernel_size**2, H', W').

    Parameters
    ----------
    features, masks : Tensor
    kernel_size : int
        Odd, 1 to 31.
    group_size : int
        The number of groups.
    scale_factor : int
        1 or more: H' = H*scale_factor, W' = W*scale_factor.

    Returns
    -------
    Tensor, (N, C, H', W')

    Raises
    ------
    ValueError
        Shapes or numbers that do not fit (mmcv: AssertionError).
    """
    channels = group_size * kernel_size**2
    if masks.shape[-3] != channels:
        raise ValueError(
            "[carafe] masks must have group_size*kernel_size**2 = "
            f"{group_size}*{kernel_size}**2 = {channels} channels; got {masks.shape[-3]}."
        )
    output: Tensor = ops.reassemble(features, masks, up=scale_factor, groups=group_size)
    return output


carafe_naive = carafe  # mmcv's first version of the same


class CARAFE(nn.Module):
    """`carafe` as a module.

    Parameters
    ----------
    kernel_size, group_size, scale_factor : int
    """

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.group_size = group_size
        self.scale_factor = scale_factor

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Upsample features with masks."""
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor)


class CARAFENaive(CARAFE):
    """The same as `CARAFE`."""


class CARAFEPack(nn.Module):
    """The whole upsampler: channel compressor, content encoder, kernel normaliser, reassembly.

    Parameters
    ----------
    channels : int
    scale_factor : int
    up_kernel : int, default 5
    up_group : int, default 1
    encoder_kernel : int, default 3
    encoder_dilation : int, default 1
    compressed_channels : int, default 64

    Notes
    -----
    `forward` normalises and reassembles in one pass; `kernel_normalizer` and `feature_reassemble`
    do the two one after the other, for code that calls them.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.encoder_kernel = encoder_kernel
        self.encoder_dilation = encoder_dilation
        self.compressed_channels = compressed_channels
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_kernel**2 * up_group * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Set weights as mmcv does: Xavier's uniform ones, and normal ones in the encoder."""
        reset_as_authors(self, self.content_encoder)

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """Return masks, (N, up_group*up_kernel**2, H', W'), of the encoder's logits."""
        masks: Tensor = ops.normalize_masks(
            mask, up=self.scale_factor, kernel_size=self.up_kernel, groups=self.up_group
        )
        return masks

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """Upsample x with masks."""
        return carafe(x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x."""
        logits = self.content_encoder(self.channel_compressor(x))
        output: Tensor = ops.reassemble_with_logits(
            x, logits, up=self.scale_factor, kernel_size=self.up_kernel, groups=self.up_group
        )
        return output


_NAMES = {cls.__name__: cls for cls in (CARAFE, CARAFENaive, CARAFEPack)}


def swap_mmcv(model: nn.Module) -> list[str]:
    """Make mmcv's modules of CARAFE in a live model ours, in place: parameters and hooks stay.

    Parameters
    ----------
    model : Module

    Returns
    -------
    list of str
        The names of the modules that were swapped.
    """
    swapped = []
    for name, module in model.named_modules():
        cls = type(module)
        if cls.__module__.partition(".")[0] == "mmcv" and cls.__name__ in _NAMES:
            module.__class__ = _NAMES[cls.__name__]
            swapped.append(name)
    return swapped
