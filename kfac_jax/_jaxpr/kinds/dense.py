"""Dense layers: a weight contracted with data."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds import chosen
from kfac_jax._jaxpr.kinds.outcome import Outcome, Refused, plain_linear, site_of
from kfac_jax._jaxpr.kinds.roles import free, is_new, output_axes
from kfac_jax._jaxpr.kinds.windows import pieces_alone, windows_on
from kfac_jax._jaxpr.sites import Axes, Reader, Window, windowed
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import View


@dataclasses.dataclass(frozen=True)
class Dense(Reader):
    """Reads the rows of a product.

    Attributes:
      x_axes: the input's axes.
      y_axes: the output's axes.
      x_windows: this parameter's input features, if it is joined to others along them.
      y_windows: this parameter's output features, if it is joined to others along them.
    """

    kind: ClassVar[str] = "dense"

    x_axes: Axes
    y_axes: Axes
    x_windows: tuple[Window, ...] = ()
    y_windows: tuple[Window, ...] = ()

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """This parameter's features of both operands."""
        assert x is not None
        x, dy = windowed(x, self.x_windows), windowed(dy, self.y_windows)
        return self.x_axes.arrange(x), self.y_axes.arrange(dy)

    @property
    def joins_outputs(self) -> bool:
        """Whether the weight is joined to others along its outputs."""
        return bool(self.y_windows)

    @property
    def is_partial(self) -> bool:
        """Whether the weight is joined to others."""
        return bool(self.x_windows or self.y_windows)


def dot_general(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A dense layer: contracted axes are inputs, the weight's free axes are outputs.

    The batch axes of `dot_general` are independent layers, except where the weight is
    only repeated along one: there one layer has more rows.
    """
    if views[0] is not None and views[1] is not None:
        return Refused("multiplied with another parameter")
    side = 0 if views[0] is not None else 1
    view = views[side]
    assert view is not None
    if view.choice is not None:
        return chosen.product(node, side, view, state)
    contract, batch = node.params["dimension_numbers"]
    w_contract, x_contract = contract[side], contract[1 - side]
    w_batch, x_batch = batch[side], batch[1 - side]
    w_free = free(len(view.axes), w_contract, w_batch)
    x_free = free(len(node.shape(1 - side)), x_contract, x_batch)
    # `dot_general` puts the axes of its result in the order: batch, free axes of the
    # left operand, free axes of the right. The axes of x below follow the rows of y, so
    # that both sides list the rows in one order.
    repeated = [is_new(view.axes[a]) for a in w_batch]
    independent = [i for i, new in enumerate(repeated) if not new]
    y_batch, first, second = output_axes(len(batch[0]), x_free, w_free, side)
    lead = [[view.axes[w_batch[i]]] for i in independent]
    ins, outs = [view.axes[a] for a in w_contract], [view.axes[a] for a in w_free]
    joined = pieces_alone(view, (*w_contract, *w_free), "joined")
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
        windows_on(view, w_contract, x_contract, "joined"),
        windows_on(view, w_free, second, "joined"),
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
