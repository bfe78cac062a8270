"""Elementwise scales and shifts, and parameters concatenated with data."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.kinds.windows import pieces_alone, windows_on
from kfac_jax._jaxpr.sites import Axes, Parameter, Reader, Site, Window, windowed
from kfac_jax._jaxpr.states import Examples, State
from kfac_jax._jaxpr.view import View


@dataclasses.dataclass(frozen=True)
class Scale(Reader):
    """Reads a scale: each feature is an independent layer with one input and output.

    Attributes:
      y_axes: the axes of the output, to whose shape the input is broadcast.
    """

    kind: ClassVar[str] = "scale"

    y_axes: Axes

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """The entries of the output, and those of the input broadcast to its shape."""
        assert x is not None
        x = jnp.broadcast_to(x, dy.shape)
        return self.y_axes.arrange(x), self.y_axes.arrange(dy)


@dataclasses.dataclass(frozen=True)
class Shift(Reader):
    """Reads a shift: a layer whose only input is the constant 1.

    Attributes:
      y_axes: the axes of the output.
      cuts: the used runs of the parameter, if it is cut.
      windows: this parameter's output features, if it is joined to others.
    """

    kind: ClassVar[str] = "shift"

    y_axes: Axes
    cuts: tuple[Window, ...] = ()
    windows: tuple[Window, ...] = ()

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """Ones, and the cotangent of the output that the full parameter would have.

        The factors of a layer are those of the full parameter. So the cotangent of a
        cut parameter's output is padded with zeros for the entries that are not used.
        """
        dy = windowed(dy, self.windows)
        widths = [(0, 0)] * dy.ndim
        for axis, start, full in self.cuts:
            widths[axis] = start, full - start - dy.shape[axis]
        dy = self.y_axes.arrange(jnp.pad(dy, widths) if self.cuts else dy)
        return jnp.ones_like(dy[..., :1]), dy

    @property
    def joins_outputs(self) -> bool:
        """Whether the parameter is joined to others."""
        return bool(self.windows)

    @property
    def is_partial(self) -> bool:
        """Whether the parameter is cut, or joined to others."""
        return bool(self.cuts or self.windows)


def scale(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """An elementwise scale: each feature is an independent 1-to-1 layer."""
    found = _against_data(node, views)
    if isinstance(found, Refused):
        return found
    at, view, features = found
    layout = view.layout([*([view.axes[a]] for a in features), [], []])
    if layout is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    reader = Scale(Axes(features, _others(node, features), ()))
    x = node.inputs[1 - at]
    return plain_linear(node, site_of(node, view, reader, state, x=x, weight=layout))


def shift(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """An elementwise shift: a layer whose only input is the constant 1."""
    found = _against_data(node, views)
    if isinstance(found, Refused):
        return found
    at, view, features = found
    cut, joined = (pieces_alone(view, features, w) for w in ("cut", "joined"))
    layout = view.layout([[view.axes[a] for a in features]], windows=cut + joined)
    if layout is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    reader = Shift(
        Axes((), _others(node, features), features),
        windows_on(view, features, features, "cut"),
        windows_on(view, features, features, "joined"),
    )
    sign = -1.0 if node.name == "sub" and at == 1 else 1.0
    bias = Parameter(view.source, layout)
    site = site_of(node, view, reader, state, bias=bias, scale=view.scale * sign)
    return plain_linear(node, site)


def entry(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A parameter that meets data entry by entry, though not as a factor or a term.

    In `a / (a + x)` the derivative by the numerator is that by a shift added to it.
    Statistics are gathered at the operand, repeated like the output.
    """
    ((at, view),) = [(i, view) for i, view in enumerate(views) if view is not None]
    shape = node.out_shape()
    if not view.axes:
        view = view.broadcast(shape, ())
    features = feature_axes(view, shape)
    layout = None
    if features is not None:
        layout = view.layout([[view.axes[a] for a in features]])
    if features is None or layout is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    reader = Shift(Axes((), _others(node, features), features))
    bias = Parameter(view.source, layout)
    place = (node.outputs[0], at)
    return plain_linear(
        node, site_of(node, view, reader, state, output=place, bias=bias)
    )


def concatenated(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A learned token: a parameter repeated for each example and joined to data.

    Such a token is a shift added to zeros. Its statistics are gathered at the repeated
    parameter, before the concatenation, where the cotangent is only the token's.
    """
    ((at, view),) = [(i, view) for i, view in enumerate(views) if view is not None]
    site = _copied(node, at, view, state, f"joined to data by `{node.name}`")
    return site if isinstance(site, Refused) else plain_linear(node, site)


def started(node: Node, at: int, view: View, state: State) -> Site | Refused:
    """A parameter that is repeated for each example to start a loop's carry."""
    return _copied(node, at, view, state, "enters the carry of a scan")


def _copied(node: Node, at: int, view: View, state: State, how: str) -> Site | Refused:
    """A shift whose statistics are gathered at an operand, a copy for each example."""
    features = feature_axes(view, node.shape(at))
    pieces = view.axes[state.axis] if isinstance(state, Examples) else ()
    # one example's copy is no copy
    repeated = isinstance(state, Examples) and (
        all(piece.size == 1 for piece in pieces)
        or any(piece.new and piece.size > 1 for piece in pieces)
    )
    if features is None or not repeated:
        return Refused(f"{how} without a copy for each case")
    layout = view.layout([[view.axes[a] for a in features]])
    if layout is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    others = tuple(i for i in range(len(node.shape(at))) if i not in features)
    return site_of(
        node,
        view,
        Shift(Axes((), others, features)),
        state,
        output=(node.outputs[0], at),
        bias=Parameter(view.source, layout),
    )


def stacked(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """The same along a new axis: a variance for all cases beside each one's mean."""
    if isinstance(state, Examples):
        axis = state.axis - (state.axis > node.params["axis"])
        state = dataclasses.replace(state, axis=axis)
    return concatenated(node, views, state)


def feature_axes(view: View, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes along which an elementwise parameter varies.

    None if it is repeated along only a part of an axis: then that axis is neither one
    of features nor one of rows.
    """
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


def _against_data(
    node: Node, views: Sequence[View | None]
) -> tuple[int, View, tuple[int, ...]] | Refused:
    """The operand that is a parameter, its view, and the axes along which it varies."""
    if views[0] is not None and views[1] is not None:
        return Refused(f"combined with another parameter by `{node.name}`")
    at = 0 if views[0] is not None else 1
    view = views[at]
    assert view is not None
    shape, data = node.out_shape(), node.shape(1 - at)
    if not view.axes:  # a scalar, which elementwise primitives broadcast by themselves
        view = view.broadcast(shape, ())
    features = feature_axes(view, shape)
    stretches = len(data) == len(shape) and all(
        n in (1, m) for n, m in zip(data, shape, strict=True)
    )
    if features is None or not stretches:
        return Refused(f"broadcast against data by `{node.name}` in an unusual way")
    return at, view, features


def _others(node: Node, features: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(len(node.out_shape())) if i not in features)
