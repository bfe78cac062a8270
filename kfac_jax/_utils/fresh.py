"""Arrays to begin with. Outside of traced programs, nothing is compiled for them.

Computed one by one, each shape would be compiled for itself, and in one program each
array is still a kernel of its own: of an optimizer's first call that was a tenth.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array


def _computed() -> bool:
    """Whether arrays are to be part of a traced program, or follow a mesh."""
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    return traced or not jax.sharding.get_abstract_mesh().empty


def _placed(x: np.ndarray) -> Array:
    # not sharing NumPy's memory, which could not be donated
    return jax.device_put(x, may_alias=False)


def full(shape: tuple[int, ...], value: float, dtype: Any) -> Array:
    """The value everywhere.

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
    """Zeros where x is: on its devices, with its sharding."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        if not x.committed and not _computed():
            return full(x.shape, 0.0, x.dtype)
    return jnp.zeros_like(x)
