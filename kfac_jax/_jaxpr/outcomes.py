"""What becomes of an equation that consumes a parameter."""

import dataclasses
from collections.abc import Sequence

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import LOST, Examples, State
from kfac_jax._jaxpr.view import View, source_view

Shapes = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear site, and its output as a view of what the site puts out.

    Attributes:
      site: the site.
      view: the output, as a view of itself.
      shape: the shape of what the site puts out.
      y_axes: its axes that are independent, rows, outputs.
      shift: the use of a bias that a tag names beside the weight.
    """

    site: Site
    view: View
    shape: tuple[int, ...]
    y_axes: tuple[tuple[int, ...], ...]
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


def plain_linear(node: Node, site: Site) -> Linear:
    """The outcome of an equation whose output is the site's as it is."""
    shape = node.out_shape()
    return Linear(site, source_view(-1, shape), shape, site.y_axes)


def row_examples(state: State, rows: Sequence[int]) -> State:
    """The state, LOST if the examples' axis is none of the rows'."""
    if isinstance(state, Examples) and state.axis not in rows:
        return LOST
    return state
