"""Weights that a program computes from parameters before they meet data.

Examples are `w * mask`, `g * v / ‖v‖`, `softplus(s)`, one of `jnp.split(w, 3)`, `w[i]`
and `a @ b`. What meets the data is a weight like any other, but its entries are not
those of a parameter. The gradient of each example by the parameter is that by the
weight, pulled back through the map between them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kfac_jax._jaxpr.graph import Graph, Node, is_value
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax._jaxpr.sites import Computed, OtherUse, Parameter, Use
from kfac_jax._jaxpr.slicing import differentiated, needed
from kfac_jax._jaxpr.states import State


def is_computed(node: Node, states: Mapping[int, State]) -> bool:
    """Whether an equation's results depend on parameters and constants only.

    Args:
      node: an equation of the program itself, not of a nested graph.
      states: for each value the axis that holds the examples; without one it does not
        depend on the batch.

    Returns:
      Whether they do, and may be differentiated.
    """
    values = [*(x for x in node.inputs if is_value(x)), *node.outputs]
    tag = node.name.startswith("kfac_") or node.name == "while"
    return not tag and all(states.get(value) is None for value in values)


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
        value = values[index - len(leaves)]
        reached = differentiated(graph, {value})
        behind[index] = tuple(i for i, x in enumerate(leaves) if x in reached)
        inside |= needed(graph, {value}, all_operands=True)
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
    wanted = _slice(graph, value)
    program = Program(wanted, {}, {})

    def computed(change: Any) -> Any:
        values = list(inputs)
        values[leaf] = values[leaf] + change.astype(values[leaf].dtype)
        return run(program, values, None)[0][0]

    return computed


def _slice(graph: Graph, value: int) -> Graph:
    """The equations that a value depends on."""
    found = needed(graph, {value}, lambda node: node.inputs, all_operands=True)
    nodes = tuple(n for n in graph.nodes if _makes(n, found))
    return dataclasses.replace(graph, nodes=nodes, outputs=(value,))


def _makes(node: Node, found: Iterable[int]) -> bool:
    return any(out in found for out in node.outputs)
