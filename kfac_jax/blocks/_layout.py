"""The layout of all arrays that blocks see, the same for all kinds of layers.

Letters: `e` axes of independent layers (any number of them), `b` batch, `s` positions
within an example, `i` inputs (with the homogeneous coordinate last if there is a bias),
`o` outputs; `r` rows that count as cases, `d` either side.
"""

import dataclasses
import math

from jax import Array
from jaxtyping import Float, Int

Arrays = dict[str, Array]
"""The arrays of one layer, by name."""

Shapes = dict[str, tuple[int, ...]]
"""The shapes of one layer's arrays, by name."""

Inputs = Float[Array, "*e b s i"] | Int[Array, "*e b s"]
"""Rows of inputs, or integers in place of one-hot rows."""

Outputs = Float[Array, "*e b s o"]
"""Output gradients."""

Gradients = Float[Array, "*e b i o"]
"""The gradient of each example."""

Matrix = Float[Array, "*e i o"]
"""A layer's parameters, a vector like them, or the diagonal of their curvature."""


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The shape of a layer: parameters are matrices `[*stacked, *independent, i, o]`.

    Attributes:
      stacked: axes that an enclosing scan runs over; a block sees one slice at a time.
      independent: axes of further independent layers.
      inputs: i.
      outputs: o.
      homogeneous: whether the last input is the constant 1 that a bias multiplies.
      one_hot: whether inputs are integers `x [*e, b, s]`, out of bounds for rows that
        do not count; only for blocks with `handles_one_hot`.
      tied: whether the parameters are also used transposed.
      products: of how many Kronecker products the curvature is a sum, for blocks with
        `handles_sums`: 1, or 2 for uses that lead to different losses.
    """

    stacked: tuple[int, ...]
    independent: tuple[int, ...]
    inputs: int
    outputs: int
    homogeneous: bool = False
    one_hot: bool = False
    tied: bool = False
    products: int = 1

    @property
    def terms(self) -> "tuple[BlockShape, ...]":
        """The shape for each product; the second, if `tied`, is of the transposed."""
        if not self.tied:
            return (dataclasses.replace(self, products=1),) * self.products
        first = dataclasses.replace(self, tied=False)
        second = dataclasses.replace(
            first, inputs=self.outputs, outputs=self.inputs, one_hot=False
        )
        return first, second

    @property
    def lead(self) -> tuple[int, ...]:
        """All axes of independent layers."""
        return (*self.stacked, *self.independent)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of the parameters as matrices."""
        return (*self.lead, self.inputs, self.outputs)

    @property
    def slice_size(self) -> int:
        """The number of parameters that one slice of the stacked axes holds."""
        return math.prod(self.independent) * self.inputs * self.outputs
