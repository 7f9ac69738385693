"""CARAFE++, content-aware reassembly of features, on NumPy, PyTorch and every DLPack array."""

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
