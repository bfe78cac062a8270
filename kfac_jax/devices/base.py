"""What a step asks of the devices that make it."""

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
    """What one device does, with the same operand on all."""

    cost: float  # multiply-adds
    function: Callable[[Any], list[Array]]
    operand: Any


class Devices(abc.ABC):
    """Devices that make a step together.

    Where they keep all of the state each, rows of it are all of it.
    """

    @property
    @abc.abstractmethod
    def cuts_state(self) -> bool:
        """Whether each keeps only a part of the state, the rows of every matrix."""

    @abc.abstractmethod
    def size(self) -> int:
        """How many share the work."""

    @abc.abstractmethod
    def keepers(self) -> int:
        """In how many parts the state is cut."""

    @abc.abstractmethod
    def sharing_only(self) -> "Devices":
        """The same devices, each of which has all of the state."""

    # ------------------------------------------------------------------ collectives

    @abc.abstractmethod
    def mean(self, tree: T) -> T:
        """The average over the devices, where each has its own."""

    @abc.abstractmethod
    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """Sums statistics over the devices, unless they are without information.

        Args:
          weight: how many batches they are of.
          counts: what their sums will be divided by: small.
          sums: large.

        Returns:
          All three, of `sums` the rows that a device keeps.
        """

    @abc.abstractmethod
    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """Whether each flag is true on all devices that keep a part."""

    # ------------------------------------------------------------------------- rows

    @abc.abstractmethod
    def row_shape(self, shape: Shape) -> Shape:
        """The shape of what is kept of an array."""

    @abc.abstractmethod
    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """What is kept of arrays that all devices have."""

    @abc.abstractmethod
    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Inverts `rows`: one collective for each type."""

    @abc.abstractmethod
    def apart(self, function: Callable[..., T], rows: Any, whole: Any) -> T:
        """Calls a function of rows and whole arrays that every device runs.

        Args:
          function: gets an `OverAxis` of these devices, a device's rows, and whole
            arrays; its results are the same on all devices.
          rows: a tree of what devices keep.
          whole: a tree of arrays that all devices have.

        Returns:
          The results.
        """

    def tree_rows(self, tree: T) -> T:
        """`rows`, of a tree."""
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, self.rows(leaves))

    def fitting(self, count: Array, shape: Shape) -> Array:
        """A count, so that it broadcasts to what is kept of an array of that shape."""
        if not self.cuts_state or count.ndim == 0:
            return count
        if count.size == 1:
            return count.reshape(())
        return self.rows([jnp.broadcast_to(count, shape)])[0]

    def finite(self, parts: Sequence[tuple[list[Array], list[Array]]]) -> list[Array]:
        """Whether all of each part is finite.

        Args:
          parts: for each, matrices whose diagonals tell, and other arrays. Of rows,
            everything is looked at.

        Returns:
          A flag for each.
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
        """Makes a state, without any device having to hold all that others keep."""

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
        """The results of tasks, each done by its owner; the same on all devices."""


def by_name(
    function: Callable[[list[S]], Sequence[T]], given: Mapping[K, S]
) -> dict[K, T]:
    """Applies a function of several to what has names, if there is any."""
    if not given:
        return {}
    return dict(zip(given, function([*given.values()]), strict=True))
