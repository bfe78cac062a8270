"""The flow between layers, and the values that a program computes just once."""

from collections.abc import Iterator, Mapping
from typing import Any

from kfac_jax._jaxpr.graph import Atom, Graph, Node, is_value
from kfac_jax._jaxpr.sites import Site

_TRANSPARENT = (
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
"""Equations that run their first body once, on their operands, for their results."""


def sources(graph: Graph, sites: Mapping[str, Site]) -> dict[str, frozenset[str]]:
    """Finds the layers that each layer's input comes from.

    A layer's sources are the layers whose output its input depends on, with no other
    layer in between.

    Args:
      graph: the program.
      sites: one for each layer, by the layer's name.

    Returns:
      For each layer's name the names of its sources, in the order of the program.
      Layers inside of loops and conditionals are left out.
    """
    at = {site.output: name for name, site in sites.items()}
    reached: dict[int, frozenset[str]] = {}
    found: dict[str, frozenset[str]] = {}

    def of(atom: Atom) -> frozenset[str]:
        return reached.get(atom, frozenset()) if is_value(atom) else frozenset()

    def visit(graph: Graph) -> None:
        for node in graph.nodes:
            if node.name in _TRANSPARENT and node.bodies:
                body = node.bodies[0]
                reached.update(zip(body.inputs, map(of, node.inputs), strict=True))
                visit(body)
                results = [of(atom) for atom in body.outputs]
            else:
                union = frozenset[str]().union(*map(of, node.inputs))
                results = [union] * len(node.outputs)
            for value, result in zip(node.outputs, results, strict=True):
                name = at.get(value)
                if name is not None:
                    x = sites[name].x
                    atoms = x if isinstance(x, tuple) else (x,)
                    found[name] = frozenset[str]().union(*map(of, atoms))
                    result = frozenset([name])
                reached[value] = result

    visit(graph)
    return found


def types_outside_loops(graph: Graph) -> dict[int, Any]:
    """The types of all values outside of loops and conditionals, by their ids."""
    return {
        value: var.aval.dtype
        for node in _outside_loops(graph)
        for value, var in zip(node.outputs, node.equation.outvars, strict=True)
        if hasattr(var.aval, "dtype")
    }


def _outside_loops(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        if node.name in _TRANSPARENT and node.bodies:
            yield from _outside_loops(node.bodies[0])
