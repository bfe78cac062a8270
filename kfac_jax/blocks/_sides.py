"""The two sides of a Kronecker product, each a full matrix or a diagonal."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kfac_jax._utils import arguments
from kfac_jax.blocks._layout import Arrays, BlockShape, Shapes
from kfac_jax.linalg._psd import diagonal

DIAGONAL = "_diagonal"
"""The suffix of a factor's name if it is only the diagonal of a matrix."""

SIDES = ("input", "output")


class Side(NamedTuple):
    """One side's factor."""

    array: Array  # [*e, d, d], or [*e, d] for a diagonal
    is_full: bool

    @property
    def diagonal(self) -> Float[Array, "*e d"]:
        """The diagonal."""
        return diagonal(self.array) if self.is_full else self.array

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the matrix, or of its diagonal."""
        return (-2, -1) if self.is_full else (-1,)

    @property
    def frobenius_norm(self) -> Float[Array, "*e"]:
        """The Frobenius norm, also of entries whose squares underflow."""
        x = self.array
        largest = jnp.abs(x).max(self.axes, keepdims=True)
        # A zero matrix is divided by 1. With the smallest number instead, XLA rewrites
        # (s / n) / tiny as s / (n tiny), and n tiny underflows to 0.
        scaled = x / jnp.where(largest > 0, largest, 1.0)
        norm = jnp.sqrt(jnp.square(scaled).sum(self.axes))
        return norm * jnp.squeeze(largest, self.axes)


Sides = tuple[Side, Side]
"""The side of the inputs, and that of the outputs."""


def sides(arrays: Arrays) -> Sides:
    """Picks the two sides from arrays by name."""
    first, second = (
        Side(arrays[name], True)
        if name in arrays
        else Side(arrays[name + DIAGONAL], False)
        for name in SIDES
    )
    return first, second


def names(both: Sides) -> tuple[str, str]:
    """The names of the sides' factors."""
    first, second = (
        name if side.is_full else name + DIAGONAL
        for name, side in zip(SIDES, both, strict=True)
    )
    return first, second


def named(inputs: Side, outputs: Side) -> Arrays:
    """Inverts `sides`."""
    first, second = names((inputs, outputs))
    return {first: inputs.array, second: outputs.array}


def side_shapes(shape: BlockShape, max_factor_dim: int | None) -> Shapes:
    """`input: [*e, i, i]` and `output: [*e, o, o]`, or their diagonals."""
    result: Shapes = {}
    for name, d in zip(SIDES, (shape.inputs, shape.outputs), strict=True):
        is_long = max_factor_dim is not None and d > max_factor_dim
        if is_long or (shape.one_hot and name == "input"):
            result[name + DIAGONAL] = (*shape.lead, d)
        else:
            result[name] = (*shape.lead, d, d)
    return result


def check_max_factor_dim(value: object) -> None:
    """Raises ValueError unless it is a length or None."""
    if value is not None and (type(value) is not int or value < 1):
        got = arguments.shown(value)
        raise ValueError(f"max_factor_dim must be an integer ≥ 1 or None; got {got}.")
