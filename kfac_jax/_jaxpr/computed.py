"""Weights that a program computes from parameters before they meet data.

Examples are `w * mask`, `g * v / ‖v‖`, `softplus(s)`, one of `jnp.split(w, 3)`, `w[i]`
and `a @ b`. What meets the data is a weight like any other, but its entries are not
those of a parameter. The gradient of each example by the parameter is that by the
weight, pulled back through the map between them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax._jaxpr.copies import Copies
from kfac_jax._jaxpr.examples import works_by_entry
from kfac_jax._jaxpr.graph import (
    Atom,
    Graph,
    Node,
    Place,
    given,
    has_own_rule,
    is_value,
)
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax._jaxpr.parts import Part, part_of, partition
from kfac_jax._jaxpr.sites import Computed, OtherUse, Parameter, Use
from kfac_jax._jaxpr.slicing import dependent, differentiated
from kfac_jax._jaxpr.states import Examples, State


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
        others: AbstractSet[int] = frozenset(),
        constants: frozenset[int] = frozenset(),
    ) -> None:
        """Notes the inputs and constants of the program.

        Args:
          graph: the program.
          states: for each value the axis that holds the examples; without one it does
            not depend on the batch.
          others: values that are not free, nor what is computed from them.
          constants: values that depend on cases, but count as constants.
        """
        self._states = states
        self._others = others
        self._constants = constants
        sizes = {x.size for x in states.values() if isinstance(x, Examples)}
        self.copies = Copies(sizes)
        self._values = {*graph.inputs, *graph.constants}
        self._outside = {*self._values}  # not free, but no loop computes them

    def note(self, node: Node) -> None:
        """Notes the results of an equation."""
        if node.name != "while" and all(map(self._is_outside, node.inputs)):
            self._outside.update(node.outputs)
            self._values.update(self._constants.intersection(node.outputs))
        if node.name != "while" and all(map(self.has, node.inputs)):
            self._values.update(
                out
                for out in node.outputs
                if self._states.get(out) is None and out not in self._others
            )
            self.copies.note(node)

    def enter(self, node: Node) -> None:
        """Notes what the bodies of an equation get."""
        for body in node.bodies:
            self._values.update(body.constants)
            self._values.update(x for x, atom in given(node, body) if self.has(atom))
            self.copies.rename(given(node, body))
            self._outside.update(body.constants)
            self._outside.update(
                x for x, atom in given(node, body) if self._is_outside(atom)
            )

    def has(self, atom: Atom) -> bool:
        """Whether a value is known to be free, as literals are."""
        return not is_value(atom) or atom in self._values

    def _is_outside(self, atom: Atom) -> bool:
        return not is_value(atom) or atom in self._outside

    def computes(self, node: Node) -> bool:
        """Whether the results of an equation are free, and no tag's."""
        special = node.name.startswith("kfac_") or node.name == "stop_gradient"
        return not special and all(map(self.has, node.outputs))


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


class Behind(NamedTuple):
    """What computed weights are computed from."""

    leaves: Mapping[int, tuple[int, ...]]  # by index the parameters
    maps: Mapping[int, Graph]  # and the map
    inside: AbstractSet[int]  # the values in these maps


def behind(
    uses: Sequence[Use], graph: Graph, leaves: Sequence[int], values: Sequence[int]
) -> Behind:
    """Looks at the computed weights that are used.

    Args:
      uses: uses in which the index `len(leaves) + k` stands for the computed weight
        that is the value `values[k]`.
      graph: the program.
      leaves: the ids of the parameters.
      values: the ids of the computed weights.

    Returns:
      What is behind them, by that index.
    """
    origins: dict[int, tuple[int, ...]] = {}
    maps: dict[int, Graph] = {}
    inside: set[int] = set()
    for index in sorted({use.leaf for use in uses if use.leaf >= len(leaves)}):
        part = lifted(graph, [values[index - len(leaves)]])
        reached = differentiated(part, {*filter(is_value, part.outputs)})
        origins[index] = tuple(i for i, x in enumerate(leaves) if x in reached)
        maps[index] = part
        inside |= reached
    return Behind(origins, maps, inside)


