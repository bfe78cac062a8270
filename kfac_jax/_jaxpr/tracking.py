"""Applies the rules of `examples` to a full program, control flow included."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.batch_means import over_cases
from kfac_jax._jaxpr.examples import named, propagate
from kfac_jax._jaxpr.graph import Atom, Graph, Node, build, is_value
from kfac_jax._jaxpr.states import (
    LOST,
    Examples,
    Lost,
    Scanned,
    State,
    merge,
)


class _States(dict[int, State]):
    """States by value, and the arguments of `track`."""

    def __init__(
        self,
        dependent: Collection[int] | None = None,
        constants: Collection[int] = (),
        means: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.dependent = dependent
        self.constants = constants
        self.means = means


def track(
    graph: Graph,
    inputs: Sequence[State],
    dependent: Collection[int] | None = None,
    *,
    constants: Collection[int] = (),
    means: Collection[int] = (),
    closed_over: Mapping[int, State] | None = None,
) -> Mapping[int, State]:
    """Finds the axis of examples of every value.

    Args:
      graph: the program.
      inputs: the states of its inputs.
      dependent: the values that depend on parameters, if they are known.
      constants: values that count as constants, though they may depend on the batch.
      means: sums that are `OfBatch` if they are over an axis of examples.
      closed_over: the states of arrays that the program closes over.

    Returns:
      The states by value.
    """
    states = _States(dependent, constants, means)
    states.update(closed_over or {})
    _track(graph, inputs, states)
    return states


def outside(states: Mapping[int, State]) -> Mapping[int, State]:
    """The states as they are after the loops over examples that values are in."""
    return {
        value: Lost(state.where) if isinstance(state, Scanned) else state
        for value, state in states.items()
    }


def _track(graph: Graph, inputs: Sequence[State], states: _States) -> list[State]:
    states.update(zip(graph.inputs, inputs, strict=True))

    def read(atom: Atom) -> State:
        return states.get(atom) if is_value(atom) else None

    for node in graph.nodes:
        operands = [read(atom) for atom in node.inputs]
        rule = _RULES.get(node.name)
        if rule is not None:
            results = named(node, operands, rule(node, operands, states))
        elif len(node.bodies) == 1 and len(node.bodies[0].inputs) == len(operands):
            results = _track(node.bodies[0], operands, states)
        else:
            results = propagate(node, read, states.dependent)
        states.update(zip(node.outputs, results, strict=True))
        for i, out in enumerate(node.outputs):
            if out in states.constants:
                states[out] = None
            elif out in states.means:
                states[out] = over_cases(node, operands[i], out) or states[out]
    return [read(atom) for atom in graph.outputs]


def _cond(node: Node, operands: list[State], states: _States) -> list[State]:
    """Merges the branches.

    The operand that chooses the branch does not count: no derivative goes through it,
    so it mixes no gradients of different examples.
    """
    branches = [_track(body, operands[1:], states) for body in node.bodies]
    return [merge(group) for group in zip(*branches, strict=True)]


def _while(node: Node, operands: list[State], states: _States) -> list[State]:
    """Iterates the states of carries until they settle; the condition does not count.

    States only go from None over examples to lost, so the iteration ends.
    """
    start = node.params["cond_nconsts"]
    stop = start + node.params["body_nconsts"]
    consts, carry = operands[start:stop], operands[stop:]
    while True:
        results = _track(node.bodies[1], [*consts, *carry], states)
        merged = [merge(pair) for pair in zip(carry, results, strict=True)]
        if merged == carry:
            return merged
        carry = merged


def _linear_solve(node: Node, operands: list[State], states: _States) -> list[State]:
    """Follows `solve`, whose result the equation returns.

    Derivatives go through the matrix as well, so the result is lost if the matrix is.
    """
    del states  # the graph of `solve` is built here, so its ids are not the program's
    lengths, solve = node.params["const_lengths"], node.params["jaxprs"].solve
    start = lengths.matvec + lengths.vecmat
    consts = operands[start : start + lengths.solve]
    right_sides = operands[sum(lengths) :]
    results = _track(build(solve), [*consts, *right_sides], _States())
    matrix = operands[: lengths.matvec]
    if any(isinstance(state, Lost) for state in matrix):
        return [LOST] * len(results)
    dependent = any(state is not None for state in matrix)
    return [LOST if dependent and state is None else state for state in results]


def _scan(node: Node, operands: list[State], states: _States) -> list[State]:
    """Iterates the states of carries until they settle; drops the scanned axis.

    A loop over examples, as by `jax.lax.map`, keeps them apart: the results of a step
    belong to that step's example, unless a carry brings in others.
    """
    layout = _compat.scan_layout(node.params)
    start, stop = layout.num_consts, layout.num_consts + layout.num_carry
    consts, carry, xs = operands[:start], operands[start:stop], operands[stop:]
    xs = [_slice(node, state) for state in xs]
    while True:
        results = _track(node.bodies[0], [*consts, *carry, *xs], states)
        out = [_joined(node, state) for state in results[: layout.num_carry]]
        merged = [merge(pair) for pair in zip(carry, out, strict=True)]
        if merged == carry:
            break
        carry = merged
    return [*carry, *(_stack(node, state) for state in results[layout.num_carry :])]


def _slice(node: Node, state: State) -> State:
    """The state of one step's slice of an array that a scan runs over."""
    if not isinstance(state, Examples):
        return state
    if state.axis == 0:
        return Scanned(id(node), state, f"{node.name} at {node.source}")
    return dataclasses.replace(state, axis=state.axis - 1)


def _joined(node: Node, state: State) -> State:
    """The state of a carry as the next step reads it.

    If the loop runs over examples, the next step is another example's.
    """
    is_of_step = isinstance(state, Scanned) and state.loop == id(node)
    return LOST if is_of_step else state


def _stack(node: Node, state: State) -> State:
    """The state of a scan's stacked results, from the state of one step's."""
    if isinstance(state, Scanned) and state.loop == id(node):
        return state.examples
    if isinstance(state, Examples):
        return dataclasses.replace(state, axis=state.axis + 1)
    return state


def _shard_map(node: Node, operands: list[State], states: _States) -> list[State]:
    """Tracks the body, where each device has a share of the examples."""
    body: Any = node.params["jaxpr"]
    local = [tuple(var.aval.shape) for var in getattr(body, "jaxpr", body).invars]
    inside = [_resize(s, shape) for s, shape in zip(operands, local, strict=True)]
    results = _track(node.bodies[0], inside, states)
    return [_resize(state, node.out_shape(i)) for i, state in enumerate(results)]


def _resize(state: State, shape: Sequence[int]) -> State:
    if not isinstance(state, Examples) or shape[state.axis] == (
        state.outer * state.size * state.inner
    ):
        return state
    if state.outer * state.inner != 1:
        return LOST
    return Examples(state.axis, shape[state.axis])


_RULES = {
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
