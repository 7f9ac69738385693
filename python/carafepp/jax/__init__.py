"""CARAFE++ in JAX.

`carafepp.reassemble` and the other functions take JAX arrays, inside and outside of ``jax.jit``,
and are differentiable. This package adds `CARAFE`, the module for Flax NNX, and
`register_handlers`, for programs that ``jax.export`` has loaded.
"""

from typing import TYPE_CHECKING, Any

from .._lazy import missing

try:
    from .operators import register_handlers
except ModuleNotFoundError as error:
    raise missing(error, "carafepp[jax]") from error

if TYPE_CHECKING:
    from .modules import CARAFE

__all__ = ["CARAFE", "register_handlers"]


def __getattr__(name: str) -> Any:
    """Import Flax for the module alone: the functions do not need it."""
    if name != "CARAFE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .modules import CARAFE
    except ModuleNotFoundError as error:
        raise missing(error, "carafepp[flax]") from error
    return CARAFE