def cut(
    uses: Sequence[Use],
    behind: Behind,
    leaves: Sequence[int],
    shapes: Sequence[Sequence[int]],
    known: Callable[[Any], Any],
) -> dict[int, Part]:
    """The computed weights that are parts of parameters, which are cut in nothing else.

    Args:
      uses: uses, as for `behind`.
      behind: what the computed weights are computed from.
      leaves: the ids of the parameters.
      shapes: the shapes of the parameters.
      known: the values of operands that are known while planning.

    Returns:
      The parts by that index.
    """
    found: dict[int, Part | None] = {}
    for index, some in behind.leaves.items():
        if len(some) == 1:
            (i,) = some
            found[index] = part_of(behind.maps[index], i, leaves[i], shapes[i], known)
    whole = {i for some in behind.leaves.values() for i in some}
    for index, some in behind.leaves.items():
        if found.get(index) is None:
            whole -= {*some}
    whole -= {
        use.leaf
        for use in uses
        if isinstance(use, OtherUse) or use.output not in behind.inside
    }
    return partition(found, {i: shapes[i] for i in whole})


def resolved(
    uses: Sequence[Use],
    behind: Behind,
    graph: Graph,
    leaves: Sequence[int],
    values: Sequence[int],
    cuts: Mapping[int, Part],
    copied: Mapping[int, int],
) -> list[Use]:
    """Replaces the uses of computed weights by uses of the parameters behind them.

    Args:
      uses: uses, as for `behind`.
      behind: what the computed weights are computed from.
      graph: the program.
      leaves: the ids of the parameters.
      values: the ids of the computed weights.
      cuts: the computed weights that are to be parts.
      copied: for values that hold copies of a weight the axis of the copies.

    Returns:
      Uses of parameters, and of parts: the index `len(leaves) + k` stands for the k-th
      part, in order. Uses by equations that a computed weight depends on are left out,
      as they are part of the map.
    """
    parts = sorted({*cuts.values()})
    places = {i: len(leaves) + parts.index(part) for i, part in cuts.items()}
    result: list[Use] = []
    for use in uses:
        if use.leaf in places:
            result.append(_of_parts(use, places, len(leaves)))
        elif use.leaf in behind.leaves:
            value, part = values[use.leaf - len(leaves)], behind.maps[use.leaf]
            axis = copied.get(value)
            for leaf in behind.leaves[use.leaf]:
                form = _form(part, leaves[leaf], axis)
                result.append(_of_parameter(use, leaf, Computed(value, form, axis)))
        elif isinstance(use, OtherUse) or use.output not in behind.inside:
            result.append(_of_parts(use, places, len(leaves)))
        elif _is_read_outside(graph, use.output, behind.inside):
            reason = "its product with a constant is used in two ways"
            result.append(OtherUse(use.leaf, "unmatched", reason, use.source))
    return result


def _of_parts(use: Use, places: Mapping[int, int], parameters: int) -> Use:
    """The use with parts for its parameters, and without another computed bias."""
    if isinstance(use, OtherUse):
        return dataclasses.replace(use, leaf=places.get(use.leaf, use.leaf))

    def moved(old: Parameter | None) -> Parameter | None:
        if old is None or old.leaf in places:
            return old and old._replace(leaf=places[old.leaf])
        return old if old.leaf < parameters else None

    return dataclasses.replace(use, weight=moved(use.weight), bias=moved(use.bias))


