"""Rows of a table picked by integers: dense layers of one-hot inputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.sites import Axes, Reader, Window, windowed
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import View


@dataclasses.dataclass(frozen=True)
class Table(Reader):
    """Reads an embedding: each row is an integer that picks a row of the table.

    Attributes:
      x_axes: the axes of the indices; the features are the columns of an index.
      y_axes: the axes of the output.
      length: the number of rows of the table.
      column: the column of an index that picks the row.
      drops: whether indices out of bounds pick no row; if not, they are clipped.
      y_windows: this table's output features, if it is joined to others along them.
    """

    kind: ClassVar[str] = "embedding"

    x_axes: Axes
    y_axes: Axes
    length: int
    column: int = 0
    drops: bool = False
    y_windows: tuple[Window, ...] = ()

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """Integers `[*rows, 1]`, where the length of the table stands for no row."""
        assert x is not None
        index = self.x_axes.arrange(x)[..., self.column, None].astype(jnp.int32)
        inside = jnp.clip(index, 0, self.length - 1)
        if self.drops:
            inside = jnp.where(inside == index, index, self.length)
        return inside, self.y_axes.arrange(windowed(dy, self.y_windows))

    @property
    def joins_outputs(self) -> bool:
        """Whether the table is joined to others along its outputs."""
        return bool(self.y_windows)

    def counted(
        self, x: Array, dy: Array, scale: Any, homogeneous: bool, one_hot: bool
    ) -> tuple[Array, Array]:
        """Integers `[*e, b, s]`, out of bounds for rows that do not count.

        A scale cannot multiply integers. So with `one_hot` it multiplies `dy`, which
        leaves `Xᵀ dY` and `A ⊗ G` as they are.
        """
        active = jnp.abs(dy).max(-1) != 0
        x = jnp.where(active, x[..., 0], self.length)
        dy = jnp.where((x < self.length)[..., None], dy, 0)
        scale = jnp.asarray(scale, dy.dtype)
        if one_hot:
            return x, dy * scale
        return jax.nn.one_hot(x, self.length, dtype=dy.dtype) * scale, dy


class Picked(NamedTuple):
    """How a gather picks full rows of a table, along one axis."""

    axis: int
    column: int  # the column of the indices that picks along that axis
    drops: bool  # whether indices out of bounds pick no row


def picked_axis(node: Node) -> Picked | None:
    """The axis along which a gather picks rows; None if it picks no full rows."""
    numbers = node.params["dimension_numbers"]
    fill = node.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    sizes, shape = tuple(node.params["slice_sizes"]), node.shape(0)
    columns = tuple(numbers.start_index_map)
    # Along an axis that is taken in full an index can only be 0 (JAX clamps others), so
    # it picks nothing. If all axes are taken in full, the first stands for a table of
    # one row.
    picked = [a for a in columns if sizes[a] != shape[a]] or list(columns[:1])
    if (
        len(picked) != 1
        or sizes[picked[0]] != 1
        or not set(numbers.collapsed_slice_dims) <= set(picked)
        or numbers.operand_batching_dims
        or any(
            n != m
            for a, (n, m) in enumerate(zip(sizes, shape, strict=True))
            if a not in picked
        )
        # a row is dropped if any of its columns is out of bounds; `drops` is for one
        or (fill and len(columns) > 1)
    ):
        return None
    return Picked(picked[0], columns.index(picked[0]), fill)


def embedding(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A gather of full rows: the indexed axis is the input, all others are outputs."""
    view = views[0]
    if view is None:
        return Refused("used as indices by `gather`")
    picked = picked_axis(node)
    if picked is None:
        return Refused("only partly used by `gather`; whole rows along one axis are")
    shape = node.shape(0)
    features = [a for a in range(len(shape)) if a != picked.axis]
    weight = view.layout([[view.axes[picked.axis]], [view.axes[a] for a in features]])
    if weight is None:
        return Refused("repeated or only partly used by `gather`")
    outs = tuple(node.params["dimension_numbers"].offset_dims)
    rows = tuple(a for a in range(len(node.out_shape())) if a not in outs)
    reader = Table(
        x_axes=Axes((), tuple(range(len(rows))), (len(rows),)),
        y_axes=Axes((), rows, outs),
        length=shape[picked.axis],
        column=picked.column,
        drops=picked.drops,
    )
    site = site_of(node, view, reader, state, x=node.inputs[1], weight=weight)
    return plain_linear(node, site)
