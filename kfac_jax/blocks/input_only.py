"""The block of a layer's inputs alone."""

import dataclasses
from typing import final

import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Float

from kfac_jax.blocks import _moments
from kfac_jax.blocks._block import Block, Damped, Spectrum
from kfac_jax.blocks._layout import Arrays, BlockShape, Inputs, Matrix, Outputs, Shapes
from kfac_jax.blocks._sides import DIAGONAL, Side, check_max_factor_dim, side_shapes
from kfac_jax.linalg._psd import diagonal, eigh


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOnly(Block):
    """`F ≈ A ⊗ I`, with `A = E[x xᵀ]`: output gradients count as uncorrelated.

    All outputs have one scale. It is the default block of `estimation_mode="inputs"`,
    where it costs no further backward pass. Rows without a gradient do not count.
    Damping is exact: `A ⊗ I + λ I`.

    Attributes:
      max_factor_dim: the longest input side with a full factor; None for no limit.
      weight_sharing: "expand", where each position is a row, or "reduce", where the
        mean of an example's inputs is.

    References:
      Benzing 2022 (arXiv:2201.12250), "Gradient descent on neurons".

    >>> InputOnly()
    InputOnly(max_factor_dim=8192, weight_sharing='expand')
    """

    max_factor_dim: int | None = 8192
    weight_sharing: str = "expand"

    elementwise = frozenset({"input_diagonal"})
    row_statistics = frozenset({"input", "input_diagonal", "count"})
    handles_one_hot = True
    needs_outputs = False

    def __post_init__(self) -> None:
        """Checks the options."""
        check_max_factor_dim(self.max_factor_dim)
        _moments.check_weight_sharing(self.weight_sharing)

    @property
    def needs_examples(self) -> bool:
        """Whether the setting is "reduce", which takes means within an example."""
        return self.weight_sharing == "reduce"

    def statistics_shapes(self, shape: BlockShape) -> Shapes:
        """The sum, and the number of rows that count."""
        return _moments.input_shapes(shape, self.max_factor_dim)

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """`input: [*e, i, i]`, or its diagonal."""
        own = side_shapes(shape, self.max_factor_dim)
        return {name: x for name, x in own.items() if name in self.row_statistics}

    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """The sum over all rows with a gradient."""
        limit, sharing = self.max_factor_dim, self.weight_sharing
        return _moments.input_moments(x, dy, shape, limit, sharing)

    def counts(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """The number of rows."""
        name, side = _side(statistics)
        count = statistics.get("count")
        if count is None:  # the homogeneous coordinate's own moment
            count = side.diagonal[..., -1]
        return {name: jnp.expand_dims(count, side.axes)}

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """`A + λ I`."""
        name, side = _side(factors)
        return {name: Damped(side.array, jnp.asarray(damping, side.array.dtype))}

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """`(A + λ I)⁻¹ V`."""
        return self.matvec(inverses, v)

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """`A V`."""
        _, (a, is_full) = _side(factors)
        return a @ v if is_full else a[..., None] * v

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The diagonal of A, for each output."""
        _, (a, is_full) = _side(factors)
        own = diagonal(a) if is_full else a
        return jnp.broadcast_to(own[..., None], shape.matrix)

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The eigenbasis of A; damping adds λ in either mode."""
        _, (a, is_full) = _side(factors)
        w, u = eigh(a) if is_full else (a, None)

        def eigenvalues(damping: Numeric, _: str) -> Array:
            damped = w + jnp.asarray(damping, w.dtype)
            return jnp.broadcast_to(damped[..., None], shape.matrix)

        return Spectrum(
            eigenvalues,
            to_basis=lambda v: v if u is None else jnp.swapaxes(u, -1, -2) @ v,
            from_basis=lambda v: v if u is None else u @ v,
        )


def _side(arrays: Arrays) -> tuple[str, Side]:
    name = "input" if "input" in arrays else "input" + DIAGONAL
    return name, Side(arrays[name], name == "input")
