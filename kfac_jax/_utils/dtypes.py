"""Accumulation types."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Float32, or the type itself where it is at least as wide or complex."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    wide = inexact and jnp.finfo(dtype).bits >= 32
    return jnp.dtype(dtype) if wide else jnp.dtype(jnp.float32)


def wide(x: Array) -> Array:
    """Casts to float32 unless the type is already as wide."""
    return x.astype(wide_dtype(x.dtype))
