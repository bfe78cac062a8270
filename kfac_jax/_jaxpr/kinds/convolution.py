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
    """Patches of a `conv_general_dilated`, of any rank.

    Attributes:
      x_order: where the input has its batch, channel and spatial axes.
      y_order: where the output has them.
      kernel: the kernel's spatial shape.
      positions: the output's spatial shape.
      strides: between positions.
      padding: zeros before and after each spatial axis; negative ones cut off.
      x_dilation: the input's, more than 1 for transposed convolutions.
      kernel_dilation: the kernel's.
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
        """The axes of `outputs`."""
        rank = len(self.kernel)
        return _kinds(self.groups, tuple(range(rank + 1)), rank + 1)

    @property
    def batch_axes(self) -> tuple[int, int]:
        """Where input and output have the batch."""
        return self.x_order[0], self.y_order[0]

    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """One for each position of the kernel."""
        assert x is not None
        axes = self.y_axes
        return axes.arrange(self.inputs(x)), axes.arrange(self.outputs(dy))

    def inputs(self, x: Array) -> Array:
        """Patches `[batch, *positions, group, channels · kernel]`."""
        x = x.transpose((self.x_order[0], *self.x_order[2:], self.x_order[1]))
        edges = [
            (low, high, d - 1)
            for (low, high), d in zip(self.padding, self.x_dilation, strict=True)
        ]
        zero = jnp.zeros((), x.dtype)
        x = jax.lax.pad(x, zero, [(0, 0, 0), *edges, (0, 0, 0)])
        for i, width in enumerate(self.kernel):
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
        """The output, or its cotangent, `[batch, *positions, group, channels]`."""
        y = y.transpose((self.y_order[0], *self.y_order[2:], self.y_order[1]))
        return y.reshape(*y.shape[:-1], self.groups, y.shape[-1] // self.groups)

    def chunks(self, batch: int) -> tuple[int, int]:
        """Splits a batch so that the patches of one part take no more than the input.

        Args:
          batch: its size.

        Returns:
          The number of parts and the size of each; what remains is smaller than one.
        """
        dilated = math.prod(self.x_dilation)
        growth = math.prod(self.kernel) / math.prod(self.strides) * dilated
        size = max(1, int(batch / max(growth, 1.0)))
        return batch // size, size


def convolution(node: Node, views: Sequence[View | None], state: State) -> Outcome:
    """A convolution: patches are inputs, channels outputs, positions are shared.

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
    # the axes of the split kernel: the group's comes just before the outputs'
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
    # positions of the kernel mix within an example, so that only the batch keeps them
    batch = Axes((), reader.y_order[:1], ()).examples(state)
    site = site_of(node, view, reader, batch, x=node.inputs[0], weight=weight)
    y_shape, feature = node.out_shape(), reader.y_order[1]
    grouped_shape = _split(y_shape, feature, reader.groups)
    own_view = source_view(-1, grouped_shape).reshape(y_shape)
    assert own_view is not None
    order = [a + (a > feature) for a in reader.y_order]
    rows = (order[0], *order[2:])
    return Linear(site, own_view, grouped_shape, _kinds(reader.groups, rows, feature))


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
    """Which axes are independent, rows, features; a single group is no axis."""
    if groups == 1:
        return Axes((), rows, (group_axis, group_axis + 1))
    return Axes((group_axis,), rows, (group_axis + 1,))


def _split(shape: Sequence[int], axis: int, groups: int) -> tuple[int, ...]:
    return (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
