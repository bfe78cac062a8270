"""Inverses and eigendecompositions of symmetric positive matrices, batched."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular


def symmetrize(x: Array) -> Array:
    """Returns `(x + xᵀ) / 2` over the last two axes."""
    return (x + jnp.swapaxes(x, -1, -2)) / 2


def inverse(x: Array) -> Array:
    """Inverts positive definite matrices `[..., d, d]`.

    A matrix that is not positive definite gives NaN, which the caller must handle.

    >>> import jax.numpy as jnp
    >>> inverse(4.0 * jnp.eye(2))
    Array([[0.25, 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    return inverse_many([x])[0]


def inverse_many(matrices: Sequence[Array]) -> list[Array]:
    """Inverts matrices of many shapes, those of similar size as one batch.

    Matrices are padded by the identity to a multiple of the block size and inverted in
    place, block by block (`_sweep`). Compile time grows with the number of different
    padded sizes, not of matrices.

    Sizes are inverted one after the other: on CPUs, batched LAPACK calls that run at
    the same time wait for each other's threads and can block for ever (jaxlib 0.10).

    Args:
      matrices: arrays `[..., d, d]`, positive definite.

    Returns:
      Their inverses in the same order and shapes.
    """
    groups: dict[tuple[int, jnp.dtype], list[int]] = {}
    for i, x in enumerate(matrices):
        groups.setdefault((_padded(x.shape[-1]), x.dtype), []).append(i)
    results: dict[int, Array] = {}
    previous = jnp.zeros(())
    for (size, dtype), members in groups.items():
        stacked = jnp.concatenate([_pad(matrices[i], size) for i in members])
        never = previous > jnp.inf  # false, but XLA cannot know: orders the calls
        inverses = _sweep(stacked + never.astype(dtype))
        previous = inverses[0, 0, 0]
        start = 0
        for i in members:
            shape = matrices[i].shape
            d = shape[-1]
            stop = start + math.prod(shape[:-2])
            results[i] = inverses[start:stop, :d, :d].reshape(shape)
            start = stop
    return [results[i] for i in range(len(matrices))]


_BLOCK = 128
"""Columns swept at once.

Enough for fast products, few enough for a cheap pivot block.
"""


def _padded(d: int) -> int:
    if d <= _BLOCK:
        return 1 << (d - 1).bit_length()
    return -(-d // _BLOCK) * _BLOCK


def _pad(x: Array, size: int) -> Array:
    """Stacks as `[k, size, size]`, with ones on the new part of the diagonal."""
    d = x.shape[-1]
    x = x.reshape(math.prod(x.shape[:-2]), d, d)
    if d == size:
        return x
    x = jnp.pad(x, ((0, 0), (0, size - d), (0, size - d)))
    return x + jnp.diag((jnp.arange(size) >= d).astype(x.dtype))[None]


def _sweep(x: Array) -> Array:
    """Inverts `[k, d, d]` by the symmetric sweep operator, a block.

    Of columns at a time.

    Sweeping the block j replaces, with `R = x[j, :]` and `P = x[j, j]⁻¹`,

        x       ←  x - Rᵀ P R     outside of the block's rows and columns,
        x[j, :] ←  P R            and its transpose,
        x[j, j] ←  -P,

    and once all blocks are swept x is minus the inverse. The pivot blocks are Schur
    complements, positive definite if x is. This takes 2 d³ multiply-adds, all in
    products (a Cholesky factorisation with its triangular inverse takes more, most of
    it serial).
    """
    size = x.shape[-1]
    block = min(_BLOCK, size)
    if size == block:
        return _pivot_inverse(x)

    def sweep(j: Array, x: Array) -> Array:
        at = j * block
        rows = jax.lax.dynamic_slice_in_dim(x, at, block, axis=1)
        pivot = _pivot_inverse(jax.lax.dynamic_slice_in_dim(rows, at, block, axis=2))
        swept = pivot @ rows
        x = x - jnp.swapaxes(rows, 1, 2) @ swept
        swept = jax.lax.dynamic_update_slice_in_dim(swept, -pivot, at, axis=2)
        x = jax.lax.dynamic_update_slice_in_dim(x, swept, at, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(
            x, jnp.swapaxes(swept, 1, 2), at, axis=2
        )

    return -jax.lax.fori_loop(0, size // block, sweep, x)


def _pivot_inverse(x: Array) -> Array:
    """Inverts small matrices as `L⁻ᵀ L⁻¹`, reading the lower triangle of `x = L Lᵀ`."""
    if x.shape[-1] == 1:
        return jnp.where(x > 0, 1.0 / x, jnp.nan)
    lower = jnp.linalg.cholesky(x, symmetrize_input=False)
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    root = solve_triangular(lower, identity, lower=True)
    return jnp.swapaxes(root, -1, -2) @ root


def is_finite(x: Array) -> Array:
    """Whether positive semidefinite matrices `[..., d, d]` are finite, from diagonals.

    `|x_ij| ≤ √(x_ii x_jj)`, so a finite diagonal bounds every entry.
    """
    return jnp.isfinite(jnp.diagonal(x, axis1=-2, axis2=-1)).all()


def eigh(x: Array) -> tuple[Array, Array]:
    """Eigenvalues, at least zero, and eigenvectors of semidefinite matrices."""
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
