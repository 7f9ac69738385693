"""CARAFE++ in PyTorch.

`carafepp.reassemble` and the other functions are differentiable on tensors as they are. Here are
the module, `CARAFE`; `replace_resampling`, which puts it into a network; in `carafepp.torch.mmcv`
what mmcv has of CARAFE; in `carafepp.torch.ultralytics` a door to YOLO; and in
`carafepp.torch.models` the paper's networks. An exported program that is loaded needs this import
for its operators, ``torch.ops.carafepp.*``.
"""

from . import operators  # noqa: F401  # registers them
from .modules import CARAFE
from .replacement import Replacement, replace_resampling

__all__ = ["CARAFE", "Replacement", "replace_resampling"]
