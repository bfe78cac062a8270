"""Weights that data choose from a table, as in `x @ w[task]`.

They are independent dense layers, each with the rows that choose it. As rows of a table
they would be outputs of one layer, with a factor of all their entries.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Graph, Node, is_value
from kfac_jax._jaxpr.kinds.embedding import picked_axis
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.kinds.roles import free, is_new, output_axes
from kfac_jax._jaxpr.sites import Axes, Reader
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import Choice, View

MOST = 256
"""The longest table of weights. Each row is read once for each of them."""

FEW = 16
"""The most weights of a table whose rows may take more than its gathered weights."""

_TRANSPARENT = ("convert_element_type", "copy", "reshape", "squeeze", "transpose")


@dataclasses.dataclass(frozen=True)
class Chosen(Reader):
    """Reads the rows of a product for each of the weights that rows choose from.

    An axis of rows may be of one operand alone: an input that meets several weights, or
    products with several weights that are added up.

    Attributes:
      y_axes: the axes of the output, and after them one of weights and those of rows
        that it has not.
      inputs: the axes of the input.
      outputs: those of the output alone.
      gaps: the rows that the input has not, and those that the output has not.
      indices: for each axis of the rows the axis of the indices that it is, or -1.
      length: the number of weights.
      column: the column of an index that chooses.
      drops: whether indices out of bounds choose none; if not, they are clipped.
    """

    kind: ClassVar[str] = "dense"

    y_axes: Axes
    inputs: Axes
    outputs: Axes
    gaps: tuple[tuple[int, ...], tuple[int, ...]]
    indices: tuple[int, ...]
    length: int
    column: int
    drops: bool

    def rows(self, x: Any, dy: Array) -> tuple[Array, Array]:
        """The rows of all weights, which are zero where another one is chosen.

        Args:
          x: the input, and the indices.
          dy: the cotangent of the output.

        Returns:
          Inputs and cotangents `[weights, *independent, *rows, features]`.
        """
        x, indices = x
        index = indices[..., self.column]
        index = index if self.drops else jnp.clip(index, 0, self.length - 1)
        index = index.transpose([axis for axis in self.indices if axis >= 0])
        others = [i for i, axis in enumerate(self.indices) if axis < 0]
        index = jnp.expand_dims(index, others)
        lead = len(self.inputs.independent)
        weights = jnp.arange(self.length, dtype=index.dtype)
        own = index[None] == weights.reshape(-1, *[1] * index.ndim)
        own = own.reshape(self.length, *[1] * lead, *index.shape, 1)
        read = self.inputs.arrange(x), self.outputs.arrange(dy)
        first, second = (
            jnp.where(own, jnp.expand_dims(part, [lead + i for i in gaps])[None], 0)
            for part, gaps in zip(read, self.gaps, strict=True)
        )
        return first, second

    @property
    def joins_outputs(self) -> bool:
        """True: the outputs of all weights are in the same array."""
        return True


def choosing(graph: Graph) -> set[Node]:
    """The gathers whose windows are weights of products, each with its own input."""
    readers: dict[int, list[Node]] = {}
    for node in graph.walk():
        for atom in filter(is_value, node.inputs):
            readers.setdefault(atom, []).append(node)

    def is_weight(value: int) -> bool:
        """Whether all that reads a value multiplies it by data."""
        found = readers.get(value, [])
        return bool(found) and all(
            is_weight(node.outputs[0])
            if node.name in _TRANSPARENT
            else node.name == "dot_general" and node.inputs.count(value) == 1
            for node in found
        )

    return {
        node
        for node in graph.walk()
        if node.name == "gather"
        and (picked := picked_axis(node)) is not None
        and node.shape(0)[picked.axis] <= _limit(node.params["slice_sizes"])
        and len(node.shape(0)) > 2
        and is_weight(node.outputs[0])
    }


def _limit(window: Sequence[int]) -> int:
    """The longest table, for rows that take about the memory of what was gathered.

    A row is read for each weight, and takes the sum of a weight's sides at most. That
    the program gathers takes their product.
    """
    return min(MOST, max(FEW, 4 * math.prod(window) // sum(window)))


def chosen(node: Node, view: View) -> View | None:
    """The windows of a gather as a view of each weight.

    Args:
      node: the gather.
      view: the table.

    Returns:
      The view, in which a weight is repeated along the axes of the indices.
    """
    picked = picked_axis(node)
    if picked is None or view.choice is not None:
        return None
    numbers, shape = node.params["dimension_numbers"], node.out_shape()
    features = [a for a in range(len(view.axes)) if a != picked.axis]
    gone = numbers.collapsed_slice_dims
    window = [a for a in range(len(view.axes)) if a not in gone]
    places = [numbers.offset_dims[window.index(a)] for a in features]
    moved = view.transpose([picked.axis, *features])
    one = dataclasses.replace(
        moved, axes=moved.axes[1:], stacked=(*moved.stacked, moved.axes[0])
    )
    wide = one.broadcast(shape, places)
    rows = [a for a in range(len(shape)) if a not in numbers.offset_dims]
    choice = Choice(
        node.inputs[1],
        picked.column,
        picked.drops,
        node.shape(0)[picked.axis],
        tuple(wide.axes[a][0] for a in rows),
    )
    return dataclasses.replace(wide, choice=choice)


def product(node: Node, side: int, view: View, state: State) -> Outcome:
    """Independent dense layers, one for each weight that may be chosen.

    Args:
      node: the product.
      side: which of its operands is the weight.
      view: this operand, as a view of the weights.
      state: where the examples are in the result.

    Returns:
      The layers, or why there are none.
    """
    choice = view.choice
    assert choice is not None
    contract, batch = node.params["dimension_numbers"]
    pairs = [*zip(batch[side], batch[1 - side], strict=True)]
    rank = len(node.shape(1 - side))
    x_free = free(rank, contract[1 - side], batch[1 - side])
    w_free = free(len(view.axes), contract[side], batch[side])
    _, first, second = output_axes(len(pairs), x_free, w_free, side)

    def index(axis: int) -> int:
        """The axis of the indices that an axis of the view is, or -1."""
        pieces = view.axes[axis]
        found = len(pieces) == 1 and pieces[0] in choice.rows
        return choice.rows.index(pieces[0]) if found else -1

    # for each axis of rows that of the input, of the output, and of the indices
    rows: list[tuple[int | None, int | None, int]] = []
    independent: list[tuple[int, int, int]] = []
    for i, (w, x) in enumerate(pairs):
        if index(w) >= 0 or is_new(view.axes[w]):
            rows.append((x, i, index(w)))
        else:
            independent.append((w, x, i))
    rows += [(x, y, -1) for x, y in zip(x_free, first, strict=True)]
    outs = [*zip(w_free, second, strict=True)]
    rows += [(None, y, index(w)) for w, y in outs if index(w) >= 0]
    ins = [*zip(contract[side], contract[1 - side], strict=True)]
    rows += [(x, None, index(w)) for w, x in ins if index(w) >= 0]
    outs = [(w, y) for w, y in outs if index(w) < 0]
    ins = [(w, x) for w, x in ins if index(w) < 0]
    weight = view.layout(
        [
            *([view.axes[w]] for w, _, _ in independent),
            [view.axes[w] for w, _ in ins],
            [view.axes[w] for w, _ in outs],
        ]
    )
    known = sorted(k for _, _, k in rows if k >= 0)
    if weight is None or known != [*range(len(choice.rows))]:
        return Refused("repeated or only partly used by `dot_general`")
    size, missing = len(node.out_shape()), itertools.count(len(node.out_shape()) + 1)
    reader = Chosen(
        Axes(
            (size, *(y for _, _, y in independent)),
            tuple(next(missing) if y is None else y for _, y, _ in rows),
            tuple(y for _, y in outs),
        ),
        Axes(
            tuple(x for _, x, _ in independent),
            tuple(x for x, _, _ in rows if x is not None),
            tuple(x for _, x in ins),
        ),
        Axes(
            tuple(y for _, _, y in independent),
            tuple(y for _, y, _ in rows if y is not None),
            tuple(y for _, y in outs),
        ),
        (
            tuple(i for i, (x, _, _) in enumerate(rows) if x is None),
            tuple(i for i, (_, y, _) in enumerate(rows) if y is None),
        ),
        tuple(k for _, _, k in rows),
        choice.length,
        choice.column,
        choice.drops,
    )
    x = node.inputs[1 - side], choice.indices
    return plain_linear(node, site_of(node, view, reader, state, x=x, weight=weight))
