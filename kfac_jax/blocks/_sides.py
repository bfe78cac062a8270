"""The two sides of a Kronecker product, each a full matrix or a diagonal."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg

Factors = dict[str, Array]

DIAGONAL = "_diagonal"
"""What a factor's name ends in if only its diagonal is kept."""


class Side(NamedTuple):
    """One side's factor."""

    array: Array  # [*e, d, d], or [*e, d] for a diagonal
    is_full: bool

    @property
    def diagonal(self) -> Array:
        """The diagonal, `[*e, d]`."""
        return linalg.diagonal(self.array) if self.is_full else self.array

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the matrix, or of its diagonal."""
        return (-2, -1) if self.is_full else (-1,)

    @property
    def frobenius_norm(self) -> Array:
        """The Frobenius norm, `[*e]`; also of numbers whose squares underflow."""
        x = self.array
        largest = jnp.abs(x).max(self.axes, keepdims=True)
        # not by the smallest number: XLA makes of (s / n) / tiny s / (n tiny), a 0 / 0
        scaled = x / jnp.where(largest > 0, largest, 1.0)
        norm = jnp.sqrt(jnp.square(scaled).sum(self.axes))
        return norm * jnp.squeeze(largest, self.axes)


def sides(factors: Factors) -> tuple[Side, Side]:
    """The inputs' side and the outputs'."""
    first, second = (
        Side(factors[name], True)
        if name in factors
        else Side(factors[name + DIAGONAL], False)
        for name in ("input", "output")
    )
    return first, second


def named(inputs: Side, outputs: Side) -> Factors:
    """Inverts `sides`."""
    return {
        name if part.is_full else name + DIAGONAL: part.array
        for name, part in (("input", inputs), ("output", outputs))
    }
