"""Views: values that hold the entries of one array, moved, repeated or rescaled.

Each axis of a view is a list of *pieces*. A piece is a run of one of the source array's
axes (a reshape splits axes into pieces, a transposition reorders them) or, where it is
`new`, an axis along which the source is repeated. A value is a view exactly when each
of its axes is a product of pieces. Every reshape, transposition and broadcast of a
weight keeps this property, except a reshape that cuts across pieces. A slice leaves a
piece that is *cut*; a concatenation leaves one that is *joined* to other arrays.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A run of an axis; compared by identity.

    Attributes:
      size: its number of entries.
      new: whether it repeats the source.
      cut: after a slice, the `(start, length)` of the kept entries' longer run: they
        begin at `start` of `length` entries of the source.
      joined: after a concatenation, the `(start, length)` of the source's entries in
        this piece; its other entries belong to other arrays.
    """

    # Identity, not equality: a square matrix has two axes of one size, and only the
    # identity of their pieces tells a transposition from a copy.

    size: int
    new: bool = False
    cut: tuple[int, int] | None = None
    joined: tuple[int, int] | None = None

    @property
    def span(self) -> int:
        """The length of the source's run that this piece stands for."""
        window = self.cut or self.joined
        return window[1] if window else self.size

    @property
    def plain(self) -> bool:
        """Whether its entries are the source's, one for one."""
        return not (self.new or self.cut or self.joined)


Axis = tuple[Piece, ...]


class Choice(NamedTuple):
    """How data choose one of the slices of an array, see `kinds.chosen`.

    Attributes:
      indices: the integers that choose, `[*rows, columns]`.
      column: the column that does.
      drops: whether integers out of bounds choose none; if not, they are clipped.
      length: the number of slices.
      rows: the pieces along which the view repeats a slice, one for each axis of rows.
    """

    indices: Any
    column: int
    drops: bool
    length: int
    rows: Axis


