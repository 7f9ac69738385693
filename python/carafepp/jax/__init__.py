"""CARAFE++ in JAX.

`carafepp.reassemble` and the other functions take JAX arrays, inside and outside of ``jax.jit``.
"""
