"""CARAFE++ in JAX.

`carafepp.reassemble` and the other functions take JAX arrays, inside and outside of ``jax.jit``,
and are differentiable. This package adds `CARAFE`, the module for Flax NNX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .modules import CARAFE

__all__ = ["CARAFE"]


def __getattr__(name: str) -> Any:
    """Import Flax for the module alone: the functions do not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .modules import CARAFE
    except ImportError as error:
        raise ImportError(f"carafepp.jax.CARAFE needs Flax: {error}. pip install flax") from error
    return CARAFE
