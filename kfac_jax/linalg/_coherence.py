"""Inverses of `A ⊗ B - C ⊗ D`, differences of Kronecker products (appendix B)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils.arguments import callable_or_none, floating, matrices, sequence
from kfac_jax._utils.ordering import known_false_after
from kfac_jax.linalg._psd import eigh


class Conditional(NamedTuple):
    """`K` and `s` with `Kᵀ A K = I` and `Kᵀ C K = diag(s)`.

    A is a second moment of `x`, and C the part of it that a linear regression on `z`
    explains, `C = X Z⁻¹ Xᵀ` with the moments `Z` of z and `X` across. So the entries of
    s are squared canonical correlations of x and z, in [0, 1].
    """

    basis: Array  # K, [d, d]
    explained: Array  # s, [d]


Triple = tuple[Array, Array, Array]
"""R_A `[d, d]`, X `[d, e]` and R_Z `[e, e]`."""

Function = Callable[[Any], list[Array]]

Each = Callable[[Sequence[float], Sequence[Function], Sequence[Any]], list[list[Array]]]
"""Applies functions, of known costs, to operands of their own."""


def conditionals(
    parts: Sequence[Triple], each: Each | None = None
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
      each: what applies the decomposition to each; by default one after the other.

    Returns:
      K and s of each.

    References:
      Martens & Grosse 2015, appendix B, with the singular value decomposition in place
      of eigenvalues.
    """
    sequence("parts", parts, "triples (R_A, X, R_Z)")
    for i, part in enumerate(parts):
        _check(f"parts[{i}]", part)
    callable_or_none("each", each)
    costs = [float(max(x.shape) ** 3) for _, x, _ in parts]
    found = (each or _in_turn)(costs, [_conditional] * len(parts), parts)
    return [Conditional(*pair) for pair in found]


def _check(name: str, part: Any) -> None:
    """Checks one triple.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    sequence(name, part, "R_A, X and R_Z", 3)
    first, last = matrices(f"{name}[0]", part[0]), matrices(f"{name}[2]", part[2])
    across = floating(f"{name}[1]", part[1])
    fits = first.ndim == last.ndim == 2
    if not fits or across.shape != (len(first), len(last)):
        raise ValueError(
            f"{name} must have X of shape {(first.shape[-1], last.shape[-1])} between "
            f"matrices R_A and R_Z; got {first.shape}, {across.shape} and {last.shape}."
        )


def _in_turn(
    costs: Sequence[float],
    functions: Sequence[Function],
    operands: Sequence[Any],
) -> list[list[Array]]:
    results: list[list[Array]] = []
    previous = jnp.zeros(())
    for function, (own, *rest) in zip(functions, operands, strict=True):
        never = known_false_after(previous).astype(own.dtype)
        results.append(function((own + never, *rest)))
        previous = jnp.ravel(results[-1][-1])[0]
    return results


def _conditional(part: Triple) -> list[Array]:
    own, across, other = part
    u, sigma = _left_singular(jnp.swapaxes(own, -1, -2) @ across @ other)
    missing = own.shape[-1] - sigma.shape[-1]
    largest = 1 - 4 * jnp.finfo(own.dtype).eps
    explained = jnp.minimum(jnp.square(jnp.pad(sigma, (0, missing))), largest)
    return [own @ u, explained]


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
    w, u = eigh(matrices("x", x))
    cutoff = w.max() * x.shape[-1] * jnp.finfo(x.dtype).eps
    kept = w > cutoff
    inverse = jnp.where(kept, 1 / jnp.where(kept, w, 1), 0)
    return (u * inverse[None, :]) @ u.T
