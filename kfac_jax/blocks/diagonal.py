"""The diagonal block."""

import dataclasses
from typing import final

import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Int

from kfac_jax._utils.dtypes import wide_dtype
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


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagonal(Block):
    """The exact diagonal of the layer's Fisher block, from each example's gradient.

    >>> Diagonal()
    Diagonal()
    """

    elementwise = frozenset({"diagonal"})
    handles_one_hot = True
    takes_gradients = True

    @property
    def needs_examples(self) -> bool:
        """Yes: gradients are summed within an example before they are squared."""
        return True

    @property
    def inverted_in_every_step(self) -> bool:
        """Yes, as that costs less than to keep the inverse."""
        return True

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """`diagonal: [*e, i, o]`."""
        return {"diagonal": shape.matrix}

    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """`Σ_b (Σ_s x dy)²`; with one position, `(x²)ᵀ dy²` without more memory."""
        if shape.one_hot:
            return {"diagonal": one_hot_squares(x, dy, shape)}
        if dy.shape[-2] == 1:
            dtype = wide_dtype(dy.dtype)
            x, dy = x.astype(dtype), dy.astype(dtype)
            sums = jnp.einsum("...bsi,...bso->...io", jnp.square(x), jnp.square(dy))
            return {"diagonal": sums}
        return self.of_gradients(per_example(x, dy), shape)

    def of_gradients(self, gradients: Gradients, shape: BlockShape) -> Arrays:
        """`Σ_b g²`."""
        return {"diagonal": jnp.square(gradients).sum(-3)}

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Adds λ."""
        return {"diagonal": Damped(factors["diagonal"], jnp.asarray(damping))}

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """Divides elementwise."""
        return inverses["diagonal"] * v

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """Multiplies elementwise."""
        return factors["diagonal"] * v

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The factor itself."""
        return factors["diagonal"]

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The standard basis."""
        d = factors["diagonal"]
        return Spectrum(
            lambda damping, _: d + jnp.asarray(damping, d.dtype),
            to_basis=lambda v: v,
            from_basis=lambda v: v,
        )


def one_hot_squares(x: Int[Array, "*e b s"], dy: Outputs, shape: BlockShape) -> Matrix:
    """`Σ_b (Σ_s x dy)²` of one-hot x: positions of one row of the table add up first.

    `(Σ_s x dy)² = Σ_s x dy Σ_t [x_t = x_s] dy_t`, so that only rows that occur are met.
    """
    dy = dy.astype(wide_dtype(dy.dtype))
    same = (x[..., :, None] == x[..., None, :]).astype(dy.dtype)
    products = dy * (same @ dy)
    flat = products.reshape(-1, shape.outputs)
    zeros = jnp.zeros((shape.inputs, shape.outputs), dy.dtype)
    return zeros.at[x.reshape(-1)].add(flat, mode="drop")
