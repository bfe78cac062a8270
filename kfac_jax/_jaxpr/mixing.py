"""Which values' examples are mixed between them and the registered losses.

Rows of a layer are examples only if what follows keeps them apart: a contrastive loss,
a batch norm or a graph's messages make each case's loss depend on other cases' rows.
This pass goes back from the losses, and asks at each equation whether an operand's axis
of examples is that of the results.
"""

from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.examples import propagate
from kfac_jax._jaxpr.graph import BODY_OFFSETS, Atom, Graph, Node, is_value
from kfac_jax._jaxpr.states import Examples, Scanned, State


def mixed(
    graph: Graph, states: Mapping[int, State], reached: set[int]
) -> Mapping[int, str]:
    """Finds values with an axis of examples that a registered loss mixes.

    Args:
      graph: the program.
      states: for each value the axis that holds the examples.
      reached: the values that gradients of the registered losses go through.

    Returns:
      The equation that mixes them, by the id of the value.
    """
    return _Mixing(states, reached).visit(graph)


class _Mixing:
    def __init__(self, states: Mapping[int, State], reached: set[int]) -> None:
        self.states = states
        self.reached = reached
        self.found: dict[int, str] = {}

    def visit(self, graph: Graph) -> Mapping[int, str]:
        """Visits the equations from the last to the first."""
        for node in reversed(graph.nodes):
            outputs = [out for out in node.outputs if out in self.reached]
            if outputs and node.bodies:
                self._enter(node)
            elif outputs:
                self._step(node, outputs)
        return self.found

    def _kept(self, atom: Atom) -> bool:
        """Whether a value has examples that no later equation was found to mix."""
        return isinstance(self._state(atom), Examples | Scanned)

    def _state(self, atom: Atom) -> State:
        return self.states.get(atom) if is_value(atom) else None

    def _step(self, node: Node, outputs: Sequence[int]) -> None:
        where = next((self.found[out] for out in outputs if out in self.found), "")
        for atom in {x for x in node.inputs if is_value(x) and x in self.reached}:
            if atom in self.found or not self._kept(atom):
                continue
            if where or self._mixes(node, atom):
                self.found[atom] = where or f"{node.name} at {node.source}"

    def _mixes(self, node: Node, atom: int) -> bool:
        """Whether an operand's examples are not those of the reached results."""
        alone = propagate(node, lambda x: self._state(x) if x == atom else None)
        return any(
            not isinstance(state, Examples | Scanned) or self.states.get(out) != state
            for out, state in zip(node.outputs, alone, strict=True)
            if out in self.reached
        )

    def _enter(self, node: Node) -> None:
        """Follows results into the bodies, and the bodies' inputs to the operands."""
        offset = BODY_OFFSETS.get(node.name)
        where = f"{node.name} at {node.source}"
        if offset is None:  # tracking went through it: results tell what it keeps
            later = [out for out in node.outputs if out in self.reached]
            if any(out in self.found or not self._kept(out) for out in later):
                for atom in filter(self._kept, node.inputs):
                    self.found.setdefault(atom, where)
            return
        for body in node.bodies:
            for out, inner in zip(node.outputs, body.outputs, strict=True):
                self._follow(inner, out, where)
            self.visit(body)
            while node.name == "scan" and self._carried(node, body, where):
                self.visit(body)
            for inner, atom in zip(body.inputs, node.inputs[offset:], strict=True):
                self._follow(atom, inner, where)

    def _follow(self, atom: Atom, later: int, where: str) -> bool:
        """Marks a value that a later one is; returns whether it was not marked."""
        if later not in self.reached or not self._kept(atom) or atom in self.found:
            return False
        if later in self.found or not self._kept(later):
            self.found[atom] = self.found.get(later, where)
            return True
        return False

    def _carried(self, node: Node, body: Graph, where: str) -> bool:
        """Follows the carry that a step reads to the one that the step before made."""
        layout = _compat.scan_layout(node.params)
        start, count = layout.num_consts, layout.num_carry
        pairs = zip(body.inputs[start : start + count], body.outputs, strict=False)
        return any([self._follow(made, read, where) for read, made in pairs])
