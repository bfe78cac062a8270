"""Rows of a table picked by integers: dense layers of one-hot inputs."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax._jaxpr.graph import Atom, Node, is_value
from kfac_jax._jaxpr.outcomes import (
    Outcome,
    Refused,
    Shapes,
    plain_linear,
    row_examples,
)
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import View, layout


class Picked(NamedTuple):
    """The axis of which a gather picks whole rows."""

    axis: int
    column: int  # of the indices
    drops: bool  # whether indices out of bounds give no row


def picked_axis(node: Node) -> Picked | None:
    """The axis that a gather picks rows along; None if they are not whole rows."""
    numbers = node.params["dimension_numbers"]
    fill = node.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    sizes, shape = tuple(node.params["slice_sizes"]), node.shape(0)
    columns = tuple(numbers.start_index_map)
    # an index along an axis that is taken whole is clamped to zero
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
        or (fill and len(columns) > 1)
    ):
        return None
    return Picked(picked[0], columns.index(picked[0]), fill)


def embedding(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A gather of whole rows: the axis indexed is the input, all others outputs."""
    view = views[0]
    if view is None:
        return Refused("used as indices by `gather`")
    picked = picked_axis(node)
    if picked is None:
        return Refused("only partly used by `gather`; whole rows along one axis are")
    shape = node.shape(0)
    features = [a for a in range(len(shape)) if a != picked.axis]
    found = layout(
        view,
        shapes[view.source],
        [
            *([a] for a in view.stacked),
            [view.axes[picked.axis]],
            [view.axes[a] for a in features],
        ],
    )
    if found is None:
        return Refused("repeated or only partly used by `gather`")
    outs = tuple(node.params["dimension_numbers"].offset_dims)
    rows = tuple(a for a in range(len(node.out_shape())) if a not in outs)
    site = Site(
        kind="embedding",
        output=node.outputs[0],
        x=node.inputs[1],
        x_axes=((), tuple(range(len(rows))), (len(rows),)),
        y_axes=((), rows, outs),
        examples=row_examples(state, rows),
        weight=(view.source, found),
        bias=None,
        scale=view.scale,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
        vocabulary=shape[picked.axis],
        column=picked.column,
        drops=picked.drops,
    )
    return plain_linear(node, site)


class OneHot:
    """Knows which values are one-hot: integers compared with an `iota`, and cast."""

    def __init__(self) -> None:
        """Knows none."""
        self._iotas: dict[int, int] = {}  # along which axis a value counts
        self._indices: dict[int, tuple[Atom, int, int]] = {}  # and the axis, its size

    def note(self, node: Node) -> None:
        """Looks at an equation without parameters."""
        if len(node.outputs) != 1:
            return
        out = node.outputs[0]
        first = next((atom for atom in node.inputs[:1] if is_value(atom)), -1)
        if node.name == "iota":
            self._iotas[out] = node.params["dimension"]
        elif node.name == "broadcast_in_dim" and first in self._iotas:
            axis = node.params["broadcast_dimensions"][self._iotas[first]]
            if node.out_shape()[axis] == node.shape()[self._iotas[first]]:
                self._iotas[out] = axis
        elif node.name == "convert_element_type" and first in self._indices:
            self._indices[out] = self._indices[first]
        elif node.name == "eq":
            self._compare(node)

    def _compare(self, node: Node) -> None:
        for counted, other in ((0, 1), (1, 0)):
            atom = node.inputs[counted]
            axis = self._iotas.get(atom) if is_value(atom) else None
            compared = node.inputs[other]
            if axis is None or (is_value(compared) and compared in self._iotas):
                continue
            shape, size = list(node.out_shape()), node.out_shape()[axis]
            shape[axis] = 1
            integers = jnp.issubdtype(
                node.equation.invars[other].aval.dtype, jnp.integer
            )
            if integers and list(node.shape(other)) == shape:
                self._indices[node.outputs[0]] = (compared, axis, size)

    def as_embedding(self, site: Site) -> Site:
        """A dense site whose input is one-hot, as the embedding that it is."""
        found = None
        if site.x is not None and is_value(site.x):
            found = self._indices.get(site.x)
        if site.kind != "dense" or found is None:
            return site
        indices, axis, size = found
        if site.x_axes[0] or site.x_axes[2] != (axis,) or site.x_places:
            return site
        return dataclasses.replace(
            site, kind="embedding", x=indices, vocabulary=size, drops=True
        )
