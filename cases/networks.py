"""Layers of the paper's networks, of the sizes that GPU kernels are timed and modelled with."""

from .table import Case

_LAYERS = [
    Case("fpn1", "a small level of an FPN", 2, 256, 50, 76, up=2, kernel_size=5),
    Case("fpn2", "a large level of an FPN", 2, 256, 100, 152, up=2, kernel_size=5),
    Case("rois", "the mask head on 1000 RoIs", 1000, 256, 14, 14, up=2, kernel_size=5),
    Case("stem", "the pooling of a ResNet stem", 64, 64, 112, 112, down=2, kernel_size=5),
    Case("s2", "a stride-2 stage of a ResNet", 64, 256, 56, 56, down=2, kernel_size=5),
    Case("s3", "a deep stage", 64, 512, 28, 28, down=2, kernel_size=5),
]
LAYERS = {case.name: case for case in _LAYERS}
