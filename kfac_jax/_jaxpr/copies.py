"""Values that hold a copy of one array for each case, by the axis of the copies.

A parameter may be repeated for each case before anything is computed from it, as
`jnp.exp(jnp.broadcast_to(s, x.shape))` is. What is computed is then one weight for all
cases. Only values that depend on no case are followed here.
"""

from collections.abc import Collection, Iterable

from kfac_jax._jaxpr.examples import propagate
from kfac_jax._jaxpr.graph import Atom, Node, is_value
from kfac_jax._jaxpr.states import Examples


class Copies:
    """Follows an axis of equal entries, as an axis of examples is followed."""

    def __init__(self, sizes: Collection[int]) -> None:
        """Without any value; `sizes` are the numbers of cases."""
        self._sizes = sizes
        self._found: dict[int, Examples] = {}

    def axis(self, value: int) -> int | None:
        """The axis along which a value's entries are equal; None if there is none."""
        state = self._found.get(value)
        return None if state is None else state.axis

    def note(self, node: Node) -> None:
        """Notes the results of an equation, whose operands were noted before."""
        if not any(is_value(x) and x in self._found for x in node.inputs):
            self._note_repetition(node)
        elif node.bodies:
            self._enter(node)
        elif self._keeps(node):
            states = propagate(node, self._found.get)
            self._found.update(
                (out, state)
                for out, state in zip(node.outputs, states, strict=True)
                if isinstance(state, Examples) and state.outer == state.inner == 1
            )

    def rename(self, pairs: Iterable[tuple[int, Atom]]) -> None:
        """Notes values that are others by another name."""
        self._found.update(
            (new, self._found[old])
            for new, old in pairs
            if is_value(old) and old in self._found
        )

    def _note_repetition(self, node: Node) -> None:
        if node.name != "broadcast_in_dim":
            return
        places, shape = node.params["broadcast_dimensions"], node.out_shape()
        kept = {b for a, b in enumerate(places) if node.shape()[a] == shape[b]}
        for axis, size in enumerate(shape):
            if axis not in kept and size in self._sizes:
                self._found[node.outputs[0]] = Examples(axis, size)
                return

    def _keeps(self, node: Node) -> bool:
        """Whether entries stay equal: all operands are the same for all copies."""
        axes = [self.axis(x) if is_value(x) else None for x in node.inputs]
        if node.name == "dot_general":
            left, right = node.params["dimension_numbers"][1]
            pairs = zip(left, right, strict=True)
            return all((axes[0] == a) == (axes[1] == b) for a, b in pairs)
        operands = enumerate(axes)
        return all(axis is not None or not node.shape(i) for i, axis in operands)

    def _enter(self, node: Node) -> None:
        """Through a function that is called once, with all operands."""
        body = node.bodies[0]
        several = len(node.bodies) > 1 or node.name in ("scan", "shard_map")
        if several or len(body.inputs) != len(node.inputs):
            return
        self.rename(zip(body.inputs, node.inputs, strict=True))
        for inner in body.nodes:
            self.note(inner)
        self.rename(zip(node.outputs, body.outputs, strict=True))
