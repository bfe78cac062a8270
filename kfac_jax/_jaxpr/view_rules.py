"""Which equations only change how a parameter is seen.

One function for each primitive. A rule gets the node and the views of its operands
(None for data); it returns the result's view, or None where that is no view.
"""

from collections.abc import Callable, Sequence

import jax.core
import jax.numpy as jnp
import numpy as np

from kfac_jax._jaxpr.folding import Known
from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.embedding import picked_axis
from kfac_jax._jaxpr.view import View

ViewRule = Callable[[Known, Node, Sequence[View | None]], View | None]


def _same(_: Known, node: Node, views: Sequence[View | None]) -> View | None:
    return views[0]


def _converted(_: Known, node: Node, views: Sequence[View | None]) -> View | None:
    """Another real type; integers have no gradient, complex products no real factor."""
    real = jnp.issubdtype(node.params["new_dtype"], jnp.floating)
    return views[0] if real else None


def _slice(_: Known, node: Node, views: Sequence[View | None]) -> View | None:
    starts, strides = node.params["start_indices"], node.params["strides"]
    if any(stride != 1 for stride in strides or ()):
        return None
    return _cut(node, views[0], starts)


def _dynamic_slice(
    known: Known, node: Node, views: Sequence[View | None]
) -> View | None:
    """A slice from a place that is known."""
    starts = [known.value(atom) for atom in node.inputs[1:]]
    if any(x is None or isinstance(x, jax.core.Tracer) for x in starts):
        return None
    limits = [n - m for n, m in zip(node.shape(), node.out_shape(), strict=True)]
    clamped = [
        max(0, min(int(start), limit))
        for start, limit in zip(starts, limits, strict=True)
    ]
    return _cut(node, views[0], clamped)


def _cut(node: Node, view: View | None, starts: Sequence[int]) -> View | None:
    """Cuts the axes that get shorter."""
    sizes = zip(node.shape(), node.out_shape(), strict=True)
    for axis, (before, after) in enumerate(sizes):
        if view is not None and before != after:
            view = view.cut(axis, int(starts[axis]), after)
    return view


def _gather(known: Known, node: Node, views: Sequence[View | None]) -> View | None:
    return _window(known, node, views) or _positions(known, node, views)


def _window(known: Known, node: Node, views: Sequence[View | None]) -> View | None:
    """One slice from a place that is known, as `w[None, :n]` is in JAX 0.8."""
    numbers, shape = node.params["dimension_numbers"], node.shape()
    sizes = node.params["slice_sizes"]
    if len(node.shape(1)) != 1 or node.out_shape() != tuple(sizes):
        return None
    indices = known.indices(node.inputs[1])
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


def _positions(known: Known, node: Node, views: Sequence[View | None]) -> View | None:
    """Consecutive rows of a table, `w[jnp.arange(n)]`, as of positions."""
    view, picked = views[0], picked_axis(node)
    if view is None or picked is None:
        return None
    rows, length = node.shape(1)[:-1], node.shape(0)[picked.axis]
    indices = known.indices(node.inputs[1])
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
    features = [a for a in range(len(view.axes)) if a != picked.axis]
    first = view.transpose([picked.axis, *features])
    shape = [*rows, *(node.shape(0)[a] for a in features)]
    outs = node.params["dimension_numbers"].offset_dims
    order = iter(range(len(rows)))
    places = [
        len(rows) + outs.index(p) if p in outs else next(order)
        for p in range(len(shape))
    ]
    split = first.reshape(shape)
    return split and split.transpose(places)


def _reshape(_: Known, node: Node, views: Sequence[View | None]) -> View | None:
    """May transpose first (as batched convolutions do)."""
    view, order = views[0], node.params["dimensions"]
    if view is not None and order is not None:
        view = view.transpose(order)
    return view and view.reshape(node.params["new_sizes"])


def _tile(_: Known, node: Node, views: Sequence[View | None]) -> View | None:
    """Repeats axes of length one."""
    shape, view = node.shape(), views[0]
    if view is None or any(
        n != 1 and times != 1
        for n, times in zip(shape, node.params["reps"], strict=True)
    ):
        return None
    return view.broadcast(node.out_shape(), range(len(shape)))


def _multiply(known: Known, node: Node, views: Sequence[View | None]) -> View | None:
    """A scalar constant factor is part of the view (W * 2.0, W / sqrt(d))."""
    if len(views) != 2 or (views[0] is None and views[1] is None):
        return None
    at = 0 if views[0] is not None else 1
    view, factor = views[at], known.value(node.inputs[1 - at])
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
