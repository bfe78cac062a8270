"""A Kronecker product `A ⊗ G` of two sides, as a block: damped, applied, decomposed."""

import jax.numpy as jnp
from chex import Numeric
from jax import Array

from kfac_jax.blocks._block import Damped, Spectrum
from kfac_jax.blocks._layout import Arrays, Matrix
from kfac_jax.blocks._pi import pi
from kfac_jax.blocks._sides import Side, Sides, names, sides
from kfac_jax.linalg._psd import eigh


def multiply(factors: Arrays, v: Matrix) -> Matrix:
    """`A V G`."""
    (a, a_is_full), (g, g_is_full) = sides(factors)
    v = a @ v if a_is_full else a[..., :, None] * v
    return v @ g if g_is_full else v * g[..., None, :]


def diagonal(factors: Arrays) -> Matrix:
    """The outer product of both diagonals."""
    a, g = (side.diagonal for side in sides(factors))
    return a[..., :, None] * g[..., None, :]


def damp(
    factors: Arrays, damping: Numeric, norm: str, exact_scalars: bool
) -> dict[str, Damped]:
    """`A + π √λ I` and `G + √λ / π I` (section 6.3), by the names of the factors.

    With `exact_scalars`, where one of them is a number, their product is `A ⊗ G + λ I`.
    """
    both = sides(factors)
    damping = jnp.asarray(damping, both[0].array.dtype)
    if exact_scalars and _has_scalar(both):
        return dict(zip(names(both), _damped_scalar(both, damping), strict=True))
    shifts = pi(norm, both) * jnp.sqrt(damping)
    damped = [
        Damped(side.array, shift if side.is_full else shift[..., None])
        for side, shift in zip(both, shifts, strict=True)
    ]
    return dict(zip(names(both), damped, strict=True))


def _has_scalar(both: Sides) -> bool:
    return any(side.array.shape[-1] == 1 for side in both)


def _damped_scalar(both: Sides, damping: Array) -> list[Damped]:
    """`A ⊗ g + λ I` as `(A g + λ I) ⊗ 1` where g, or A, is a number."""
    scalar = 0 if both[0].array.shape[-1] == 1 else 1
    result: list[Damped] = []
    for i, (x, is_full) in enumerate(both):
        if i == scalar:
            result.append(Damped(jnp.ones_like(x), jnp.zeros_like(damping)))
            continue
        number = both[scalar].diagonal
        result.append(Damped(x * (number[..., None] if is_full else number), damping))
    return result


def spectrum(factors: Arrays, norm: str, exact_scalars: bool) -> Spectrum:
    """The joint eigenbasis `U_A ⊗ U_G`; exact damping adds λ to the products."""
    both = sides(factors)
    (wa, ua), (wg, ug) = (eigh(x) if is_full else (x, None) for x, is_full in both)
    is_exact = exact_scalars and _has_scalar(both)
    shares = pi(norm, (Side(wa, False), Side(wg, False)))[..., None]

    def eigenvalues(damping: Numeric, mode: str) -> Array:
        damping = jnp.asarray(damping, wa.dtype)
        if mode == "exact" or is_exact:
            return wa[..., :, None] * wg[..., None, :] + damping
        gamma = jnp.sqrt(damping)
        damped_a, damped_g = wa + shares[0] * gamma, wg + shares[1] * gamma
        return damped_a[..., :, None] * damped_g[..., None, :]

    def to_basis(v: Array) -> Array:
        v = v if ua is None else jnp.swapaxes(ua, -1, -2) @ v
        return v if ug is None else v @ ug

    def from_basis(v: Array) -> Array:
        v = v if ua is None else ua @ v
        return v if ug is None else v @ jnp.swapaxes(ug, -1, -2)

    return Spectrum(eigenvalues, to_basis, from_basis)
