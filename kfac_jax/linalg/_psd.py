"""Inverses and eigendecompositions of symmetric positive matrices, batched."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular


def symmetrize(x: Array) -> Array:
    """Returns `(x + xᵀ) / 2` over the last two axes."""
    return (x + jnp.swapaxes(x, -1, -2)) / 2


def inverse(x: Array) -> Array:
    """Inverts positive definite matrices `[..., d, d]` by Cholesky.

    With `x = L Lᵀ` the inverse is `L⁻ᵀ L⁻¹`. A matrix that is not positive definite gives
    NaN, which the caller must handle.

    >>> import jax.numpy as jnp
    >>> inverse(2.0 * jnp.eye(2))
    Array([[0.5, 0. ],
           [0. , 0.5]], dtype=float32)
    """
    if x.shape[-1] == 1:
        return jnp.where(x > 0, 1.0 / x, jnp.nan)
    lower = jnp.linalg.cholesky(x, symmetrize_input=False)
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    root = solve_triangular(lower, identity, lower=True)
    return jnp.swapaxes(root, -1, -2) @ root


def inverse_many(matrices: Sequence[Array]) -> list[Array]:
    """Inverts matrices of many shapes, those of equal size as one batch.

    Compile time grows with the number of different sizes, not of matrices.

    Args:
      matrices: arrays `[..., d, d]`, positive definite.

    Returns:
      Their inverses in the same order and shapes.
    """
    groups: dict[tuple[int, jnp.dtype], list[int]] = {}
    for i, x in enumerate(matrices):
        groups.setdefault((x.shape[-1], x.dtype), []).append(i)
    results: dict[int, Array] = {}
    for (d, _), members in groups.items():
        stacked = jnp.concatenate([matrices[i].reshape(-1, d, d) for i in members])
        inverses = inverse(stacked)
        start = 0
        for i in members:
            shape = matrices[i].shape
            count = matrices[i].size // (d * d)
            results[i] = inverses[start : start + count].reshape(shape)
            start += count
    return [results[i] for i in range(len(matrices))]


def eigh(x: Array) -> tuple[Array, Array]:
    """Eigenvalues (at least zero) and eigenvectors of positive semidefinite matrices."""
    w, u = jnp.linalg.eigh(symmetrize(x))
    return jnp.maximum(w, 0.0), u


def trace_pi(a: Array, g: Array) -> Array:
    """`π = √((tr A / dim A) / (tr G / dim G))`, 1 where that is 0 or not finite.

    References:
      Martens & Grosse 2015, section 6.3 (trace norm).

    >>> import jax.numpy as jnp
    >>> trace_pi(4.0 * jnp.eye(3), jnp.eye(2))
    Array(2., dtype=float32)
    """
    mean_a = jnp.trace(a, axis1=-2, axis2=-1) / a.shape[-1]
    mean_g = jnp.trace(g, axis1=-2, axis2=-1) / g.shape[-1]
    good = (mean_a > 0) & (mean_g > 0)
    ratio = jnp.where(good, mean_a, 1.0) / jnp.where(good, mean_g, 1.0)
    return jnp.where(jnp.isfinite(ratio) & (ratio > 0), jnp.sqrt(ratio), 1.0)
