"""Tensor normal training: the Kronecker product with the block's own marginals."""

import dataclasses
from typing import final

import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Float

from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks import _product
from kfac_jax.blocks._block import Block, Damped, Spectrum
from kfac_jax.blocks._layout import (
    Arrays,
    BlockShape,
    Gradients,
    Inputs,
    Matrix,
    Outputs,
    Shapes,
)
from kfac_jax.blocks._pi import check_pi
from kfac_jax.blocks._sides import (
    Side,
    check_max_factor_dim,
    named,
    side_shapes,
    sides,
)
from kfac_jax.blocks.diagonal import one_hot_squares


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TNT(Block):
    """`F ≈ A ⊗ G / tr F` with `A = E[g gᵀ]`, `G = E[gᵀ g]`, g `[i, o]` per example.

    A and G are the partial traces of F: as if g came from a matrix normal distribution.
    Unlike `Kronecker` it does not assume that inputs and output gradients are
    independent, and needs no convention for shared weights; it is exact where F is a
    Kronecker product, and its trace always is. A kernel counts as one matrix of taps
    and inputs by outputs.

    Attributes:
      max_factor_dim: the longest side with a full factor; None for no limit.
      pi: the norm in π, as of `Kronecker`.
      exact_scalars: whether a layer with only one input or output is damped exactly.

    References:
      Ren & Goldfarb 2021 (arXiv:2106.02925), with exact rather than batch-averaged
      gradients.

    >>> TNT(max_factor_dim=1024)
    TNT(max_factor_dim=1024, pi='trace', exact_scalars=False)
    """

    max_factor_dim: int | None = 8192
    pi: str = "trace"
    exact_scalars: bool = False

    elementwise = frozenset({"input_diagonal", "output_diagonal"})
    handles_one_hot = True
    solves_by_sides = True

    takes_gradients = True

    def __post_init__(self) -> None:
        """Checks the options."""
        check_max_factor_dim(self.max_factor_dim)
        check_pi(self.pi)
        arguments.flag("exact_scalars", self.exact_scalars)

    @property
    def needs_examples(self) -> bool:
        """Yes: gradients are summed within an example."""
        return True

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """`input: [*e, i, i]` and `output: [*e, o, o]`, or their diagonals."""
        return side_shapes(shape, self.max_factor_dim)

    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """`Σ_b Xᵀ (dY dYᵀ) X` and `Σ_b dYᵀ (X Xᵀ) dY`, rows being positions."""
        wanted = self.factor_shapes(shape)
        dtype = wide_dtype(dy.dtype)
        dy = dy.astype(dtype)
        if shape.one_hot:
            same = (x[..., :, None] == x[..., None, :]).astype(dtype)
            inputs = Side(one_hot_squares(x, dy, shape).sum(-1), False)
        else:
            x = x.astype(dtype)
            same = jnp.einsum("...bsi,...bti->...bst", x, x)
            weights = jnp.einsum("...bso,...bto->...bst", dy, dy)
            inputs = _weighted(x, weights, "input" in wanted)
        return named(inputs, _weighted(dy, same, "output" in wanted))

    def of_gradients(self, gradients: Gradients, shape: BlockShape) -> Arrays:
        """`Σ_b g gᵀ` and `Σ_b gᵀ g`."""
        return named(*marginals(gradients, self.factor_shapes(shape)))

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Factored Tikhonov damping, as of `Kronecker`."""
        return _product.damp(_scaled(factors), damping, self.pi, self.exact_scalars)

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """`A⁻¹ V G⁻¹`, the factors scaled before they were inverted."""
        return _product.multiply(inverses, v)

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """`A V G / tr F`."""
        return _product.multiply(_scaled(factors), v)

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The outer product of both diagonals."""
        return _product.diagonal(_scaled(factors))

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The joint eigenbasis."""
        return _product.spectrum(_scaled(factors), self.pi, self.exact_scalars)


def marginals(gradients: Gradients, wanted: Shapes) -> tuple[Side, Side]:
    """`Σ_b g gᵀ` and `Σ_b gᵀ g`, or their diagonals."""
    if "input" in wanted:
        first = Side(jnp.einsum("...bio,...bjo->...ij", gradients, gradients), True)
    else:
        first = Side(jnp.square(gradients).sum((-3, -1)), False)
    if "output" in wanted:
        second = Side(jnp.einsum("...bio,...bip->...op", gradients, gradients), True)
    else:
        second = Side(jnp.square(gradients).sum((-3, -2)), False)
    return first, second


def _weighted(
    rows: Float[Array, "*e b s d"], weights: Float[Array, "*e b s s"], is_full: bool
) -> Side:
    """`Σ_b Rᵀ W R`, or its diagonal."""
    mixed = jnp.einsum("...bst,...btd->...bsd", weights, rows)
    if is_full:
        return Side(jnp.einsum("...bsi,...bsj->...ij", rows, mixed), True)
    return Side((rows * mixed).sum((-3, -2)), False)


def _scaled(factors: Arrays) -> Arrays:
    """Divides G by the trace of F."""
    inputs, outputs = sides(factors)
    trace = jnp.expand_dims(outputs.diagonal.sum(-1), outputs.axes)
    scaled = outputs.array / jnp.where(trace > 0, trace, 1.0)
    return named(inputs, Side(scaled, outputs.is_full))
