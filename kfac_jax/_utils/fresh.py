"""Initial arrays, made without compiling anything (outside of traced programs).

If JAX computed them one by one, each shape would be compiled by itself. Even in a
single program each array is a kernel of its own, which took a tenth of an optimizer's
first call.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array


def _computed() -> bool:
    """Whether JAX must compute arrays: inside of a trace, or with a mesh in context."""
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    return traced or not jax.sharding.get_abstract_mesh().empty


def _placed(x: np.ndarray) -> Array:
    # not sharing NumPy's memory, which could not be donated
    return jax.device_put(x, may_alias=False)


def full(shape: tuple[int, ...], value: float, dtype: Any) -> Array:
    """An array with one value in all entries.

    >>> full((2,), 1.0, jnp.float32)
    Array([1., 1.], dtype=float32)
    """
    if _computed():
        return jnp.full(shape, value, dtype)
    return _placed(np.full(shape, value, dtype))


def identities(shape: tuple[int, ...], dtype: Any) -> Array:
    """Identities `[..., d, d]`.

    >>> identities((1, 2, 2), jnp.float32)
    Array([[[1., 0.],
            [0., 1.]]], dtype=float32)
    """
    if _computed():
        return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
    return _placed(np.broadcast_to(np.eye(shape[-1], dtype=dtype), shape))


def zeros_like(x: Any) -> Array:
    """Zeros with the shape, type, devices and sharding of x."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        if not x.committed and not _computed():
            return full(x.shape, 0.0, x.dtype)
    return jnp.zeros_like(x)
