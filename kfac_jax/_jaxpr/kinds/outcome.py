"""The possible outcomes for an equation that combines a parameter with data."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kfac_jax._jaxpr.graph import Atom, Node
from kfac_jax._jaxpr.sites import Axes, Parameter, Reader, Site
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import Layout, View, source_view


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer's site, and its output as a view that biases can be matched with.

    Attributes:
      site: the site.
      view: the equation's output as a view of an array of shape `shape`.
      shape: the output's shape, with an axis of its own for each role: a grouped
        convolution's channels are `[groups, channels per group]`.
      axes: the roles of the axes of `shape`.
      shift: the use of a bias that a tag names beside the weight.
    """

    site: Site
    view: View
    shape: tuple[int, ...]
    axes: Axes
    shift: Site | None = None


@dataclasses.dataclass(frozen=True)
class Refused:
    """The reason why an equation is not a layer."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Generic:
    """The user's generic tag on a parameter."""

    leaf: int


Outcome = Linear | Refused | Generic

Rule = Callable[[Node, Sequence[View | None], State], Outcome]
"""Maps a node, the views of its operands (None for data), and the state of its first
result, to an outcome."""


def site_of(
    node: Node,
    view: View,
    reader: Reader,
    state: State,
    *,
    x: Atom | tuple[Atom, ...] | None = None,
    output: Any = None,
    weight: Layout | None = None,
    bias: Parameter | None = None,
    transposed: Layout | None = None,
    scale: Any = None,
) -> Site:
    """Makes a site of an equation that uses a parameter.

    Args:
      node: the equation.
      view: the equation's operand, as a view of the parameter.
      reader: reads rows from input and output.
      state: the state of the output.
      x: the input, or the operands that it is read from.
      output: the id of the output; by default the equation's first result.
      weight: the weight's layout.
      bias: the bias.
      transposed: the weight's layout with inputs and outputs swapped.
      scale: the scalar factor; by default the view's.

    Returns:
      The site.
    """
    return Site(
        reader=reader,
        output=node.outputs[0] if output is None else output,
        x=x,
        weight=weight and Parameter(view.source, weight),
        bias=bias,
        transposed=transposed,
        examples=reader.y_axes.examples(state),
        scale=view.scale if scale is None else scale,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
    )


def plain_linear(node: Node, site: Site, shift: Site | None = None) -> Linear:
    """The outcome of an equation whose result is the site's output, not reshaped."""
    shape = node.out_shape()
    return Linear(site, source_view(-1, shape), shape, site.reader.y_axes, shift)
