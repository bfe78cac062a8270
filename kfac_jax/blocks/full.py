"""The full block."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax.blocks._block import (
    Block,
    BlockShape,
    Damped,
    Factors,
    Spectrum,
    per_example,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Block):
    """The exact Fisher block of the layer, a dense matrix; for small layers.

    >>> Full()
    Full()
    """

    @property
    def needs_examples(self) -> bool:
        """Yes: gradients are summed within an example before they are squared."""
        return True

    def statistics_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """One matrix for each slice of the stacked axes."""
        return self.factor_shapes(shape)

    def factor_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """`full: [*stacked, p, p]` for the p parameters of a slice."""
        return {"full": (*shape.stacked, shape.slice_size, shape.slice_size)}

    def statistics(self, x: Array, dy: Array, shape: BlockShape) -> Factors:
        """`Σ_b g gᵀ` over each example's flattened gradient."""
        g = per_example(x, dy)
        g = jnp.moveaxis(g, -3, 0)
        flat = g.reshape(len(g), -1)
        return {"full": flat.T @ flat}

    def damp(self, factors: Factors, damping: Array) -> dict[str, Damped]:
        """Adds λ to the diagonal."""
        return {"full": Damped(factors["full"], jnp.asarray(damping))}

    def solve(self, inverses: Factors, v: Array) -> Array:
        """Multiplies the flattened parameters by the inverse."""
        return self.matvec(inverses, v)

    def matvec(self, factors: Factors, v: Array) -> Array:
        """Multiplies the flattened parameters."""
        f = factors["full"]
        flat = v.reshape(*f.shape[:-1], 1)
        return (f @ flat).reshape(v.shape)

    def diagonal(self, factors: Factors, shape: BlockShape) -> Array:
        """The matrix's diagonal."""
        d = jnp.diagonal(factors["full"], axis1=-2, axis2=-1)
        return d.reshape(shape.matrix)

    def spectrum(self, factors: Factors, shape: BlockShape) -> Spectrum:
        """The matrix's eigenbasis."""
        w, u = linalg.eigh(factors["full"])

        def to_basis(v: Array) -> Array:
            return (jnp.swapaxes(u, -1, -2) @ v.reshape(*w.shape, 1))[..., 0]

        return Spectrum(
            lambda damping, _: w + jnp.asarray(damping, w.dtype),
            to_basis,
            from_basis=lambda v: (u @ v[..., None]).reshape(shape.matrix),
        )
