"""Tensor normal training: the Kronecker product with the block's own marginals."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks._block import BlockShape, Damped, Factors, Spectrum
from kfac_jax.blocks.diagonal import one_hot_squares
from kfac_jax.blocks.kronecker import Kronecker


@dataclasses.dataclass(frozen=True, kw_only=True)
class TNT(Kronecker):
    """`F ≈ A ⊗ G / tr F` with `A = E[g gᵀ]`, `G = E[gᵀ g]`, g `[i, o]` per example.

    A and G are the partial traces of F: as if g came from a matrix normal distribution.
    Unlike `Kronecker` it does not assume that inputs and output gradients are
    independent, and needs no convention for shared weights; it is exact where F is a
    Kronecker product, and its trace always is. A kernel counts as one matrix of taps
    and inputs by outputs. Of `Kronecker`'s options `weight_sharing` and
    `gradient_products` do not apply.

    References:
      Ren & Goldfarb 2021 (arXiv:2106.02925), with exact rather than batch-averaged
      gradients.

    >>> TNT(max_factor_dim=1024).max_factor_dim
    1024
    """

    row_statistics = frozenset()
    handles_tied = False

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.weight_sharing != "expand":
            raise ValueError(
                "TNT sums gradients over an example's positions and has no "
                f"weight_sharing; got {self.weight_sharing!r}. Leave it out."
            )
        if self.gradient_products:
            raise ValueError(
                "TNT multiplies gradients, not products: expected no "
                "gradient_products, got True. Leave it out."
            )

    @property
    def needs_examples(self) -> bool:
        """Yes: gradients are summed within an example."""
        return True

    def statistics_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """Sums for both factors."""
        return self.factor_shapes(shape)

    def statistics(self, x: Array, dy: Array, shape: BlockShape) -> Factors:
        """`Σ_b Xᵀ (dY dYᵀ) X` and `Σ_b dYᵀ (X Xᵀ) dY`, rows being positions."""
        kept = self.factor_shapes(shape)
        dtype = wide_dtype(dy.dtype)
        dy = dy.astype(dtype)
        result: Factors = {}
        if shape.one_hot:
            same = (x[..., :, None] == x[..., None, :]).astype(dtype)
            squares = one_hot_squares(x, dy, shape)
            result["input_diagonal"] = squares.sum(-1)
        else:
            x = x.astype(dtype)
            same = jnp.einsum("...bsi,...bti->...bst", x, x)
            weights = jnp.einsum("...bso,...bto->...bst", dy, dy)
            result |= _weighted("input", kept, x, weights)
        return result | _weighted("output", kept, dy, same)

    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """The number of batches."""
        return dict.fromkeys(statistics, weight)

    def damp(self, factors: Factors, damping: Array) -> dict[str, Damped]:
        """Factored Tikhonov damping, as of `Kronecker`."""
        return super().damp(_scaled(factors), damping)

    def matvec(self, factors: Factors, v: Array) -> Array:
        """`A V G / tr F`."""
        return super().matvec(_scaled(factors), v)

    def solve(self, inverses: Factors, v: Array) -> Array:
        """`A⁻¹ V G⁻¹`, the factors scaled before they were inverted."""
        return super().matvec(inverses, v)

    def diagonal(self, factors: Factors, shape: BlockShape) -> Array:
        """The outer product of both diagonals."""
        return super().diagonal(_scaled(factors), shape)

    def spectrum(self, factors: Factors, shape: BlockShape) -> Spectrum:
        """The joint eigenbasis."""
        return super().spectrum(_scaled(factors), shape)


def _weighted(
    side: str, kept: dict[str, tuple[int, ...]], rows: Array, weights: Array
) -> Factors:
    """`Σ_b Rᵀ W R` for rows `[*e, b, s, d]`, or its diagonal."""
    mixed = jnp.einsum("...bst,...btd->...bsd", weights, rows)
    if side in kept:
        return {side: jnp.einsum("...bsi,...bsj->...ij", rows, mixed)}
    return {side + "_diagonal": (rows * mixed).sum((-3, -2))}


def _scaled(factors: Factors) -> Factors:
    """Divides G by the trace of F."""
    result = dict(factors)
    for name in ("output", "output_diagonal"):
        if name in factors:
            full = name == "output"
            g = factors[name]
            trace = (linalg.diagonal(g) if full else g).sum(-1)
            safe = jnp.where(trace > 0, trace, 1.0)
            result[name] = g / (safe[..., None, None] if full else safe[..., None])
    return result
