"""Backward slices of a graph: the values that given values depend on."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax.numpy as jnp

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
    all_operands: bool = False,
    rules: bool = True,
) -> set[int]:
    """Slices back: the ids of all values that the values in `wanted` depend on.

    Args:
      graph: the program.
      wanted: ids of values, also of nested graphs.
      reads: the operands that an equation without bodies depends on; by default
        `read_inputs`.
      all_operands: whether equations with bodies depend on all their operands, as they
        do if the slice is to be run. If not, bodies are looked into.
      rules: whether functions with custom derivative rules depend on all operands, as
        an operand may be there for the rule alone. If not, bodies are looked into.

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
        if all_operands or offset is None or (rules and has_own_rule(node)):
            if any(out in found for out in node.outputs):
                for body in node.bodies:
                    found.update(_values(body.outputs))
            for body in node.bodies:
                visit(body)
            found.update(_values(node.inputs))
            return
        found.update(_values(node.inputs[:offset]))  # what chooses the branch of a cond
        for body in node.bodies:
            follow(node.outputs, body.outputs)
            visit(body)
            # A needed carry is needed from the step before, too, which may need other
            # carries. The set only grows, so this ends.
            while node.name == "scan" and follow(*_carry(node, body)):
                visit(body)
            follow(body.inputs, node.inputs[offset:])

    def follow(values: Sequence[int], origins: Sequence[Atom]) -> bool:
        """Adds the origins of the values that are found; returns whether any is new."""
        size = len(found)
        pairs = zip(values, origins, strict=True)
        found.update(_values(atom for value, atom in pairs if value in found))
        return len(found) > size

    visit(graph)
    return found


def _carry(node: Node, body: Graph) -> tuple[Sequence[int], Sequence[Atom]]:
    """The carry that a step of a scan reads, and the one that a step returns."""
    layout = _compat.scan_layout(node.params)
    start, size = layout.num_consts, layout.num_carry
    return body.inputs[start : start + size], body.outputs[:size]


def differentiated(graph: Graph, wanted: set[int], *, rules: bool = True) -> set[int]:
    """Slices back like `needed`, but not through operations that stop gradients."""
    stops = {*_stops(graph)}
    stopped = {out for node in stops for out in node.outputs}

    def reads(node: Node) -> tuple[Atom, ...]:
        return () if node in stops else read_inputs(node)

    return needed(graph, wanted, reads, rules=rules) - stopped


def dependent(graph: Graph, inputs: Iterable[int]) -> set[int]:
    """Slices forward: the ids of values that have a derivative by some inputs.

    A loop's carry may depend on them at any step. Nothing does behind an operation that
    stops gradients, except in functions with a custom rule.
    """
    found = {*inputs}

    def visit(graph: Graph, ruled: bool) -> None:
        for node in graph.nodes:
            read = any(atom in found for atom in _values(node.inputs))
            if not read or (node.name == "stop_gradient" and not ruled):
                continue
            found.update(node.outputs)
            offset = BODY_OFFSETS.get(node.name)
            for body in node.bodies:
                operands = node.inputs[offset:] if offset is not None else ()
                if node.name == "scan" or len(operands) != len(body.inputs):
                    found.update(body.inputs)
                else:
                    pairs = zip(body.inputs, operands, strict=True)
                    found.update(
                        x for x, atom in pairs if is_value(atom) and atom in found
                    )
                visit(body, ruled or has_own_rule(node))

    visit(graph, False)
    return found


def _stops(graph: Graph) -> Iterator[Node]:
    """Nodes that stop gradients, except inside of functions with a custom rule.

    Those of comparisons, and all others without real or complex results, do.

    Args:
      graph: the program.

    Yields:
      The nodes.
    """
    # such a rule replaces the body's derivative, so a stop in the body need not be one
    for node in graph.nodes:
        if node.name == "stop_gradient" or (not node.bodies and _is_discrete(node)):
            yield node
        elif not has_own_rule(node):
            for body in node.bodies:
                yield from _stops(body)


def _is_discrete(node: Node) -> bool:
    types = [x.aval.dtype for x in node.equation.outvars]
    return bool(types) and not any(jnp.issubdtype(x, jnp.inexact) for x in types)


def without_rest(graph: Graph, wanted: set[int]) -> Graph:
    """The graph without equations that the values in `wanted` do not depend on."""
    found = needed(graph, wanted, lambda node: node.inputs, all_operands=True)
    nodes = tuple(
        node
        for node in graph.nodes
        if any(out in found for inner in _within(node) for out in inner.outputs)
    )
    return dataclasses.replace(graph, nodes=nodes, outputs=())


def split(graph: Graph, wanted: set[int]) -> tuple[Graph, Graph]:
    """Divides a graph into equations that the values in `wanted` need, and the rest.

    Args:
      graph: the graph.
      wanted: ids of values.

    Returns:
      The first graph, which returns every value that the second reads, and the second,
      which takes those values and returns the graph's outputs.
    """
    first = without_rest(graph, wanted)
    in_first = {*first.nodes}
    rest = tuple(node for node in graph.nodes if node not in in_first)
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
    """The ids of all values that a node's nested graphs define."""
    for body in node.bodies:
        yield from body.inputs
        for inner in body.walk():
            yield from inner.outputs
