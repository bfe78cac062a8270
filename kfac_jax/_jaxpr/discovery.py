"""Finds layers by dataflow: follows each parameter to the equation that consumes it.

Separate passes run first for everything that does not need the parameters: which values
gradients reach, which are constants, which are one-hot, and where the examples are.
Biases are found last, as they need the layers.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import jax.numpy as jnp

from kfac_jax._jaxpr.computed import Free, lifted
from kfac_jax._jaxpr.constants import only_of_constants, with_cases
from kfac_jax._jaxpr.finder import Finder
from kfac_jax._jaxpr.graph import (
    Graph,
    Node,
    is_value,
)
from kfac_jax._jaxpr.kinds.chosen import choosing
from kfac_jax._jaxpr.mixing import apart, mixed, reason
from kfac_jax._jaxpr.normalizing import with_constant_means
from kfac_jax._jaxpr.parts import Part
from kfac_jax._jaxpr.separate import joining
from kfac_jax._jaxpr.sites import OtherUse, Use, unmatched
from kfac_jax._jaxpr.slicing import dependent, differentiated
from kfac_jax._jaxpr.states import Examples, Lost, State
from kfac_jax._jaxpr.tracking import outside, track


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The result of discovery.

    Attributes:
      as_written: the program.
      graph: the same, without derivatives through `constant_means`.
      uses: every use of a parameter through which a registered loss has a gradient. An
        index beyond those of parameters is one of `parts`.
      parts: the parts that some parameters are cut in, each of them a weight.
      whole_uses: the uses if such a parameter is one weight, that computes the parts.
      losses: the number of loss tags.
      loss_examples: for each loss tag, where the examples are in the registered output.
      constant_means: means over the cases that the network normalises with, and that
        the curvature takes for constants: the source lines by the results' ids.
      joins_cases: why cases cannot be evaluated one by one; empty if they can.
    """

    as_written: Graph
    graph: Graph
    uses: tuple[Use, ...]
    parts: tuple[Part, ...]
    whole_uses: tuple[Use, ...]
    losses: int
    loss_examples: tuple[State, ...]
    constant_means: Mapping[int, str]
    joins_cases: str


def discover(
    as_written: Graph,
    leaf_shapes: Sequence[Sequence[int]],
    arguments: Sequence[State],
    whole: bool = False,
) -> Found:
    """Finds all uses of the first `len(leaf_shapes)` inputs of the program.

    If no registered output depends on the batch, arrays that the program closes over
    may hold the cases: those that are as long as a loss's cases, where these can be
    followed from there to the outputs.

    Args:
      as_written: the program; its inputs are the parameters, then the arguments.
      leaf_shapes: the shapes of the parameters.
      arguments: for each argument, which axis holds the examples.
      whole: whether uses count that lead to the program's first output, its loss, and
        not those that lead to registered outputs.

    Returns:
      What was found.
    """
    found, has_batch = _discover(as_written, leaf_shapes, arguments, whole, {})
    if has_batch or whole:
        return found
    closed_over = _data_of(as_written, len(leaf_shapes), arguments)
    if not closed_over:
        return found
    other, _ = _discover(as_written, leaf_shapes, arguments, whole, closed_over)
    return other if unmatched(other.uses) <= unmatched(found.uses) else found


def _discover(
    as_written: Graph,
    leaf_shapes: Sequence[Sequence[int]],
    arguments: Sequence[State],
    whole: bool,
    closed_over: Mapping[int, State],
) -> tuple[Found, bool]:
    """What was found, and whether a registered output depends on the batch."""
    losses = [node for node in as_written.walk() if node.name == "kfac_loss"]
    ends = as_written.outputs[:1] if whole else [n.inputs[0] for n in losses]
    wanted = {*filter(is_value, ends)}
    leaves = as_written.inputs[: len(leaf_shapes)]
    start = [*([None] * len(leaves)), *arguments]
    graph, constant = as_written, dict[int, str]()
    if not whole:
        graph, constant = with_constant_means(
            as_written, start, leaves, wanted, closed_over
        )
    tracked = track(
        graph,
        start,
        dependent(graph, leaves),
        constants=constant,
        closed_over=closed_over,
    )
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
    has_batch |= whole and any(arguments)
    walk = functools.partial(_walk, graph, wanted, states, leaves, leaf_shapes)
    finder, uses = walk(frozenset(constant) if has_batch else None)
    # Functions with custom rules count as their bodies here: an operand that the body
    # does not read is for the rule alone, so it is no use that discovery missed. What
    # is computed from a parameter may be such an operand, too.
    reached = differentiated(graph, wanted, rules=False)
    read = [value for value in finder.computed if value in finder.reached]
    part = lifted(graph, read)
    reached |= differentiated(part, {*filter(is_value, part.outputs)})
    both = [
        [*found, *_unaccounted_for(leaves, reached, found, finder.parts)]
        for found in (uses, finder.whole_uses)
    ]
    if has_batch:
        both = [with_cases(x, graph, states) for x in both]
    if has_batch and not whole:
        places = mixed(graph, tracked, wanted)
        makers = graph.sources.makers
        where = next(filter(None, (reason(x, places, makers) for x in both[0])), "")
        both = [apart(x, places, makers) for x in both]
        if where:  # cases cannot be pulled back together
            loss_examples = tuple(Lost(where) if x else x for x in loss_examples)
    uses, whole_uses = map(tuple, both)
    joins = next(
        (f"they may meet in the mean at {line}" for line in constant.values()), ""
    )
    copied = finder.free.copies.axis if finder.free else lambda _: None
    found = Found(
        as_written,
        graph,
        uses,
        finder.parts,
        whole_uses,
        len(losses),
        loss_examples,
        constant,
        joins or joining(graph, tracked, wanted, copied),
    )
    return found, has_batch


