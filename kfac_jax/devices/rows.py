"""Rows of arrays: one axis is moved to the front, padded, and cut over devices."""

import jax.numpy as jnp
from jax import Array

Shape = tuple[int, ...]


def row_axis(shape: Shape) -> int:
    """The axis that is cut: the longest one; for a square matrix, that of its rows.

    >>> row_axis((4, 8, 8)), row_axis((3, 3, 64, 128)), row_axis((5,))
    (1, 3, 0)
    """
    if len(shape) < 2:
        return 0
    rows_first = [len(shape) - 2, *range(len(shape))]
    return max(rows_first, key=lambda i: shape[i])


def rows_shape(shape: Shape, devices: int) -> Shape:
    """The shape of all rows together, `[devices · rows, ...]`.

    >>> rows_shape((7, 7), 4), rows_shape((), 4)
    ((8, 7), (4,))
    """
    shape = shape or (1,)
    axis = row_axis(shape)
    rows = -(-shape[axis] // devices) * devices
    return (rows, *shape[:axis], *shape[axis + 1 :])


def own_shape(shape: Shape, devices: int) -> Shape:
    """The shape of one device's rows, `[rows, ...]`."""
    rows, *rest = rows_shape(shape, devices)
    return (rows // devices, *rest)


def to_rows(x: Array, devices: int) -> Array:
    """Moves the axis that is cut to the front, and pads it with zeros."""
    x = x.reshape(x.shape or (1,))
    return fill(jnp.moveaxis(x, row_axis(x.shape), 0), devices)


def fill(x: Array, devices: int) -> Array:
    """Pads the first axis with zeros to a multiple of the number of devices."""
    return jnp.pad(x, [(0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1)])


def from_rows(x: Array, shape: Shape) -> Array:
    """Inverts `to_rows`; the padding, and so the number of devices, may be any."""
    full = shape or (1,)
    axis = row_axis(full)
    return jnp.moveaxis(x[: full[axis]], 0, axis).reshape(shape)
