"""Sites: the places where a program combines parameters with data."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Atom
from kfac_jax._jaxpr.states import Examples, State
from kfac_jax._jaxpr.view import Layout

Windows = tuple[tuple[int, int, int], ...]
"""For some axes: which, where the window begins, and a length."""


class Patches(Protocol):
    """Makes a convolution's operands those of a dense layer."""

    @property
    def batch_axes(self) -> tuple[int, int]:
        """The axes of input and output that hold the batch."""
        ...

    def inputs(self, x: Array) -> Array:
        """Patches, `[batch, *positions, group, inputs]`."""
        ...

    def outputs(self, y: Array) -> Array:
        """Outputs, `[batch, *positions, group, outputs]`."""
        ...

    def chunks(self, batch: int) -> tuple[int, int]:
        """How many parts of what size to make patches of at once."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One use of a linear layer, `y[e, r, o] = Σ_i x[e, r, i] w[e, i, o] + b[e, o]`.

    Attributes:
      kind: "dense", "conv", "embedding", "scale" or "shift".
      output: the id of `y`, where statistics are gathered.
      x: the id (or literal) of the input; None for a shift, whose input is 1.
      x_axes: the axes of `x` that are independent, rows, inputs; of a convolution's
        patches.
      y_axes: the axes of `y` that are independent, rows, outputs; of a convolution's
        outputs in the order of its patches.
      examples: which rows belong to one example; LOST or None where not known.
      weight: leaf and layout of the weight, or None for a shift.
      bias: leaf and layout of the bias added to `y`, or None.
      scale: the scalar factor between the leaf and what multiplies `x`.
      scans: the scans that run over the parameter.
      repeated: whether a scan uses the parameter in all its steps.
      source: the user's source line.
      rows: at how many positions of the batch each independent layer is used.
      convolution: what makes patches of `x`; None for other kinds.
      cases: of a constant input, which each case of the batch shares, how many cases it
        stands for; 0 for other inputs.
      vocabulary: how many rows an embedding's table has; its `x` are integers.
      column: which of an embedding's indices picks the row.
      drops: whether an embedding gives a constant for indices out of bounds.
      transposed: the layout of a dense layer's weight with inputs and outputs swapped.
      swapped: whether the layer has the weight in that layout.
      parts: for axes of `y` along which only a part of the parameter is used: the axis,
        where the part begins, and the length of the whole.
      x_places: for axes of `x` that meet several joined parameters: the axis, where
        this one's entries begin, and how many they are.
      y_places: the same for axes of `y`.
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
    rows: int = 0
    convolution: "Patches | None" = None
    cases: int = 0
    vocabulary: int = 0
    column: int = 0
    drops: bool = False
    transposed: Layout | None = None
    swapped: bool = False
    parts: Windows = ()
    x_places: Windows = ()
    y_places: Windows = ()

    def canonical(
        self, x: Array | None, dy: Array, homogeneous: bool, *, one_hot: bool = True
    ) -> tuple[Array, Array]:
        """Brings `x` and `dy` to `[*independent, batch, shared, features]`.

        With `one_hot` an embedding's `x` are integers without an axis of features, out
        of bounds for rows that do not count. Rows with `dy` exactly zero (masked, not
        routed here) become zero in `x`. With `homogeneous`, `x` gets the coordinate 1
        as its last feature.

        Args:
          x: the input as the program has it; None for a shift.
          dy: the cotangent of the output as the program has it.
          homogeneous: whether the layer has a bias.
          one_hot: whether an embedding's inputs stay integers; zeros and ones if not.

        Returns:
          `x` and `dy` in the canonical layout.
        """
        if self.convolution is not None:
            assert x is not None
            x, dy = self.convolution.inputs(x), self.convolution.outputs(dy)
        x = None if x is None else _windowed(x, self.x_places)
        dy = self._whole(_windowed(dy, self.y_places))
        shape = dy.shape
        dy = self._rows(dy, self.y_axes)
        active = jnp.abs(dy).max(-1, keepdims=True) != 0
        if self.vocabulary:
            assert x is not None
            x = self._indices(x, active[..., 0])
            dy = jnp.where((x < self.vocabulary)[..., None], dy, 0)
            scale = jnp.asarray(self.scale, dy.dtype)
            if one_hot:
                return x, dy * scale
            return jax.nn.one_hot(x, self.vocabulary, dtype=dy.dtype) * scale, dy
        if x is None:
            return active.astype(dy.dtype) * jnp.asarray(self.scale, dy.dtype), dy
        if not jnp.issubdtype(x.dtype, jnp.floating):  # products take integers too
            x = x.astype(dy.dtype)
        if self.kind == "scale":
            x = jnp.broadcast_to(x, shape)
        x = self._rows(x, self.x_axes)
        if not (isinstance(self.scale, float) and self.scale == 1.0):
            x = x * jnp.asarray(self.scale, x.dtype)
        if homogeneous:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return jnp.where(active, x, jnp.zeros((), x.dtype)), dy

    def _whole(self, dy: Array) -> Array:
        """The cotangent of what all of the parameter would have put out."""
        if not self.parts:
            return dy
        widths = [(0, 0)] * dy.ndim
        for axis, start, whole in self.parts:
            widths[axis] = start, whole - start - dy.shape[axis]
        return jnp.pad(dy, widths)

    def _indices(self, x: Array, active: Array) -> Array:
        indices = self._rows(x, self.x_axes)[..., self.column].astype(jnp.int32)
        if self.drops:
            active = active & (indices >= 0) & (indices < self.vocabulary)
        indices = jnp.clip(indices, 0, self.vocabulary - 1)
        return jnp.where(active, indices, self.vocabulary)

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


def _windowed(value: Array, windows: Windows) -> Array:
    for axis, start, size in windows:
        value = jax.lax.slice_in_dim(value, start, start + size, axis=axis)
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class OtherUse:
    """A use of a parameter that no layer covers, or that the user tagged generic."""

    leaf: int
    kind: str  # "generic" or "unmatched"
    reason: str
    source: str


Use = Site | OtherUse
