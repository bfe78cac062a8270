"""The roles of the axes of `dot_general`."""

from collections.abc import Sequence

from kfac_jax._jaxpr.view import Axis, axis_size


def free(rank: int, *used: Sequence[int]) -> list[int]:
    """The axes that are not used."""
    return [i for i in range(rank) if not any(i in axes for axes in used)]


def is_new(axis: Axis) -> bool:
    """Whether a view is repeated along an axis."""
    return all(piece.new or piece.size == 1 for piece in axis) and axis_size(axis) > 1


def output_axes(
    batch: int, x_free: Sequence[int], w_free: Sequence[int], side: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The product's axes: those of the batch, of rows, and of outputs.

    Args:
      batch: the number of batch axes.
      x_free: the input's free axes.
      w_free: the weight's free axes.
      side: which operand is the weight.

    Returns:
      Three lists of axes of the product.
    """
    counts = [len(w_free), len(x_free)] if side == 0 else [len(x_free), len(w_free)]
    left = tuple(range(batch, batch + counts[0]))
    right = tuple(range(batch + counts[0], batch + sum(counts)))
    rows, outs = (right, left) if side == 0 else (left, right)
    return tuple(range(batch)), rows, outs
