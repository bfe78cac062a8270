"""Experts: a weight for each group of rows, as in mixtures of experts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.sites import Axes, Reader
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import View


@dataclasses.dataclass(frozen=True)
class Ragged(Reader):
    """Reads the rows of a ragged product, `[rows, outputs]`, for each group.

    Attributes:
      y_axes: the axes of the output, and one of groups after them.
      groups: the number of groups.
    """

    kind: ClassVar[str] = "dense"

    y_axes: Axes
    groups: int

    def rows(self, x: Any, dy: Array) -> tuple[Array, Array]:
        """The rows of all groups, `[groups, rows, features]`; zero in other groups.

        Args:
          x: the input `[rows, inputs]`, sorted by group, and the groups' sizes.
          dy: the cotangent of the output.

        Returns:
          Inputs and cotangents.
        """
        inputs, sizes = x
        ends = jnp.cumsum(sizes)[:, None]
        at = jnp.arange(len(inputs))[None, :]
        own = ((at >= ends - sizes[:, None]) & (at < ends))[..., None]
        return (
            jnp.where(own, inputs[None], jnp.zeros((), inputs.dtype)),
            jnp.where(own, dy[None], jnp.zeros((), dy.dtype)),
        )

    @property
    def joins_outputs(self) -> bool:
        """True: the groups are in the same array."""
        return True


def ragged_dot(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """Independent dense layers, one for each group of rows."""
    view, numbers = views[1], node.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    usual = (
        tuple(batch[0]) == ()
        and tuple(contract[0]) == (1,)
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and len(node.inputs) == 3
    )
    if view is None or views[0] is not None or not usual:
        return Refused(f"not the weights of `{node.name}` over rows sorted by group")
    inputs = contract[1][0]
    weight = view.layout([[view.axes[a]] for a in (0, inputs, 3 - inputs)])
    if weight is None:
        return Refused(f"repeated or only partly used by `{node.name}`")
    reader = Ragged(Axes((2,), (0,), (1,)), node.shape(1)[0])
    x = (node.inputs[0], node.inputs[2])
    return plain_linear(node, site_of(node, view, reader, state, x=x, weight=weight))
