"""Convolutions as dense layers over patches."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Node
from kfac_jax._jaxpr.outcomes import Linear, Outcome, Refused, Shapes
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import LOST, Examples, State
from kfac_jax._jaxpr.view import View, layout, source_view


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The static description of a `conv_general_dilated`, of any rank.

    Attributes:
      x_axes: where the input has its batch, channel and spatial axes.
      y_axes: where the output has them.
      kernel: the kernel's spatial shape.
      positions: the output's spatial shape.
      strides: between positions.
      padding: zeros before and after each spatial axis; negative ones cut off.
      x_dilation: the input's, more than 1 for transposed convolutions.
      kernel_dilation: the kernel's.
      groups: the number of independent groups of channels.
    """

    x_axes: tuple[int, ...]
    y_axes: tuple[int, ...]
    kernel: tuple[int, ...]
    positions: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @property
    def batch_axes(self) -> tuple[int, int]:
        """The axes of input and output that hold the batch."""
        return self.x_axes[0], self.y_axes[0]

    def inputs(self, x: Array) -> Array:
        """Patches `[batch, *positions, group, channels · kernel]`."""
        x = x.transpose((self.x_axes[0], *self.x_axes[2:], self.x_axes[1]))
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
        y = y.transpose((self.y_axes[0], *self.y_axes[2:], self.y_axes[1]))
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


def convolution(
    node: Node, views: Sequence[View | None], shapes: Shapes, state: State
) -> Outcome:
    """A convolution: patches are inputs, channels outputs, positions are shared.

    Groups of channels are independent layers.
    """
    if views[0] is not None:
        other = "another parameter" if views[1] is not None else "data as the kernel"
        return Refused(f"convolved with {other}")
    view = views[1]
    assert view is not None
    params = node.params
    if params["batch_group_count"] != 1:
        return Refused("convolved with batch_group_count > 1")
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    y_axes, y_shape = tuple(numbers.out_spec), node.out_shape()
    conv = Convolution(
        x_axes=tuple(numbers.lhs_spec),
        y_axes=y_axes,
        kernel=tuple(node.shape(1)[a] for a in spatial),
        positions=tuple(y_shape[a] for a in y_axes[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple((low, high) for low, high in params["padding"]),
        x_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )
    split = _split(node.shape(1), out_axis, conv.groups)
    grouped = view.reshape(split)
    if grouped is None:
        return Refused("convolved in groups that do not match its axes")
    # the axes of the split kernel: the group's comes just before the outputs'
    move = [a + (a > out_axis) for a in range(len(view.axes))]
    found = layout(
        grouped,
        shapes[view.source],
        [
            *([a] for a in grouped.stacked),
            *([grouped.axes[out_axis]] for _ in range(conv.groups > 1)),
            [grouped.axes[move[a]] for a in (in_axis, *spatial)],
            [grouped.axes[out_axis + 1]],
        ],
    )
    if found is None:
        return Refused("repeated or only partly used by `conv_general_dilated`")
    rank = len(spatial)
    axes = _kinds(conv.groups, tuple(range(rank + 1)), rank + 1)
    site = Site(
        kind="conv",
        output=node.outputs[0],
        x=node.inputs[0],
        x_axes=axes,
        y_axes=axes,
        examples=_examples(state, y_axes[0]),
        weight=(view.source, found),
        bias=None,
        scale=view.scale,
        scans=view.scans,
        repeated=view.repeated,
        source=node.source,
        convolution=conv,
    )
    feature = y_axes[1]
    virtual = _split(y_shape, feature, conv.groups)
    raw = [a + (a > feature) for a in y_axes]
    own_view = source_view(-1, virtual).reshape(y_shape)
    assert own_view is not None
    rows = (raw[0], *raw[2:])
    return Linear(site, own_view, virtual, _kinds(conv.groups, rows, feature))


def _kinds(
    groups: int, rows: tuple[int, ...], group_axis: int
) -> tuple[tuple[int, ...], ...]:
    """Which axes are independent, rows, features; a single group is no axis."""
    if groups == 1:
        return (), rows, (group_axis, group_axis + 1)
    return (group_axis,), rows, (group_axis + 1,)


def _split(shape: Sequence[int], axis: int, groups: int) -> tuple[int, ...]:
    return (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def _examples(state: State, batch_axis: int) -> State:
    if not isinstance(state, Examples):
        return state
    return dataclasses.replace(state, axis=0) if state.axis == batch_axis else LOST
