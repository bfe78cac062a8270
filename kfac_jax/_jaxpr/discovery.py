"""Finds layers by dataflow: follows each parameter to the equation that consumes it.

A parameter is followed through equations that only change its view and into every
nested graph, until an equation combines it with data. The table `CONSUMERS` says which
equations are layers; everything else is recorded as unmatched, with the equation and
the line.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp

from kfac_jax._jaxpr import _compat, consumers, outcomes, view_rules
from kfac_jax._jaxpr.constants import with_cases
from kfac_jax._jaxpr.convolution import convolution
from kfac_jax._jaxpr.differentiation import NO_REVERSE_MODE
from kfac_jax._jaxpr.embedding import OneHot, embedding
from kfac_jax._jaxpr.graph import (
    BODY_OFFSETS,
    Atom,
    Graph,
    Node,
    differentiated,
    has_own_rule,
    is_value,
    needed,
    read_inputs,
    use_counts,
)
from kfac_jax._jaxpr.sites import OtherUse, Site, Use
from kfac_jax._jaxpr.states import Examples, State
from kfac_jax._jaxpr.tracking import track
from kfac_jax._jaxpr.view import View, source_view


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What discovery learns about a program.

    Attributes:
      graph: the program.
      uses: every use of every parameter that a registered loss has a gradient for.
      scanned: for each scan (by its first result) the leaves it runs over.
      losses: how many loss tags there are.
      loss_examples: for each loss tag, where the examples are in the registered output.
    """

    graph: Graph
    uses: tuple[Use, ...]
    scanned: Mapping[Node, frozenset[int]]
    losses: int
    loss_examples: tuple[State, ...]


def discover(
    graph: Graph, leaf_shapes: Sequence[Sequence[int]], arguments: Sequence[State]
) -> Found:
    """Finds all uses of the first `len(leaf_shapes)` inputs of the program.

    Args:
      graph: the program; its inputs are the parameters, then the arguments.
      leaf_shapes: the shapes of the parameters.
      arguments: for each argument, which axis holds the examples.

    Returns:
      What was found.
    """
    losses = [node for node in graph.walk() if node.name == "kfac_loss"]
    wanted = {n.inputs[0] for n in losses if is_value(n.inputs[0])}
    states = track(graph, [*([None] * len(leaf_shapes)), *arguments])
    live, reached = needed(graph, wanted), differentiated(graph, wanted)
    finder = _Finder(live, reached, use_counts(graph), states)
    for leaf, (value, shape) in enumerate(
        zip(graph.inputs[: len(leaf_shapes)], leaf_shapes, strict=True)
    ):
        finder.views[value] = (source_view(leaf, shape),)
    finder.visit(graph, leaf_shapes)
    finder.uses += _lost(
        graph.inputs[: len(leaf_shapes)],
        differentiated(graph, wanted, rules=False),
        finder.uses,
    )
    loss_examples = tuple(_examples(node, states) for node in losses)
    uses = finder.uses
    if any(
        states.get(node.inputs[0]) is not None
        or _is_repeated(state, finder.makers.get(node.inputs[0]))
        for node, state in zip(losses, loss_examples, strict=True)
        if is_value(node.inputs[0])
    ):
        uses = with_cases(uses, graph, states)
    return Found(
        graph=graph,
        uses=tuple(uses),
        scanned={node: frozenset(leaves) for node, leaves in finder.scanned.items()},
        losses=len(losses),
        loss_examples=loss_examples,
    )


def _examples(loss: Node, states: Mapping[int, State]) -> State:
    """Those of the network's output or, if it does not depend on data, of targets."""
    given = (states.get(atom) for atom in loss.inputs if is_value(atom))
    return next((state for state in given if state is not None), None)


def _is_repeated(examples: State, maker: Node | None) -> bool:
    """Whether one output was repeated for all examples, as `vmap` does."""
    return (
        isinstance(examples, Examples)
        and maker is not None
        and maker.name == "broadcast_in_dim"
        and examples.axis not in maker.params["broadcast_dimensions"]
    )


