"""What discovery asks of a single equation and the views of its operands."""

from collections.abc import Sequence

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Linear, Outcome, Refused
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples, State
from kfac_jax._jaxpr.view import View


def joined(node: Node, members: Sequence[tuple[View, ...]]) -> tuple[View, ...] | None:
    """The views of parameters that are concatenated; None where they are not."""
    if node.name != "concatenate" or not all(members):
        return None
    axis, start = node.params["dimension"], 0
    total = node.out_shape()[axis]
    result: list[View] = []
    for i, some in enumerate(members):
        for view in some:
            placed = view.joined(axis, start, total)
            if placed is None:
                return None
            result.append(placed)
        start += node.shape(i)[axis]
    return tuple(result)


def one_at_a_time(
    members: Sequence[tuple[View, ...]], by_operand: bool
) -> list[list[View | None]] | None:
    """Splits an equation on joined parameters in one case for each of them.

    Args:
      members: for each operand, the views that it consists of.
      by_operand: whether other operands count as data where one is a parameter.

    Returns:
      For each joined parameter the views of the operands, as if it were alone; None if
      two operands are joined.
    """
    if by_operand:
        return [
            [view if i == at else None for i in range(len(members))]
            for at, some in enumerate(members)
            for view in some
        ]
    several = [i for i, some in enumerate(members) if len(some) > 1]
    if len(several) > 1:
        return None
    first: list[View | None] = [some[0] if some else None for some in members]
    if not several:
        return [first]
    at = several[0]
    return [[*first[:at], view, *first[at + 1 :]] for view in members[at]]


def varies(site: Site, state: State) -> bool:
    """Whether a weight has the axis of examples."""
    return isinstance(state, Examples) and not isinstance(site.examples, Examples)


def may_compute(node: Node, outcome: Outcome) -> bool:
    """Whether an equation on constants rather computes a weight than is a layer.

    Products entry by entry do, and rows that are picked from a table.

    Args:
      node: the equation, whose results do not depend on the batch.
      outcome: what a rule made of it.

    Returns:
      Whether it does.
    """
    if not isinstance(outcome, Linear):
        return isinstance(outcome, Refused)
    site = outcome.site
    return (
        isinstance(site.output, tuple) or site.kind == "scale" or node.name == "gather"
    )
