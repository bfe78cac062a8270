"""What becomes of an equation that consumes a parameter."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kfac_jax._jaxpr.graph import Atom, Node
from kfac_jax._jaxpr.sites import Axes, Held, Reader, Site
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import Layout, View, source_view


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear site, and its output as a view of what the site puts out.

    Attributes:
      site: the site.
      view: the output, as a view of itself.
      shape: the shape of what the site puts out.
      axes: its axes.
      shift: the use of a bias that a tag names beside the weight.
    """

    site: Site
    view: View
    shape: tuple[int, ...]
    axes: Axes
    shift: Site | None = None


@dataclasses.dataclass(frozen=True)
class Refused:
    """Why an equation is not a layer."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Generic:
    """The user's generic tag on a parameter."""

    leaf: int


Outcome = Linear | Refused | Generic

Rule = Callable[[Node, Sequence[View | None], State], Outcome]
"""From a node, the views of its operands (None for data) and where the examples are in
its result."""


def site_of(
    node: Node,
    view: View,
    reader: Reader,
    state: State,
    *,
    x: Atom | None = None,
    output: Any = None,
    weight: Layout | None = None,
    bias: Held | None = None,
    transposed: Layout | None = None,
    scale: Any = None,
) -> Site:
    """The use of a parameter by an equation.

    Args:
      node: the equation.
      view: how it sees the parameter.
      reader: how rows are read from its operands.
      state: where the examples are in what `reader` calls the output.
      x: the input.
      output: the output, if it is not the equation's.
      weight: the weight's layout.
      bias: the bias.
      transposed: the weight's layout with inputs and outputs swapped.
      scale: the scalar factor, if it is not the view's.

    Returns:
      The site.
    """
    return Site(
        reader=reader,
        output=node.outputs[0] if output is None else output,
        x=x,
        weight=weight and Held(view.source, weight),
        bias=bias,
        transposed=transposed,
        examples=reader.y_axes.examples(state),
        scale=view.scale if scale is None else scale,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
    )


def plain_linear(node: Node, site: Site, shift: Site | None = None) -> Linear:
    """The outcome of an equation whose output is the site's as it is."""
    shape = node.out_shape()
    return Linear(site, source_view(-1, shape), shape, site.reader.y_axes, shift)
