"""CARAFE++, content-aware reassembly of features, on NumPy, PyTorch and every DLPack array.

`carafepp.torch`, `carafepp.jax`, `carafepp.viz` and `carafepp.experiments` are imported when they
are first used: they need packages that carafepp itself does not.
"""

from typing import TYPE_CHECKING

from ._core import version as _version
from ._paths import get_cmake_dir, get_include, get_library
from .ops import (
    force_implementation,
    get_num_threads,
    list_implementations,
    normalize_masks,
    normalize_masks_backward,
    output_size,
    reassemble,
    reassemble_backward,
    reassemble_with_logits,
    reassemble_with_logits_backward,
    set_num_threads,
    show_config,
)

if TYPE_CHECKING:
    from . import experiments as experiments
    from . import jax as jax
    from . import torch as torch
    from . import viz as viz
else:
    from ._lazy import lazy_modules

    __getattr__, __dir__ = lazy_modules(globals(), "experiments", "jax", "torch", "viz")

__version__ = _version()

__all__ = [
    "force_implementation",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "get_num_threads",
    "list_implementations",
    "normalize_masks",
    "normalize_masks_backward",
    "output_size",
    "reassemble",
    "reassemble_backward",
    "reassemble_with_logits",
    "reassemble_with_logits_backward",
    "set_num_threads",
    "show_config",
]
