"""The folders that a C or C++ program needs to build against carafepp."""

from __future__ import annotations

import sys
from pathlib import Path

from . import _core

_FOLDER = Path(_core.__file__).parent


def get_include() -> str:
    """Return the folder to include ``carafepp/carafepp.h`` from.

    Examples
    --------
    ``cc program.c -I"$(python -c 'import carafepp; print(carafepp.get_include())')" ...``
    """
    return str(_FOLDER / "include")


def get_library() -> str:
    """Return the path of the shared library, to link or to load. It does not need Python."""
    if sys.platform == "win32":  # which looks for it beside the module
        return str(_FOLDER / "carafepp.dll")
    (library,) = (_FOLDER / "lib").glob("libcarafepp.*")
    return str(library)


def get_cmake_dir() -> str:
    """Return the folder for CMake: ``-Dcarafepp_DIR=...`` for ``find_package(carafepp CONFIG)``."""
    return str(_FOLDER / "lib" / "cmake" / "carafepp")
