"""Layers whose inputs do not depend on the batch: one row stands for all cases.

Examples are the directions in which a network is differentiated under `vmap`, and
everything computed from them. JAX computes such a layer once for all cases, so the
gradient at its output is a sum over cases.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr.graph import Graph, Node, is_value
from kfac_jax._jaxpr.sites import OtherUse, Site, Use
from kfac_jax._jaxpr.states import Examples, State


def only_of_constants(uses: Sequence[Use]) -> set[int]:
    """The outputs of layers whose parameters are multiplied with constants alone.

    Such a product may rather be a map to a weight, as in `x @ (basis @ w)`: then each
    example has a gradient of its own.

    Args:
      uses: the uses that discovery found.

    Returns:
      Their ids.
    """
    products = {
        use: use.output
        for use in uses
        if isinstance(use, Site)
        and use.examples is None
        and use.x is not None
        and not isinstance(use.output, tuple)
    }
    others = {use.leaf for use in uses if use not in products}
    return {output for use, output in products.items() if use.leaf not in others}


def with_cases(
    uses: Sequence[Use], graph: Graph, states: Mapping[int, State]
) -> list[Use]:
    """Records how many cases each constant input stands for.

    A constant may have an axis of examples nevertheless (the first state of a recurrent
    network). It does if its output meets data of the same shape, and is left as it is.

    Args:
      uses: the uses that discovery found.
      graph: the program.
      states: for each value the axis that holds the examples.

    Returns:
      The uses. Where the number of cases cannot be told, the use is refused.
    """
    readers: dict[int, list[Node]] = {}
    for node in graph.walk():
        for atom in node.inputs:
            if is_value(atom):
                readers.setdefault(atom, []).append(node)

    @functools.cache
    def examples(value: int) -> State:
        """The state of the data that a constant meets in its own shape, or None."""
        for node in readers.get(value, []):
            at = node.inputs.index(value)
            moves = node.name in ("transpose", "rev", "dot_general")
            if node.bodies or moves or not node.outputs:
                continue
            if node.shape(at) != node.out_shape():
                continue
            state = states.get(node.outputs[0])
            state = examples(node.outputs[0]) if state is None else state
            if state is not None:
                return state
        return None

    def cases(value: int) -> set[int]:
        """The sizes of the batches that a constant meets; 0 for one not known."""
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
        elif isinstance(use.output, tuple) or examples(use.output) is not None:
            result.append(use)
        else:
            met = cases(use.output)
            count = met.pop() if len(met) == 1 else 0
            counted = dataclasses.replace(use, cases=count)
            result.append(counted if count else mixed(use))
    return result


def mixed(use: Site, where: str = "") -> OtherUse:
    """Refuses a use whose input is a constant.

    Args:
      use: the use.
      where: a further reason, appended to the message.

    Returns:
      The use that takes its place, of no layer.
    """
    reason = "its inputs do not depend on the batch, so gradients mix the examples"
    return OtherUse(use.leaf, "unmatched", reason + where, use.source)
