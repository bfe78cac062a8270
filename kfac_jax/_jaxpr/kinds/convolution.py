"""Convolutions as dense layers over patches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.kinds.outcome import Linear, Outcome, Refused, site_of
from kfac_jax._jaxpr.sites import Axes, Reader
from kfac_jax._jaxpr.states import State
from kfac_jax._jaxpr.view import View, source_view


@dataclasses.dataclass(frozen=True)
class Convolution(Reader):
    """Reads the patches of a `conv_general_dilated` of any rank.

    Attributes:
      x_order: the input's batch axis, channel axis and spatial axes.
      y_order: the output's, in the same order.
      kernel: the kernel's spatial shape.
      positions: the output's spatial shape.
      strides: the distances between positions.
      padding: zeros before and after each spatial axis; a negative number cuts entries.
      x_dilation: the input's dilation, more than 1 for transposed convolutions.
      kernel_dilation: the kernel's dilation.
      groups: the number of independent groups of channels.
    """

    kind: ClassVar[str] = "conv"

    x_order: tuple[int, ...]
    y_order: tuple[int, ...]
    kernel: tuple[int, ...]
    positions: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @property
    def y_axes(self) -> Axes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The roles of the axes of `outputs`, to which both sides are brought."""
        rank = len(self.kernel)
        return _kinds(self.groups, tuple(range(rank + 1)), rank + 1)

    @property
    def batch_axes(self) -> tuple[int, int]:
        """The batch axes of input and output."""
        return self.x_order[0], self.y_order[0]

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """One row for each example and position: a patch, and the channels there."""
        assert x is not None
        axes = self.y_axes
        return axes.arrange(self.inputs(x)), axes.arrange(self.outputs(dy))

    def inputs(self, x: Array) -> Array:
        """Patches `[batch, *positions, group, channels · kernel]`.

        Made of strided slices, one spatial axis after the other. Each puts the offsets
        in the kernel last, so a patch has the weight's order (channel, *kernel).
        """
        x = x.transpose((self.x_order[0], *self.x_order[2:], self.x_order[1]))
        edges = [
            (low, high, d - 1)
            for (low, high), d in zip(self.padding, self.x_dilation, strict=True)
        ]
        zero = jnp.zeros((), x.dtype)
        x = jax.lax.pad(x, zero, [(0, 0, 0), *edges, (0, 0, 0)])
        for i, width in enumerate(self.kernel):
            # from the first position to the last, the latter included
            span = (self.positions[i] - 1) * self.strides[i] + 1
            starts = [k * self.kernel_dilation[i] for k in range(width)]
            moved = [
                jax.lax.slice_in_dim(x, k, k + span, self.strides[i], axis=1 + i)
                for k in starts
            ]
            x = jnp.stack(moved, axis=-1)
        rest = math.prod(x.shape[1 + len(self.kernel) :]) // self.groups
        return x.reshape(*x.shape[: 1 + len(self.kernel)], self.groups, rest)

    def outputs(self, y: Array) -> Array:
        """The output or its cotangent as `[batch, *positions, group, channels]`."""
        y = y.transpose((self.y_order[0], *self.y_order[2:], self.y_order[1]))
        return y.reshape(*y.shape[:-1], self.groups, y.shape[-1] // self.groups)

    def chunks(self, batch: int) -> tuple[int, int]:
        """Splits a batch so that the patches of one chunk take no more than the input.

        Args:
          batch: the batch size.

        Returns:
          The number of full chunks and their size.
        """
        # An entry of the input stands for about prod(x_dilation) / prod(strides)
        # positions, and each position's patch has prod(kernel) entries per channel.
        dilated = math.prod(self.x_dilation)
        growth = math.prod(self.kernel) / math.prod(self.strides) * dilated
        size = max(1, int(batch / max(growth, 1.0)))
        return batch // size, size


def convolution(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A convolution: a dense layer from patches to channels, shared by all positions.

    Groups of channels are independent layers.
    """
    if views[0] is not None:
        other = "another parameter" if views[1] is not None else "data as the kernel"
        return Refused(f"convolved with {other}")
    view = views[1]
    assert view is not None
    if node.params["batch_group_count"] != 1:
        return Refused("convolved with batch_group_count > 1")
    out_axis, in_axis, *spatial = node.params["dimension_numbers"].rhs_spec
    reader = _reader(node, spatial)
    grouped = view.reshape(_split(node.shape(1), out_axis, reader.groups))
    if grouped is None:
        return Refused("convolved in groups that do not match its axes")
    # Where the kernel's axes are once it is split: the axis of groups is at `out_axis`,
    # just before that of the outputs, and moves all later ones on by one.
    move = [a + (a > out_axis) for a in range(len(view.axes))]
    weight = grouped.layout(
        [
            *([grouped.axes[out_axis]] for _ in range(reader.groups > 1)),
            [grouped.axes[move[a]] for a in (in_axis, *spatial)],
            [grouped.axes[out_axis + 1]],
        ],
    )
    if weight is None:
        return Refused("repeated or only partly used by `conv_general_dilated`")
    # A patch reads several positions, so no spatial axis can be one of examples. The
    # batch axis is the first of the rows.
    batch = Axes((), reader.y_order[:1], ()).examples(state)
    site = site_of(node, view, reader, batch, x=node.inputs[0], weight=weight)
    y_shape, feature = node.out_shape(), reader.y_order[1]
    grouped_shape = _split(y_shape, feature, reader.groups)
    # a bias is added to the output with its channels in one axis, not by groups
    y_view = source_view(-1, grouped_shape).reshape(y_shape)
    assert y_view is not None
    order = [a + (a > feature) for a in reader.y_order]
    rows = (order[0], *order[2:])
    return Linear(site, y_view, grouped_shape, _kinds(reader.groups, rows, feature))


def _reader(node: Node, spatial: Sequence[int]) -> Convolution:
    params, numbers = node.params, node.params["dimension_numbers"]
    y_order = tuple(numbers.out_spec)
    return Convolution(
        x_order=tuple(numbers.lhs_spec),
        y_order=y_order,
        kernel=tuple(node.shape(1)[a] for a in spatial),
        positions=tuple(node.out_shape()[a] for a in y_order[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple((low, high) for low, high in params["padding"]),
        x_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )


def _kinds(groups: int, rows: tuple[int, ...], group_axis: int) -> Axes:
    """The roles of axes, with channels at `group_axis` and the next.

    A single group is no independent axis, so that an ungrouped convolution has none.
    """
    if groups == 1:
        return Axes((), rows, (group_axis, group_axis + 1))
    return Axes((group_axis,), rows, (group_axis + 1,))


def _split(shape: Sequence[int], axis: int, groups: int) -> tuple[int, ...]:
    return (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
