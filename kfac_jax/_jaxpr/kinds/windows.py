"""Where parameters are cut, or joined to others, along the axes that layers see."""

from collections.abc import Sequence
from typing import Literal

from kfac_jax._jaxpr.sites import Window
from kfac_jax._jaxpr.view import Piece, View

Kind = Literal["part", "place"]
"""Cut from a longer piece, or joined to others: those attributes of `Piece`."""


def pieces_alone(view: View, axes: Sequence[int], kind: Kind) -> list[Piece]:
    """Those windows of that kind that are one of these axes by themselves."""
    pieces = [view.only(axis) for axis in axes]
    return [p for p in pieces if p is not None and getattr(p, kind)]


def windows_on(
    view: View, axes: Sequence[int], others: Sequence[int], kind: Kind
) -> tuple[Window, ...]:
    """The windows of those pieces, on the axes of data that these axes meet."""
    return tuple(
        Window(other, *getattr(piece, kind))
        for axis, other in zip(axes, others, strict=True)
        for piece in pieces_alone(view, [axis], kind)
    )
