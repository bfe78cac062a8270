"""Inverses of `A ⊗ B - C ⊗ D`, differences of Kronecker products (appendix B)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._ordering import known_false_after
from kfac_jax.linalg._psd import eigh


class Conditional(NamedTuple):
    """`K` and `s` with `Kᵀ A K = I` and `Kᵀ C K = diag(s)`.

    A is a second moment of `x`, and C the part of it that a linear regression on `z`
    explains, `C = X Z⁻¹ Xᵀ` with the moments `Z` of z and `X` across. So the entries of
    s are squared canonical correlations of x and z, in [0, 1].
    """

    basis: Array  # K, [d, d]
    explained: Array  # s, [d]


def conditionals(
    parts: Sequence[tuple[Array, Array, Array]],
) -> list[Conditional]:
    """Diagonalises A and `C = X Z⁻¹ Xᵀ` together, one pair after the other.

    With K, s of A and C and L, t of B and D, the inverse of `A ⊗ B - C ⊗ D` is
    `(K ⊗ L) (I - s ⊗ t)⁻¹ (K ⊗ L)ᵀ`. The squared singular values of the coherence
    matrix `R_Aᵀ X R_Z` are s: what they leave of 1 keeps its sign in float32, where
    eigenvalues of a product lose it. Those within rounding of 1 are taken for the
    nearest number that leaves something.

    Args:
      parts: for each pair R_A `[d, d]`, X `[d, e]`, and R_Z `[e, e]`, with
        `R_A R_Aᵀ = A⁻¹` and `R_Z R_Zᵀ = Z⁻¹`.

    Returns:
      K and s of each.

    References:
      Martens & Grosse 2015, appendix B, with the singular value decomposition in place
      of eigenvalues.
    """
    results: list[Conditional] = []
    previous = jnp.zeros(())
    for own, across, other in parts:
        never = known_false_after(previous).astype(own.dtype)
        coherence = jnp.swapaxes(own, -1, -2) @ across @ other + never
        u, sigma = _left_singular(coherence)
        missing = own.shape[-1] - sigma.shape[-1]
        largest = 1 - 4 * jnp.finfo(own.dtype).eps
        explained = jnp.minimum(jnp.square(jnp.pad(sigma, (0, missing))), largest)
        results.append(Conditional(own @ u, explained))
        previous = explained[0]
    return results


def _left_singular(x: Array) -> tuple[Array, Array]:
    """All left singular vectors `[d, d]` and the singular values of `[d, e]`."""

    def at_once(x: Array) -> tuple[Array, Array]:
        u, sigma, _ = jnp.linalg.svd(x, full_matrices=True)
        return u, sigma

    # batched LAPACK calls can block for ever on CPUs; see `eigh`
    one_by_one = jax.custom_batching.sequential_vmap(at_once)
    return jax.lax.platform_dependent(x, cpu=one_by_one, default=at_once)


def pseudo_inverse(x: Array) -> Array:
    """`x⁺` of a semidefinite `[d, d]`; eigenvalues within rounding of zero count as it.

    >>> import jax.numpy as jnp
    >>> pseudo_inverse(jnp.diag(jnp.asarray([4.0, 0.0])))
    Array([[0.25, 0.  ],
           [0.  , 0.  ]], dtype=float32...)
    """
    w, u = eigh(x)
    cutoff = w.max() * x.shape[-1] * jnp.finfo(x.dtype).eps
    kept = w > cutoff
    inverse = jnp.where(kept, 1 / jnp.where(kept, w, 1), 0)
    return (u * inverse[None, :]) @ u.T
