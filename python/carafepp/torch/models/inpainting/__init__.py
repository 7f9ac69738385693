"""The inpainting systems of the CARAFE++ paper (section 4.3, Tables 7 and 10), in plain PyTorch.

`partial` has the layers that know which of their features are there, `generators` the two
networks that fill holes, `adversarial` the discriminator and the losses. Everywhere a hole is a
boolean map (N, 1, H, W), true where a picture is missing: M in the paper; a valid map is its
opposite. Pictures are within [-1, 1].
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
