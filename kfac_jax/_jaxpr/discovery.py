"""Finds layers by dataflow: follows each parameter to the equation that consumes it.

A parameter is followed through equations that only change its view and into every
nested graph, until an equation combines it with data. The table `kinds.RULES` says
which equations are layers; everything else is recorded as unmatched, with the equation
and the line.

Separate passes run first for everything that does not need the parameters: which values
gradients reach, which are constants, which are one-hot, and where the examples are.
Biases are found last, as they need the layers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr import _compat, kinds, view_rules
from kfac_jax._jaxpr.biases import Consumed, biases
from kfac_jax._jaxpr.computed import Free, lifted, resolved
from kfac_jax._jaxpr.constants import with_cases
from kfac_jax._jaxpr.differentiation import NO_REVERSE_MODE
from kfac_jax._jaxpr.equations import (
    joined,
    may_compute,
    one_at_a_time,
    varies,
)
from kfac_jax._jaxpr.folding import Folded
from kfac_jax._jaxpr.graph import (
    BODY_OFFSETS,
    Atom,
    Graph,
    Node,
    has_own_rule,
    is_value,
    read_inputs,
)
from kfac_jax._jaxpr.kinds.one_hot import as_embedding, one_hot_values
from kfac_jax._jaxpr.kinds.outcome import Generic, Linear, Outcome, Refused
from kfac_jax._jaxpr.mixing import mixed
from kfac_jax._jaxpr.sites import OtherUse, Site, Use
from kfac_jax._jaxpr.slicing import dependent, differentiated, needed
from kfac_jax._jaxpr.states import Examples, Lost, State
from kfac_jax._jaxpr.tracking import outside, track
from kfac_jax._jaxpr.view import View, source_view


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The result of discovery.

    Attributes:
      graph: the program.
      uses: every use of a parameter through which a registered loss has a gradient.
      losses: the number of loss tags.
      loss_examples: for each loss tag, where the examples are in the registered output.
    """

    graph: Graph
    uses: tuple[Use, ...]
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
    leaves = graph.inputs[: len(leaf_shapes)]
    start = [*([None] * len(leaves)), *arguments]
    tracked = track(graph, start, dependent(graph, leaves))
    states = outside(tracked)
    loss_examples = tuple(_examples(node, states) for node in losses)
    origins = graph.sources.makers
    # Only a network that depends on the batch can have a layer that does not: if no
    # output does (a fixed set of points is the batch), constants are the data.
    has_batch = any(
        states.get(node.inputs[0]) is not None
        or _is_repeated(state, origins.get(node.inputs[0]))
        for node, state in zip(losses, loss_examples, strict=True)
        if is_value(node.inputs[0])
    )
    free = Free(graph, states) if has_batch else None
    finder = _Finder(graph, wanted, states, free)
    uses = finder.find(leaves, leaf_shapes)
    if free is not None and finder.by_case:
        # noise for each case is no weight: what is computed from it is data
        free = Free(graph, states, finder.by_case)
        finder = _Finder(graph, wanted, states, free)
        uses = finder.find(leaves, leaf_shapes)
    # Functions with custom rules count as their bodies here: an operand that the body
    # does not read is for the rule alone, so it is no use that discovery missed. What
    # is computed from a parameter may be such an operand, too.
    reached = differentiated(graph, wanted, rules=False)
    read = [value for value in finder.computed if value in finder.reached]
    part = lifted(graph, read)
    reached |= differentiated(part, {*filter(is_value, part.outputs)})
    uses += _unaccounted_for(leaves, reached, uses)
    if has_batch:
        uses = with_cases(uses, graph, states)
        places = mixed(graph, tracked, wanted)
        uses, where = _apart(uses, places)
        if where:  # cases cannot be pulled back together
            loss_examples = tuple(Lost(where) if x else x for x in loss_examples)
    return Found(graph, tuple(uses), len(losses), loss_examples)


