"""The paper's networks (section 4), with CARAFE++ or any operator that it is compared with.

Reference modules of plain `torch.nn`, to be read beside the paper and lifted into a model.
"""

from .fpn import FPN, MaskHead, ResNetFPN
from .resampling import DOWNSAMPLERS, UPSAMPLERS, downsampler, upsampler
from .resnet import ResNet, resnet50, resnet101
from .upernet import UperNet

__all__ = [
    "DOWNSAMPLERS",
    "FPN",
    "UPSAMPLERS",
    "MaskHead",
    "ResNet",
    "ResNetFPN",
    "UperNet",
    "downsampler",
    "resnet50",
    "resnet101",
    "upsampler",
]
