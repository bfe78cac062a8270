"""The full block."""

import dataclasses
from typing import final

import jax.numpy as jnp
from chex import Numeric
from jax import Array

from kfac_jax.blocks._block import Block, Damped, Spectrum, per_example
from kfac_jax.blocks._layout import (
    Arrays,
    BlockShape,
    Gradients,
    Inputs,
    Matrix,
    Outputs,
    Shapes,
)
from kfac_jax.linalg._psd import diagonal, eigh


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Block):
    """The exact Fisher block of the layer, a dense matrix; for small layers.

    >>> Full()
    Full()
    """

    takes_gradients = True

    @property
    def needs_examples(self) -> bool:
        """Yes: gradients are summed within an example before they are squared."""
        return True

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """`full: [*stacked, p, p]` for the p parameters of a slice."""
        return {"full": (*shape.stacked, shape.slice_size, shape.slice_size)}

    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """`Σ_b g gᵀ` over each example's flattened gradient."""
        return self.of_gradients(per_example(x, dy), shape)

    def of_gradients(self, gradients: Gradients, shape: BlockShape) -> Arrays:
        """`Σ_b g gᵀ`."""
        g = jnp.moveaxis(gradients, -3, 0)
        flat = g.reshape(len(g), -1)
        return {"full": flat.T @ flat}

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Adds λ to the diagonal."""
        return {"full": Damped(factors["full"], jnp.asarray(damping))}

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """Multiplies the flattened parameters by the inverse."""
        return self.matvec(inverses, v)

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """Multiplies the flattened parameters."""
        f = factors["full"]
        flat = v.reshape(*f.shape[:-1], 1)
        return (f @ flat).reshape(v.shape)

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The matrix's diagonal."""
        return diagonal(factors["full"]).reshape(shape.matrix)

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The matrix's eigenbasis."""
        w, u = eigh(factors["full"])

        def to_basis(v: Array) -> Array:
            return (jnp.swapaxes(u, -1, -2) @ v.reshape(*w.shape, 1))[..., 0]

        return Spectrum(
            lambda damping, _: w + jnp.asarray(damping, w.dtype),
            to_basis,
            from_basis=lambda v: (u @ v[..., None]).reshape(shape.matrix),
        )
