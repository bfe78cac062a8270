"""Layers whose inputs do not depend on the batch: one row stands for all its cases.

Such are the directions in which a network is differentiated under `vmap`, and what is
made of them. The gradient at their output is the sum over cases.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr.examples import LOST, Examples, State, propagate
from kfac_jax._jaxpr.graph import Graph, Node, is_value
from kfac_jax._jaxpr.sites import OtherUse, Site, Use

MOVES = ("transpose", "rev", "dot_general")
"""Equations after which the examples may be elsewhere, though shapes are the same."""


def with_cases(
    uses: Sequence[Use], graph: Graph, states: Mapping[int, State]
) -> list[Use]:
    """Notes how many cases a constant input stands for.

    A constant may have an axis of examples too (the first state of a recurrent net);
    that shows where its output, perhaps in another shape, meets data.

    Args:
      uses: what discovery found.
      graph: the program.
      states: for each value which axis holds the examples.

    Returns:
      The uses; those where the number of cases cannot be told are refused.
    """
    readers: dict[int, list[Node]] = {}
    for node in graph.walk():
        for atom in node.inputs:
            if is_value(atom):
                readers.setdefault(atom, []).append(node)

    @functools.cache
    def examples(value: int) -> State:
        for node in readers.get(value, []):
            if node.bodies:
                continue
            out = node.outputs[0]
            state = states.get(out)
            state = examples(out) if state is None else state
            if state is None:
                continue
            shape = node.shape(node.inputs.index(value))
            if state == LOST and node.name not in MOVES and shape == node.out_shape():
                return LOST
            for guess in _guesses(state, shape):

                def read(atom: int, guess: State = guess) -> State:
                    return guess if atom == value else states.get(atom)

                if propagate(node, read)[0] == state:
                    return guess
        return None

    def cases(value: int) -> set[int]:
        """The sizes of the batches that a constant meets; zero where not known."""
        met: set[int] = set()
        seen, waiting = {value}, [value]
        while waiting:
            for node in readers.get(waiting.pop(), []):
                if node.bodies:
                    met.add(0)
                    continue
                for out in node.outputs:
                    state = states.get(out)
                    if state is not None:
                        met.add(state.size if isinstance(state, Examples) else 0)
                    elif out not in seen:
                        seen.add(out)
                        waiting.append(out)
        return met

    result: list[Use] = []
    for use in uses:
        if isinstance(use, OtherUse) or use.examples is not None:
            result.append(use)
        elif examples(use.output) is not None:
            result.append(use)
        else:
            met = cases(use.output)
            count = met.pop() if len(met) == 1 else 0
            known = dataclasses.replace(use, cases=count)
            result.append(known if count else mixed(use))
    return result


def _guesses(state: State, shape: Sequence[int]) -> list[State]:
    """Where a value's examples may be, if those of what is made of it are there."""
    if not isinstance(state, Examples):
        return []
    axes = range(len(shape))
    guesses = (
        dataclasses.replace(state, axis=axis, outer=outer, inner=inner)
        for axis in axes
        for outer in sorted({1, state.outer})
        for inner in sorted({1, state.inner})
    )
    return [g for g in guesses if shape[g.axis] == g.outer * g.size * g.inner]


def mixed(use: Site, where: str = "") -> OtherUse:
    """Refuses a use of a constant.

    Args:
      use: the use.
      where: why it is not allowed here.

    Returns:
      What takes its place.
    """
    leaf = use.weight or use.bias
    assert leaf is not None
    reason = "its inputs do not depend on the batch, so gradients mix the examples"
    return OtherUse(leaf[0], "unmatched", reason + where, use.source)
