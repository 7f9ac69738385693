"""The paper's networks (section 4), with CARAFE++ or any operator that it is compared with.

Reference modules of plain `torch.nn`, to be read beside the paper and lifted into a model.
"""

from .resampling import DOWNSAMPLERS, UPSAMPLERS, downsampler, upsampler

__all__ = [
    "DOWNSAMPLERS",
    "UPSAMPLERS",
    "downsampler",
    "upsampler",
]
