"""Weights that a program computes from parameters before they meet data.

Examples are `w * mask`, `g * v / ‖v‖`, `softplus(s)`, one of `jnp.split(w, 3)`, `w[i]`
and `a @ b`. What meets the data is a weight like any other, but its entries are not
those of a parameter. The gradient of each example by the parameter is that by the
weight, pulled back through the map between them.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_jax._jaxpr.graph import Atom, Graph, Node, given, is_value
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax._jaxpr.sites import Computed, OtherUse, Parameter, Use
from kfac_jax._jaxpr.slicing import differentiated
from kfac_jax._jaxpr.states import State


class Free:
    """The values that depend on no case and on no step of a loop.

    They can be computed anew outside of the loops and branches that they are in. What a
    nested graph gets from around it does not differ there; only a scan's carry and its
    slices do, and what a device of a `shard_map` has. Equations are noted in order.
    """

    def __init__(
        self,
        graph: Graph,
        states: Mapping[int, State],
        others: Collection[int] = frozenset(),
    ) -> None:
        """Notes the inputs and constants of the program.

        Args:
          graph: the program.
          states: for each value the axis that holds the examples; without one it does
            not depend on the batch.
          others: values that are not free, nor what is computed from them.
        """
        self._states = states
        self._others = others
        self._values = {*graph.inputs, *graph.constants}

    def note(self, node: Node) -> None:
        """Notes the results of an equation."""
        if node.name != "while" and all(map(self.has, node.inputs)):
            self._values.update(
                out
                for out in node.outputs
                if self._states.get(out) is None and out not in self._others
            )

    def enter(self, node: Node) -> None:
        """Notes what the bodies of an equation get."""
        for body in node.bodies:
            self._values.update(body.constants)
            self._values.update(x for x, atom in given(node, body) if self.has(atom))

    def has(self, atom: Atom) -> bool:
        """Whether a value is known to be free, as literals are."""
        return not is_value(atom) or atom in self._values

    def computes(self, node: Node) -> bool:
        """Whether the results of an equation are free, real and no tag's."""
        types = [x.aval.dtype for x in node.equation.outvars]
        real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in types)
        special = node.name.startswith("kfac_") or node.name == "stop_gradient"
        return real and not special and all(map(self.has, node.outputs))


def lifted(graph: Graph, values: Sequence[int]) -> Graph:
    """The equations that free values depend on, as one graph that returns them."""
    sources = graph.sources

    def origin(atom: Atom) -> Atom:
        while is_value(atom) and atom in sources.outer:
            atom = sources.outer[atom]
        return atom

    nodes: dict[Node, Node | None] = {}
    outputs = tuple(map(origin, values))
    waiting = list(outputs)
    while waiting:
        made = sources.makers.get(waiting[-1]) if is_value(waiting[-1]) else None
        if made is None or nodes.get(made) is not None:
            waiting.pop()
            continue
        inputs = tuple(map(origin, made.inputs))
        if made not in nodes:
            nodes[made] = None  # its operands come first
            waiting += inputs
        else:
            del nodes[made]  # to be last
            nodes[made] = dataclasses.replace(made, inputs=inputs)
            waiting.pop()
    in_order = tuple(node for node in nodes.values() if node is not None)
    return Graph(graph.inputs, sources.constants, in_order, outputs)


def resolved(
    uses: Sequence[Use], graph: Graph, leaves: Sequence[int], values: Sequence[int]
) -> list[Use]:
    """Replaces the uses of computed weights by uses of the parameters behind them.

    Args:
      uses: uses in which the index `len(leaves) + k` stands for the computed weight
        that is the value `values[k]`.
      graph: the program.
      leaves: the ids of the parameters.
      values: the ids of the computed weights.

    Returns:
      Uses of parameters. Uses by equations that a computed weight depends on are left
      out, as they are part of the map.
    """
    behind: dict[int, tuple[int, ...]] = {}
    inside: set[int] = set()
    for index in {use.leaf for use in uses if use.leaf >= len(leaves)}:
        part = lifted(graph, [values[index - len(leaves)]])
        reached = differentiated(part, {*filter(is_value, part.outputs)})
        behind[index] = tuple(i for i, x in enumerate(leaves) if x in reached)
        inside.update(out for node in part.walk() for out in node.outputs)
    result: list[Use] = []
    for use in uses:
        if use.leaf in behind:
            value = values[use.leaf - len(leaves)]
            result += [_of_parameter(use, leaf, value) for leaf in behind[use.leaf]]
        elif isinstance(use, OtherUse):
            result.append(use)
        elif use.output not in inside:
            own = use.bias is None or use.bias.leaf < len(leaves)
            result.append(use if own else dataclasses.replace(use, bias=None))
        elif _is_read_outside(graph, use.output, inside):
            reason = "its product with a constant is used in two ways"
            result.append(OtherUse(use.leaf, "unmatched", reason, use.source))
    return result


def _of_parameter(use: Use, leaf: int, value: int) -> Use:
    if isinstance(use, OtherUse):
        return dataclasses.replace(use, leaf=leaf)
    computed = Computed(value)
    if use.weight is None:
        assert use.bias is not None
        bias = Parameter(leaf, use.bias.layout)
        return dataclasses.replace(use, bias=bias, computed=computed)
    # a bias that is added to its output is recorded as a shift, too
    weight = Parameter(leaf, use.weight.layout)
    return dataclasses.replace(use, weight=weight, bias=None, computed=computed)


def _is_read_outside(graph: Graph, value: int, inside: set[int]) -> bool:
    return any(
        value in node.inputs and not any(out in inside for out in node.outputs)
        for node in graph.walk()
    )


def map_of(
    graph: Graph, leaf: int, value: int, inputs: Sequence[Any]
) -> Callable[[Any], Any]:
    """The map from a change of one parameter to a computed weight.

    Args:
      graph: the program.
      leaf: the parameter's index.
      value: the id of the computed weight.
      inputs: the program's inputs, which are the parameters, then the arguments.

    Returns:
      A function of an array like the parameter.
    """
    program = Program(lifted(graph, [value]), {}, {})

    def computed(change: Any) -> Any:
        values = list(inputs)
        values[leaf] = values[leaf] + change.astype(values[leaf].dtype)
        return run(program, values, None)[0][0]

    return computed
