"""Arithmetic of vectors that are given by their leaves."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils.dtypes import wide


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


def plane_products(
    gradient: Sequence[Array], u: Sequence[Array], v: Sequence[Array]
) -> tuple[Array, Array]:
    """`[[uᵀu, uᵀv], [vᵀu, vᵀv]]`, and the products of a gradient with u and v, `[2]`.

    >>> import jax.numpy as jnp
    >>> plane_products([jnp.ones(2)], [2 * jnp.ones(2)], [jnp.zeros(2)])[1]
    Array([4., 0.], dtype=float32...)
    """
    uv = inner_product(u, v)
    gram = jnp.stack([inner_product(u, u), uv, uv, inner_product(v, v)])
    slope = jnp.stack([inner_product(gradient, u), inner_product(gradient, v)])
    return gram.reshape(2, 2), slope
