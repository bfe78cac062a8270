"""Means over the cases that a network normalises with, as batch norm does in training.

Each case's loss depends on all cases through them, though weakly. The curvature takes
them for constants: then every layer keeps its axis of examples, before and after. Only
means that are subtracted from what they are means of, or of whose root it is divided by
or multiplied with, are taken so. What depends on cases in other ways loses the axis.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax

from kfac_jax._jaxpr.batch_means import SUMS
from kfac_jax._jaxpr.graph import (
    BODY_OFFSETS,
    Atom,
    Graph,
    Node,
    has_own_rule,
    is_value,
)
from kfac_jax._jaxpr.slicing import dependent, differentiated
from kfac_jax._jaxpr.states import Examples, Lost, OfBatch, State
from kfac_jax._jaxpr.tracking import track


def with_constant_means(
    graph: Graph,
    inputs: Sequence[State],
    leaves: Sequence[int],
    wanted: set[int],
    closed_over: Mapping[int, State],
) -> tuple[Graph, dict[int, str]]:
    """Stops derivatives at means over the cases that the network normalises with.

    Args:
      graph: the program.
      inputs: the states of its inputs.
      leaves: the ids of the parameters.
      wanted: the registered outputs.
      closed_over: the states of arrays that the program closes over.

    Returns:
      The program, which has further equations that stop derivatives, and the source
      lines of the means by the ids of those equations' results. The same program if
      there are none, or if the registered outputs have no examples for other reasons.
    """
    on_parameters = dependent(graph, leaves)
    live = differentiated(graph, wanted) & on_parameters
    sums = live.intersection(_sums(graph))
    while True:
        states = track(
            graph, inputs, on_parameters, means=sums, closed_over=closed_over
        )
        wrong = sums.intersection(_misused(graph, states, live))
        if not wrong:
            break
        sums -= wrong
    over_cases = map(states.get, sums)
    means = {x for s in over_cases if isinstance(s, OfBatch) for x in s.sums}
    lost = any(isinstance(states.get(x), Lost) for x in wanted)
    if lost or not means:
        return graph, {}
    stopped: dict[int, str] = {}
    fresh = 1 + max(_ids(graph))
    return _stopped(graph, means, stopped, fresh), stopped


def _sums(graph: Graph) -> Iterator[int]:
    """The results of sums, except inside of functions with a custom rule."""
    for node in graph.nodes:
        if node.name in SUMS:
            yield from node.outputs
        elif not has_own_rule(node):
            for body in node.bodies:
                yield from _sums(body)


def _misused(
    graph: Graph, states: Mapping[int, State], live: Collection[int]
) -> Iterator[int]:
    """The sums of which something is made that is no normalisation."""

    def state(atom: Atom) -> State:
        return states.get(atom) if is_value(atom) else None

    for node in graph.walk():
        for before, after in _edges(node):
            of_batch, later = state(before), state(after)
            kept = isinstance(later, OfBatch) or (
                isinstance(later, Examples) and not node.bodies
            )
            tag = node.name == "kfac_loss"
            if isinstance(of_batch, OfBatch) and after in live and (tag or not kept):
                yield from of_batch.sums


def _edges(node: Node) -> Iterator[tuple[Atom, Atom]]:
    """Values, and those that the equation makes of them."""
    offset = BODY_OFFSETS.get(node.name)
    if not node.bodies or offset is None:
        yield from ((atom, out) for atom in node.inputs for out in node.outputs)
        return
    for body in node.bodies:
        yield from zip(node.inputs[offset:], body.inputs, strict=True)
        yield from zip(body.outputs, node.outputs, strict=True)


def _ids(graph: Graph) -> Iterator[int]:
    yield from (*graph.inputs, *graph.constants)
    for node in graph.nodes:
        yield from node.outputs
        for body in node.bodies:
            yield from _ids(body)


def _stopped(
    graph: Graph, means: Collection[int], stopped: dict[int, str], fresh: int
) -> Graph:
    """The graph in which derivatives stop at some values; fills in `stopped`."""
    new: dict[Atom, int] = {}
    nodes: list[Node] = []

    def renamed(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
        return tuple(new.get(x, x) if is_value(x) else x for x in atoms)

    for node in graph.nodes:
        bodies = tuple(_stopped(x, means, stopped, fresh) for x in node.bodies)
        inputs = renamed(node.inputs)
        nodes.append(dataclasses.replace(node, inputs=inputs, bodies=bodies))
        for i, out in enumerate(node.outputs):
            if out not in means:
                continue
            like = node.equation.outvars[i].aval
            shape = jax.ShapeDtypeStruct(like.shape, like.dtype)
            (equation,) = jax.make_jaxpr(jax.lax.stop_gradient)(shape).jaxpr.eqns
            value = fresh + len(stopped)
            callers = (*node.callers, node.equation)
            nodes.append(Node(equation, (out,), (value,), (), callers))
            new[out], stopped[value] = value, node.source
    outputs = renamed(graph.outputs)
    return dataclasses.replace(graph, nodes=tuple(nodes), outputs=outputs)
