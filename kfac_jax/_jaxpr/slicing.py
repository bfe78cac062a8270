"""Slices of a graph: what values depend on, and what gradients of them reach."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.graph import (
    BODY_OFFSETS,
    Atom,
    Graph,
    Node,
    has_own_rule,
    is_value,
    read_inputs,
)


def needed(
    graph: Graph,
    wanted: set[int],
    reads: Callable[[Node], tuple[Atom, ...]] | None = None,
    *,
    whole: bool = False,
    rules: bool = True,
) -> set[int]:
    """Slices back: the ids of all values that the values in `wanted` depend on.

    Args:
      graph: the program.
      wanted: ids of values, also of nested graphs.
      reads: what an equation without bodies reads; by default `read_inputs`.
      whole: whether equations with bodies read all operands, as they must to be run.
      rules: whether functions with custom derivative rules do, where an operand may be
        for the rule alone.

    Returns:
      The ids, `wanted` among them.
    """
    found = set(wanted)
    reads = reads or read_inputs

    def visit(graph: Graph) -> None:
        for node in reversed(graph.nodes):
            results = any(out in found for out in node.outputs)
            if not node.bodies:
                found.update(_values(reads(node) if results else ()))
            elif results or any(value in found for value in _inner(node)):
                enter(node)

    def enter(node: Node) -> None:
        offset = BODY_OFFSETS.get(node.name)
        if whole or offset is None or (rules and has_own_rule(node)):
            if any(out in found for out in node.outputs):
                for body in node.bodies:
                    found.update(_values(body.outputs))
            for body in node.bodies:
                visit(body)
            found.update(_values(node.inputs))
            return
        found.update(_values(node.inputs[:offset]))  # which branch
        for body in node.bodies:
            follow(node.outputs, body.outputs)
            visit(body)
            while node.name == "scan" and follow(*_carry(node, body)):
                visit(body)
            follow(body.inputs, node.inputs[offset:])

    def follow(known: Sequence[int], same: Sequence[Atom]) -> bool:
        """Whether any is new of the values that are the same as what is needed."""
        size = len(found)
        pairs = zip(known, same, strict=True)
        found.update(_values(atom for value, atom in pairs if value in found))
        return len(found) > size

    visit(graph)
    return found


def _carry(node: Node, body: Graph) -> tuple[Sequence[int], Sequence[Atom]]:
    """What one step of a scan is given, and what the step before it puts out."""
    layout = _compat.scan_layout(node.params)
    start, size = layout.num_consts, layout.num_carry
    return body.inputs[start : start + size], body.outputs[:size]


def differentiated(graph: Graph, wanted: set[int], *, rules: bool = True) -> set[int]:
    """Slices back as `needed` does, but only to values that gradients reach."""
    stops = {*_stops(graph)}
    stopped = {out for node in stops for out in node.outputs}

    def reads(node: Node) -> tuple[Atom, ...]:
        return () if node in stops else read_inputs(node)

    return needed(graph, wanted, reads, rules=rules) - stopped


def _stops(graph: Graph) -> Iterator[Node]:
    """Where gradients stop, but for functions whose own rule may say otherwise."""
    for node in graph.nodes:
        if node.name == "stop_gradient":
            yield node
        elif not has_own_rule(node):
            for body in node.bodies:
                yield from _stops(body)


def without_rest(graph: Graph, wanted: set[int]) -> Graph:
    """The graph with no more than what the values in `wanted` are computed from."""
    found = needed(graph, wanted, lambda node: node.inputs, whole=True)
    nodes = tuple(
        node
        for node in graph.nodes
        if any(out in found for inner in _within(node) for out in inner.outputs)
    )
    return dataclasses.replace(graph, nodes=nodes, outputs=())


def split(graph: Graph, wanted: set[int]) -> tuple[Graph, Graph]:
    """Divides a graph into what the values in `wanted` are computed from, and the rest.

    Args:
      graph: the graph.
      wanted: ids of values.

    Returns:
      The first part, whose outputs are all that the second needs of it, and the second,
      whose inputs are those and whose outputs are the graph's.
    """
    first = without_rest(graph, wanted)
    own = {*first.nodes}
    rest = tuple(node for node in graph.nodes if node not in own)
    made = {*graph.inputs, *(out for node in first.nodes for out in node.outputs)}
    read = [*graph.outputs, *(atom for node in rest for atom in node.inputs)]
    shared = tuple(dict.fromkeys(a for a in read if is_value(a) and a in made))
    return (
        dataclasses.replace(first, outputs=shared),
        dataclasses.replace(graph, inputs=shared, nodes=rest),
    )


def _within(node: Node) -> Iterator[Node]:
    yield node
    for body in node.bodies:
        yield from body.walk()


def _values(atoms: Iterable[Atom]) -> Iterator[int]:
    return (atom for atom in atoms if is_value(atom))


def _inner(node: Node) -> Iterator[int]:
    """The values that bodies define."""
    for body in node.bodies:
        yield from body.inputs
        for inner in body.walk():
            yield from inner.outputs
