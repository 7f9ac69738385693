"""Classes of packages that somebody else has imported. Nothing is imported here."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def imported_class(package: str, name: str) -> type | None:
    """Return a class of an imported package; None if the package is half imported, lazy or a mock.

    The package's own ``__getattr__`` is not asked: it could import more.
    """
    try:
        cls = object.__getattribute__(sys.modules.get(package), name)
    except AttributeError:
        return None
    return cls if isinstance(cls, type) else None


def is_tensor(value: Any) -> bool:
    """Tell whether something is a PyTorch tensor."""
    if type(value) is np.ndarray:
        return False
    tensor = imported_class("torch", "Tensor")
    return tensor is not None and isinstance(value, tensor)
