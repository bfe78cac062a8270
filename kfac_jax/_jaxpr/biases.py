"""Finds biases: parameters that are added to the output of a linear layer.

A second pass over the program, after the layers are known. The output of each layer is
followed through equations that only change its view, up to the addition.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kfac_jax._jaxpr import view_rules
from kfac_jax._jaxpr.folding import Folded
from kfac_jax._jaxpr.graph import Atom, Graph, Node, is_value, use_counts
from kfac_jax._jaxpr.kinds.outcome import Linear
from kfac_jax._jaxpr.sites import Parameter, Site, is_one
from kfac_jax._jaxpr.view import Axis, Layout, Piece, View, axis_size


class Consumed(NamedTuple):
    """A linear layer, and the views of the operands of its equation."""

    linear: Linear
    views: Sequence[View | None]  # None for data


def biases(
    graph: Graph, layers: Mapping[Node, Sequence[Consumed]], folded: Folded
) -> Mapping[Site, Parameter]:
    """Finds the bias of each layer that has one.

    Args:
      graph: the program.
      layers: the layers by their equations; several where parameters are joined.
      folded: values that do not depend on inputs.

    Returns:
      The biases, by the use of the weight. Each addition is in `layers` as a shift too;
      the plan drops the shift if the bias joins the weight's layer.
    """
    counts = use_counts(graph)
    outputs: dict[int, Linear] = {}  # values that are views of some layer's output
    found: dict[Site, Parameter] = {}

    def alone(atom: Atom) -> Linear | None:
        """The layer whose output this is, if it is read once.

        If anything else reads the output without the bias, the statistics at `y` see
        its cotangent too, and `dy` is not the gradient of `x W + b`.
        """
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
            # (of a sum of biases the first joins the weight)
            if target is not None and bias is not None and target.site not in found:
                found[target.site] = bias
        if node not in layers and len(node.inputs) == 1:
            target = alone(node.inputs[0])
            moved = target and _moved(target, node, folded)
            if moved is not None:
                outputs[node.outputs[0]] = moved
    return found


def _moved(linear: Linear, node: Node, folded: Folded) -> Linear | None:
    """The layer with its output after an equation; None if that is no view of it."""
    rule = view_rules.TABLE.get(node.name)
    # a bias of a part of the outputs cannot be a row of the weight's matrix
    cut = node.name == "slice" and node.out_shape() != node.shape()
    view = None if rule is None or cut else rule(folded, node, [linear.view])
    return view and dataclasses.replace(linear, view=view)


def _bias(linear: Linear, view: View) -> Parameter | None:
    """The bias that a parameter is for a layer to whose output it is added, or None."""
    site = linear.site
    if (
        site.reader.joins_outputs  # the output belongs to several layers
        or site.weight is None  # the layer is a shift by another parameter
        or site.bias is not None
        or view.scans != site.scans  # one of the two has fewer copies
        # the homogeneous input is exactly 1, so it can take no factor
        or not (is_one(view.scale) and is_one(linear.view.scale))
    ):
        return None
    layout = bias_layout(linear, view)
    return layout and Parameter(view.source, layout)


def bias_layout(linear: Linear, bias: View) -> Layout | None:
    """The layout `[*independent, out]` of a bias added to a linear output, or None.

    The output has been reshaped and transposed on its way to the addition. Its pieces
    tell which axis of `y` each of its entries is from. The bias is cut into pieces of
    the same sizes, so that each piece of the output meets one of the bias. Along rows
    the bias must be repeated; along independent and output axes it must vary.
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
    # one axis for each piece of the output
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
    """Pairs each piece of the linear output with the axis of `y` that it is from.

    `order` has the pieces in the row-major order of `y`, so as many belong to each axis
    as multiply to its size.
    """
    pieces = [piece for piece in linear.view.order if piece.size != 1]
    result: list[tuple[Piece, int]] = []
    for axis, size in enumerate(linear.shape):
        rest = size
        while rest > 1:
            piece = pieces.pop(0)
            result.append((piece, axis))
            rest //= piece.size
    return result
