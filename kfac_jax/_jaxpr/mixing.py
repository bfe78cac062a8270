"""Which values' examples are mixed between them and the registered losses.

Rows of a layer are examples only if what follows keeps them apart: a contrastive loss,
a batch norm or a graph's messages make each case's loss depend on other cases' rows.
This pass goes back from the losses, and asks at each equation whether an operand's axis
of examples is that of the results.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.examples import propagate
from kfac_jax._jaxpr.graph import BODY_OFFSETS, Atom, Graph, Node, is_value
from kfac_jax._jaxpr.sites import Site, Use
from kfac_jax._jaxpr.states import Examples, Lost, Scanned, State


def mixed(
    graph: Graph, states: Mapping[int, State], wanted: Collection[int]
) -> Mapping[int, str]:
    """Finds values with an axis of examples that a registered loss mixes.

    Args:
      graph: the program.
      states: for each value the axis that holds the examples.
      wanted: the registered outputs.

    Returns:
      The equation that mixes them, by the id of the value.
    """
    return _Mixing(states, wanted).visit(graph)


class _Mixing:
    def __init__(self, states: Mapping[int, State], wanted: Collection[int]) -> None:
        self.states = states
        self.live = {*wanted}  # values that a loss has a derivative by
        self.found: dict[int, str] = {}

    def visit(self, graph: Graph) -> Mapping[int, str]:
        """Visits the equations from the last to the first."""
        for node in reversed(graph.nodes):
            outputs = [out for out in node.outputs if out in self.live]
            if not outputs or node.name == "stop_gradient":
                continue
            if node.bodies and node.name in BODY_OFFSETS:
                self._enter(node)
            else:
                self._step(node, outputs)
        return self.found

    def _kept(self, atom: Atom) -> bool:
        """Whether a value has examples, as tracking tells."""
        return isinstance(self._state(atom), Examples | Scanned)

    def _state(self, atom: Atom) -> State:
        return self.states.get(atom) if is_value(atom) else None

    def _step(self, node: Node, outputs: Sequence[int]) -> None:
        later = next((self.found[out] for out in outputs if out in self.found), "")
        for i, atom in enumerate(node.inputs[:1] if _is_tag(node) else node.inputs):
            dtype = node.equation.invars[i].aval.dtype
            if not is_value(atom) or not jnp.issubdtype(dtype, jnp.inexact):
                continue
            self.live.add(atom)
            new = atom not in self.found and self._kept(atom)
            if new and (later or self._mixes(node, atom, outputs)):
                self.found[atom] = later or f"{node.name} at {node.source}"

    def _mixes(self, node: Node, atom: int, outputs: Sequence[int]) -> bool:
        """Whether an operand's examples are not those of the results."""
        # tracking went through these: their results tell what they keep
        if node.bodies or node.name == "custom_linear_solve":
            return not all(map(self._kept, outputs))
        alone = propagate(node, lambda x: self._state(x) if x == atom else None)
        several = len(node.outputs) > 1  # of which some may be of other operands
        return any(
            not isinstance(state, Examples | Scanned) or self.states.get(out) != state
            for out, state in zip(node.outputs, alone, strict=True)
            if out in outputs and not (several and state is None)
        )

    def _enter(self, node: Node) -> None:
        """Follows results into the bodies, and the bodies' inputs to the operands."""
        where = f"{node.name} at {node.source}"
        for body in node.bodies:
            self._follow(body.outputs, node.outputs, where)
            self.visit(body)
            while node.name == "scan" and self._carried(node, body, where):
                self.visit(body)
            self._follow(node.inputs[BODY_OFFSETS[node.name] :], body.inputs, where)

    def _follow(self, atoms: Sequence[Atom], later: Sequence[int], where: str) -> bool:
        """Marks values like the later ones that they are; whether any is new."""
        before = len(self.live) + len(self.found)
        for atom, value in zip(atoms, later, strict=True):
            if value not in self.live or not is_value(atom):
                continue
            self.live.add(atom)
            lost = value in self.found or not self._kept(value)
            if lost and self._kept(atom):
                self.found.setdefault(atom, self.found.get(value, where))
        return len(self.live) + len(self.found) > before

    def _carried(self, node: Node, body: Graph, where: str) -> bool:
        """Follows the carry that a step reads to the one that the step before made."""
        layout = _compat.scan_layout(node.params)
        start, count = layout.num_consts, layout.num_carry
        read = body.inputs[start : start + count]
        return self._follow(body.outputs[:count], read, where)


def _is_tag(node: Node) -> bool:
    """Whether an equation returns its first operand, and others are for the library."""
    return node.name in ("kfac_layer", "kfac_generic", "kfac_loss")


def apart(
    uses: Sequence[Use], places: Mapping[int, str], makers: Mapping[int, Node]
) -> list[Use]:
    """Forgets the examples of uses that a loss mixes.

    Args:
      uses: the uses.
      places: what `mixed` returned.
      makers: the equations by their results.

    Returns:
      The uses.
    """
    reasons = [reason(use, places, makers) for use in uses]
    return [
        dataclasses.replace(use, examples=Lost(why)) if why else use
        for use, why in zip(uses, reasons, strict=True)
    ]


def reason(use: Use, places: Mapping[int, str], makers: Mapping[int, Node]) -> str:
    """The equation that mixes the examples of a use; empty without."""
    if not isinstance(use, Site) or not isinstance(use.examples, Examples):
        return ""
    place, *at = use.output if isinstance(use.output, tuple) else (use.output,)
    node = makers.get(place)
    if at and node is not None and node.name == "scan":  # what starts a carry
        place = node.bodies[0].inputs[at[0]]
    return places.get(place, "")
