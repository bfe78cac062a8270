"""Weights that are used both directly and transposed: a sum of two Kronecker products.

A table of embeddings that is also the output layer, or a decoder that shares the
encoder's weights, has `F ≈ A ⊗ G + G' ⊗ A'`. A and G are from the inputs and output
gradients of the direct use, A' and G' from those of the transposed use, whose inputs
meet the weight's output side. Factors of the second term have the prefix `transposed_`.

The inverse of such a sum is no Kronecker product. So the sum is replaced by the product
`X ⊗ Y` nearest to it in the Frobenius norm.
"""

from typing import TypeVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kfac_jax.blocks._layout import Arrays
from kfac_jax.blocks._sides import Side, Sides, named, sides

TRANSPOSED = "transposed_"

SECOND = "second_"
"""The prefix of a second term that is not transposed, of `KroneckerSum`."""

T = TypeVar("T")


def join(
    first: dict[str, T], second: dict[str, T], *, prefix: str = TRANSPOSED
) -> dict[str, T]:
    """The factors (or statistics, or their shapes) of both terms in one mapping."""
    return {**first, **{prefix + name: value for name, value in second.items()}}


def split(factors: Arrays, prefix: str = TRANSPOSED) -> tuple[Arrays, Arrays]:
    """Inverts `join`; the second term is empty for a weight used in one way."""
    start = len(prefix)
    first = {n: x for n, x in factors.items() if not n.startswith(prefix)}
    second = {n[start:]: x for n, x in factors.items() if n.startswith(prefix)}
    return first, second


def nearest_product(factors: Arrays) -> Arrays:
    """The factors X and Y of the nearest product; a single product is its own.

    With the two terms written as `Σ_u w_u P_u ⊗ Q_u`, P and Q of norm one, laid out as
    vectors, the sum is the matrix `P W Qᵀ`. Its best approximation of rank one is `X =
    Σ_u a_u P_u` times `Y = Σ_u b_u Q_u`, where a is the leading eigenvector of `M = W
    (QᵀQ) W (PᵀP)` and `b = W (PᵀP) a / (aᵀ (PᵀP) a)`. Inner products of semidefinite
    matrices are not negative, so neither are the entries of M and a (Perron), and X and
    Y are semidefinite.

    References:
      Van Loan & Pitsianis 1993, "Approximation with Kronecker products".
    """
    first, second = split(factors)
    if not second:
        return factors
    (a, g), (other_a, other_g) = sides(first), sides(second)
    p, q = (a, other_g), (g, other_a)
    p_norms, q_norms = (jnp.stack([x.frobenius_norm for x in pair]) for pair in (p, q))
    tiny = jnp.finfo(p_norms.dtype).tiny
    # Only the ratio of the two weights matters. Each is a product of norms, which may
    # underflow, so their logarithms are compared.
    log_w = jnp.log(jnp.maximum(p_norms, tiny)) + jnp.log(jnp.maximum(q_norms, tiny))
    p_norms, q_norms = (jnp.where(n > 0, n, 1.0) for n in (p_norms, q_norms))
    largest = log_w.max(0, keepdims=True)
    w = jnp.exp(log_w - largest)
    p_cosine, q_cosine = _inner(p, p_norms), _inner(q, q_norms)
    x = _leading(w, p_cosine, q_cosine)
    mixed = x + p_cosine[None] * x[::-1]
    y = w * mixed / jnp.maximum((x * mixed).sum(0, keepdims=True), tiny)
    scale = jnp.exp(largest / 2)  # split evenly; π makes the damping ignore the split
    return named(
        _combine(scale * x / p_norms, p),
        _combine(scale * y / q_norms, q),
    )


def _inner(pair: Sides, norms: Float[Array, " 2 *e"]) -> Float[Array, "*e"]:
    """The cosine of the angle between two matrices."""
    full = pair[0].is_full and pair[1].is_full
    axes = (-2, -1) if full else (-1,)
    x, y = (
        (side.array if full else side.diagonal) / jnp.expand_dims(norm, axes)
        for side, norm in zip(pair, norms, strict=True)
    )
    return jnp.maximum((x * y).sum(axes), 0)


def _leading(
    w: Float[Array, " 2 *e"], p_cosine: Float[Array, "*e"], q_cosine: Float[Array, "*e"]
) -> Float[Array, " 2 *e"]:
    """The leading eigenvector of `W (QᵀQ) W (PᵀP)`."""
    both = w[0] * w[1]
    top = jnp.square(w[0]) + both * p_cosine * q_cosine
    bottom = jnp.square(w[1]) + both * p_cosine * q_cosine
    right = jnp.square(w[0]) * p_cosine + both * q_cosine
    left = jnp.square(w[1]) * p_cosine + both * q_cosine
    half = (top - bottom) / 2
    root = jnp.sqrt(jnp.square(half) + left * right)
    # An eigenvector is orthogonal to either row of M - λ I. In the chosen row `half`
    # and `root` have one sign, so that nothing cancels.
    upper = jnp.stack([half + root, left])
    lower = jnp.stack([right, root - half])
    return jnp.where(half >= 0, upper, lower)


def _combine(weights: Float[Array, " 2 *e"], pair: Sides) -> Side:
    """The weighted sum of two sides; a diagonal if both are diagonals."""
    full = pair[0].is_full or pair[1].is_full
    axes = (-2, -1) if full else (-1,)
    first, second = (
        jnp.expand_dims(weight, axes) * (as_matrix(side) if full else side.array)
        for weight, side in zip(weights, pair, strict=True)
    )
    return Side(first + second, full)


def as_matrix(x: Side) -> Float[Array, "*e d d"]:
    """The side as a full matrix."""
    if x.is_full:
        return x.array
    return x.array[..., None] * jnp.eye(x.array.shape[-1], dtype=x.array.dtype)
