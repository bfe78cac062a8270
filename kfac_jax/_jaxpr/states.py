"""States of values: which axis, if any, holds the examples of the batch."""

import dataclasses
from collections.abc import Callable, Sequence

from kfac_jax._jaxpr.graph import Node


@dataclasses.dataclass(frozen=True)
class Examples:
    """An axis of `outer × size × inner` entries, of which `size` are the examples.

    A reshape may merge the axis of examples with its neighbours: `[2, n, 3] -> [6 n]`
    gives outer = 2, inner = 3.
    """

    axis: int
    size: int
    outer: int = 1
    inner: int = 1


@dataclasses.dataclass(frozen=True)
class Lost:
    """The value depends on the batch, but none of its axes is one of examples.

    `where` names the equation that first mixed the examples, or has no rule. It is for
    messages only, so that it takes no part in comparisons.
    """

    where: str = dataclasses.field(default="", compare=False)


LOST = Lost()


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A value of a single example, inside a loop over examples: `x[i]` in step i.

    This state exists only while `tracking` follows the loop's body. Afterwards such a
    value is `Lost`, as it has no axis of examples.
    """

    loop: int
    examples: Examples
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class OfBatch:
    """The value is the same for all cases: it is computed from means over them.

    This state exists only while `normalizing` looks for means to normalise with. `sums`
    are the results of the sums over cases. A sum that is divided by a constant is a
    mean; its root, or one of a sum of means, is for scaling.
    """

    sums: frozenset[int]
    is_mean: bool = False
    is_root: bool = False


State = Examples | Lost | Scanned | OfBatch | None
"""None means that the value does not depend on the batch."""

Rule = Callable[[Node, Sequence[State]], list[State]]
"""Maps the states of an equation's operands to the states of its results."""


def merge(states: Sequence[State]) -> State:
    """The common state of all values that depend on the batch; lost if they differ."""
    found = [state for state in states if state is not None]
    if found and all(isinstance(state, OfBatch) for state in found):
        return joined_means(found)
    lost = next((state for state in found if isinstance(state, Lost)), None)
    if lost is not None:
        return lost
    alone = [x for x in found if isinstance(x, Examples) and x.size == 1]
    if alone and len(alone) == len(found):
        # a single example is along any axis: that with the fewest other entries
        return min(alone, key=lambda x: x.outer * x.inner)
    if len(set(found)) > 1:
        return LOST
    return found[0] if found else None


def joined_means(states: Sequence[State]) -> OfBatch:
    """The state of what is computed from several means."""
    means = [state for state in states if isinstance(state, OfBatch)]
    return OfBatch(
        frozenset().union(*(state.sums for state in means)),
        all(state.is_mean for state in means),
        all(state.is_root for state in means),
    )
