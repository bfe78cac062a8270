"""Inverses of `A ⊗ B - C ⊗ D`, differences of Kronecker products (appendix B)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kfac_jax._utils.ordering import known_false_after
from kfac_jax.linalg._psd import eigh


class Conditional(NamedTuple):
    """`K` and `s` with `Kᵀ A K = I` and `Kᵀ C K = diag(s)`.

    A is a second moment of `x`, and C the part of it that a linear regression on `z`
    explains, `C = X Z⁻¹ Xᵀ` with the moments `Z` of z and `X` across. So the entries of
    s are squared canonical correlations of x and z, in [0, 1].
    """

    basis: Float[Array, "d d"]  # K
    explained: Float[Array, " d"]  # s


Triple = tuple[Array, Array, Array]
"""R_A `[d, d]`, X `[d, p]` and R_Z `[p, p]`."""

Function = Callable[[Triple], list[Array]]

Each = Callable[
    [Sequence[float], Sequence[Function], Sequence[Triple]], list[list[Array]]
]
"""Applies functions, of known costs, to operands of their own."""


def conditionals(
    parts: Sequence[Triple], each: Each | None = None
) -> list[Conditional]:
    """Diagonalises A and `C = X Z⁻¹ Xᵀ` together, one pair after the other.

    With K, s of A and C and L, t of B and D, the inverse of `A ⊗ B - C ⊗ D` is
    `(K ⊗ L) (I - s ⊗ t)⁻¹ (K ⊗ L)ᵀ`. The entries of s are the squared singular values
    of the coherence matrix `R_Aᵀ X R_Z`. Computed so, `1 - s` keeps its sign in
    float32, while eigenvalues of a matrix product would lose it. Values of s within
    rounding of 1 are lowered, so that `1 - s` is positive.

    Args:
      parts: for each pair R_A `[d, d]`, X `[d, p]`, and R_Z `[p, p]`, with
        `R_A R_Aᵀ = A⁻¹` and `R_Z R_Zᵀ = Z⁻¹`.
      each: applies the decomposition to all pairs; by default one after the other.

    Returns:
      K and s of each.

    References:
      Martens & Grosse 2015, appendix B, with the singular value decomposition in place
      of eigenvalues.
    """
    costs = [float(max(x.shape) ** 3) for _, x, _ in parts]
    found = (each or _in_turn)(costs, [_conditional] * len(parts), parts)
    return [Conditional(*pair) for pair in found]


def _in_turn(
    costs: Sequence[float], functions: Sequence[Function], operands: Sequence[Triple]
) -> list[list[Array]]:
    results: list[list[Array]] = []
    previous = jnp.zeros(())
    for function, (own, across, other) in zip(functions, operands, strict=True):
        never = known_false_after(previous).astype(own.dtype)
        results.append(function((own + never, across, other)))
        previous = jnp.ravel(results[-1][-1])[0]
    return results


def _conditional(part: Triple) -> list[Array]:
    own, across, other = part
    u, sigma = _left_singular(jnp.swapaxes(own, -1, -2) @ across @ other)
    missing = own.shape[-1] - sigma.shape[-1]
    largest = 1 - 4 * jnp.finfo(own.dtype).eps
    explained = jnp.minimum(jnp.square(jnp.pad(sigma, (0, missing))), largest)
    return [own @ u, explained]


def _left_singular(
    x: Float[Array, "d p"],
) -> tuple[Float[Array, "d d"], Float[Array, " n"]]:
    """All left singular vectors, and the `n = min(d, p)` singular values."""

    def at_once(x: Array) -> tuple[Array, Array]:
        u, sigma, _ = jnp.linalg.svd(x, full_matrices=True)
        return u, sigma

    # batched LAPACK calls can block for ever on CPUs; see `eigh`
    one_by_one = jax.custom_batching.sequential_vmap(at_once)
    return jax.lax.platform_dependent(x, cpu=one_by_one, default=at_once)


def pseudo_inverse(x: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`x⁺` of a semidefinite x; eigenvalues within rounding of zero count as zero.

    >>> import jax.numpy as jnp
    >>> pseudo_inverse(jnp.diag(jnp.asarray([4.0, 0.0])))
    Array([[0.25, 0.  ],
           [0.  , 0.  ]], dtype=float32...)
    """
    w, u = eigh(x)
    cutoff = w.max() * x.shape[-1] * jnp.finfo(x.dtype).eps
    positive = w > cutoff
    inverse = jnp.where(positive, 1 / jnp.where(positive, w, 1), 0)
    return (u * inverse[None, :]) @ u.T