def _form(graph: Graph, leaf: int, axis: int | None) -> str:
    """The form of a map; see `Computed`.

    Args:
      graph: the map, whose only output is the computed weight.
      leaf: the parameter's id.
      axis: the axis of copies, if the output has one.

    Returns:
      The form.
    """
    makers = {out: node for node in graph.nodes for out in node.outputs}
    reached = dependent(graph, [leaf])
    (value,) = graph.outputs
    if value not in makers:
        return "entry"  # the parameter itself
    made = makers[value]
    place = made.outputs.index(value)
    shape, dtype = made.out_shape(place), made.equation.outvars[place].aval.dtype
    if axis is not None:
        shape = (*shape[:axis], *shape[axis + 1 :])
    if not jnp.issubdtype(dtype, jnp.floating):
        return "other"  # complex numbers have no real factors
    same = _shape_of(graph, leaf) == shape and _is_by_entry(graph, leaf)
    kept = "entry" if same else "other"

    def own(node: Node) -> list[int]:
        inputs = enumerate(node.inputs)
        return [i for i, x in inputs if is_value(x) and x in reached]

    while made.name in _SCALING and own(made) == [0] and not any(_others(made)):
        value = made.inputs[0]
        if value not in makers:
            return kept
        made = makers[value]
    plain = made.name == "dot_general" and (
        made.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
        and len(made.shape(0)) == len(made.shape(1)) == 2
    )
    if not plain or len(own(made)) != 1:
        return kept
    (side,) = own(made)
    inner, outer = made.shape(side)[:: 1 if side else -1]
    if made.inputs[side] != leaf or inner > outer:
        return kept  # as many unit vectors as rows show the other matrix
    return ("right", "left")[side]


_SPREAD = ("broadcast_in_dim", "reduce_max", "reduce_min", "reduce_sum", "squeeze")
"""Equations by which a norm or a mean gets into all entries."""


def _is_by_entry(graph: Graph, leaf: int) -> bool:
    """Whether each entry of a map's output depends on that of the parameter.

    On others it may only by their norms, means and the like.
    """
    direct, reached = {leaf}, {leaf}
    for node in graph.nodes:
        if not any(is_value(x) and x in reached for x in node.inputs):
            continue
        by_entry = works_by_entry(node) or (
            has_own_rule(node) and all(map(works_by_entry, node.bodies[0].walk()))
        )
        if not by_entry and node.name not in _SPREAD:
            return False
        reached.update(node.outputs)
        if by_entry and any(is_value(x) and x in direct for x in node.inputs):
            direct.update(node.outputs)
    return graph.outputs[0] in direct


_SCALING = ("convert_element_type", "div", "mul", "neg")


def _others(node: Node) -> list[tuple[int, ...]]:
    """The shapes of all operands but the first."""
    return [node.shape(i) for i in range(1, len(node.inputs))]


def _shape_of(graph: Graph, value: int) -> tuple[int, ...]:
    """The shape of a value, from an equation that reads it."""
    pairs = ((node, i) for node in graph.nodes for i in range(len(node.inputs)))
    return next(node.shape(i) for node, i in pairs if node.inputs[i] == value)


def _of_parameter(use: Use, leaf: int, computed: Computed) -> Use:
    if isinstance(use, OtherUse):
        return dataclasses.replace(use, leaf=leaf)
    if use.weight is None:
        assert use.bias is not None
        bias = Parameter(leaf, use.bias.layout)
        return dataclasses.replace(use, bias=bias, computed=computed)
    # a bias that is added to its output is recorded as a shift, too
    weight = Parameter(leaf, use.weight.layout)
    return dataclasses.replace(use, weight=weight, bias=None, computed=computed)


def _is_read_outside(graph: Graph, value: Place, inside: AbstractSet[int]) -> bool:
    return any(
        value in node.inputs and not any(out in inside for out in node.outputs)
        for node in graph.walk()
    )


def map_of(
    graph: Graph, leaf: int, computed: Computed, inputs: Sequence[Any]
) -> Callable[[Any], Any]:
    """The map from a change of one parameter to a computed weight.

    Args:
      graph: the program.
      leaf: the parameter's index.
      computed: the computed weight.
      inputs: the program's inputs, which are the parameters, then the arguments.

    Returns:
      A function of an array like the parameter.
    """
    program = Program(lifted(graph, [computed.value]), {}, {})

    def weight(change: Any) -> Any:
        values = list(inputs)
        values[leaf] = values[leaf] + change.astype(values[leaf].dtype)
        found = run(program, values, None)[0][0]
        axis = computed.copied
        return found if axis is None else jax.lax.index_in_dim(found, 0, axis, False)

    return weight