def _data_of(graph: Graph, count: int, arguments: Sequence[State]) -> dict[int, State]:
    """Arrays that the program closes over and that hold its cases, with their states.

    Args:
      graph: the program.
      count: the number of parameters, its first inputs.
      arguments: for each argument, which axis holds the examples.

    Returns:
      Those from which the cases alone can be followed to a registered output, if all of
      them together do not lose them.
    """
    losses = [node for node in graph.walk() if node.name == "kfac_loss"]
    outputs = [n.inputs[0] for n in losses if is_value(n.inputs[0])]
    lengths = {node.shape()[0] for node in losses}
    start = [*([None] * count), *arguments]
    below = dependent(graph, graph.inputs[:count])

    def follows(closed_over: Mapping[int, State]) -> bool:
        states = track(graph, start, below, closed_over=closed_over)
        ends = [states.get(x) for x in outputs]
        is_case = (isinstance(x, Examples) and x.axis == 0 for x in ends)
        return any(is_case) and not any(isinstance(x, Lost) for x in ends)

    found: dict[int, State] = {}
    for name, value in graph.sources.constants.items():
        shape = jnp.shape(value)
        if shape and shape[0] in lengths:
            own: dict[int, State] = {name: Examples(0, shape[0])}
            found |= own if follows(own) else {}
    return found if found and follows(found) else {}


def _walk(
    graph: Graph,
    wanted: set[int],
    states: Mapping[int, State],
    leaves: Sequence[int],
    shapes: Sequence[Sequence[int]],
    constants: frozenset[int] | None,
) -> tuple["Finder", list[Use]]:
    """Walks over the program, and again where the first walk has shown what it is.

    Args:
      graph: the program.
      wanted: the ids of the registered outputs.
      states: for each value the axis that holds the examples.
      leaves: the ids of the parameters.
      shapes: the shapes of the parameters.
      constants: values that depend on cases, but count as constants; None if no output
        depends on cases.

    Returns:
      The last walk that counts, and the uses that it found.
    """

    def again(
        by_case: AbstractSet[int] = frozenset(),
        maps: AbstractSet[int] = frozenset(),
        choices: AbstractSet[Node] = frozenset(),
    ) -> tuple[Finder, list[Use]]:
        free = None if constants is None else Free(graph, states, by_case, constants)
        finder = Finder(graph, wanted, states, free, maps, choices)
        return finder, finder.find(leaves, shapes)

    def is_better(other: Finder, others: list[Use]) -> bool:
        """Whether a walk finds all that the last one did."""
        lost = _unaccounted_for(leaves, other.reached, others, other.parts)
        worse = unmatched([*others, *lost]) - unmatched(uses)
        return not worse and other.by_case <= finder.by_case | by_case

    finder, uses = again()
    if constants is None:
        return finder, uses
    by_case = frozenset(finder.by_case)
    if by_case:
        # noise for each case is no weight: what is computed from it is data
        finder, uses = again(by_case)
    maps: set[int] = set()
    while more := only_of_constants(uses) - maps:
        # products with constants that are no layers, but maps to weights of layers
        maps |= more
        walk = again(by_case, maps)
        if not is_better(*walk):
            maps -= more
            break
        finder, uses = walk
    if choices := choosing(graph):
        walk = again(by_case, maps, choices)
        if is_better(*walk):
            return walk
    return finder, uses


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


def _unaccounted_for(
    leaves: Sequence[int],
    reached: set[int],
    uses: Sequence[Use],
    parts: Sequence[Part],
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
    seen.update(part.leaf for part in parts)
    reason = "gradients reach it in a way that could not be followed"
    return [
        OtherUse(leaf, "unmatched", reason, "")
        for leaf, value in enumerate(leaves)
        if value in reached and leaf not in seen
    ]
