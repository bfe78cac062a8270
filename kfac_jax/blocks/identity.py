"""The identity block."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax.blocks._block import Block, BlockShape, Damped, Factors, Spectrum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Block):
    """`F ≈ I`: the layer follows its gradient, scaled by `1 / (1 + λ)`.

    >>> Identity()
    Identity()
    """

    elementwise = frozenset({"identity"})
    handles_tied = True
    handles_one_hot = True

    def statistics_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """Needs none."""
        return {}

    def factor_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """Keeps none."""
        return {}

    def statistics(self, x: Array, dy: Array, shape: BlockShape) -> Factors:
        """Gathers none."""
        return {}

    def damp(self, factors: Factors, damping: Array) -> dict[str, Damped]:
        """`1 + λ`."""
        one = jnp.ones((), jnp.asarray(damping).dtype)
        return {"identity": Damped(one, jnp.asarray(damping))}

    def solve(self, inverses: Factors, v: Array) -> Array:
        """Scales `v`."""
        return inverses["identity"].astype(v.dtype) * v

    def matvec(self, factors: Factors, v: Array) -> Array:
        """Returns `v`."""
        return v

    def diagonal(self, factors: Factors, shape: BlockShape) -> Array:
        """Ones."""
        return jnp.ones(shape.matrix)

    def spectrum(self, factors: Factors, shape: BlockShape) -> Spectrum:
        """The standard basis."""
        return Spectrum(
            lambda damping, _: jnp.ones(shape.matrix) + jnp.asarray(damping),
            to_basis=lambda v: v,
            from_basis=lambda v: v,
        )
