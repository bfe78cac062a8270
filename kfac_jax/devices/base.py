"""The protocol of devices that run a step together."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.devices.rows import Shape
from kfac_jax.linalg._coherence import Conditional
from kfac_jax.linalg._psd import Inverted, finite_diagonals

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")

Shifted = tuple[Array, Array]
"""x `[..., d, d]` and s `[...]`, for `x + s I`."""


class Task(NamedTuple):
    """A computation for one device."""

    cost: float  # multiply-adds
    function: Callable[[Any], list[Array]]
    operand: Any  # the same on all devices


class Devices(abc.ABC):
    """Devices that run a step together.

    They may keep a part each of the state: *rows* of every array. If each device keeps
    the full state, the rows of an array are the array.
    """

    @property
    @abc.abstractmethod
    def cuts_state(self) -> bool:
        """Whether each device keeps only rows of the state's arrays."""

    @abc.abstractmethod
    def size(self) -> int:
        """The number of devices that share the work."""

    @abc.abstractmethod
    def keepers(self) -> int:
        """The number of parts that the state is cut into."""

    # ------------------------------------------------------------------ collectives

    @abc.abstractmethod
    def mean(self, tree: T) -> T:
        """Averages, over the devices, arrays that differ between them."""

    @abc.abstractmethod
    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """Sums statistics over the devices.

        The large `sums` are only exchanged if the weight is positive.

        Args:
          weight: the number of cases that the statistics are over.
          counts: small arrays, which the sums will be divided by.
          sums: large arrays.

        Returns:
          All three; of `sums` the rows that a device keeps.
        """

    @abc.abstractmethod
    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """For each flag, whether it is true on all devices that keep rows."""

    @abc.abstractmethod
    def parts(self) -> int:
        """The number of parts of a batch that `joined` concatenates."""

    @abc.abstractmethod
    def joined(self, part: Array, axis: int = 0) -> Array:
        """Concatenates, along an axis, parts that the devices have of a batch."""

    @abc.abstractmethod
    def own(self, whole: Array) -> Array:
        """This device's part of what `joined` gives along the first axis."""

    # ------------------------------------------------------------------------- rows

    @abc.abstractmethod
    def row_shape(self, shape: Shape) -> Shape:
        """The shape of the rows of an array."""

    @abc.abstractmethod
    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """Cuts full arrays into the rows that devices keep."""

    @abc.abstractmethod
    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Inverts `rows`, with one collective for each type."""

    @abc.abstractmethod
    def apart(self, function: Callable[..., T], rows: Any, full: Any) -> T:
        """Calls a function on every device, with this device's rows.

        Args:
          function: gets an `OverAxis` of these devices, a device's rows, and full
            arrays; its results are the same on all devices.
          rows: a tree of rows.
          full: a tree of arrays that all devices have.

        Returns:
          The results.
        """

    def tree_rows(self, tree: T) -> T:
        """Cuts the arrays of a tree into rows."""
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, self.rows(leaves))

    def fitting(self, count: Array, shape: Shape) -> Array:
        """Makes a count broadcast to the rows of an array of that shape."""
        if not self.cuts_state or count.ndim == 0:
            return count
        if count.size == 1:
            return count.reshape(())
        return self.rows([jnp.broadcast_to(count, shape)])[0]

    def finite(self, parts: Sequence[tuple[list[Array], list[Array]]]) -> list[Array]:
        """Whether all arrays of each part are finite.

        Args:
          parts: for each part, matrices of which the diagonal is enough to check, and
            other arrays. If devices keep rows, which have no diagonal, all entries are
            checked.

        Returns:
          A flag for each part.
        """
        if self.cuts_state:
            own = [
                jnp.stack([jnp.isfinite(x).all() for x in (*matrices, *rest)]).all()
                for matrices, rest in parts
            ]
            return self.everywhere(own)
        flags = list(finite_diagonals([matrices for matrices, _ in parts]))
        for i, (_, rest) in enumerate(parts):
            for x in rest:
                flags[i] &= jnp.isfinite(x).all()
        return flags

    # --------------------------------------------------------------------- inversion

    @abc.abstractmethod
    def made(self, make: Callable[[], T]) -> T:
        """Makes a state, so that no device has to hold the rows of others."""

    @abc.abstractmethod
    def inverses(self, shifted: Mapping[K, Shifted]) -> dict[K, Inverted]:
        """Inverts matrices, see `linalg.inverse_many`."""

    @abc.abstractmethod
    def roots(self, shifted: Mapping[K, Shifted]) -> dict[K, Array]:
        """Roots of inverses, see `linalg.inverse_root_many`."""

    @abc.abstractmethod
    def conditionals(
        self, parts: Mapping[K, tuple[Array, Array, Array]]
    ) -> dict[K, Conditional]:
        """Decompositions for linked layers, see `linalg.conditionals`."""

    @abc.abstractmethod
    def each(self, tasks: Mapping[K, Task]) -> dict[K, list[Array]]:
        """Runs each task on one device, its owner; all devices get all results."""


def by_name(
    function: Callable[[list[S]], Sequence[T]], given: Mapping[K, S]
) -> dict[K, T]:
    """Applies a function of a list to the values of a mapping, unless it is empty."""
    if not given:
        return {}
    return dict(zip(given, function([*given.values()]), strict=True))
