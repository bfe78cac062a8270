"""Constant folding: values of a program that do not depend on its inputs."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.graph import (
    BODY_OFFSETS,
    Atom,
    Graph,
    Node,
    is_value,
)

LARGEST = 2**20
"""The most integers of one array that are evaluated while planning."""


class Folded:
    """Values computed from literals and constants alone.

    Scalars (factors of weights) are evaluated at once. Arrays of integers or booleans
    (indices of rows) are evaluated when asked for, as most are never needed.
    """

    def __init__(self, graph: Graph, live: set[int]) -> None:
        """Evaluates scalars.

        Args:
          graph: the program.
          live: the ids of values that the registered losses depend on; scalars that are
            not among them are not evaluated.
        """
        self._live = live
        self._values: dict[int, Any] = {}
        self._makers = graph.sources.makers
        self._fold(graph)

    def value(self, atom: Atom) -> Any:
        """The value of a literal, constant or folded scalar; None if not known."""
        return self._values.get(atom) if is_value(atom) else atom.val

    def indices(self, atom: Atom) -> Any:
        """Integers or booleans computed from constants alone; None for others."""
        known = self.value(atom)
        if known is not None or not is_value(atom):
            return known
        node = self._makers.get(atom)
        if node is None or node.bodies or len(node.outputs) != 1:
            return None
        dtype = node.equation.outvars[0].aval.dtype
        discrete = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
        if not discrete or math.prod(node.out_shape()) > LARGEST:
            return None
        values = [self.indices(one) for one in node.inputs]
        if any(value is None for value in values):
            return None
        result = self._values[atom] = _evaluated(node, values)
        return result

    def _fold(self, graph: Graph) -> None:
        self._values.update(graph.constants)
        for node in graph.nodes:
            if node.bodies:
                self._enter(node)
            elif len(node.outputs) == 1 and node.out_shape() == ():
                values = [self.value(atom) for atom in node.inputs]
                known = bool(values) and not any(value is None for value in values)
                if known and node.outputs[0] in self._live:
                    self._values[node.outputs[0]] = _evaluated(node, values)

    def _enter(self, node: Node) -> None:
        offset = BODY_OFFSETS.get(node.name)
        if offset is None:
            return
        for body in node.bodies:
            # carries and slices change from step to step of a scan, so that no one
            # value of its body's inputs is the operand's
            if node.name != "scan":
                for inner, atom in zip(body.inputs, node.inputs[offset:], strict=True):
                    if self.value(atom) is not None:
                        self._values[inner] = self.value(atom)
            self._fold(body)


def _evaluated(node: Node, values: Sequence[Any]) -> Any:
    traced = any(isinstance(value, jax.core.Tracer) for value in values)
    if node.name == "pvary" and not traced:
        # inside of a shard_map body, whose mesh axes do not exist while planning
        return values[0]
    # A plan may be made while the caller's `jit` is being traced. Without this context
    # the operations would be staged into that trace and yield tracers, not numbers.
    context = contextlib.nullcontext() if traced else jax.ensure_compile_time_eval()
    with context:
        (result,) = _compat.evaluate(node.equation, values)
    return result
