"""Views: values that hold the entries of one array, moved, repeated or rescaled.

The axes of a view are lists of *pieces*. A piece is a run of the source array's axis (a
reshape splits axes into pieces, a transposition reorders them) or, where it is `new`,
an axis along which the source is repeated. A value is a view exactly when each axis is
a product of pieces, which holds for everything that reshapes, transposes and broadcasts
make of a weight except a reshape that cuts across pieces. A slice leaves a *part* of a
piece; joined to other arrays it has a *place* among them.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A run of an axis; compared by identity.

    Attributes:
      size: how long it is.
      new: whether it repeats the source.
      part: where it begins in a longer run of the source, and how long that is.
      place: where in it the source's entries begin, and how many they are; the others
        are not of this source.
    """

    size: int
    new: bool = False
    part: tuple[int, int] | None = None
    place: tuple[int, int] | None = None

    @property
    def whole(self) -> int:
        """How long a run of the source it stands for."""
        window = self.part or self.place
        return window[1] if window else self.size

    @property
    def plain(self) -> bool:
        """Whether its entries are the source's, one for one."""
        return not (self.new or self.part or self.place)


Axis = tuple[Piece, ...]


def axis_size(axis: Axis) -> int:
    """The length of an axis."""
    return math.prod(piece.size for piece in axis)


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """How a value is made of the entries of the array `source`.

    Attributes:
      source: which array (the index of a parameter leaf).
      source_shape: that array's shape.
      order: the source's pieces in its own row-major order.
      axes: the value's axes.
      stacked: the pieces of axes that enclosing scans run over, outermost first.
      scale: the product of the scalar factors, a number or a scalar array.
      scans: which scans those are.
      repeated: whether a scan uses the same entries in all its steps.
    """

    source: int
    source_shape: tuple[int, ...]
    order: Axis
    axes: tuple[Axis, ...]
    stacked: tuple[Axis, ...] = ()
    scale: Any = 1.0
    scans: tuple[int, ...] = ()
    repeated: bool = False

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
        # parts of one entry would be dropped, as all pieces of that size are
        if piece is None or not piece.plain or size == 1:
            return None
        return self._replaced(axis, piece, Piece(size, part=(start, piece.size)))

    def joined(self, axis: int, start: int, total: int) -> "View | None":
        """Joins it to other arrays along an axis that is one piece of the source."""
        piece, view = self.only(axis), self
        if axis_size(self.axes[axis]) == 1:  # its piece may have been dropped
            piece = Piece(1)
            view = dataclasses.replace(self, order=(piece, *self.order))
        if piece is None or not piece.plain:
            return None
        placed = Piece(total, place=(start, piece.size))
        return view._replaced(axis, piece, placed)

    def only(self, axis: int) -> Piece | None:
        """The one piece (longer than one) that an axis consists of."""
        pieces = [piece for piece in self.axes[axis] if piece.size != 1]
        return pieces[0] if len(pieces) == 1 else None

    def _replaced(self, axis: int, old: Piece, new: Piece) -> "View":
        order = _split(self.order, {old: (new,)})
        axes = (*self.axes[:axis], (new,), *self.axes[axis + 1 :])
        return dataclasses.replace(self, order=order, axes=axes)

    def reshape(self, shape: Sequence[int]) -> "View | None":
        """Regroups (and splits) pieces; None where a cut falls across pieces."""
        queue = [p for axis in self.axes for p in axis if p.size != 1]
        splits: dict[Piece, Axis] = {}
        axes: list[Axis] = []
        for size in shape:
            axis: list[Piece] = []
            rest = size
            while rest > 1:
                piece = queue.pop(0)
                if rest % piece.size:
                    if piece.size % rest or not (piece.plain or piece.new):
                        return None
                    head = Piece(rest, piece.new)
                    tail = Piece(piece.size // rest, piece.new)
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
          groups: of the view's axes; those that scans run over come first by
            themselves.
          windows: parts and joined pieces that may stand for all of the source's.

        Returns:
          The layout of the whole source; None where the groups do not hold every entry
          exactly once.
        """
        every = [*([axis] for axis in self.stacked), *groups]
        order = [piece for piece in self.order if piece.size != 1]
        target = [p for group in every for axis in group for p in axis if p.size != 1]
        if len(target) != len(order) or set(target) != set(order):
            return None
        if not all(piece.plain or piece in windows for piece in order):
            return None
        shape = tuple(math.prod(p.whole for a in group for p in a) for group in every)
        position = {piece: i for i, piece in enumerate(order)}
        runs: list[
            list[int]
        ] = []  # maximal runs that are adjacent in source and target
        for piece in target:
            index = position[piece]
            if runs and runs[-1][-1] + 1 == index:
                runs[-1].append(index)
            else:
                runs.append([index])
        by_source = sorted(runs)
        sizes = tuple(math.prod(order[i].whole for i in run) for run in by_source)
        permutation = tuple(by_source.index(run) for run in runs)
        return Layout(self.source_shape, sizes, permutation, shape)


def _split(axis: Axis, splits: dict[Piece, Axis]) -> Axis:
    return tuple(part for piece in axis for part in splits.get(piece, (piece,)))


def source_view(source: int, shape: Sequence[int]) -> View:
    """The view of an array that is the array itself."""
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

    def from_matrix(self, matrix: Any) -> Any:
        """Inverts `to_matrix`."""
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        moved = matrix.reshape([self.sizes[i] for i in self.permutation])
        return moved.transpose(inverse).reshape(self.source_shape)
