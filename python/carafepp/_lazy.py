"""Modules that are imported when they are first used, as they need packages of an extra."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_modules(
    namespace: dict[str, Any], *names: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that has these modules.

    A module that cannot be imported is no attribute, so ``hasattr`` and ``help`` go on.
    """
    package = namespace["__name__"]

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return import_module(f"{package}.{name}")
        except ImportError as error:
            raise AttributeError(f"{package}.{name} cannot be imported: {error}") from error

    return get, lambda: sorted({*namespace, *names})


def missing(error: ModuleNotFoundError, install: str) -> ModuleNotFoundError:
    """Return the error for a missing package, with what to install."""
    return ModuleNotFoundError(f'{error}. Install it: pip install "{install}"', name=error.name)
