"""Layers whose inputs do not depend on the batch: one row stands for all its cases.

Such are the directions in which a network is differentiated under `vmap`, and what is
made of them. The gradient at their output is the sum over cases.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr.graph import Graph, Node, is_value
from kfac_jax._jaxpr.sites import OtherUse, Site, Use
from kfac_jax._jaxpr.states import Examples, State


def with_cases(
    uses: Sequence[Use], graph: Graph, states: Mapping[int, State]
) -> list[Use]:
    """Notes how many cases a constant input stands for.

    A constant may have an axis of examples too (the first state of a recurrent net);
    that shows where its output meets data of the same shape.

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
            at = node.inputs.index(value)
            moves = node.name in ("transpose", "rev", "dot_general")
            if node.bodies or moves or node.shape(at) != node.out_shape():
                continue
            state = states.get(node.outputs[0])
            state = examples(node.outputs[0]) if state is None else state
            if state is not None:
                return state
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


def mixed(use: Site, where: str = "") -> OtherUse:
    """Refuses a use of a constant.

    Args:
      use: the use.
      where: why it is not allowed here.

    Returns:
      What takes its place.
    """
    reason = "its inputs do not depend on the batch, so gradients mix the examples"
    return OtherUse(use.leaf, "unmatched", reason + where, use.source)
