"""The solution of one damped system."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kfac_jax.linalg._psd import eigh


def clipped_solve(
    matrix: Float[Array, "n n"], damping: Float[Array, ""], right: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Solves `(M + λ I) x = b` for a matrix that is positive but for rounding.

    Args:
      matrix: M, symmetric.
      damping: λ > 0.
      right: b.

    Returns:
      x, and whether there was no Cholesky factor: then it is by eigenvalues of M that
      are at least zero.
    """
    damped = matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(damped)
    fails = ~jnp.isfinite(jnp.diagonal(factor)).all()

    def by_factor() -> Array:
        return jax.scipy.linalg.cho_solve((factor, True), right)

    def by_eigenvalues() -> Array:
        values, vectors = eigh(matrix)
        shifted = jnp.maximum(values, 0) + damping
        return vectors @ ((vectors.T @ right) / shifted)

    return jax.lax.cond(fails, by_eigenvalues, by_factor), fails
