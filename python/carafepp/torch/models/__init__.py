"""The paper's networks (section 4), with CARAFE++ or an operator that it compares.

The modules use plain `torch.nn`. Read them beside the paper, or copy them into a model.
`inpainting` also has the losses and layers of its systems.
"""

from .fpn import FPN, MaskHead, ResNetFPN
from .inpainting import GlobalLocalGenerator, PartialConvUNet, PatchDiscriminator
from .resampling import DOWNSAMPLERS, UPSAMPLERS, downsampler, upsampler
from .resnet import ResNet, resnet50, resnet101
from .upernet import UperNet

__all__ = [
    "DOWNSAMPLERS",
    "FPN",
    "UPSAMPLERS",
    "GlobalLocalGenerator",
    "MaskHead",
    "PartialConvUNet",
    "PatchDiscriminator",
    "ResNet",
    "ResNetFPN",
    "UperNet",
    "downsampler",
    "resnet50",
    "resnet101",
    "upsampler",
]
