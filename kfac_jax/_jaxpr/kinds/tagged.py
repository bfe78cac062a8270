"""Layers, and parameters, that the user has tagged."""

from collections.abc import Sequence

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.dense import Dense
from kfac_jax._jaxpr.kinds.elementwise import Scale, Shift, feature_axes
from kfac_jax._jaxpr.kinds.outcome import (
    Generic,
    Outcome,
    Refused,
    plain_linear,
    site_of,
)
from kfac_jax._jaxpr.sites import Axes, Parameter, is_one
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import Layout, View


def generic(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A parameter under `register_generic`."""
    view = views[0]
    assert view is not None
    return Generic(view.source)


def tagged(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A layer with one of the `register_*` layer tags.

    Discovery finds convolutions where their output is computed, not by their tag.
    """
    kind, names = node.params["kind"], node.params["names"]
    if any(view is not None for view in views[:2]):
        return Refused(f"tagged as {kind}, but the layer's input is a parameter")
    operands = views[1 + node.params["num_inputs"] :]
    parameters = {
        name: view
        for name, view in zip(names, operands, strict=True)
        if view is not None
    }
    if len(parameters) != len(operands):
        return Refused(f"tagged as {kind}, but an operand is not a view of a parameter")
    return _RULES[kind](node, parameters, state)


def _dense(node: Node, parameters: dict[str, View], state: State) -> Outcome:
    # `vmap` over the weights puts that many leading axes in front, of the output too
    n, rank = node.params["independent"], len(node.out_shape())
    view, added = parameters["w"], parameters.get("b")
    weight = view.layout([[a] for a in view.axes[: n + 2]])
    layout = added and added.layout([[a] for a in added.axes[: n + 1]])
    if weight is None or (added is not None and layout is None):
        return Refused("tagged as dense, but a parameter is repeated or partly used")
    axes = Axes(tuple(range(n)), tuple(range(n, rank - 1)), (rank - 1,))
    bias = Parameter(added.source, layout) if added and layout else None
    fits = added is not None and _fits(view, added)
    site = site_of(
        node,
        view,
        Dense(axes, axes),
        state,
        x=node.inputs[1],
        weight=weight,
        bias=bias if fits else None,
    )
    if added is None:
        return plain_linear(node, site)
    # The bias is recorded as a shift too, for where it cannot join the weight's layer.
    # As a shift it is a single layer, also under a `vmap` over the weights.
    by_itself = Shift(Axes((), axes.rows, (*axes.independent, *axes.features)))
    joint = added.layout([added.axes[: n + 1]])
    assert joint is not None  # as there is a layout of the same axes
    alone = site_of(node, added, by_itself, state, bias=Parameter(added.source, joint))
    return plain_linear(node, site, alone)


def _fits(weight: View, bias: View) -> bool:
    """Whether a bias can be the last row of the weight's matrix, whose input is 1."""
    return weight.scans == bias.scans and is_one(bias.scale)


def _scale_and_shift(node: Node, parameters: dict[str, View], state: State) -> Outcome:
    shape = node.out_shape()
    if node.params["independent"] or node.shape(1) != shape:
        return Refused("tagged as scale_and_shift under a vmap over its parameters")
    wide = {
        name: view.broadcast(shape, range(len(shape) - len(view.axes), len(shape)))
        for name, view in parameters.items()
    }
    features = feature_axes(next(iter(wide.values())), shape)
    if features is None or any(
        feature_axes(v, shape) != features for v in wide.values()
    ):
        return Refused("tagged as scale_and_shift with shapes that do not match")
    rows = tuple(i for i in range(len(shape)) if i not in features)
    layouts: dict[str, Layout] = {}
    for name, view in wide.items():
        groups = [*([view.axes[a]] for a in features), []]
        found = view.layout([*groups, []] if name == "scale" else groups)
        if found is None:
            return Refused("tagged as scale_and_shift, but a parameter is partly used")
        layouts[name] = found
    scale, shift = wide.get("scale"), wide.get("shift")
    alone = None
    if shift is not None:
        joint = shift.layout([[shift.axes[a] for a in features]])
        assert joint is not None  # as there is a layout of the same axes
        reader = Shift(Axes((), rows, features))
        bias = Parameter(shift.source, joint)
        alone = site_of(node, shift, reader, state, bias=bias)
    if scale is None:
        assert alone is not None  # the tag has one of them
        return plain_linear(node, alone)
    fits = shift is not None and _fits(scale, shift)
    site = site_of(
        node,
        scale,
        Scale(Axes(features, rows, ())),
        state,
        x=node.inputs[1],
        weight=layouts["scale"],
        bias=Parameter(shift.source, layouts["shift"]) if shift and fits else None,
    )
    return plain_linear(node, site, alone)


_RULES = {"dense": _dense, "scale_and_shift": _scale_and_shift}
