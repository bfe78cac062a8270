"""Elementwise scales and shifts, and parameters that are joined to data."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.kinds.windows import pieces_alone, windows_on
from kfac_jax._jaxpr.sites import Axes, Held, Reader, Window, windowed
from kfac_jax._jaxpr.states import Examples, State
from kfac_jax._jaxpr.view import View


@dataclasses.dataclass(frozen=True)
class Scale(Reader):
    """Each feature is an independent layer with one input and one output.

    Attributes:
      y_axes: the axes of the output; the input is stretched to them.
    """

    kind: ClassVar[str] = "scale"

    y_axes: Axes

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """As they are, the input stretched."""
        assert x is not None
        x = jnp.broadcast_to(x, dy.shape)
        return self.y_axes.arrange(x), self.y_axes.arrange(dy)


@dataclasses.dataclass(frozen=True)
class Shift(Reader):
    """A layer whose only input is the constant one.

    Attributes:
      y_axes: the axes of the output.
      parts: the runs of the parameter that are used, if not all of it is.
      places: where in the output's features this parameter's begin, if it is joined to
        others.
    """

    kind: ClassVar[str] = "shift"

    y_axes: Axes
    parts: tuple[Window, ...] = ()
    places: tuple[Window, ...] = ()

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """Ones, and the cotangent of what all of the parameter would have put out."""
        dy = windowed(dy, self.places)
        widths = [(0, 0)] * dy.ndim
        for axis, start, full in self.parts:
            widths[axis] = start, full - start - dy.shape[axis]
        dy = self.y_axes.arrange(jnp.pad(dy, widths) if self.parts else dy)
        return jnp.ones_like(dy[..., :1]), dy

    @property
    def joins_outputs(self) -> bool:
        """Of parameters that are joined."""
        return bool(self.places)

    @property
    def is_partial(self) -> bool:
        """Of parameters that are cut or joined."""
        return bool(self.parts or self.places)


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
    """An elementwise shift: a layer whose only input is the constant one."""
    found = _against_data(node, views)
    if isinstance(found, Refused):
        return found
    at, view, features = found
    cut, joined = (pieces_alone(view, features, w) for w in ("part", "place"))
    layout = view.layout([[view.axes[a] for a in features]], windows=cut + joined)
    if layout is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    reader = Shift(
        Axes((), _others(node, features), features),
        windows_on(view, features, features, "part"),
        windows_on(view, features, features, "place"),
    )
    sign = -1.0 if node.name == "sub" and at == 1 else 1.0
    bias = Held(view.source, layout)
    site = site_of(node, view, reader, state, bias=bias, scale=view.scale * sign)
    return plain_linear(node, site)


def concatenated(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A parameter that is repeated for each example and joined to data: a token.

    It is a shift of nothing, so its statistics are gathered where it is repeated.
    """
    given = [(i, view) for i, view in enumerate(views) if view is not None]
    if len(given) > 1:
        return Refused("concatenated with another parameter")
    ((at, view),) = given
    features = feature_axes(view, node.shape(at))
    repeated = isinstance(state, Examples) and any(
        piece.new and piece.size > 1 for piece in view.axes[state.axis]
    )
    if features is None or not repeated:
        return Refused("concatenated with data without one copy for each example")
    layout = view.layout([[view.axes[a] for a in features]])
    if layout is None:
        return Refused("repeated or only partly used by `concatenate`")
    reader = Shift(Axes((), _others(node, features), features))
    site = site_of(
        node,
        view,
        reader,
        state,
        output=node.inputs[at],
        bias=Held(view.source, layout),
    )
    return plain_linear(node, site)


def feature_axes(view: View, shape: Sequence[int]) -> tuple[int, ...] | None:
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


def _against_data(
    node: Node, views: Sequence[View | None]
) -> tuple[int, View, tuple[int, ...]] | Refused:
    """Which operand is the parameter, and the axes along which it varies."""
    if views[0] is not None and views[1] is not None:
        return Refused(f"combined with another parameter by `{node.name}`")
    at = 0 if views[0] is not None else 1
    view = views[at]
    assert view is not None
    shape, data = node.out_shape(), node.shape(1 - at)
    if not view.axes:  # a scalar, which an equation repeats by itself
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
