"""CARAFE++ in PyTorch.

`carafepp.reassemble` and the other functions are differentiable on tensors. This package adds:

- `CARAFE`, the module, and `replace_resampling`, which puts it into a network;
- `convex_upsample`, `adaptive_conv`, `AdaptiveConv` and `Involution2d`, other papers' operators;
- `carafepp.torch.mmcv`, a replacement for mmcv's CARAFE;
- `carafepp.torch.ultralytics`, for Ultralytics YOLO;
- `carafepp.torch.models`, the paper's networks;
- `decompositions`, for exporters that know PyTorch's operators alone.

Import it before you load an exported program with the operators ``torch.ops.carafepp.*``.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_modules, missing

try:
    from .modules import CARAFE
    from .operators import decompositions  # which registers the operators
    from .relatives import AdaptiveConv, Involution2d, adaptive_conv, convex_upsample
    from .replacement import Replacement, replace_resampling
except ModuleNotFoundError as error:
    raise missing(error, "carafepp[torch]") from error

if TYPE_CHECKING:
    from . import mmcv as mmcv
    from . import models as models
    from . import ultralytics as ultralytics
else:
    __getattr__, __dir__ = lazy_modules(globals(), "mmcv", "models", "ultralytics")

__all__ = [
    "CARAFE",
    "AdaptiveConv",
    "Involution2d",
    "Replacement",
    "adaptive_conv",
    "convex_upsample",
    "decompositions",
    "replace_resampling",
]
