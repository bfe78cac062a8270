"""Which equations are layers.

One function for each primitive that consumes a parameter.

A consumer gets the node, the views of its operands (None for data), the parameters'
shapes and where the examples are in the result. It returns a linear site, or why not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.outcomes import (
    Generic,
    Linear,
    Outcome,
    Refused,
    Shapes,
    plain_linear,
    row_examples,
)
from kfac_jax._jaxpr.sites import Site, Windows
from kfac_jax._jaxpr.states import Examples, State
from kfac_jax._jaxpr.view import Axis, Layout, Piece, View, axis_size, layout


def is_one(scale: Any) -> bool:
    """Whether a scale is known to be one."""
    return isinstance(scale, float | int) and scale == 1.0


def dot_general(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A dense layer: contracted axes are inputs, free axes of the weight outputs.

    Batch axes are independent layers, or rows where the weight is merely repeated.
    """
    if views[0] is not None and views[1] is not None:
        return Refused("multiplied with another parameter")
    side = 0 if views[0] is not None else 1
    view = views[side]
    assert view is not None
    contract, batch = node.params["dimension_numbers"]
    w_contract, x_contract = contract[side], contract[1 - side]
    w_batch, x_batch = batch[side], batch[1 - side]
    w_free = _free(len(view.axes), w_contract, w_batch)
    x_free = _free(len(node.shape(1 - side)), x_contract, x_batch)
    repeated = [_is_new(view.axes[a]) for a in w_batch]
    independent = [i for i, new in enumerate(repeated) if not new]
    y_batch, first, second = _output_axes(len(batch[0]), x_free, w_free, side)
    lead = [
        *([a] for a in view.stacked),
        *([view.axes[w_batch[i]]] for i in independent),
    ]
    ins, outs = [view.axes[a] for a in w_contract], [view.axes[a] for a in w_free]
    windows = _alone(view, (*w_contract, *w_free), "place")
    shape = shapes[view.source]
    found = layout(view, shape, [*lead, ins, outs], windows=windows)
    if found is None:
        return Refused("repeated or only partly used by `dot_general`")
    rows = (*(i for i in y_batch if repeated[i]), *first)
    site = Site(
        kind="dense",
        output=node.outputs[0],
        x=node.inputs[1 - side],
        x_axes=(
            tuple(x_batch[i] for i in independent),
            (*(x_batch[i] for i in y_batch if repeated[i]), *x_free),
            tuple(x_contract),
        ),
        y_axes=(tuple(independent), rows, second),
        examples=row_examples(state, rows),
        weight=(view.source, found),
        bias=None,
        scale=view.scale,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
        x_places=_windows(view, w_contract, x_contract, "place"),
        y_places=_windows(view, w_free, second, "place"),
        transposed=layout(view, shape, [*lead, outs, ins], windows=windows),
    )
    return plain_linear(node, site)


def _free(rank: int, *used: Sequence[int]) -> list[int]:
    return [i for i in range(rank) if not any(i in axes for axes in used)]


def _is_new(axis: Axis) -> bool:
    return all(piece.new or piece.size == 1 for piece in axis) and axis_size(axis) > 1


