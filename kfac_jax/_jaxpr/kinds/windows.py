"""Windows of parameters that are cut, or joined to others, along a layer's axes."""

from collections.abc import Sequence
from typing import Literal

from kfac_jax._jaxpr.sites import Window
from kfac_jax._jaxpr.view import Piece, View

Kind = Literal["cut", "joined"]
"""The attribute of `Piece` that holds the window."""


def pieces_alone(view: View, axes: Sequence[int], kind: Kind) -> list[Piece]:
    """The pieces with a window of that kind that are an axis by themselves."""
    pieces = [view.only(axis) for axis in axes]
    return [p for p in pieces if p is not None and getattr(p, kind)]


def windows_on(
    view: View, axes: Sequence[int], others: Sequence[int], kind: Kind
) -> tuple[Window, ...]:
    """Translates pieces' windows to the axes of the data that they are combined with.

    Args:
      view: the parameter.
      axes: axes of the view.
      others: for each of them the axis of the data that it meets.
      kind: which windows.

    Returns:
      The windows, on axes of the data.
    """
    return tuple(
        Window(other, *getattr(piece, kind))
        for axis, other in zip(axes, others, strict=True)
        for piece in pieces_alone(view, [axis], kind)
    )
