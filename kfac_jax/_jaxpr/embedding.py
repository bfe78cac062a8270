"""Rows of a table picked by integers: dense layers of one-hot inputs."""

from collections.abc import Sequence

import jax

from kfac_jax._jaxpr.examples import State
from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.outcomes import (
    Outcome,
    Refused,
    Shapes,
    plain_linear,
    row_examples,
)
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.view import View, layout


def embedding(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A gather of whole rows: the axis indexed is the input, all others outputs."""
    view = views[0]
    if view is None:
        return Refused("used as indices by `gather`")
    numbers = node.params["dimension_numbers"]
    fill = node.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    sizes, shape = tuple(node.params["slice_sizes"]), node.shape(0)
    columns = tuple(numbers.start_index_map)
    # an index along an axis that is taken whole is clamped to zero
    picked = [a for a in columns if sizes[a] != shape[a]] or list(columns[:1])
    features = [a for a in range(len(shape)) if a not in picked]
    if (
        len(picked) != 1
        or sizes[picked[0]] != 1
        or not set(numbers.collapsed_slice_dims) <= set(picked)
        or numbers.operand_batching_dims
        or any(sizes[a] != shape[a] for a in features)
        or (fill and len(columns) > 1)
    ):
        return Refused("only partly used by `gather`; whole rows along one axis are")
    found = layout(
        view,
        shapes[view.source],
        [
            *([a] for a in view.stacked),
            [view.axes[picked[0]]],
            [view.axes[a] for a in features],
        ],
    )
    if found is None:
        return Refused("repeated or only partly used by `gather`")
    outs = tuple(numbers.offset_dims)
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
        vocabulary=shape[picked[0]],
        column=columns.index(picked[0]),
        drops=fill,
    )
    return plain_linear(node, site)