class _Finder:
    """The state of one walk over the program."""

    def __init__(
        self,
        live: set[int],
        reached: set[int],
        counts: Mapping[int, int],
        states: Mapping[int, State],
    ) -> None:
        self.live = live
        self.reached = reached  # by gradients; where they stop, parameters are data
        self.counts = counts
        self.states = states
        self.views: dict[int, tuple[View, ...]] = {}  # several of joined parameters
        self.known: dict[int, Any] = {}
        self.makers: dict[int, Node] = {}  # which equation a value comes from
        self.linear: dict[int, outcomes.Linear] = {}
        self.uses: list[Use] = []
        self.scanned: dict[Node, set[int]] = {}
        self.produced: set[int] = set()  # by equations, so that they can be tagged
        self.one_hot = OneHot()
        self.steps = 1  # how often the equation at hand is run, scans included

    def members(self, atom: Atom) -> tuple[View, ...]:
        """The views that a value consists of; none for data."""
        return self.views.get(atom, ()) if is_value(atom) else ()

    def value(self, atom: Atom) -> Any:
        """The value of a literal or of a constant; None if it is not known."""
        return self.known.get(atom) if is_value(atom) else atom.val

    def visit(self, graph: Graph, shapes: Sequence[Sequence[int]]) -> None:
        self.known.update(graph.constants)
        for node in graph.nodes:
            if not any(out in self.live for out in node.outputs) and not node.bodies:
                continue
            self.makers.update(dict.fromkeys(node.outputs, node))
            if node.bodies:
                self._enter(node, shapes)
            else:
                self._step(node, shapes)
            self.produced.update(node.outputs)

    def _step(self, node: Node, shapes: Sequence[Sequence[int]]) -> None:
        members = [self.members(atom) for atom in node.inputs]
        if node.name == "kfac_layer" and read_inputs(node) == node.inputs[:1]:
            members = members[:1]
        if not any(members):
            self._fold(node)
            self._follow_linear(node)
            self.one_hot.note(node)
            return
        if not any(out in self.reached for out in node.outputs):
            return
        joined = _joined(node, members)
        if joined is not None:
            self.views[node.outputs[0]] = joined
            return
        choices = _one_at_a_time(members)
        if choices is None:
            views = [view for some in members for view in some]
            self._refuse(node, views, f"joined and then combined by `{node.name}`")
            return
        rule = view_rules.TABLE.get(node.name)
        moved = [rule(self, node, views) for views in choices] if rule else []
        found = tuple(view for view in moved if view is not None)
        if found and len(found) == len(choices):
            self.views[node.outputs[0]] = found
            return
        for views in choices:
            self._consume(node, views, shapes)

    def _consume(
        self,
        node: Node,
        views: Sequence[View | None],
        shapes: Sequence[Sequence[int]],
    ) -> None:
        consumer = CONSUMERS.get(node.name)
        outcome = (
            outcomes.Refused(f"consumed by `{node.name}`, which is not a layer")
            if consumer is None
            else consumer(node, views, shapes, self.states.get(node.outputs[0]))
        )
        if isinstance(outcome, outcomes.Linear):
            tagged = outcome.site.output
            if tagged not in node.outputs and tagged not in self.produced:
                self._refuse(
                    node,
                    views,
                    f"enters the control flow around `{node.name}` already repeated",
                )
                return
            rows = math.prod(outcome.shape[a] for a in outcome.y_axes[1])
            site = self.one_hot.as_embedding(outcome.site)
            site = dataclasses.replace(site, rows=rows * self.steps)
            outcome = dataclasses.replace(outcome, site=site)
        if isinstance(outcome, outcomes.Linear) and node.name in ("add", "sub"):
            outcome = self._as_bias(node, views, outcome, shapes)
        if isinstance(outcome, outcomes.Linear):
            self.uses.append(outcome.site)
            self.linear[node.outputs[0]] = outcome
            if outcome.shift is not None:
                rows = outcome.site.rows
                self.uses.append(dataclasses.replace(outcome.shift, rows=rows))
        elif isinstance(outcome, outcomes.Generic):
            self.uses.append(OtherUse(outcome.leaf, "generic", "", node.source))
        else:
            self._refuse(node, views, outcome.reason)

    def _refuse(self, node: Node, views: Sequence[View | None], reason: str) -> None:
        line = node.source
        for view in views:
            if view is not None:
                self.uses.append(OtherUse(view.source, "unmatched", reason, line))

    def _as_bias(
        self,
        node: Node,
        views: Sequence[View | None],
        shift: outcomes.Linear,
        shapes: Sequence[Sequence[int]],
    ) -> outcomes.Linear:
        """Notes on the shift's site which linear output it is the bias of, if any."""
        other = next((a for a in node.inputs if not self.members(a)), None)
        linear = self.linear.get(other) if isinstance(other, int) else None
        view = next(view for view in views if view is not None)
        if (
            linear is None
            or other is None
            or self.counts.get(other) != 1
            or node.name == "sub"
            or linear.site.y_places  # whose outputs are only some of those
            or linear.site.weight is None  # a shift by another parameter
            or linear.site.bias is not None
        ):
            return shift
        plain = consumers.is_one(view.scale) and consumers.is_one(linear.view.scale)
        plain = plain and view.scans == linear.site.scans
        joint = consumers.bias_layout(linear, view, shapes) if plain else None
        if joint is None:
            return shift
        index = next(i for i, use in enumerate(self.uses) if use is linear.site)
        self.uses[index] = dataclasses.replace(linear.site, bias=(view.source, joint))
        return shift

    def _follow_linear(self, node: Node) -> None:
        """Follows the output of a linear layer through views that keep it to itself."""
        atom = node.inputs[0] if node.inputs else None
        linear = self.linear.get(atom) if isinstance(atom, int) else None
        rule = view_rules.TABLE.get(node.name)
        if linear is None or rule is None or self.counts.get(cast("int", atom)) != 1:
            return
        moved = rule(self, node, [linear.view])
        cut = node.name == "slice" and node.out_shape() != node.shape()
        if moved is not None and len(node.inputs) == 1 and not cut:
            self.linear[node.outputs[0]] = dataclasses.replace(linear, view=moved)

    def _fold(self, node: Node) -> None:
        """Evaluates scalars that depend on literals and constants only."""
        if len(node.outputs) != 1 or node.out_shape() != ():
            return
        values = [self.value(atom) for atom in node.inputs]
        if any(value is None for value in values) or not values:
            return
        self.known[node.outputs[0]] = _evaluated(node, values)

    def indices(self, atom: Atom) -> Any:
        """Integers that are made of literals and constants only; None for others."""
        known = self.value(atom)
        if known is not None or not is_value(atom):
            return known
        node = self.makers.get(atom)
        if node is None or node.bodies or len(node.outputs) != 1:
            return None
        whole = jnp.issubdtype(node.equation.outvars[0].aval.dtype, jnp.integer)
        logical = node.equation.outvars[0].aval.dtype == bool
        if not (whole or logical) or math.prod(node.out_shape()) > LARGEST_FOLDED:
            return None
        values = [self.indices(one) for one in node.inputs]
        if any(value is None for value in values):
            return None
        result = self.known[atom] = _evaluated(node, values)
        return result

    def _enter(self, node: Node, shapes: Sequence[Sequence[int]]) -> None:
        members = [self.members(atom) for atom in node.inputs]
        offset = BODY_OFFSETS.get(node.name)
        if offset is None:
            reached = any(out in self.reached for out in node.outputs)
            if reached and any(members):
                why = NO_ENTRY.get(node.name, "discovery does not look into")
                self._refuse(
                    node,
                    [view for some in members for view in some],
                    f"enters `{node.name}`, which {why}",
                )
            return
        inside = {"scan": self._scanned, "shard_map": self._replicated}.get(node.name)
        if inside is not None:
            entered = [
                [inside(node, i, view) for view in some]
                for i, some in enumerate(members)
            ]
            members = [
                tuple(view for view in some if view is not None) for some in entered
            ]
        steps = self.steps
        if node.name == "scan":
            self.steps *= _compat.scan_layout(node.params).length
        for body in node.bodies:
            for value, some, atom in zip(
                body.inputs, members[offset:], node.inputs[offset:], strict=True
            ):
                if some:
                    self.views[value] = some
                elif node.name != "scan" and self.value(atom) is not None:
                    self.known[value] = self.value(atom)
            self.visit(body, shapes)
        self.steps = steps
        self._leave(node)

    def _leave(self, node: Node) -> None:
        """Follows the views that bodies return as they are; reports the others."""
        for i, out in enumerate(node.outputs):
            members = [self.members(body.outputs[i]) for body in node.bodies]
            if out not in self.reached or not any(members):
                continue
            if node.name in RETURNING and all(some is members[0] for some in members):
                self.views[out] = members[0]
                continue
            why = ", whose rule may change its gradient" if has_own_rule(node) else ""
            views = [view for some in members for view in some]
            self._refuse(node, views, f"returned by `{node.name}`{why}")

    def _replicated(self, node: Node, i: int, view: View) -> View | None:
        """The view of an operand of which every device gets the whole."""
        if any(name is not None for name in node.params["in_specs"][i]):
            self._refuse(node, [view], "enters a shard_map in parts")
            return None
        return view

    def _scanned(self, node: Node, i: int, view: View) -> View | None:
        """The view that one step of a scan has of an operand."""
        layout = _compat.scan_layout(node.params)
        first_xs = layout.num_consts + layout.num_carry
        if i < layout.num_consts:
            return dataclasses.replace(view, repeated=True)
        if i < first_xs:
            if node.bodies[0].inputs[i] in self.reached:
                self._refuse(node, [view], "enters the carry of a scan")
            return None
        self.scanned.setdefault(node, set()).add(view.source)
        return view.unstacked(node.outputs[0])


