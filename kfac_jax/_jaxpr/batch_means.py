"""Rules for means over the cases: what is made of them, and where they meet cases."""

import dataclasses
from collections.abc import Sequence

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.states import LOST, Examples, OfBatch, State, joined_means

SUMS = ("psum", "reduce_sum")
"""`lax.pmean` under `vmap` is a `psum` over a numbered axis."""

_MOVES = (
    *SUMS,
    "broadcast_in_dim",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
)
_ROOTS = ("pow", "rsqrt", "sqrt")


def over_cases(node: Node, operand: State, out: int) -> OfBatch | None:
    """The state of a sum over an axis of examples; None for other sums."""
    if isinstance(operand, Examples) and operand.axis in node.params["axes"]:
        return OfBatch(frozenset({out}))
    return None


def made_of_means(
    node: Node, states: Sequence[State], *, by_entry: bool
) -> OfBatch | None:
    """What an equation without examples makes of means over the cases.

    Args:
      node: the equation.
      states: its operands' states, some of which are `OfBatch` and the others None.
      by_entry: whether it works entry by entry.

    Returns:
      The state of the results; None for what no normalisation needs.
    """
    means = joined_means(states)
    if node.name in _MOVES:
        return means
    if not by_entry:
        return None
    scaled = node.name == "mul" and None in states
    divided = node.name == "div" and states[-1] is None
    is_mean = means.is_mean or scaled or divided
    is_root = means.is_root or (is_mean and node.name in _ROOTS)
    return dataclasses.replace(means, is_mean=is_mean, is_root=is_root)


def normalizes(node: Node, states: Sequence[State], *, by_entry: bool) -> bool:
    """Whether an equation centres or scales examples by means over them."""
    means = joined_means(states)
    if not by_entry or len(states) != 2:
        return False
    if node.name == "mul":
        return means.is_root
    centres = node.name == "sub" and means.is_mean
    scales = node.name == "div" and means.is_root
    return isinstance(states[1], OfBatch) and (centres or scales)


def with_means(
    node: Node, states: Sequence[State], *, by_entry: bool
) -> list[State] | State:
    """The results' state if there are means among the operands.

    Args:
      node: the equation.
      states: its operands' states.
      by_entry: whether it works entry by entry.

    Returns:
      The state of all results; or the operands' states, of which the means count as
      constants, if examples are normalised.
    """
    if not any(isinstance(state, OfBatch) for state in states):
        return list(states)
    others = [s for s in states if s is not None and not isinstance(s, OfBatch)]
    if not others:
        return made_of_means(node, states, by_entry=by_entry) or LOST
    cases = all(isinstance(state, Examples) for state in others)
    if cases and normalizes(node, states, by_entry=by_entry):
        return [None if isinstance(s, OfBatch) else s for s in states]
    return LOST
