"""The identity block."""

import dataclasses
from typing import final

import jax.numpy as jnp
from chex import Numeric

from kfac_jax.blocks._block import Block, Damped, Spectrum
from kfac_jax.blocks._layout import Arrays, BlockShape, Inputs, Matrix, Outputs, Shapes


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Block):
    """`F ≈ I`: the layer follows its gradient, scaled by `1 / (1 + λ)`.

    >>> Identity()
    Identity()
    """

    elementwise = frozenset({"identity"})
    handles_tied = True
    needs_outputs = False
    handles_one_hot = True

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """Keeps none."""
        return {}

    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """Gathers none."""
        return {}

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """`1 + λ`."""
        one = jnp.ones((), jnp.asarray(damping).dtype)
        return {"identity": Damped(one, jnp.asarray(damping))}

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """Scales `v`."""
        return inverses["identity"].astype(v.dtype) * v

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """Returns `v`."""
        return v

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """Ones."""
        return jnp.ones(shape.matrix)

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The standard basis."""
        return Spectrum(
            lambda damping, _: jnp.ones(shape.matrix) + jnp.asarray(damping),
            to_basis=lambda v: v,
            from_basis=lambda v: v,
        )
