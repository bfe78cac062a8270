"""Kronecker products fitted to the second moments of whole gradients.

Let a row's gradient be `x dyᵀ`, and `M = E[x xᵀ ⊗ dy dyᵀ]`. The paper takes both
sides for independent: `E[x xᵀ] ⊗ E[dy dyᵀ]`. Better products weigh each row by the
other side:

    A = E[(dyᵀ Q dy) x xᵀ],  G = E[(xᵀ P x) dy dyᵀ],  c = E[(xᵀ P x) (dyᵀ Q dy)]

and are `A ⊗ G / c`. With `P = A` and `Q = G`, up to scalars, this is the power method
for the product nearest to M in the Frobenius norm. With `P = A⁻¹` and `Q = G⁻¹` it is
the iteration for the normal distribution with a Kronecker-factored covariance that has
the least divergence `KL(N(0, M) ‖ N(0, A ⊗ G))`. In both cases c is the best scale.

P and Q are carried: they are of the factors so far, and a refresh renews them. Each of
A, G and c is linear in the rows, so that sums over batches and devices mean something,
and all have the same unit whatever P and Q are: these are scaled such that `E[xᵀ P x]`
of independent sides is the trace of `E[x xᵀ]`, as it is with `P = I`.

References:
  Van Loan & Pitsianis 1993, "Approximation with Kronecker products". Lin et al. 2025
  (arXiv:2509.03378) for the divergence.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks import _moments
from kfac_jax.blocks._layout import Arrays, BlockShape, Outputs, Shapes
from kfac_jax.blocks._sides import (
    DIAGONAL,
    SIDES,
    Side,
    named,
    names,
    side_shapes,
    sides,
)
from kfac_jax.linalg._gram import gram
from kfac_jax.linalg._psd import eigh

FITS = ("independent", "frobenius", "kl")

WEIGHT = "_weight"
"""The suffix of P and Q, after the name of the side's factor."""

CARRIED = frozenset(
    f"{side}{kind}{WEIGHT}" for side in SIDES for kind in ("", DIAGONAL)
)

FLOOR = 1e-4
"""What eigenvalues count as at least before they are inverted, of their mean.

Rows have nothing along the others, or next to nothing, which they would count for."""


def shapes(shape: BlockShape, max_factor_dim: int | None) -> Shapes:
    """Those of both sides, of `scale: [*e]` (c), and of P and Q."""
    own = side_shapes(shape, max_factor_dim)
    weights = {name + WEIGHT: size for name, size in own.items()}
    return own | {"scale": shape.lead} | weights


def moments(
    x: Float[Array, "*e b s i"] | Int[Array, "*e b s"],
    dy: Outputs,
    shape: BlockShape,
    weights: Arrays,
    weight_sharing: str,
) -> Arrays:
    """The sums A, G and c over rows; `x` must be zero for rows without a gradient."""
    p, q = sides({name.removesuffix(WEIGHT): value for name, value in weights.items()})
    outputs = _rows(_moments.output_rows(dy, weight_sharing))
    by_outputs = _form(outputs, q)
    if shape.one_hot:
        by_inputs = _form_of_table(x, dy, p, weight_sharing)
        parts = _parts_of_table(x, dy, by_outputs, weight_sharing)
        zeros = jnp.zeros((shape.inputs,), parts.dtype)
        counts = zeros.at[x.reshape(-1)].add(parts.reshape(-1), mode="drop")
        inputs = Side(counts, False)
    else:
        rows = _rows(_moments.input_rows(x, dy, weight_sharing))
        by_inputs = _form(rows, p)
        inputs = _weighted(rows, by_outputs, p.is_full)
    both = named(inputs, _weighted(outputs, by_inputs, q.is_full))
    return both | {"scale": (by_inputs * by_outputs).sum(-1)}


def carry(factors: Arrays, fit: str) -> Arrays:
    """P and Q of the factors; the identity of a factor that is zero."""
    both = sides(factors)
    return {
        name + WEIGHT: _weight(side, fit)
        for name, side in zip(names(both), both, strict=True)
    }


def product(factors: Arrays) -> Arrays:
    """The sides `A / c` and `G` of the product; zero without rows."""
    a, g = sides(factors)
    scale = factors["scale"]
    share = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return named(Side(a.array * jnp.expand_dims(share, a.axes), a.is_full), g)


def _rows(x: Float[Array, "*e b s d"]) -> Float[Array, "*e r d"]:
    wide = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    return wide.astype(wide_dtype(x.dtype))


def _form(rows: Float[Array, "*e r d"], weight: Side) -> Float[Array, "*e r"]:
    """`xᵀ P x` of each row, which rounding does not make negative."""
    p = weight.array.astype(rows.dtype)
    turned = rows @ p if weight.is_full else rows * p[..., None, :]
    return jnp.maximum((turned * rows).sum(-1), 0)


def _weighted(
    rows: Float[Array, "*e r d"], weights: Float[Array, "*e r"], is_full: bool
) -> Side:
    """`Σ_r w x xᵀ`, or its diagonal."""
    if is_full:
        return Side(gram(rows * jnp.sqrt(weights)[..., None], rows.dtype), True)
    return Side((jnp.square(rows) * weights[..., None]).sum(-2), False)


def _form_of_table(
    x: Int[Array, "*e b s"], dy: Outputs, weight: Side, weight_sharing: str
) -> Float[Array, "*e r"]:
    """`xᵀ P x` of one-hot rows with a diagonal P, or of an example's mean."""
    found = weight.array.at[x].get(mode="fill", fill_value=0.0)
    found = found.astype(wide_dtype(dy.dtype))
    if weight_sharing == "expand":
        return found.reshape(-1)
    return (found * _moments.occurrences_of(x, dy)).sum(-1).reshape(-1)


def _parts_of_table(
    x: Int[Array, "*e b s"],
    dy: Outputs,
    weights: Float[Array, "*e r"],
    weight_sharing: str,
) -> Float[Array, "*e b s"]:
    """What each position adds to its entry of A."""
    if weight_sharing == "expand":
        return weights.reshape(x.shape)
    return _moments.occurrences_of(x, dy) * weights.reshape(*x.shape[:-1], 1)


def _weight(side: Side, fit: str) -> Array:
    """P of a factor S: `S tr(S) / tr(S²)`, or `S⁻¹ tr(S) / d`."""
    s = side.array
    d = s.shape[-1]
    unit = jnp.eye(d, dtype=s.dtype) if side.is_full else jnp.ones((d,), s.dtype)
    one = jnp.broadcast_to(unit, s.shape)
    mean = jnp.expand_dims(side.diagonal.mean(-1), side.axes)
    scaled = s / jnp.where(mean > 0, mean, 1)  # with trace d
    if fit == "frobenius":
        square = jnp.expand_dims(jnp.square(scaled).sum(side.axes), side.axes)
        found = scaled * (d / jnp.where(square > 0, square, 1))
    elif side.is_full:
        # no factorisation: those of several layers at a time can block for ever
        w, u = eigh(scaled)
        found = (u / (w + FLOOR)[..., None, :]) @ jnp.swapaxes(u, -1, -2)
    else:
        found = 1 / (scaled + FLOOR)
    usable = (mean > 0) & jnp.isfinite(found).all(side.axes, keepdims=True)
    return jnp.where(usable, found, one)
