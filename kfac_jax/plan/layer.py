"""The static description of one layer of the plan."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.parts import Box
from kfac_jax._jaxpr.view import Layout
from kfac_jax.blocks import Block, BlockShape

KINDS = {
    "dense": "a weight contracted with data, with or without bias",
    "conv": "a convolution of any rank, with or without bias",
    "embedding": "rows of a table picked by integers",
    "tied": "a weight that is used transposed too, as a table that is also the output",
    "scale": "an elementwise scale",
    "scale_and_shift": "an elementwise scale with the shift that follows it",
    "shift": "a parameter added to data that is not some layer's bias, or that meets "
    "data entry by entry otherwise",
    "mixed": "a parameter that is used as layers of different kinds or shapes",
    "generic": "tagged with register_generic",
    "unmatched": "used in a way that no layer covers",
    "unused": "no gradient of a registered loss reaches it",
}
"""The kinds of layers, as `blocks={kind: ...}` knows them."""

TAGGED = (
    "dense",
    "conv",
    "embedding",
    "tied",
    "scale",
    "scale_and_shift",
    "shift",
    "mixed",
)
"""The kinds whose statistics are gathered from inputs and output gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its parameters, how they are used, and what approximates it.

    Attributes:
      name: the common path of its parameters.
      kind: one of `KINDS`.
      params: paths of its parameters, the weight before the bias.
      shapes: their shapes, or those of the layer's parts of them.
      dtype: the type that its curvature is computed in, float32 or wider.
      factor_dtype: the type that its averages are stored in.
      uses: the number of places where the program uses it.
      rows: the number of rows of the plan's batch, over all uses.
      block: the approximation; None leaves the gradient as it is.
      shape: the canonical shape.
      reason: why no better block applies; empty if the block is as it should be.
      source: the user's source line of its first use.
      leaves: the indices of its parameters among all leaves.
      boxes: for each parameter the part of it that is the layer's; None for all.
      layouts: for each parameter, how its entries (or the part's) become matrices.
      roles: for each parameter "weight" or "bias".
    """

    name: str
    kind: str
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    factor_dtype: str
    uses: int
    rows: int = 0
    block: Block | None
    shape: BlockShape
    reason: str = ""
    source: str = ""
    leaves: tuple[int, ...]
    boxes: tuple[Box | None, ...] = ()
    layouts: tuple[Layout, ...]
    roles: tuple[str, ...]

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the block's factors by name."""
        return {} if self.block is None else self.block.factor_shapes(self.shape)

    def stored_dtype(self, name: str) -> str:
        """The type that a factor is stored in; a basis must be as exact as `dtype`."""
        return self.dtype if name in self.carried_shapes else self.factor_dtype

    @property
    def statistics_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the block's statistics; for untapped layers, of its factors."""
        if self.block is None or not self.tagged:
            return self.factor_shapes
        return self.block.statistics_shapes(self.shape)

    @property
    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors (bases) that the block's statistics depend on."""
        carried = frozenset() if self.block is None else self.block.carried
        return {n: s for n, s in self.factor_shapes.items() if n in carried}

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of those that are orthogonal."""
        bases = frozenset() if self.block is None else self.block.bases
        return tuple(name for name in self.carried_shapes if name in bases)

    @property
    def damped(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the damped matrices that the block has inverted."""
        if self.block is None:
            return {}
        factors = {
            name: jax.ShapeDtypeStruct(shape, self.dtype)
            for name, shape in self.factor_shapes.items()
        }
        one = jax.ShapeDtypeStruct((), self.dtype)
        damped = jax.eval_shape(self.block.damp, factors, one)
        return {name: x for name, (x, _) in damped.items()}

    @property
    def positions(self) -> float:
        """The number of rows of each layer in a stack; `rows` counts those of all."""
        return self.rows / math.prod(self.shape.stacked)

    @property
    def homogeneous(self) -> bool:
        """Whether the last input is the constant 1 of a bias."""
        return "bias" in self.roles

    @property
    def tagged(self) -> bool:
        """Whether the layer is of a kind with inputs and output gradients."""
        return self.kind in TAGGED

    @property
    def is_tapped(self) -> bool:
        """Whether taps gather statistics for the layer's block."""
        return self.tagged and bool(self.factor_shapes)

    @property
    def is_squared(self) -> bool:
        """Whether the statistics are squares of the parameter's gradient."""
        return not self.tagged and bool(self.factor_shapes)

    @property
    def leaf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the leaves that its parameters are, or are parts of."""
        pairs = zip(self._boxes, self.shapes, strict=True)
        return tuple(shape if box is None else box.array_shape for box, shape in pairs)

    @property
    def _boxes(self) -> tuple[Box | None, ...]:
        return self.boxes or (None,) * len(self.leaves)

    @property
    def leaf_layouts(self) -> tuple[Layout, ...]:
        """The layouts, of parts in the shape that they have in their leaves."""
        pairs = zip(self.layouts, self._boxes, strict=True)
        return tuple(
            layout
            if box is None
            else dataclasses.replace(layout, source_shape=box.shape)
            for layout, box in pairs
        )

    def to_matrix(self, leaves: Sequence[Array]) -> Array:
        """Joins the layer's parameters (or vectors like them) as `[*e, i, o]`."""
        parts = [
            layout.to_matrix(
                leaf if box is None else leaf[box.slices].reshape(layout.source_shape)
            )
            for layout, box, leaf in zip(self.layouts, self._boxes, leaves, strict=True)
        ]
        parts = [
            part[..., None, :] if role == "bias" else part
            for part, role in zip(parts, self.roles, strict=True)
        ]
        if len({part.dtype for part in parts}) > 1:  # a bias in another type
            parts = [part.astype(self.dtype) for part in parts]
        return jnp.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]

    def from_matrix(
        self, matrix: Array, leaves: Sequence[Array | None] | None = None
    ) -> list[Array]:
        """Inverts `to_matrix`.

        Args:
          matrix: `[*e, i, o]`.
          leaves: where the layer has a part of a leaf, the other entries; else zeros.

        Returns:
          Arrays like the leaves; the same one for parameters that are parts of one.
        """
        found: dict[int, Array] = {}
        for leaf, other in zip(self.leaves, leaves or (), strict=leaves is not None):
            if other is not None:
                found[leaf] = other
        for leaf, layout, box, role in zip(
            self.leaves, self.layouts, self._boxes, self.roles, strict=True
        ):
            if role == "bias":
                part = matrix[..., -1, :]
            else:
                part = matrix[..., :-1, :] if self.homogeneous else matrix
            own = layout.from_matrix(part)
            if box is not None:
                whole = found.get(leaf, jnp.zeros(box.array_shape)).astype(own.dtype)
                own = whole.at[box.slices].set(own.reshape(box.shape))
            found[leaf] = own
        return [found[leaf] for leaf in self.leaves]
