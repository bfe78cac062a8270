"""What is known of a value: which of its axes holds the examples of the batch."""

import dataclasses
from collections.abc import Callable, Sequence

from kfac_jax._jaxpr.graph import Node


@dataclasses.dataclass(frozen=True)
class Examples:
    """An axis of `outer × size × inner` entries, the examples in the middle."""

    axis: int
    size: int
    outer: int = 1
    inner: int = 1


@dataclasses.dataclass(frozen=True)
class Lost:
    """Depends on the batch in a way that no rule covers, since that equation."""

    where: str = dataclasses.field(default="", compare=False)


LOST = Lost()


@dataclasses.dataclass(frozen=True)
class Scanned:
    """All of one example, whose axis a loop runs over: `x[i]` in its i-th iteration.

    Only inside of that loop, and only while `tracking` follows it. What reads the
    states gets `Lost` there, as no axis is one of examples.
    """

    loop: int
    examples: Examples
    where: str = dataclasses.field(default="", compare=False)


State = Examples | Lost | Scanned | None
"""None: does not depend on the batch."""

Rule = Callable[[Node, Sequence[State]], list[State]]
"""From the states of an equation's operands to those of its results."""


def merge(states: Sequence[State]) -> State:
    """The one state of all that depend on the batch; lost if they differ."""
    found = [state for state in states if state is not None]
    lost = next((state for state in found if isinstance(state, Lost)), None)
    if lost is not None or len(set(found)) > 1:
        return lost or LOST
    return found[0] if found else None