def axis_size(axis: Axis) -> int:
    """The length of an axis."""
    return math.prod(piece.size for piece in axis)


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A value whose entries are those of the array `source`, moved or repeated.

    Attributes:
      source: which array (the index of a parameter leaf).
      source_shape: that array's shape.
      order: the source's pieces in its own row-major order.
      axes: the value's axes.
      stacked: the pieces of axes that enclosing scans run over, outermost first.
      scale: the product of the scalar factors, a number or a scalar array.
      scans: the ids of the scans that run over `stacked`, in the same order.
      repeated: whether a scan uses the same entries in all its steps.
      choice: how data choose one of the last of `stacked`, if they do.
    """

    source: int
    source_shape: tuple[int, ...]
    order: Axis
    axes: tuple[Axis, ...]
    stacked: tuple[Axis, ...] = ()
    scale: Any = 1.0
    scans: tuple[int, ...] = ()
    repeated: bool = False
    choice: Choice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return tuple(axis_size(axis) for axis in self.axes)

    def transpose(self, permutation: Sequence[int]) -> "View":
        """Reorders the axes."""
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in permutation))

    def squeeze(self, dimensions: Sequence[int]) -> "View":
        """Drops axes of length one."""
        axes = tuple(a for i, a in enumerate(self.axes) if i not in dimensions)
        return dataclasses.replace(self, axes=axes)

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> "View":
        """Applies `broadcast_in_dim`."""
        axes: list[Axis] = [(Piece(size, new=True),) for size in shape]
        for axis, position in zip(self.axes, dimensions, strict=True):
            if axis_size(axis) == shape[position]:
                axes[position] = axis
        return dataclasses.replace(self, axes=tuple(axes))

    def cut(self, axis: int, start: int, size: int) -> "View | None":
        """Slices an axis that is one piece of the source; None for other axes."""
        piece = self.only(axis)
        # `reshape` and `layout` ignore pieces of size 1, as they move no entries. A
        # cut piece of size 1 would be ignored too, and its window forgotten.
        if piece is None or not piece.plain or size == 1:
            return None
        return self._replaced(axis, piece, Piece(size, cut=(start, piece.size)))

    def joined(self, axis: int, start: int, total: int) -> "View | None":
        """The view as a run of a concatenation along an axis.

        Args:
          axis: the axis, one piece of the source.
          start: where the view's entries begin in the result.
          total: the length of the result's axis.

        Returns:
          The joined view; None for other axes.
        """
        piece, view = self.only(axis), self
        if axis_size(self.axes[axis]) == 1:
            # A piece of size 1 may have been dropped by a squeeze or reshape before. A
            # fresh one may stand anywhere in `order`, as its axis has length 1.
            piece = Piece(1)
            view = dataclasses.replace(self, order=(piece, *self.order))
        if piece is None or not piece.plain:
            return None
        joined = Piece(total, joined=(start, piece.size))
        return view._replaced(axis, piece, joined)

    def only(self, axis: int) -> Piece | None:
        """The piece of an axis that consists of a single one longer than 1, or None."""
        pieces = [piece for piece in self.axes[axis] if piece.size != 1]
        return pieces[0] if len(pieces) == 1 else None

    def _replaced(self, axis: int, old: Piece, new: Piece) -> "View":
        order = _split(self.order, {old: (new,)})
        axes = (*self.axes[:axis], (new,), *self.axes[axis + 1 :])
        return dataclasses.replace(self, order=order, axes=axes)

    def reshape(self, shape: Sequence[int]) -> "View | None":
        """Regroups (and splits) pieces; None where a cut falls across pieces.

        Pieces are taken in row-major order until their sizes multiply to the next
        axis. If the next piece is too long, it is split in a head, which completes the
        axis, and a tail. So every axis must end between pieces or divide one evenly:
        `(2, 3) -> (3, 2)` of two plain pieces does neither and is no view.
        """
        queue = [p for axis in self.axes for p in axis if p.size != 1]
        splits: dict[Piece, Axis] = {}
        axes: list[Axis] = []
        for size in shape:
            axis: list[Piece] = []
            rest = size
            while rest > 1:
                piece = queue.pop(0)
                if rest % piece.size:
                    # windows are contiguous in the piece as it is, not in its splits
                    if piece.size % rest or not (piece.plain or piece.new):
                        return None
                    head = Piece(rest, piece.new)
                    tail = Piece(piece.size // rest, piece.new)
                    # A tail may be split again. `order` and `stacked` know only the
                    # piece that was there before this reshape, so splits are recorded
                    # under that one.
                    origin = next((k for k, v in splits.items() if piece in v), piece)
                    current = splits.get(origin, (piece,))
                    at = current.index(piece)
                    splits[origin] = (*current[:at], head, tail, *current[at + 1 :])
                    queue.insert(0, tail)
                    piece = head
                axis.append(piece)
                rest //= piece.size
            axes.append(tuple(axis))
        return dataclasses.replace(
            self,
            order=_split(self.order, splits),
            stacked=tuple(_split(axis, splits) for axis in self.stacked),
            axes=tuple(axes),
        )

    def scaled(self, factor: Any) -> "View":
        """Multiplies by a scalar."""
        return dataclasses.replace(self, scale=self.scale * factor)

    def unstacked(self, scan: int) -> "View":
        """Removes the leading axis, which a scan runs over."""
        return dataclasses.replace(
            self,
            axes=self.axes[1:],
            stacked=(*self.stacked, self.axes[0]),
            scans=(*self.scans, scan),
        )

    def layout(
        self, groups: Sequence[Sequence[Axis]], *, windows: Collection[Piece] = ()
    ) -> "Layout | None":
        """The layout that makes each of `groups` one matrix axis.

        Args:
          groups: for each matrix axis, the view's axes that it consists of. The axes
            that scans run over are put in front, each an axis of its own.
          windows: cut or joined pieces whose full span the layout may cover.

        Returns:
          The layout of the full source; None where the groups do not hold every entry
          exactly once.
        """
        every = [*([axis] for axis in self.stacked), *groups]
        order = [piece for piece in self.order if piece.size != 1]
        target = [p for group in every for axis in group for p in axis if p.size != 1]
        # `new` pieces are not in `order`, so a repeated entry fails here too
        if len(target) != len(order) or set(target) != set(order):
            return None
        if not all(piece.plain or piece in windows for piece in order):
            return None
        shape = tuple(math.prod(p.span for a in group for p in a) for group in every)
        position = {piece: i for i, piece in enumerate(order)}
        # Pieces that are adjacent in source and target are fused to one run. Layouts
        # are compared to tell whether two uses are the same linear map, so equal
        # bijections must come out equal, however finely reshapes have split the axes.
        runs: list[list[int]] = []
        for piece in target:
            index = position[piece]
            if runs and runs[-1][-1] + 1 == index:
                runs[-1].append(index)
            else:
                runs.append([index])
        by_source = sorted(runs)
        sizes = tuple(math.prod(order[i].span for i in run) for run in by_source)
        permutation = tuple(by_source.index(run) for run in runs)
        return Layout(self.source_shape, sizes, permutation, shape)


def _split(axis: Axis, splits: dict[Piece, Axis]) -> Axis:
    return tuple(new for piece in axis for new in splits.get(piece, (piece,)))


def source_view(source: int, shape: Sequence[int]) -> View:
    """The trivial view: the array itself."""
    pieces = tuple(Piece(size) for size in shape)
    return View(source, tuple(shape), pieces, tuple((piece,) for piece in pieces))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A bijection between an array and `[*independent, in, out]` matrices; static.

    The array is reshaped to `sizes`, transposed by `permutation`, reshaped to `shape`.
    Equal bijections have equal layouts.
    """

    source_shape: tuple[int, ...]
    sizes: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, ...]

    def to_matrix(self, array: Any) -> Any:
        """Moves the array's entries to matrices."""
        return array.reshape(self.sizes).transpose(self.permutation).reshape(self.shape)

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the array, the axes of the matrices that it runs along."""
        found: list[tuple[int, ...]] = []
        for axis, length in enumerate(self.source_shape):
            where = [np.zeros(length, int)] * len(self.source_shape)
            where[axis] = np.arange(length)
            flat = np.ravel_multi_index(where, self.source_shape)
            parts = np.unravel_index(flat, self.sizes)
            order = self.permutation
            moved = np.ravel_multi_index(
                [parts[i] for i in order], [self.sizes[i] for i in order]
            )
            places = np.unravel_index(moved, self.shape)
            found.append(tuple(i for i, x in enumerate(places) if x.any()))
        return tuple(found)

    def from_matrix(self, matrix: Any) -> Any:
        """Inverts `to_matrix`."""
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        moved = matrix.reshape([self.sizes[i] for i in self.permutation])
        return moved.transpose(inverse).reshape(self.source_shape)
