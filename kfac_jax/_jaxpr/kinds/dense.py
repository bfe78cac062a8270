"""Dense layers: a weight contracted with data."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.kinds.windows import pieces_alone, windows_on
from kfac_jax._jaxpr.sites import Axes, Reader, Window, windowed
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import Axis, View, axis_size


@dataclasses.dataclass(frozen=True)
class Dense(Reader):
    """Rows of a product.

    Attributes:
      x_axes: the input's axes.
      y_axes: the output's.
      x_places: where in the input's features this parameter's begin, if it is joined to
        others.
      y_places: the same of the output's.
    """

    kind: ClassVar[str] = "dense"

    x_axes: Axes
    y_axes: Axes
    x_places: tuple[Window, ...] = ()
    y_places: tuple[Window, ...] = ()

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """As they are."""
        assert x is not None
        x, dy = windowed(x, self.x_places), windowed(dy, self.y_places)
        return self.x_axes.arrange(x), self.y_axes.arrange(dy)

    @property
    def joins_outputs(self) -> bool:
        """Of weights that are joined along their outputs."""
        return bool(self.y_places)

    @property
    def is_partial(self) -> bool:
        """Of weights that are joined."""
        return bool(self.x_places or self.y_places)


def dot_general(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A dense layer: contracted axes are inputs, free axes of the weight outputs.

    Batch axes are independent layers, or rows where the weight is merely repeated.
    """
    if views[0] is not None and views[1] is not None:
        return Refused("multiplied with another parameter")
    side = 0 if views[0] is not None else 1
    view = views[side]
    assert view is not None
    contract, batch = node.params["dimension_numbers"]
    w_contract, x_contract = contract[side], contract[1 - side]
    w_batch, x_batch = batch[side], batch[1 - side]
    w_free = _free(len(view.axes), w_contract, w_batch)
    x_free = _free(len(node.shape(1 - side)), x_contract, x_batch)
    repeated = [_is_new(view.axes[a]) for a in w_batch]
    independent = [i for i, new in enumerate(repeated) if not new]
    y_batch, first, second = _output_axes(len(batch[0]), x_free, w_free, side)
    lead = [[view.axes[w_batch[i]]] for i in independent]
    ins, outs = [view.axes[a] for a in w_contract], [view.axes[a] for a in w_free]
    joined = pieces_alone(view, (*w_contract, *w_free), "place")
    weight = view.layout([*lead, ins, outs], windows=joined)
    if weight is None:
        return Refused("repeated or only partly used by `dot_general`")
    reader = Dense(
        Axes(
            tuple(x_batch[i] for i in independent),
            (*(x_batch[i] for i in y_batch if repeated[i]), *x_free),
            tuple(x_contract),
        ),
        Axes(
            tuple(independent), (*(i for i in y_batch if repeated[i]), *first), second
        ),
        windows_on(view, w_contract, x_contract, "place"),
        windows_on(view, w_free, second, "place"),
    )
    site = site_of(
        node,
        view,
        reader,
        state,
        x=node.inputs[1 - side],
        weight=weight,
        transposed=view.layout([*lead, outs, ins], windows=joined),
    )
    return plain_linear(node, site)


def _free(rank: int, *used: Sequence[int]) -> list[int]:
    return [i for i in range(rank) if not any(i in axes for axes in used)]


def _is_new(axis: Axis) -> bool:
    return all(piece.new or piece.size == 1 for piece in axis) and axis_size(axis) > 1


def _output_axes(
    batch: int, x_free: Sequence[int], w_free: Sequence[int], side: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the product: batch, then free ones of the left, then of the right."""
    parts = [len(w_free), len(x_free)] if side == 0 else [len(x_free), len(w_free)]
    left = tuple(range(batch, batch + parts[0]))
    right = tuple(range(batch + parts[0], batch + sum(parts)))
    rows, outs = (right, left) if side == 0 else (left, right)
    return tuple(range(batch)), rows, outs