def _lost(leaves: Sequence[int], reached: set[int], uses: Sequence[Use]) -> list[Use]:
    """What would be called unused though gradients reach it, whatever the cause."""
    known: set[int] = set()
    for use in uses:
        if isinstance(use, OtherUse):
            known.add(use.leaf)
        else:
            known.update(part[0] for part in (use.weight, use.bias) if part)
    reason = "gradients reach it in a way that could not be followed"
    return [
        OtherUse(leaf, "unmatched", reason, "")
        for leaf, value in enumerate(leaves)
        if value in reached and leaf not in known
    ]


def _joined(node: Node, members: Sequence[tuple[View, ...]]) -> tuple[View, ...] | None:
    """The views of parameters that are concatenated; None where they are not."""
    if node.name != "concatenate" or not all(members):
        return None
    axis, start = node.params["dimension"], 0
    total = node.out_shape()[axis]
    result: list[View] = []
    for i, some in enumerate(members):
        for view in some:
            placed = view.joined(axis, start, total)
            if placed is None:
                return None
            result.append(placed)
        start += node.shape(i)[axis]
    return tuple(result)


def _one_at_a_time(
    members: Sequence[tuple[View, ...]],
) -> list[list[View | None]] | None:
    """The operands' views with one of several joined ones; None for two joints."""
    several = [i for i, some in enumerate(members) if len(some) > 1]
    if len(several) > 1:
        return None
    first: list[View | None] = [some[0] if some else None for some in members]
    if not several:
        return [first]
    at = several[0]
    return [[*first[:at], view, *first[at + 1 :]] for view in members[at]]


LARGEST_FOLDED = 2**20
"""How many integers are evaluated while planning, at most."""


def _evaluated(node: Node, values: Sequence[Any]) -> Any:
    traced = any(isinstance(value, jax.core.Tracer) for value in values)
    if node.name == "pvary" and not traced:
        return values[0]  # the same number; outside of shard_map nothing varies
    context = contextlib.nullcontext() if traced else jax.ensure_compile_time_eval()
    with context:
        (result,) = _compat.evaluate(node.equation, values)
    return result


CONSUMERS: dict[str, Callable[..., outcomes.Outcome]] = {
    "dot_general": consumers.dot_general,
    "conv_general_dilated": convolution,
    "gather": embedding,
    "concatenate": consumers.concatenated,
    "mul": consumers.scale,
    "add": consumers.shift,
    "sub": consumers.shift,
    "kfac_layer": consumers.tagged,
    "kfac_generic": consumers.generic,
}

RETURNING = ("checkpoint", "remat2", "remat", "cond")
"""Equations whose results are what their bodies return."""

NO_ENTRY = {"while": NO_REVERSE_MODE}
"""Why it does not look into others."""

__all__ = ["CONSUMERS", "Found", "Site", "discover"]
