"""Rules that track by dataflow which axis of a value holds the examples of the batch.

The leading axes of the loss function's array arguments are axes of examples. Each rule
says where a primitive moves such an axis. A value that depends on the batch in a way
that no rule covers is `LOST`: approximations that sum within an example are refused for
layers that use it.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kfac_jax._jaxpr import batched
from kfac_jax._jaxpr.batch_means import with_means
from kfac_jax._jaxpr.graph import Atom, Node, is_value
from kfac_jax._jaxpr.states import (
    LOST,
    Examples,
    Lost,
    OfBatch,
    Rule,
    Scanned,
    State,
    merge,
)


def _elementwise(node: Node, states: Sequence[State]) -> list[State]:
    """Operands of one shape, or of length 1 along some axes."""
    shape = node.out_shape()
    for i, state in enumerate(states):
        if isinstance(state, Examples):
            operand = node.shape(i)
            if len(operand) != len(shape) or operand[state.axis] != shape[state.axis]:
                return [LOST] * len(node.outputs)
    return [merge(states)] * len(node.outputs)


def _transpose(node: Node, states: Sequence[State]) -> list[State]:
    (state,) = states
    if isinstance(state, Examples):
        axis = list(node.params["permutation"]).index(state.axis)
        return [dataclasses.replace(state, axis=axis)]
    return [state]


def _broadcast(node: Node, states: Sequence[State]) -> list[State]:
    state = states[0]
    if isinstance(state, Examples):
        axis = node.params["broadcast_dimensions"][state.axis]
        if node.out_shape()[axis] != node.shape()[state.axis]:
            return [LOST]
        return [dataclasses.replace(state, axis=axis)]
    return [state]


def _drop(node: Node, state: State, axes: Sequence[int]) -> State:
    if isinstance(state, Examples):
        if state.axis in axes:
            return LOST
        return dataclasses.replace(
            state, axis=state.axis - sum(a < state.axis for a in axes)
        )
    return state


def _squeeze(node: Node, states: Sequence[State]) -> list[State]:
    return [_drop(node, states[0], node.params["dimensions"])]


def _reduce(node: Node, states: Sequence[State]) -> list[State]:
    return [_drop(node, states[0], node.params["axes"])]


def _reshape(node: Node, states: Sequence[State]) -> list[State]:
    state = states[0]
    if not isinstance(state, Examples):
        return [state]
    old, new = node.shape(), node.out_shape()
    order = node.params["dimensions"]
    if order is not None:  # transposes first
        state = dataclasses.replace(state, axis=tuple(order).index(state.axis))
        old = tuple(old[a] for a in order)
    before = math.prod(old[: state.axis]) * state.outer
    found: list[Examples] = []
    for axis, size in enumerate(new):
        start = math.prod(new[:axis])
        # In row-major order one example's entries are `before` blocks apart. The new
        # axis begins after `start` blocks. So it has `before / start` outer entries,
        # then the examples, then what is left of its size.
        if before % start == 0 and (start * size) % (before * state.size) == 0:
            outer = before // start
            inner = size // (outer * state.size)
            if inner and outer * state.size * inner == size:
                found.append(Examples(axis, state.size, outer, inner))
    if not found:
        return [LOST]
    # a single example may be along any axis of length 1, or be a part of longer ones
    near = lambda x: (x.outer * x.inner, abs(x.axis - state.axis))  # noqa: E731
    return [min(found, key=near)]


def _dot_general(node: Node, states: Sequence[State]) -> list[State]:
    (contract, batch) = node.params["dimension_numbers"]
    results: list[State] = []
    lhs_free = len(node.shape(0)) - len(contract[0])
    for side, state in enumerate(states[:2]):
        if not isinstance(state, Examples):
            results.append(state)
        elif state.axis in contract[side]:
            results.append(LOST)
        elif state.axis in batch[side]:
            axis = list(batch[side]).index(state.axis)
            results.append(dataclasses.replace(state, axis=axis))
        else:
            used = (*contract[side], *batch[side])
            axis = state.axis - sum(a < state.axis for a in used)
            axis += lhs_free if side else len(batch[0])
            results.append(dataclasses.replace(state, axis=axis))
    return [merge(results)]


def _convolution(node: Node, states: Sequence[State]) -> list[State]:
    """The examples are images, or groups of channels.

    `vmap` over images and kernels together (or over both's cotangents) puts the mapped
    axis into the channels: an example is then one or several groups.
    """
    numbers = node.params["dimension_numbers"]
    if node.params["batch_group_count"] != 1:
        return [LOST]
    images, kernels = states
    results: list[State] = [images, kernels]
    groups, features = node.params["feature_group_count"], numbers.out_spec[1]
    per_group = node.shape(1)[numbers.rhs_spec[0]] // groups
    if isinstance(images, Examples):
        # how many groups each example has: an example's channels over a group's
        own_groups = images.inner // node.shape(1)[numbers.rhs_spec[1]]
        if images.axis == numbers.lhs_spec[0]:
            results[0] = dataclasses.replace(images, axis=numbers.out_spec[0])
        elif images.axis == numbers.lhs_spec[1] and (
            images.outer * images.size * own_groups == groups
        ):
            inner = own_groups * per_group
            results[0] = dataclasses.replace(images, axis=features, inner=inner)
        else:
            results[0] = LOST
    if isinstance(kernels, Examples):
        # the examples' boundaries must be boundaries of groups
        by_group = (
            kernels.axis == numbers.rhs_spec[0] and kernels.inner % per_group == 0
        )
        results[1] = dataclasses.replace(kernels, axis=features) if by_group else LOST
    return [merge(results)]


def _along(param: str) -> Rule:
    """A rule for primitives that mix entries along axes named by a parameter.

    The axis of examples must not be among them.
    """

    def rule(node: Node, states: Sequence[State]) -> list[State]:
        value = node.params[param]
        axes = value if isinstance(value, tuple | list) else (value,)
        return [_keep(merge(states), axes)] * len(node.outputs)

    return rule


def _keep(state: State, axes: Sequence[int]) -> State:
    """The state, unless its axis of examples is one of `axes`."""
    return LOST if isinstance(state, Examples) and state.axis in axes else state


def _unstack(node: Node, states: Sequence[State]) -> list[State]:
    return [_drop(node, states[0], (node.params["axis"],))] * len(node.outputs)


def _stack(node: Node, states: Sequence[State]) -> list[State]:
    """Stacks operands along a new axis at `axis`."""
    merged = merge(states)
    if isinstance(merged, Examples):
        moved = merged.axis + (merged.axis >= node.params["axis"])
        return [dataclasses.replace(merged, axis=moved)]
    return [merged]


def _top_k(node: Node, states: Sequence[State]) -> list[State]:
    """Works along the last axis, or since JAX 0.8 along `axis`."""
    last = len(node.shape()) - 1
    return [_keep(states[0], (node.params.get("axis", last),))] * len(node.outputs)


def _same_size(node: Node, states: Sequence[State]) -> list[State]:
    """Slices and pads, which must not change the length of the axis of examples."""
    state = states[0]
    if isinstance(state, Examples):
        if node.out_shape()[state.axis] != node.shape()[state.axis]:
            return [LOST]
        if any(other is not None for other in states[1:]):
            return [LOST]
    return [state] if isinstance(state, Examples) else [merge(states)]


def _window(node: Node, states: Sequence[State]) -> list[State]:
    """Reductions over windows, which must not span several examples."""
    state = states[0]
    if isinstance(state, Examples):
        if node.params["window_dimensions"][state.axis] != 1:
            return [LOST]
    return _same_size(node, states)


_OPAQUE = ("pallas_call", "ffi_call", "pure_callback", "io_callback")
"""Primitives that may mix entries, although operands and results have one shape."""

RULES: dict[str, Rule] = {
    **batched.RULES,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "concatenate": _along("dimension"),
    "rev": _along("dimensions"),
    "sort": _along("dimension"),
    "split": _along("axis"),
    "stack": _stack,
    "unstack": _unstack,
    "slice": _same_size,
    "pad": _same_size,
    "dynamic_slice": _same_size,
    **dict.fromkeys(_OPAQUE, lambda node, _: [LOST] * len(node.outputs)),
    **{f"reduce_window_{name}": _window for name in ("max", "sum", "min")},
    "tile": _same_size,
    "top_k": _top_k,
    "approx_top_k": _along("reduction_dimension"),
}
RULES.update(
    {
        name: lambda node, states: [states[0]]
        for name in ("kfac_layer", "kfac_loss", "kfac_generic")
    }
)
RULES.update(
    {
        f"cum{name}": _along("axis")
        for name in ("sum", "prod", "max", "min", "logsumexp")
    }
)
RULES.update(
    {
        f"reduce_{name}": _reduce
        for name in ("sum", "max", "min", "prod", "and", "or", "xor")
    }
)
RULES.update({name: _reduce for name in ("argmax", "argmin")})
RULES["reduce"] = lambda node, states: (
    [_drop(node, merge(states), node.params["dimensions"])] * len(node.outputs)
)


def propagate(
    node: Node,
    read: Callable[[Atom], State],
    dependent: Collection[int] | None = None,
) -> list[State]:
    """Returns where the examples are in the results of an equation without bodies.

    Args:
      node: the equation.
      read: the state of each operand.
      dependent: the values that depend on parameters, if they are known. Others cannot
        mix the gradients of different examples, so that data whose axis is lost (a mean
        over the batch) leave that of an operand that they are combined with by entry.

    Returns:
      The states of the results.
    """
    states = [read(atom) if is_value(atom) else None for atom in node.inputs]
    has_axis = any(isinstance(state, Examples) for state in states)
    has_means = any(isinstance(state, OfBatch) for state in states)
    by_entry = works_by_entry(node)
    if dependent is not None and (has_axis or has_means) and by_entry:
        states = [
            None if isinstance(state, Lost) and atom not in dependent else state
            for atom, state in zip(node.inputs, states, strict=True)
        ]
    if has_means:
        result = with_means(node, states, by_entry=by_entry)
        if not isinstance(result, list):
            return [result] * len(node.outputs)
        states = result
    if all(state is None for state in states):
        return [None] * len(node.outputs)
    if node.name == "device_put":  # of several arrays, which do not meet
        return list(states)
    merged = merge(states)
    if isinstance(merged, Scanned):  # all operands belong to one example: none can mix
        return [merged] * len(node.outputs)
    rule = RULES.get(node.name)
    if rule is None:
        rule = _elementwise if by_entry else _lost
    results = rule(node, states)
    if all(isinstance(s, Examples) and s.size == 1 for s in states if s is not None):
        results = [_of_one(node, i, x) for i, x in enumerate(results)]
    return named(node, states, results)


def _of_one(node: Node, index: int, state: State) -> State:
    """The state of a result that belongs to the only example, whatever its axes are.

    Axes of length 1 look alike, so rules may take one for another and lose it.
    """
    shape = node.out_shape(index)
    if not isinstance(state, Lost) or not shape:
        return state
    return Examples(0, 1, 1, shape[0])


def named(node: Node, before: Sequence[State], after: Sequence[State]) -> list[State]:
    """Records where the axis was lost: here, unless an operand had lost it before."""
    if not any(isinstance(state, Lost) for state in after):
        return list(after)
    lost = next((s for s in before if isinstance(s, Lost) and s.where), None)
    if lost is None:
        lost = Lost(f"{node.name} at {node.source}" if node.source else node.name)
    return [lost if isinstance(state, Lost) else state for state in after]


def _lost(node: Node, states: Sequence[State]) -> list[State]:
    return [LOST] * len(node.outputs)


def works_by_entry(node: Node) -> bool:
    """Whether an equation may be taken for one that works entry by entry.

    It may if all shapes are equal, as every primitive that mixes entries in spite of
    equal shapes has a rule.
    """
    if node.bodies or node.name in RULES or not node.outputs:
        return False
    shape: Any = node.out_shape()
    if any(node.out_shape(i) != shape for i in range(len(node.outputs))):
        return False
    return all(len(node.shape(i)) in (0, len(shape)) for i, _ in enumerate(node.inputs))
