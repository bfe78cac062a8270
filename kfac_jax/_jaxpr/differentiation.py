"""Errors with the user's source lines, for what JAX cannot differentiate."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import jax

from kfac_jax._jaxpr.graph import Graph, Node, build, is_value

_CUSTOM_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")
NO_REVERSE_MODE = "has no reverse mode: use scan, or fori_loop with fixed bounds"


def check_forward_mode(
    graph: Graph, product: Callable[..., Any], *operands: Any
) -> None:
    """Checks that forward mode does not meet a `custom_vjp` function.

    JAX reports this only on compilation, and without the place. When a tangent meets
    such a function, JAX leaves a `custom_lin` equation in the traced product.

    Args:
      graph: the program. The product is traced only if the program has such functions.
      product: a function that differentiates the program in forward mode.
      *operands: its operands.

    Raises:
      ValueError: if a tangent meets a `custom_vjp` function; the message has its line.
    """
    if has_forward_mode(graph):
        return
    met = build(jax.make_jaxpr(product)(*operands)).walk()
    lines = _lines(node for node in met if node.name == "custom_lin")
    if lines:
        raise ValueError(
            f"The network uses a `custom_vjp` function at {lines}, which has no "
            "forward mode; exact products with the curvature need one. Write it as "
            "jax.custom_jvp, or do without exact products: give kfac a learning "
            "rate, a momentum and a damping instead of QuadraticModel and "
            "LevenbergMarquardt."
        )


def has_forward_mode(graph: Graph) -> bool:
    """Whether a program has no `custom_vjp` functions."""
    return all(node.name not in _CUSTOM_VJP for node in graph.walk())


@contextlib.contextmanager
def reverse_mode(graph: Graph, parameters: int) -> Generator[None]:
    """A context for reverse mode that adds source lines to JAX's error about `while`.

    Args:
      graph: the program.
      parameters: the number of parameters, which are the program's first inputs.

    Yields:
      Nothing.

    Raises:
      ValueError: if a gradient meets a `while`.
    """
    try:
        yield
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        reached = _reached(graph, graph.inputs[:parameters])
        lines = _lines(node for node in reached if node.name == "while")
        raise ValueError(
            f"The loss depends on parameters through a `while` loop at {lines}, which "
            f"{NO_REVERSE_MODE}."
        ) from error


def _reached(graph: Graph, inputs: Sequence[int]) -> list[Node]:
    """The nodes that may depend on the inputs; bodies count as reading all operands."""
    values, nodes = {*inputs}, list[Node]()
    for node in graph.nodes:
        if any(is_value(atom) and atom in values for atom in node.inputs):
            values.update(node.outputs)
            nodes += [node, *(inner for body in node.bodies for inner in body.walk())]
    return nodes


def _lines(nodes: Iterable[Node]) -> str:
    return ", ".join(sorted({node.source for node in nodes}))
