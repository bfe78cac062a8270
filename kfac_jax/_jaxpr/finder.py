"""One walk over a program, from each parameter to the equations that consume it.

A parameter is followed through equations that only change its view and into every
nested graph, until an equation combines it with data. The table `kinds.RULES` says
which equations are layers; everything else is recorded as unmatched, with the equation
and the line.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from kfac_jax._jaxpr import _compat, kinds, view_rules
from kfac_jax._jaxpr.biases import Consumed, biases
from kfac_jax._jaxpr.computed import Free, behind, cut, lifted, resolved
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
from kfac_jax._jaxpr.kinds.chosen import chosen
from kfac_jax._jaxpr.kinds.one_hot import as_embedding, one_hot_values
from kfac_jax._jaxpr.kinds.outcome import Generic, Linear, Outcome, Refused
from kfac_jax._jaxpr.parts import Part
from kfac_jax._jaxpr.sites import OtherUse, Site, Use
from kfac_jax._jaxpr.slicing import differentiated, needed
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import View, source_view


class Finder:
    """One walk over the program: the results of earlier passes, and its own."""

    def __init__(
        self,
        graph: Graph,
        wanted: set[int],
        states: Mapping[int, State],
        free: Free | None,
        maps: AbstractSet[int],
        choices: AbstractSet[Node],
    ) -> None:
        self.graph = graph
        self.states = states
        # without data, nothing is computed before it meets data
        self.free = free
        self.maps = maps  # products with constants that are no layers
        self.live = needed(graph, wanted)
        # values that gradients reach: behind a stop_gradient a parameter is data
        self.reached = differentiated(graph, wanted)
        self.folded = Folded(graph, self.live)
        self.one_hot = one_hot_values(graph)
        self.choices = choices  # gathers whose windows are weights
        self.on_devices = _on_devices(graph)
        # a tuple, as a concatenation or a sum is a view of several parameters
        self.views: dict[int, tuple[View, ...]] = {}
        self.behind_layers: set[int] = set()  # values computed from outputs of layers
        self.layers: dict[Node, list[Consumed]] = {}
        self.uses: list[Use] = []
        self.leaves: Sequence[int] = ()
        self.computed: list[int] = []  # weights that are computed from parameters
        self.copied: dict[int, int] = {}  # the axis of copies of some of these
        self.by_case: set[int] = set()  # those that differ from case to case
        self.parts: tuple[Part, ...] = ()  # of parameters that are cut
        self.whole_uses: list[Use] = []  # if they are not

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
        origins = behind(uses, self.graph, leaves, self.computed)
        cuts = cut(uses, origins, leaves, shapes, self.folded.value)
        self.parts = tuple(sorted({*cuts.values()}))
        known = uses, origins, self.graph, leaves, self.computed
        self.whole_uses = resolved(*known, {}, self.copied)
        return resolved(*known, cuts, self.copied) if cuts else self.whole_uses

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
                if not (reached and members and self._compute(node, steps)):
                    self._enter(node, steps)
            elif reached:
                self._step(node, steps)

    def _compute(self, node: Node, steps: int) -> bool:
        """Makes an equation's results computed weights, if they may be."""
        if self.free is None or not self.free.computes(node):
            return False
        for i, out in enumerate(node.outputs):
            if out in self.reached:
                self._as_computed(out, node.out_shape(i), steps)
        return True

    def _as_computed(self, value: int, shape: Sequence[int], steps: int) -> None:
        index = len(self.leaves) + len(self.computed)
        self.computed.append(value)
        view = source_view(index, shape)
        axis = None if self.free is None else self.free.copies.axis(value)
        if axis is not None:
            self.copied[value] = axis
            others = [i for i in range(len(shape)) if i != axis]
            view = source_view(index, [shape[i] for i in others])
            view = view.broadcast(shape, others)
        self.views[value] = (dataclasses.replace(view, repeated=steps > 1),)

    def _compute_operands(self, node: Node, steps: int) -> bool:
        """Makes operands that are views computed weights; whether there are any."""
        found = False
        for i, atom in enumerate(node.inputs):
            old = not is_value(atom) or atom in self.computed or atom in self.leaves
            if self.free is None or old or not self.members(atom):
                continue
            if self.free.has(atom):
                self._as_computed(atom, node.shape(i), steps)
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
            if self._compute(node, steps):
                return
            if self._compute_operands(node, steps):
                return self._step(node, steps)
            views = [view for some in members for view in some]
            self._refuse(node, views, f"joined and then combined by `{node.name}`")
            return
        if node in self.choices and len(choices) == 1 and choices[0][1] is None:
            table = choices[0][0]
            one = chosen(node, table) if table is not None else None
            if one is not None and self.states.get(node.inputs[1]) is not None:
                self.views[node.outputs[0]] = (one,)
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
        computes = node.outputs[0] in self.maps or any(
            may_compute(node, outcome) for outcome in outcomes
        )
        if computes and self._compute(node, steps):
            return
        # a slice or a repetition that is no layer's may be a map that leads to one
        refused = any(isinstance(outcome, Refused) for outcome in outcomes)
        if refused and self._compute_operands(node, steps):
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
        shape = dict(enumerate(linear.shape))
        count = steps * math.prod(shape.get(axis, 1) for axis in linear.axes.rows)
        site = as_embedding(linear.site, self.one_hot)
        on_device = at in self.on_devices
        site = dataclasses.replace(site, count=count, on_device=on_device)
        linear = dataclasses.replace(linear, site=site)
        known, added = self._in_tag(node, views)
        state = self.states.get(node.outputs[0])
        if site.leaf >= len(self.leaves) and varies(site, state):
            part = lifted(self.graph, [self.computed[site.leaf - len(self.leaves)]])
            reached = differentiated(part, {*filter(is_value, part.outputs)})
            self.by_case.update(reached.intersection(self.computed))
        self.layers.setdefault(node, []).append(Consumed(linear, views))
        self.behind_layers.update(node.outputs)
        if not known:
            self.uses.append(site)
        if linear.shift is not None and not added:
            self.uses.append(dataclasses.replace(linear.shift, count=count))

    def _in_tag(self, node: Node, views: Sequence[View | None]) -> tuple[bool, bool]:
        """Whether a tag's weight, and its bias, have been recorded already.

        Either may be a sum, of which each term comes with the other in turn.
        """
        if node.name != "kfac_layer":
            return False, False
        weight = 1 + node.params["num_inputs"]
        earlier = [x.views for x in self.layers.get(node, [])]
        return (
            any(old[weight] is views[weight] for old in earlier),
            any(old[-1] is views[-1] for old in earlier),
        )

    def _refuse(self, node: Node, views: Sequence[View | None], reason: str) -> None:
        line, at = node.source, node.outputs[0] if node.outputs else None
        for view in views:
            if view is not None:
                self.uses.append(OtherUse(view.source, "unmatched", reason, line, at))

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
                [inside(node, i, view, steps) for view in some]
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

    def _replicated(self, node: Node, i: int, view: View, steps: int) -> View | None:
        """The view of an operand that every device gets in full."""
        del steps
        if any(name is not None for name in node.params["in_specs"][i]):
            self._refuse(node, [view], "enters a shard_map in parts")
            return None
        return view

    def _start(self, node: Node, at: int, view: View, state: State, steps: int) -> None:
        """Records a parameter with which a loop's carry starts, as a shift."""
        site = kinds.started(node, at, view, state)
        if isinstance(site, Refused):
            self._refuse(node, [view], site.reason)
            return
        count = steps * math.prod(node.shape(at)[a] for a in site.reader.y_axes.rows)
        self.uses.append(dataclasses.replace(site, count=count))

    def _scanned(self, node: Node, i: int, view: View, steps: int) -> View | None:
        """The view that one step of a scan has of an operand.

        A constant operand is seen by all steps, a scanned one slice by slice. Carries
        differ from step to step, so they are views of no parameter.
        """
        layout = _compat.scan_layout(node.params)
        first_xs = layout.num_consts + layout.num_carry
        if i < layout.num_consts:
            return dataclasses.replace(view, repeated=True)
        if i < first_xs:
            inner = node.bodies[0].inputs[i]
            if inner in self.reached:
                self._start(node, i, view, self.states.get(inner), steps)
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


RETURNING = ("checkpoint", "remat2", "remat", "cond")
"""Equations whose results are what their bodies return."""

NO_ENTRY = {"while": NO_REVERSE_MODE}
"""Why discovery does not look into some equations, for messages."""
