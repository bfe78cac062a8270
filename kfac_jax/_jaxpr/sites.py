"""Sites: the places where a program combines parameters with data."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.examples import Examples, State
from kfac_jax._jaxpr.graph import Atom
from kfac_jax._jaxpr.view import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One use of a linear layer, `y[e, r, o] = Σ_i x[e, r, i] w[e, i, o] + b[e, o]`.

    Attributes:
      kind: "dense", "scale" or "shift".
      output: the id of `y`, where statistics are gathered.
      x: the id (or literal) of the input; None for a shift, whose input is 1.
      x_axes: the axes of `x` that are independent, rows, inputs.
      y_axes: the axes of `y` that are independent, rows, outputs.
      examples: which rows belong to one example; LOST or None where not known.
      weight: leaf and layout of the weight, or None for a shift.
      bias: leaf and layout of the bias added to `y`, or None.
      scale: the scalar factor between the leaf and what multiplies `x`.
      scans: the scans that run over the parameter.
      repeated: whether a scan uses the parameter in all its steps.
      source: the user's source line.
    """

    kind: str
    output: int
    x: Atom | None
    x_axes: tuple[tuple[int, ...], ...]
    y_axes: tuple[tuple[int, ...], ...]
    examples: State
    weight: tuple[int, Layout] | None
    bias: tuple[int, Layout] | None
    scale: Any
    scans: tuple[int, ...]
    repeated: bool
    source: str

    def canonical(
        self, x: Array | None, dy: Array, homogeneous: bool
    ) -> tuple[Array, Array]:
        """Brings input and output gradient to `[*independent.

        Batch, shared, features]`.

        Rows with `dy` exactly zero (masked, not routed here) become zero in `x`. With
        `homogeneous`, `x` gets the coordinate 1 as its last feature.

        Args:
          x: the input as the program has it; None for a shift.
          dy: the cotangent of the output as the program has it.
          homogeneous: whether the layer has a bias.

        Returns:
          `x` and `dy` in the canonical layout.
        """
        dy = self._rows(dy, self.y_axes)
        active = (dy != 0).any(-1, keepdims=True)
        coordinate = active.astype(dy.dtype)
        if x is None:
            return coordinate * jnp.asarray(self.scale, dy.dtype), dy
        x = self._rows(x, self.x_axes)
        x = jnp.where(active, x, jnp.zeros((), x.dtype))
        if not (isinstance(self.scale, float) and self.scale == 1.0):
            x = x * jnp.asarray(self.scale, x.dtype)
        if homogeneous:
            x = jnp.concatenate([x, coordinate.astype(x.dtype)], axis=-1)
        return x, dy

    def _rows(self, value: Array, axes: tuple[tuple[int, ...], ...]) -> Array:
        independent, rows, features = axes
        value = value.transpose((*independent, *rows, *features))
        shape = value.shape
        e, r = len(independent), len(rows)
        head = shape[:e]
        size = 1
        for n in shape[e + r :]:
            size *= n
        if isinstance(self.examples, Examples):
            at = self.y_axes[1].index(self.examples.axis)
            split = (self.examples.outer, self.examples.size, self.examples.inner)
            row_shape = (*shape[e : e + at], *split, *shape[e + at + 1 : e + r])
            value = value.reshape((*head, *row_shape, size))
            value = jnp.moveaxis(value, e + at + 1, e)
            return value.reshape((*head, self.examples.size, -1, size))
        return value.reshape((*head, -1, 1, size))


@dataclasses.dataclass(frozen=True, eq=False)
class OtherUse:
    """A use of a parameter that no layer covers, or that the user tagged generic."""

    leaf: int
    kind: str  # "generic" or "unmatched"
    reason: str
    source: str


Use = Site | OtherUse
