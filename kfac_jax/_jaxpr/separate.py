"""Whether each case can be evaluated by itself, in a batch of one.

It can if no case meets another one on its way to the registered outputs, be it in data
alone (`x - x.mean(0)`), and if nothing belongs to a case by its place in the batch, as
noise of the batch's shape and `jnp.arange(len(x))` do.
"""

from collections.abc import Callable, Iterator, Mapping

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.examples import works_by_entry
from kfac_jax._jaxpr.graph import BODY_OFFSETS, Atom, Graph, Node, is_value
from kfac_jax._jaxpr.slicing import needed
from kfac_jax._jaxpr.states import Examples, Lost, Scanned, State


def joining(
    graph: Graph,
    states: Mapping[int, State],
    wanted: set[int],
    copied: Callable[[int], int | None],
) -> str:
    """Why cases cannot be evaluated one by one.

    Args:
      graph: the program.
      states: for each value the axis that holds the examples, as in loops over them.
      wanted: the ids of the registered outputs.
      copied: the axis along which a value's entries are known to be equal, or None.

    Returns:
      The reason, with the equation and the line; empty if they can.
    """
    live = needed(graph, wanted)
    lost = (x for value, x in states.items() if value in live and isinstance(x, Lost))
    for state in lost:
        return f"they may meet in {state.where or 'an argument'}"
    places = _Places(graph, states, copied)
    for node in graph.walk():
        if any(out in live for out in node.outputs) and places.belong(node):
            line = f"{node.name} at {node.source}"
            return f"{line} takes values by the cases' places in the batch"
    return ""


class _Places:
    """Finds values that depend on no case, but differ from case to case."""

    def __init__(
        self,
        graph: Graph,
        states: Mapping[int, State],
        copied: Callable[[int], int | None],
    ) -> None:
        self._makers, self._outer, _ = graph.sources
        self._states = states
        self._copied = copied
        self._known: dict[tuple[Atom, int], bool] = {}

    def belong(self, node: Node) -> bool:
        """Whether an equation brings such values to the cases."""
        body = node.bodies[-1].inputs if node.bodies else ()
        if len(body) != len(_given(node)):
            return True
        pairs = self._of_bodies(node) if node.bodies else self._of_operands(node)
        return any(
            self._state(atom) is None and not self._is_uniform(atom, axis)
            for atom, axis in pairs
        )

    def _state(self, atom: Atom) -> State:
        return self._states.get(atom) if is_value(atom) else None

    def _of_operands(self, node: Node) -> Iterator[tuple[Atom, int]]:
        """The operands that have the axis of examples, and where, by their shapes."""
        state = self._state(node.outputs[0]) if node.outputs else None
        if not isinstance(state, Examples):
            return
        axis, length = state.axis, node.out_shape()[state.axis]
        for i, atom in enumerate(node.inputs):
            shape = node.shape(i)
            if not is_value(atom) or not shape:
                continue
            match node.name:
                case "dot_general":
                    batch = node.params["dimension_numbers"][1][i]
                    axes = batch[axis : axis + 1]
                case "conv_general_dilated":
                    axes = ()
                case _ if works_by_entry(node) or node.name == "concatenate":
                    axes = (axis,)
                case _:
                    axes = tuple(range(len(shape)))
            yield from ((atom, a) for a in axes if shape[a] == length)

    def _of_bodies(self, node: Node) -> Iterator[tuple[Atom, int]]:
        """Operands and bodies' results that are taken for values by case."""
        body, operands = node.bodies[-1], _given(node)
        first_xs = len(operands)
        if node.name == "scan":
            layout = _compat.scan_layout(node.params)
            first_xs = layout.num_consts + layout.num_carry
        by_case = any(isinstance(self._state(x), Scanned) for x in body.inputs)
        pairs = zip(operands, body.inputs, strict=True)
        for i, (atom, inner) in enumerate(pairs):
            state = self._state(inner)
            if isinstance(state, Examples):
                yield atom, state.axis + (i >= first_xs)
            elif by_case and i >= first_xs:
                yield atom, 0
        for one in node.bodies:
            for out, atom in zip(node.outputs, one.outputs, strict=False):
                state = self._state(out)
                if isinstance(state, Examples) and node.name == "cond":
                    yield atom, state.axis

    def _is_uniform(self, atom: Atom, axis: int) -> bool:
        """Whether a value's entries are equal along an axis, as far as is known."""
        while is_value(atom) and atom in self._outer:
            atom = self._outer[atom]
        if not is_value(atom) or self._copied(atom) == axis:
            return True
        if (atom, axis) not in self._known:
            self._known[atom, axis] = self._is_made_uniform(atom, axis)
        return self._known[atom, axis]

    def _is_made_uniform(self, value: int, axis: int) -> bool:
        node = self._makers.get(value)
        if node is None:
            return False
        if node.name == "iota":
            return node.params["dimension"] != axis
        if node.name == "transpose":
            return self._is_uniform(node.inputs[0], node.params["permutation"][axis])
        if node.name == "broadcast_in_dim":
            places = node.params["broadcast_dimensions"]
            if axis not in places:
                return True
            source = tuple(places).index(axis)
            one = node.shape()[source] == 1
            return one or self._is_uniform(node.inputs[0], source)
        return works_by_entry(node) and all(
            not node.shape(i) or node.shape(i)[axis] == 1 or self._is_uniform(x, axis)
            for i, x in enumerate(node.inputs)
        )


def _given(node: Node) -> tuple[Atom, ...]:
    """The operands that an equation's last body gets; none without a body."""
    if not node.bodies:
        return ()
    offset = BODY_OFFSETS.get(node.name, node.params.get("cond_nconsts", 0))
    return node.inputs[offset:]