def _output_axes(
    batch: int, x_free: Sequence[int], w_free: Sequence[int], side: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the product: batch, then free ones of the left, then of the right."""
    parts = [len(w_free), len(x_free)] if side == 0 else [len(x_free), len(w_free)]
    left = tuple(range(batch, batch + parts[0]))
    right = tuple(range(batch + parts[0], batch + sum(parts)))
    rows, outs = (right, left) if side == 0 else (left, right)
    return tuple(range(batch)), rows, outs


def _feature_axes(view: View, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes along which an elementwise parameter varies; None if it cuts one."""
    if len(view.axes) != len(shape):
        return None
    features: list[int] = []
    for i, axis in enumerate(view.axes):
        pieces = [p for p in axis if p.size != 1]
        if pieces and not any(p.new for p in pieces):
            features.append(i)
        elif any(not p.new for p in pieces):
            return None
    return tuple(features)


def _elementwise(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State, kind: str
) -> Outcome:
    if views[0] is not None and views[1] is not None:
        return Refused(f"combined with another parameter by `{node.name}`")
    at = 0 if views[0] is not None else 1
    view = views[at]
    assert view is not None
    shape = node.out_shape()
    if not view.axes:  # a scalar, which an equation repeats by itself
        view = view.broadcast(shape, ())
    features = _feature_axes(view, shape)
    data = node.shape(1 - at)
    stretches = len(data) == len(shape) and all(
        n in (1, m) for n, m in zip(data, shape, strict=True)
    )
    if features is None or not stretches:
        return Refused(f"broadcast against data by `{node.name}` in an unusual way")
    stacked = [[a] for a in view.stacked]
    if kind == "scale":
        groups = [*([view.axes[a]] for a in features), [], []]
    else:
        groups = [[view.axes[a] for a in features]]
    windows: list[Piece] = []
    if kind == "shift":
        windows = [p for w in ("part", "place") for p in _alone(view, features, w)]
    found = layout(view, shapes[view.source], [*stacked, *groups], windows=windows)
    if found is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    rows = tuple(i for i in range(len(shape)) if i not in features)
    axes = (features, rows, ()) if kind == "scale" else ((), rows, features)
    sign = -1.0 if node.name == "sub" and at == 1 else 1.0
    site = Site(
        kind=kind,
        output=node.outputs[0],
        x=node.inputs[1 - at] if kind == "scale" else None,
        x_axes=axes if kind == "scale" else ((), (), ()),
        y_axes=axes,
        examples=row_examples(state, rows),
        weight=(view.source, found) if kind == "scale" else None,
        bias=None if kind == "scale" else (view.source, found),
        scale=view.scale if kind == "scale" else view.scale * sign,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
        parts=_windows(view, features, features, "part"),
        y_places=_windows(view, features, features, "place"),
    )
    return plain_linear(node, site)


def _alone(view: View, axes: Sequence[int], window: str) -> list[Piece]:
    """Pieces with a "part" or "place" that are one of these axes."""
    pieces = [view.only(axis) for axis in axes]
    return [p for p in pieces if p is not None and getattr(p, window)]


def _windows(
    view: View, axes: Sequence[int], others: Sequence[int], window: str
) -> Windows:
    """The windows of those pieces, on the axes of data that these axes meet."""
    return tuple(
        (other, *getattr(piece, window))
        for axis, other in zip(axes, others, strict=True)
        for piece in _alone(view, [axis], window)
    )


def scale(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """An elementwise scale: each feature is an independent 1-to-1 layer."""
    return _elementwise(node, views, shapes, state, "scale")


def shift(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """An elementwise shift: a layer whose only input is the constant one."""
    return _elementwise(node, views, shapes, state, "shift")


def concatenated(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A parameter that is repeated for each example and joined to data: a token.

    It is a shift of nothing, so its statistics are gathered where it is repeated.
    """
    given = [(i, view) for i, view in enumerate(views) if view is not None]
    if len(given) > 1:
        return Refused("concatenated with another parameter")
    ((at, view),) = given
    shape = node.shape(at)
    features = _feature_axes(view, shape)
    repeated = isinstance(state, Examples) and any(
        piece.new and piece.size > 1 for piece in view.axes[state.axis]
    )
    if features is None or not repeated:
        return Refused("concatenated with data without one copy for each example")
    groups = [*([a] for a in view.stacked), [view.axes[a] for a in features]]
    found = layout(view, shapes[view.source], groups)
    if found is None:
        return Refused("repeated or only partly used by `concatenate`")
    rows = tuple(i for i in range(len(shape)) if i not in features)
    site = _shift(node, node.inputs[at], rows, features, view, found, state)
    return plain_linear(node, site)


def _shift(
    node: Node,
    output: Any,
    rows: tuple[int, ...],
    features: tuple[int, ...],
    view: View,
    found: Layout,
    state: State,
) -> Site:
    """A parameter that is added to an output, or stands there by itself."""
    return Site(
        kind="shift",
        output=output,
        x=None,
        x_axes=((), (), ()),
        y_axes=((), rows, features),
        examples=row_examples(state, rows),
        weight=None,
        bias=(view.source, found),
        scale=view.scale,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
    )


def generic(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A parameter under `register_generic`."""
    view = views[0]
    assert view is not None
    return Generic(view.source)


def tagged(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A layer under one of the `register_*` layer tags."""
    kind, names = node.params["kind"], node.params["names"]
    if any(view is not None for view in views[:2]):
        return Refused(f"tagged as {kind}, but the layer's input is a parameter")
    parts = views[1 + node.params["num_inputs"] :]
    given = {
        name: view for name, view in zip(names, parts, strict=True) if view is not None
    }
    if len(given) != len(parts):
        return Refused(f"tagged as {kind}, but an operand is not a view of a parameter")
    return TAGGED[kind](node, given, shapes, state)


def _tagged_dense(
    node: Node, given: dict[str, View], shapes: Shapes, state: State
) -> Outcome:
    n = node.params["independent"]
    rank = len(node.out_shape())
    w, b = given["w"], given.get("b")
    stacked = [[a] for a in w.stacked]
    ind = [[w.axes[i]] for i in range(n)]
    weight = layout(w, shapes[w.source], [*stacked, *ind, [w.axes[n]], [w.axes[n + 1]]])
    bias = b and layout(
        b,
        shapes[b.source],
        [*([a] for a in b.stacked), *([b.axes[i]] for i in range(n)), [b.axes[n]]],
    )
    if weight is None or (b is not None and bias is None):
        return Refused("tagged as dense, but a parameter is repeated or partly used")
    axes = (tuple(range(n)), tuple(range(n, rank - 1)), (rank - 1,))
    site = Site(
        kind="dense",
        output=node.outputs[0],
        x=node.inputs[1],
        x_axes=axes,
        y_axes=axes,
        examples=row_examples(state, axes[1]),
        weight=(w.source, weight),
        bias=(b.source, bias) if b and bias and _fits(w, b) else None,
        scale=w.scale,
        scans=w.scans,
        repeated=w.repeated,
        source=node.source,
    )
    linear = plain_linear(node, site)
    if b is None:
        return linear
    places = (*range(n), rank - 1)
    return dataclasses.replace(
        linear, shift=_tagged_shift(node, b, b.axes, places, shapes, state)
    )


def _fits(weight: View, bias: View) -> bool:
    """Whether a bias can be the weight of the weight's homogeneous coordinate."""
    return weight.scans == bias.scans and is_one(bias.scale)


def _tagged_shift(
    node: Node,
    view: View,
    axes: Sequence[Axis],
    features: tuple[int, ...],
    shapes: Shapes,
    state: State,
) -> Site:
    """The use of a tagged bias by itself, which detection notes beside the weight's."""
    found = layout(view, shapes[view.source], [*([a] for a in view.stacked), axes])
    assert found is not None  # as it has been laid out beside the weight
    rows = tuple(i for i in range(len(node.out_shape())) if i not in features)
    return _shift(node, node.outputs[0], rows, features, view, found, state)


def _tagged_scale_and_shift(
    node: Node, given: dict[str, View], shapes: Shapes, state: State
) -> Outcome:
    shape = node.out_shape()
    if node.params["independent"] or node.shape(1) != shape:
        return Refused("tagged as scale_and_shift under a vmap over its parameters")
    wide = {
        name: view.broadcast(shape, range(len(shape) - len(view.axes), len(shape)))
        for name, view in given.items()
    }
    features = _feature_axes(next(iter(wide.values())), shape)
    if features is None or any(
        _feature_axes(v, shape) != features for v in wide.values()
    ):
        return Refused("tagged as scale_and_shift with shapes that do not match")
    rows = tuple(i for i in range(len(shape)) if i not in features)
    laid_out: dict[str, Layout] = {}
    for name, view in wide.items():
        groups = [*([a] for a in view.stacked), *([view.axes[a]] for a in features), []]
        found = layout(
            view, shapes[view.source], [*groups, []] if name == "scale" else groups
        )
        if found is None:
            return Refused("tagged as scale_and_shift, but a parameter is partly used")
        laid_out[name] = found
    scale, shift = wide.get("scale"), wide.get("shift")
    alone = shift and _tagged_shift(
        node, shift, [shift.axes[a] for a in features], features, shapes, state
    )
    if scale is None:
        assert alone is not None  # the tag has one of them
        return plain_linear(node, alone)
    axes = (features, rows, ())
    site = Site(
        kind="scale",
        output=node.outputs[0],
        x=node.inputs[1],
        x_axes=axes,
        y_axes=axes,
        examples=row_examples(state, rows),
        weight=(scale.source, laid_out["scale"]),
        bias=(shift.source, laid_out["shift"])
        if shift and _fits(scale, shift)
        else None,
        scale=scale.scale,
        scans=scale.scans,
        repeated=scale.repeated,
        source=node.source,
    )
    return dataclasses.replace(plain_linear(node, site), shift=alone)


TAGGED = {"dense": _tagged_dense, "scale_and_shift": _tagged_scale_and_shift}
"""Convolutions are looked up where their output comes from instead."""


def bias_layout(linear: Linear, bias: View, shapes: Shapes) -> Layout | None:
    """The layout `[*independent, out]` of a bias added to a linear output, or None.

    Each piece of the output's view must meet one axis of the bias: rows meet axes along
    which the bias is repeated, independent and output axes meet entries of the bias.
    """
    if len(bias.axes) != len(linear.view.axes):
        return None
    sizes: list[int] = []
    pieces: list[Piece] = []
    for y_axis, b_axis in zip(linear.view.axes, bias.axes, strict=True):
        repeated = axis_size(b_axis) == 1
        if not repeated and axis_size(b_axis) != axis_size(y_axis):
            return None
        pieces.extend(y_axis)
        sizes.extend(1 if repeated else piece.size for piece in y_axis)
    fine = bias.reshape(sizes)
    if fine is None:
        return None
    meets = dict(zip(pieces, fine.axes, strict=True))
    groups: dict[int, list[Axis]] = {}
    kinds = {a: k for k, axes in enumerate(linear.y_axes) for a in axes}
    for piece, axis in _origin(linear):
        met = meets.get(piece, ())
        is_row = kinds[axis] == 1
        varies = any(not p.new and p.size != 1 for p in met)
        if is_row == varies:
            return None
        if not is_row:
            groups.setdefault(axis, []).append(met)
    independent = [groups.get(a, []) for a in linear.y_axes[0]]
    out = [axis for a in linear.y_axes[2] for axis in groups.get(a, [])]
    return layout(
        fine,
        shapes[bias.source],
        [*([a] for a in fine.stacked), *independent, out],
    )


def _origin(linear: Linear) -> list[tuple[Piece, int]]:
    """Pairs each piece of the linear output with the axis of `y` it came from."""
    pieces = [piece for piece in linear.view.order if piece.size != 1]
    result: list[tuple[Piece, int]] = []
    for axis, size in enumerate(linear.shape):
        rest = size
        while rest > 1:
            piece = pieces.pop(0)
            result.append((piece, axis))
            rest //= piece.size
    return result
