"""Rules for batched primitives: linear algebra, indexing and random numbers.

These primitives do the same for each entry of some batch axes, which `vmap` adds in
front or names in a parameter. An axis of examples among the batch axes stays one.
"""

import dataclasses
from collections.abc import Callable, Sequence

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.states import LOST, Examples, Rule, State, merge

_CORE_AXES: dict[str, tuple[int, ...]] = {
    "cholesky": (2,),
    "cholesky_update": (2, 1),
    "eig": (2,),
    "eigh": (2,),
    "geqp3": (2, 1),
    "geqrf": (2,),
    "hessenberg": (2,),
    "householder_product": (2, 1),
    "lu": (2,),
    "lu_pivots_to_permutation": (1,),
    "ormqr": (2, 1, 2),
    "qr": (2,),
    "schur": (2,),
    "svd": (2,),
    "symmetric_product": (2, 2),
    "tridiagonal": (2,),
    "tridiagonal_solve": (1, 1, 1, 2),
    "random_bits": (0,),
    "random_fold_in": (0, 0),
    "random_seed": (0,),
    "random_split": (0,),
    "random_unwrap": (0,),
    "random_wrap": (1,),
}
"""The number of each operand's core axes: the last ones, which hold the matrix, vector
or raw key that the primitive works on. All axes before them are batch axes, which come
first in the results too."""


def _leading(core_axes: Sequence[int]) -> Rule:
    def rule(node: Node, states: Sequence[State]) -> list[State]:
        leading: list[State] = []
        for i, (state, count) in enumerate(zip(states, core_axes, strict=True)):
            in_core = isinstance(state, Examples) and (
                state.axis >= len(node.shape(i)) - count
            )
            leading.append(LOST if in_core else state)
        return [merge(leading)] * len(node.outputs)

    return rule


def _triangular_solve(node: Node, states: Sequence[State]) -> list[State]:
    """Of right sides of one matrix each is solved for alone.

    `vmap` over right sides puts the mapped axis among the columns.
    """
    free = len(node.shape(1)) - (1 if node.params["left_side"] else 2)
    matrix, right = states
    if matrix is None and isinstance(right, Examples) and right.axis == free:
        return [right]
    return _leading((2, 2))(node, states)


def _fft(node: Node, states: Sequence[State]) -> list[State]:
    return _leading((len(node.params["fft_lengths"]),))(node, states)


def _dynamic_update_slice(node: Node, states: Sequence[State]) -> list[State]:
    """Replaces a window of the operand, which must hold all examples."""
    if any(state is not None for state in states[2:]):
        return [LOST]
    merged = merge(states[:2])
    if isinstance(merged, Examples):
        if node.shape(0)[merged.axis] != node.shape(1)[merged.axis]:
            return [LOST]
    return [merged]


def _gather(node: Node, states: Sequence[State]) -> list[State]:
    """Picks windows of an array; the examples are in the indices, in windows, or both.

    The axes of the result are those of a window, at `offset_dims`, and elsewhere those
    of the indices (without the last, which holds coordinates). A window keeps examples
    apart if it has the array's full length along their axis.
    """
    numbers = node.params["dimension_numbers"]
    offset = list(numbers.offset_dims)
    batch = [axis for axis in range(len(node.out_shape())) if axis not in offset]
    pairs = dict(
        zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    )
    gone = {*numbers.collapsed_slice_dims, *pairs}
    window = [axis for axis in range(len(node.shape(0))) if axis not in gone]
    table, indices = states

    def of_table(axis: int) -> int | None:
        if axis in pairs:
            return batch[pairs[axis]]
        full = node.params["slice_sizes"][axis] == node.shape(0)[axis]
        return offset[window.index(axis)] if full and axis in window else None

    def of_indices(axis: int) -> int | None:
        return batch[axis] if axis < len(batch) else None

    return [merge([_moved(table, of_table), _moved(indices, of_indices)])]


def _scatter(node: Node, states: Sequence[State]) -> list[State]:
    """Writes windows into an array; the result has the array's axes.

    The axes of the updates are those of a window, at `update_window_dims`, and
    elsewhere those of the indices (without the last, which holds coordinates).
    """
    numbers = node.params["dimension_numbers"]
    pairs = dict(
        zip(
            numbers.scatter_indices_batching_dims,
            numbers.operand_batching_dims,
            strict=True,
        )
    )
    gone = {*numbers.inserted_window_dims, *pairs.values()}
    window = [axis for axis in range(len(node.shape(0))) if axis not in gone]
    at = list(numbers.update_window_dims)
    batch = [axis for axis in range(len(node.shape(2))) if axis not in at]
    operand, indices, updates = states

    def is_full(axis: int) -> bool:
        return node.shape(2)[at[window.index(axis)]] == node.shape(0)[axis]

    def of_operand(axis: int) -> int | None:
        inside = axis in window and is_full(axis)
        return axis if inside or axis in pairs.values() else None

    def of_updates(axis: int) -> int | None:
        if axis not in at:
            return pairs.get(batch.index(axis))
        target = window[at.index(axis)]
        return target if is_full(target) else None

    return [
        merge(
            [
                _moved(operand, of_operand),
                _moved(indices, pairs.get),
                _moved(updates, of_updates),
            ]
        )
    ]


def _moved(state: State, to: Callable[[int], int | None]) -> State:
    """The state with its axis mapped by `to`; lost if `to` returns None."""
    if not isinstance(state, Examples):
        return state
    axis = to(state.axis)
    return LOST if axis is None else dataclasses.replace(state, axis=axis)


_SCATTERS = tuple(
    f"scatter{kind}"
    for kind in ("", "-add", "-sub", "_add", "_sub", "_mul", "_min", "_max")
)

RULES: dict[str, Rule] = {
    **{name: _leading(counts) for name, counts in _CORE_AXES.items()},
    **dict.fromkeys(_SCATTERS, _scatter),
    "fft": _fft,
    "triangular_solve": _triangular_solve,
    "gather": _gather,
    "dynamic_update_slice": _dynamic_update_slice,
}
