"""Equations whose result is a view of a parameter: they move or rescale its entries.

`TABLE` has one rule for each primitive. A rule gets the values known while planning,
the node and the views of its operands (None for data). It returns the view that the
result is, or None if the result is not a view.
"""

from collections.abc import Callable, Sequence

import jax.core
import jax.numpy as jnp
import numpy as np

from kfac_jax._jaxpr.folding import Folded
from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.embedding import picked_axis
from kfac_jax._jaxpr.view import View

ViewRule = Callable[[Folded, Node, Sequence[View | None]], View | None]


def _same(_: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    return views[0]


def _converted(_: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    """Follows casts to real types only.

    Integers have no gradient, and products with complex numbers no real factors.
    """
    real = jnp.issubdtype(node.params["new_dtype"], jnp.floating)
    return views[0] if real else None


def _slice(_: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    starts, strides = node.params["start_indices"], node.params["strides"]
    if any(stride != 1 for stride in strides or ()):
        return None
    return _cut(node, views[0], starts)


def _dynamic_slice(
    folded: Folded, node: Node, views: Sequence[View | None]
) -> View | None:
    """A slice whose start is known while planning."""
    starts = [folded.value(atom) for atom in node.inputs[1:]]
    if any(x is None or isinstance(x, jax.core.Tracer) for x in starts):
        return None
    # JAX clamps starts so that the slice lies inside the operand
    limits = [n - m for n, m in zip(node.shape(), node.out_shape(), strict=True)]
    clamped = [
        max(0, min(int(start), limit))
        for start, limit in zip(starts, limits, strict=True)
    ]
    return _cut(node, views[0], clamped)


def _cut(node: Node, view: View | None, starts: Sequence[int]) -> View | None:
    """Cuts the axes that the result has shorter."""
    sizes = zip(node.shape(), node.out_shape(), strict=True)
    for axis, (before, after) in enumerate(sizes):
        if view is not None and before != after:
            view = view.cut(axis, int(starts[axis]), after)
    return view


def _gather(folded: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    return _window(folded, node, views) or _positions(folded, node, views)


def _window(folded: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    """One slice whose start is known while planning.

    JAX 0.8 writes `w[None, :n]` as such a gather, later versions as a slice.
    """
    numbers, shape = node.params["dimension_numbers"], node.shape()
    sizes = node.params["slice_sizes"]
    if len(node.shape(1)) != 1 or node.out_shape() != tuple(sizes):
        return None
    indices = folded.indices(node.inputs[1])
    if indices is None or isinstance(indices, jax.core.Tracer):
        return None
    starts = [0] * len(shape)
    for axis, start in zip(numbers.start_index_map, np.asarray(indices), strict=True):
        starts[axis] = int(start)
    inside = all(
        0 <= start <= n - size
        for start, n, size in zip(starts, shape, sizes, strict=True)
    )
    return _cut(node, views[0], starts) if inside else None


def _positions(folded: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    """Consecutive rows of a table, `w[jnp.arange(n)]`: positional embeddings.

    With such indices a gather only slices and reshapes, and the rows, then added to
    data, are a shift. As an embedding they would be a layer with a constant input.
    """
    view, picked = views[0], picked_axis(node)
    if view is None or picked is None:
        return None
    rows, length = node.shape(1)[:-1], node.shape(0)[picked.axis]
    indices = folded.indices(node.inputs[1])
    if indices is None or isinstance(indices, jax.core.Tracer):
        return None
    column = np.asarray(indices)[..., picked.column].reshape(-1)
    start = int(column[0]) if column.size else 0
    inside = 0 <= start and start + column.size <= length
    if not inside or not np.array_equal(column, start + np.arange(column.size)):
        return None
    if column.size != length:
        view = view.cut(picked.axis, start, column.size)
        if view is None:
            return None
    # The result has the axes of a row at `offset_dims`, those of the indices elsewhere.
    # So bring the picked axis to the front, split it like the indices, and move both. A
    # row that is a slice of length one, as `vmap` makes it, still has the picked axis.
    numbers = node.params["dimension_numbers"]
    features = [a for a in range(len(view.axes)) if a != picked.axis]
    first = view.transpose([picked.axis, *features])
    sizes = enumerate(node.params["slice_sizes"])
    shape = [*rows, *(n for a, n in sizes if a not in numbers.collapsed_slice_dims)]
    outs = numbers.offset_dims
    order = iter(range(len(rows)))
    places = [
        len(rows) + outs.index(p) if p in outs else next(order)
        for p in range(len(shape))
    ]
    split = first.reshape(shape)
    return split and split.transpose(places)


def _reshape(_: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    """A reshape; its `dimensions` say how to transpose first (batched convolutions)."""
    view, order = views[0], node.params["dimensions"]
    if view is not None and order is not None:
        view = view.transpose(order)
    return view and view.reshape(node.params["new_sizes"])


def _tile(_: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    """Repeats axes of length one."""
    shape, view = node.shape(), views[0]
    if view is None or any(
        n != 1 and times != 1
        for n, times in zip(shape, node.params["reps"], strict=True)
    ):
        return None
    return view.broadcast(node.out_shape(), range(len(shape)))


def _multiply(folded: Folded, node: Node, views: Sequence[View | None]) -> View | None:
    """Products with a scalar constant, `W * 2.0` or `W / sqrt(d)`, rescale the view."""
    if len(views) != 2 or (views[0] is None and views[1] is None):
        return None
    at = 0 if views[0] is not None else 1
    view, factor = views[at], folded.value(node.inputs[1 - at])
    if view is None or factor is None or getattr(factor, "size", 1) != 1:
        return None
    factor = factor.reshape(()) if getattr(factor, "ndim", 0) else factor
    if node.name == "div":
        if at:
            return None
        factor = 1.0 / factor
    return view.scaled(factor)


TABLE: dict[str, ViewRule] = {
    "convert_element_type": _converted,
    "copy": _same,
    "copy_p": _same,
    "reduce_precision": _same,
    "sharding_constraint": _same,
    "name": _same,
    "reshard": _same,
    "pvary": _same,
    "pcast": _same,
    "transpose": lambda _, n, v: v[0] and v[0].transpose(n.params["permutation"]),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "tile": _tile,
    "squeeze": lambda _, n, v: v[0] and v[0].squeeze(n.params["dimensions"]),
    "reshape": _reshape,
    "broadcast_in_dim": lambda _, n, v: (
        v[0] and v[0].broadcast(n.params["shape"], n.params["broadcast_dimensions"])
    ),
    "neg": lambda _, n, v: v[0] and v[0].scaled(-1.0),
    "mul": _multiply,
    "div": _multiply,
}
