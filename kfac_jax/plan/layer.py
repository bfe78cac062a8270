"""The static description of one layer of the plan."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.view import Layout
from kfac_jax.blocks import Block, BlockShape

KINDS = {
    "dense": "a weight contracted with data, with or without bias",
    "conv": "a convolution of any rank, with or without bias",
    "embedding": "rows of a table picked by integers",
    "tied": "a weight that is used transposed too, as a table that is also the output",
    "scale": "an elementwise scale",
    "scale_and_shift": "an elementwise scale with the shift that follows it",
    "shift": "a parameter added to data that is not some layer's bias",
    "generic": "tagged with register_generic",
    "unmatched": "used in a way that no layer covers",
    "unused": "no gradient of a registered loss reaches it",
}
"""The kinds of layers, as `blocks={kind: ...}` knows them."""

TAGGED = ("dense", "conv", "embedding", "tied", "scale", "scale_and_shift", "shift")
"""Those with inputs and outputs that statistics are gathered from."""


CROSS = ("parent_input", "parent_output")
"""The factors of a link: second moments of a layer's inputs with its parent's, and of
their output gradients, `[i, parent's i]` and `[o, parent's o]`."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A layer's place in a forest of layers with cross-layer curvature.

    Attributes:
      root: the name of the layer that this tree's links lead to.
      parent: the name of the layer that uses the output next; None for the root.
      inputs: how many inputs the parent has, 0 for none.
      outputs: how many outputs.
    """

    root: str
    parent: str | None = None
    inputs: int = 0
    outputs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its parameters, how they are used, and what approximates it.

    Attributes:
      name: the common path of its parameters.
      kind: one of `KINDS`.
      params: paths of its parameters, the weight before the bias.
      shapes: their shapes.
      dtype: the factors' type, float32 or wider.
      uses: at how many places the program uses it.
      rows: at how many positions of the plan's batch, all uses together.
      block: the approximation; None leaves the gradient as it is.
      shape: the canonical shape.
      link: its place among linked layers; None for a layer by itself.
      unlinked: why it has no parent, where links were asked for.
      product_rows: at how many positions of the plan's batch its gradient is gathered
        as the product that it is; 0 where it is not.
      no_product: why not, where that was asked for.
      reason: why no better block applies; empty where nothing is amiss.
      source: the user's source line of its first use.
      leaves: indices of its parameters among all leaves.
      layouts: how each parameter's entries become matrices.
      roles: for each parameter "weight" or "bias".
    """

    name: str
    kind: str
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    uses: int
    rows: int = 0
    block: Block | None
    shape: BlockShape
    link: Link | None = None
    unlinked: str = ""
    product_rows: int = 0
    no_product: str = ""
    reason: str = ""
    source: str = ""
    leaves: tuple[int, ...]
    layouts: tuple[Layout, ...]
    roles: tuple[str, ...]

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors by name, those of a link included."""
        return self.block_factor_shapes | self.cross_shapes

    @property
    def block_factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the block's factors by name."""
        return {} if self.block is None else self.block.factor_shapes(self.shape)

    @property
    def cross_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors that are shared with the parent."""
        if self.link is None or self.link.parent is None:
            return {}
        inputs = self.shape.inputs, self.link.inputs
        outputs = self.shape.outputs, self.link.outputs
        return dict(zip(CROSS, (inputs, outputs), strict=True))

    @property
    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of those factors that the block's statistics need."""
        carried = frozenset() if self.block is None else self.block.carried
        return {n: s for n, s in self.factor_shapes.items() if n in carried}

    @property
    def inverted_in_every_step(self) -> bool:
        """Whether the inverse follows the factors in every step, not every T3."""
        block = None if self.link is not None else self.block
        return block is not None and block.inverted_in_every_step

    @property
    def factor_bytes(self) -> int:
        """How much the factors hold, in bytes."""
        sizes = (math.prod(shape) for shape in self.factor_shapes.values())
        return sum(sizes) * jnp.dtype(self.dtype).itemsize

    @property
    def damped(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is inverted, as abstract arrays."""
        if self.block is None:
            return {}
        factors = {
            name: jax.ShapeDtypeStruct(shape, self.dtype)
            for name, shape in self.block_factor_shapes.items()
        }
        one = jax.ShapeDtypeStruct((), self.dtype)
        damped = jax.eval_shape(self.block.damp, factors, one)
        return {name: x for name, (x, _) in damped.items()}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what an optimizer keeps to divide by the curvature, by name."""
        if self.link is not None:
            return self.joint_shapes
        return {name: x.shape for name, x in self.damped.items()}

    @property
    def joint_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what a linked layer has in place of inverses, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.link is None:
            return shapes
        for side, n in (("input", self.shape.inputs), ("output", self.shape.outputs)):
            shapes[f"{side}_basis"] = n, n
            if self.cross_shapes:
                shapes[f"{side}_explained"] = (n,)
                shapes[f"{side}_regression"] = self.cross_shapes[f"parent_{side}"]
        return shapes

    @property
    def inverse_bytes(self) -> int:
        """How much the inverses hold, in bytes."""
        sizes = (math.prod(shape) for shape in self.inverse_shapes.values())
        return sum(sizes) * jnp.dtype(self.dtype).itemsize

    @property
    def inversion_cost(self) -> int:
        """Multiply-adds of one refresh of the inverses, d³ for a factor `[d, d]`.

        A link adds for each side, with m ≥ n its two lengths, the products of its
        coherence and regression, and `2 m² n + 4 m n² + 4.5 n³` for singular vectors.
        """
        return self._own_inversion_cost + self._link_cost

    @property
    def _link_cost(self) -> int:
        cost = 0.0
        for shape in self.cross_shapes.values():
            m, n = max(shape), min(shape)
            cost += 2 * m * n * (m + n) + 2 * m**2 * n + 4 * m * n**2 + 4.5 * n**3
        return int(cost)

    @property
    def _own_inversion_cost(self) -> int:
        if self.block is None:
            return 0
        names = self.block.elementwise | self.block.carried
        inverted = {name: x.shape for name, x in self.damped.items()}
        if not self.shape.tied:  # whose factors are added up first
            inverted |= self.block_factor_shapes
        return sum(
            math.prod(shape) * shape[-1]
            for name, shape in inverted.items()
            if name not in names
        )

    @property
    def statistics_cost(self) -> float:
        """Multiply-adds of one batch's statistics, gradients of outputs included."""
        if not self.factor_shapes or not self.tagged:
            return 0
        moments = sum(math.prod(shape) for shape in self.factor_shapes.values())
        moments /= len(self.shape.terms)  # about half of the rows are for either
        return self._rows_each * (moments + math.prod(self.shape.matrix))

    @property
    def gradient_cost(self) -> float:
        """Multiply-adds of the layer in one gradient: three products."""
        return 3 * self._rows_each * math.prod(self.shape.matrix)

    @property
    def _rows_each(self) -> float:
        """Rows of each slice of the stacked axes, of which `rows` counts all."""
        return self.rows / math.prod(self.shape.stacked)

    @property
    def row_statistics(self) -> frozenset[str]:
        """Statistics that depend on layers' inputs only."""
        own = frozenset() if self.block is None else self.block.row_statistics
        return own | {CROSS[0]} if self.cross_shapes else own

    @property
    def homogeneous(self) -> bool:
        """Whether the last input is the constant 1 of a bias."""
        return "bias" in self.roles

    @property
    def tagged(self) -> bool:
        """Whether statistics come from inputs and output gradients of the layer."""
        return self.kind in TAGGED

    def to_matrix(self, leaves: Sequence[Array]) -> Array:
        """Joins the layer's parameters (or vectors like them) as `[*e, i, o]`."""
        parts = [
            layout.to_matrix(leaf)
            for layout, leaf in zip(self.layouts, leaves, strict=True)
        ]
        parts = [
            part[..., None, :] if role == "bias" else part
            for part, role in zip(parts, self.roles, strict=True)
        ]
        if len({part.dtype for part in parts}) > 1:  # a bias in another type
            parts = [part.astype(self.dtype) for part in parts]
        return jnp.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]

    def from_matrix(self, matrix: Array) -> list[Array]:
        """Inverts `to_matrix`."""
        results: list[Array] = []
        for layout, role in zip(self.layouts, self.roles, strict=True):
            if role == "bias":
                part = matrix[..., -1, :]
            else:
                part = matrix[..., :-1, :] if self.homogeneous else matrix
            results.append(layout.from_matrix(part))
        return results
