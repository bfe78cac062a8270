"""Runs the rules of `examples` over a whole program, control flow included."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.examples import LOST, Examples, State, propagate
from kfac_jax._jaxpr.graph import Atom, Graph, Node, is_value


def track(graph: Graph, inputs: Sequence[State]) -> Mapping[int, State]:
    """Returns the state of every value, given those of the program's inputs."""
    states: dict[int, State] = {}
    _track(graph, inputs, states)
    return states


def _track(
    graph: Graph, inputs: Sequence[State], states: dict[int, State]
) -> list[State]:
    states.update(zip(graph.inputs, inputs, strict=True))

    def read(atom: Atom) -> State:
        return states.get(atom) if is_value(atom) else None

    for node in graph.nodes:
        operands = [read(atom) for atom in node.inputs]
        if node.name == "scan":
            results = _scan(node, operands, states)
        elif node.name == "cond":
            branches = [_track(body, operands[1:], states) for body in node.bodies]
            results = [_join(group) for group in zip(*branches, strict=True)]
        elif node.name == "shard_map":
            results = _shard_map(node, operands, states)
        elif len(node.bodies) == 1 and len(node.bodies[0].inputs) == len(operands):
            results = _track(node.bodies[0], operands, states)
        else:
            results = propagate(node, read)
        states.update(zip(node.outputs, results, strict=True))
    return [read(atom) for atom in graph.outputs]


def _join(group: Sequence[State]) -> State:
    found = {state for state in group if state is not None}
    return found.pop() if len(found) == 1 else (LOST if found else None)


def _scan(node: Node, operands: list[State], states: dict[int, State]) -> list[State]:
    """Carries are iterated until their state settles; scanned axes are dropped."""
    layout = _compat.scan_layout(node.params)
    start, stop = layout.num_consts, layout.num_consts + layout.num_carry
    consts, carry, xs = operands[:start], operands[start:stop], operands[stop:]
    xs = [_shift(state, -1) for state in xs]
    while True:
        results = _track(node.bodies[0], [*consts, *carry, *xs], states)
        out = results[: layout.num_carry]
        merged = [_join(pair) for pair in zip(carry, out, strict=True)]
        if merged == carry:
            break
        carry = merged
    return [*carry, *(_shift(state, 1) for state in results[layout.num_carry :])]


def _shard_map(
    node: Node, operands: list[State], states: dict[int, State]
) -> list[State]:
    """Inside, each device has its own examples."""
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


def _shift(state: State, by: int) -> State:
    if not isinstance(state, Examples):
        return state
    if state.axis + by < 0:
        return LOST
    return Examples(state.axis + by, state.size, state.outer, state.inner)
