"""Which parameters are biases: added to the output of a linear layer, and nothing else.

A second pass over the program, after the layers are known. The output of a layer is
followed through equations that only change its view, up to the addition.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kfac_jax._jaxpr import view_rules
from kfac_jax._jaxpr.folding import Known
from kfac_jax._jaxpr.graph import Atom, Graph, Node, is_value, use_counts
from kfac_jax._jaxpr.kinds.outcome import Linear
from kfac_jax._jaxpr.sites import Held, Site, is_one
from kfac_jax._jaxpr.view import Axis, Layout, Piece, View, axis_size


class Consumed(NamedTuple):
    """A linear layer, and the operands that its equation makes it of."""

    linear: Linear
    views: Sequence[View | None]  # None for data


def biases(
    graph: Graph, layers: Mapping[Node, Sequence[Consumed]], known: Known
) -> Mapping[Site, Held]:
    """Finds the bias of each layer that has one.

    Args:
      graph: the program.
      layers: what equations make layers; several of one where parameters are joined.
      known: values that do not depend on inputs.

    Returns:
      The biases, by the use of the weight. Each is the use of a shift as well.
    """
    counts = use_counts(graph)
    outputs: dict[int, Linear] = {}  # values that are some layer's output, moved
    found: dict[Site, Held] = {}

    def alone(atom: Atom) -> Linear | None:
        """The layer whose output this is, if nothing else reads it."""
        read_once = is_value(atom) and counts.get(atom) == 1
        return outputs.get(atom) if read_once else None

    for node in graph.walk():
        for linear, views in layers.get(node, ()):
            outputs[node.outputs[0]] = linear
            if node.name != "add":
                continue
            view = next(view for view in views if view is not None)
            target = alone(node.inputs[views.index(None)])
            bias = target and _bias(target, view)
            if target is not None and bias is not None:
                found[target.site] = bias
        if node not in layers and len(node.inputs) == 1:
            target = alone(node.inputs[0])
            moved = target and _moved(target, node, known)
            if moved is not None:
                outputs[node.outputs[0]] = moved
    return found


def _moved(linear: Linear, node: Node, known: Known) -> Linear | None:
    """The layer with its output as the equation shows it; None if it is changed."""
    rule = view_rules.TABLE.get(node.name)
    cut = node.name == "slice" and node.out_shape() != node.shape()
    view = None if rule is None or cut else rule(known, node, [linear.view])
    return view and dataclasses.replace(linear, view=view)


def _bias(linear: Linear, view: View) -> Held | None:
    """A parameter as the bias of the layer to whose output it is added."""
    site = linear.site
    if (
        site.reader.joins_outputs  # of several layers
        or site.weight is None  # a shift by another parameter
        or site.bias is not None
        or view.scans != site.scans
        or not (is_one(view.scale) and is_one(linear.view.scale))
    ):
        return None
    layout = bias_layout(linear, view)
    return layout and Held(view.source, layout)


def bias_layout(linear: Linear, bias: View) -> Layout | None:
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
    for piece, axis in _origin(linear):
        met = meets.get(piece, ())
        is_row = axis in linear.axes.rows
        varies = any(not p.new and p.size != 1 for p in met)
        if is_row == varies:
            return None
        if not is_row:
            groups.setdefault(axis, []).append(met)
    independent = [groups.get(a, []) for a in linear.axes.independent]
    out = [axis for a in linear.axes.features for axis in groups.get(a, [])]
    return fine.layout([*independent, out])


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
