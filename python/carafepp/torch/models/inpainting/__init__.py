"""The inpainting systems of the CARAFE++ paper (section 4.3, Tables 7 and 10), in plain PyTorch.

`partial` has layers that take a map of the valid features. `generators` has the two networks that
fill holes. `adversarial` has the discriminator and the losses. A hole is a boolean map
(N, 1, H, W) of the missing pixels: M in the paper. A valid map is its opposite. Pictures are within
[-1, 1].
"""

from .adversarial import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from .generators import GlobalLocalGenerator, PartialConvUNet, compose
from .partial import PartialCARAFE, PartialConv2d

__all__ = [
    "GlobalLocalGenerator",
    "PartialCARAFE",
    "PartialConv2d",
    "PartialConvUNet",
    "PatchDiscriminator",
    "compose",
    "discriminator_loss",
    "generator_loss",
    "reconstruction_loss",
]
