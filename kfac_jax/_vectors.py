"""Arithmetic of vectors that are given by their leaves."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kfac_jax._dtypes import wide


def inner_product(u: Sequence[Array], v: Sequence[Array]) -> Array:
    """`uᵀ v`, accumulated in float32 or wider; zero for no leaves.

    >>> import jax.numpy as jnp
    >>> inner_product([jnp.ones(3), jnp.ones((2, 2))], [jnp.ones(3), jnp.ones((2, 2))])
    Array(7., dtype=float32...)
    """
    couples = [(wide(x), wide(y)) for x, y in zip(u, v, strict=True)]
    parts = [jnp.vdot(x, y).astype(float) for x, y in couples if x.ndim > 1]
    # XLA compiles much for a sum over a vector: these share one
    small = [(x.reshape(-1), y.reshape(-1)) for x, y in couples if x.ndim <= 1]
    if small:
        x, y = (
            jnp.concatenate([part.astype(float) for part in side])
            for side in zip(*small, strict=True)
        )
        parts.append(jnp.vdot(x, y))
    return sum(parts, start=jnp.zeros((), float))