def _apart(uses: Sequence[Use], mixed: Mapping[int, str]) -> tuple[list[Use], str]:
    """Forgets the examples of uses that a loss mixes; returns one of the reasons."""
    result, where = list[Use](), ""
    for use in uses:
        reason = ""
        if isinstance(use, Site) and isinstance(use.examples, Examples):
            place, *_ = use.output if isinstance(use.output, tuple) else (use.output,)
            reason = mixed.get(place, "")
        if reason:
            use = dataclasses.replace(use, examples=Lost(reason))
            where = where or reason
        result.append(use)
    return result, where


def _examples(loss: Node, states: Mapping[int, State]) -> State:
    """The state of a registered output or, if that has none, of its targets."""
    operands = (states.get(atom) for atom in loss.inputs if is_value(atom))
    return next((state for state in operands if state is not None), None)


def _is_repeated(examples: State, maker: Node | None) -> bool:
    """Whether a single output was broadcast over the examples, as by `vmap`."""
    return (
        isinstance(examples, Examples)
        and maker is not None
        and maker.name == "broadcast_in_dim"
        and examples.axis not in maker.params["broadcast_dimensions"]
    )


class _Finder:
    """One walk over the program: the results of earlier passes, and its own."""

    def __init__(
        self,
        graph: Graph,
        wanted: set[int],
        states: Mapping[int, State],
        free: Free | None,
    ) -> None:
        self.graph = graph
        self.states = states
        # without data, nothing is computed before it meets data
        self.free = free
        self.live = needed(graph, wanted)
        # values that gradients reach: behind a stop_gradient a parameter is data
        self.reached = differentiated(graph, wanted)
        self.folded = Folded(graph, self.live)
        self.one_hot = one_hot_values(graph)
        self.on_devices = _on_devices(graph)
        # a tuple, as a concatenation or a sum is a view of several parameters
        self.views: dict[int, tuple[View, ...]] = {}
        self.behind_layers: set[int] = set()  # values computed from outputs of layers
        self.layers: dict[Node, list[Consumed]] = {}
        self.uses: list[Use] = []
        self.leaves: Sequence[int] = ()
        self.computed: list[int] = []  # weights that are computed from parameters
        self.by_case: set[int] = set()  # those that differ from case to case

    def find(self, leaves: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[Use]:
        """Returns the uses of the parameters that the values `leaves` are."""
        self.leaves = leaves
        for i, (value, shape) in enumerate(zip(leaves, shapes, strict=True)):
            self.views[value] = (source_view(i, shape),)
        self._visit(self.graph, 1)
        added = biases(self.graph, self.layers, self.folded)
        uses = [
            dataclasses.replace(use, bias=added[use])
            if isinstance(use, Site) and use in added
            else use
            for use in self.uses
        ]
        return resolved(uses, self.graph, leaves, self.computed)

    def members(self, atom: Atom) -> tuple[View, ...]:
        """The views that a value consists of; none for data."""
        return self.views.get(atom, ()) if is_value(atom) else ()

    def _visit(self, graph: Graph, steps: int) -> None:
        """Visits a graph that is run `steps` times in the program."""
        for node in graph.nodes:
            if self.free is not None:
                self.free.note(node)
            if any(is_value(x) and x in self.behind_layers for x in node.inputs):
                self.behind_layers.update(node.outputs)
            reached = any(out in self.reached for out in node.outputs)
            if node.bodies:
                members = any(self.members(atom) for atom in node.inputs)
                if not (reached and members and self._compute(node)):
                    self._enter(node, steps)
            elif reached:
                self._step(node, steps)

    def _compute(self, node: Node) -> bool:
        """Makes an equation's results computed weights, if they may be."""
        if self.free is None or not self.free.computes(node):
            return False
        for i, out in enumerate(node.outputs):
            self._as_computed(out, node.out_shape(i))
        return True

    def _as_computed(self, value: int, shape: Sequence[int]) -> None:
        index = len(self.leaves) + len(self.computed)
        self.computed.append(value)
        self.views[value] = (source_view(index, shape),)

    def _compute_operands(self, node: Node) -> bool:
        """Makes operands that are views computed weights; whether there are any."""
        found = False
        for i, atom in enumerate(node.inputs):
            old = not is_value(atom) or atom in self.computed or atom in self.leaves
            if self.free is None or old or not self.members(atom):
                continue
            if self.free.has(atom):
                self._as_computed(atom, node.shape(i))
                found = True
        return found

    def _step(self, node: Node, steps: int) -> None:
        members = [self.members(atom) for atom in node.inputs]
        if node.name == "kfac_layer" and read_inputs(node) == node.inputs[:1]:
            members = members[:1]  # a convolution's: it was found where `y` was made
        if not any(members):
            return
        together = joined(node, members) or self._summed(node, members)
        if together is not None:
            self.views[node.outputs[0]] = together
            return
        choices = one_at_a_time(members, node.name in kinds.BY_OPERAND)
        if choices is None:
            if self._compute(node):
                return
            if self._compute_operands(node):
                return self._step(node, steps)
            views = [view for some in members for view in some]
            self._refuse(node, views, f"joined and then combined by `{node.name}`")
            return
        # View rules come before those of layers. `mul` and `gather` have both, and a
        # product with a constant, or a slice, is no layer.
        rule = view_rules.TABLE.get(node.name)
        moved = [rule(self.folded, node, views) for views in choices] if rule else []
        found = tuple(view for view in moved if view is not None)
        if found and len(found) == len(choices):
            self.views[node.outputs[0]] = found
            return
        outcomes = [self._outcome(node, views) for views in choices]
        if any(may_compute(node, x) for x in outcomes) and self._compute(node):
            return
        # a slice or a repetition that is no layer's may be a map that leads to one
        refused = any(isinstance(outcome, Refused) for outcome in outcomes)
        if refused and self._compute_operands(node):
            return self._step(node, steps)
        for views, outcome in zip(choices, outcomes, strict=True):
            self._consume(node, views, outcome, steps)

    def _summed(
        self, node: Node, members: Sequence[tuple[View, ...]]
    ) -> tuple[View, ...] | None:
        """The views of a sum of parameters and of what does not depend on the batch.

        `w0 + delta`, and a straight-through `w + stop_gradient(q - w)`: the derivative
        by each parameter is that by the sum. What comes out of a layer is no such term,
        though its input may be constant: a parameter added to it is a bias.

        Args:
          node: the equation.
          members: the views that its operands consist of.

        Returns:
          All views; None if the equation is another sum, or none.
        """
        if node.name not in ("add", "sub", "add_any"):
            return None
        result: list[View] = []
        for i, (atom, some) in enumerate(zip(node.inputs, members, strict=True)):
            data = is_value(atom) and (
                self.states.get(atom) is not None or atom in self.behind_layers
            )
            if (some and node.shape(i) != node.out_shape()) or (data and not some):
                return None
            sign = -1.0 if node.name == "sub" and i == 1 else 1.0
            result += some if sign == 1.0 else [view.scaled(sign) for view in some]
        return tuple(result)

    def _outcome(self, node: Node, views: Sequence[View | None]) -> Outcome:
        rule = kinds.RULES.get(node.name)
        if rule is None:
            return Refused(f"consumed by `{node.name}`, which is not a layer")
        return rule(node, views, self.states.get(node.outputs[0]))

    def _consume(
        self, node: Node, views: Sequence[View | None], outcome: Outcome, steps: int
    ) -> None:
        match outcome:
            case Generic():
                self.uses.append(OtherUse(outcome.leaf, "generic", "", node.source))
            case Refused():
                self._refuse(node, views, outcome.reason)
            case Linear():
                self._add(node, views, outcome, steps)

    def _add(
        self, node: Node, views: Sequence[View | None], linear: Linear, steps: int
    ) -> None:
        """Records a layer that is used in each of `steps` steps."""
        at = linear.site.output
        at = at[0] if isinstance(at, tuple) else at
        count = steps * math.prod(linear.shape[axis] for axis in linear.axes.rows)
        site = as_embedding(linear.site, self.one_hot)
        on_device = at in self.on_devices
        site = dataclasses.replace(site, count=count, on_device=on_device)
        linear = dataclasses.replace(linear, site=site)
        # a tag's bias is added once, however many terms its weight has
        first = node not in self.layers
        state = self.states.get(node.outputs[0])
        if site.leaf >= len(self.leaves) and varies(site, state):
            part = lifted(self.graph, [self.computed[site.leaf - len(self.leaves)]])
            made = {out for inner in part.walk() for out in inner.outputs}
            self.by_case.update(made.intersection(self.computed))
        self.layers.setdefault(node, []).append(Consumed(linear, views))
        self.behind_layers.update(node.outputs)
        self.uses.append(site)
        if linear.shift is not None and first:
            self.uses.append(dataclasses.replace(linear.shift, count=count))

    def _refuse(self, node: Node, views: Sequence[View | None], reason: str) -> None:
        line = node.source
        for view in views:
            if view is not None:
                self.uses.append(OtherUse(view.source, "unmatched", reason, line))

    def _enter(self, node: Node, steps: int) -> None:
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
        if self.free is not None:
            self.free.enter(node)
        if node.name == "scan":
            steps *= _compat.scan_layout(node.params).length
        for body in node.bodies:
            self.views.update(zip(body.inputs, members[offset:], strict=True))
            self._note_layers(node, body, node.inputs[offset:])
            self._visit(body, steps)
            for out, inner in zip(node.outputs, body.outputs, strict=True):
                if is_value(inner) and inner in self.behind_layers:
                    self.behind_layers.add(out)
        self._leave(node)

    def _note_layers(self, node: Node, body: Graph, operands: Sequence[Atom]) -> None:
        """Notes which operands of a body are computed from outputs of layers."""
        behind = [is_value(x) and x in self.behind_layers for x in operands]
        if node.name == "scan":  # a carry may be, from its second step on
            layout = _compat.scan_layout(node.params)
            first = layout.num_consts
            behind[first : first + layout.num_carry] = [True] * layout.num_carry
        self.behind_layers.update(
            value for value, yes in zip(body.inputs, behind, strict=True) if yes
        )

    def _leave(self, node: Node) -> None:
        """Follows views that all bodies return alike; refuses the others."""
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
        """The view of an operand that every device gets in full."""
        if any(name is not None for name in node.params["in_specs"][i]):
            self._refuse(node, [view], "enters a shard_map in parts")
            return None
        return view

    def _scanned(self, node: Node, i: int, view: View) -> View | None:
        """The view that one step of a scan has of an operand.

        A constant operand is seen by all steps, a scanned one slice by slice. Carries
        differ from step to step, so they are views of no parameter.
        """
        layout = _compat.scan_layout(node.params)
        first_xs = layout.num_consts + layout.num_carry
        if i < layout.num_consts:
            return dataclasses.replace(view, repeated=True)
        if i < first_xs:
            if node.bodies[0].inputs[i] in self.reached:
                self._refuse(node, [view], "enters the carry of a scan")
            return None
        return view.unstacked(node.outputs[0])


def _on_devices(graph: Graph) -> set[int]:
    """The values that each device of a `shard_map` in the program has for itself."""
    return {
        out
        for node in graph.walk()
        if node.name == "shard_map"
        for body in node.bodies
        for inner in body.walk()
        for out in inner.outputs
    }


def _unaccounted_for(
    leaves: Sequence[int], reached: set[int], uses: Sequence[Use]
) -> list[Use]:
    """Reports parameters without any use although gradients reach them.

    A safety net: without it a gap in this module would make such a parameter "unused",
    which needs no report, and its curvature would be ignored in silence.
    """
    seen: set[int] = set()
    for use in uses:
        if isinstance(use, OtherUse):
            seen.add(use.leaf)
        else:
            seen.update(p.leaf for p in (use.weight, use.bias) if p)
    reason = "gradients reach it in a way that could not be followed"
    return [
        OtherUse(leaf, "unmatched", reason, "")
        for leaf, value in enumerate(leaves)
        if value in reached and leaf not in seen
    ]


RETURNING = ("checkpoint", "remat2", "remat", "cond")
"""Equations whose results are what their bodies return."""

NO_ENTRY = {"while": NO_REVERSE_MODE}
"""Why discovery does not look into some equations, for messages."""
