"""A single device, or several that each do everything."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jax import Array

from kfac_jax.devices.base import Devices, Shifted, Task, by_name
from kfac_jax.devices.rows import Shape
from kfac_jax.linalg._coherence import Conditional, conditionals
from kfac_jax.linalg._psd import Inverted, inverse_many, inverse_root_many

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Alone(Devices):
    """A device that shares nothing; `devices=None` means this.

    >>> Alone().size()
    1
    """

    @property
    def cuts_state(self) -> bool:
        """False: it keeps the full state."""
        return False

    def size(self) -> int:
        """1."""
        return 1

    def keepers(self) -> int:
        """1."""
        return 1

    def mean(self, tree: T) -> T:
        """Returns the tree, the average over one device."""
        return tree

    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """Returns the arguments, the sums over one device."""
        return weight, counts, sums

    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """Returns the flags."""
        return list(flags)

    def parts(self) -> int:
        """1."""
        return 1

    def joined(self, part: Array, axis: int = 0) -> Array:
        """Returns the array, which is the whole."""
        return part

    def own(self, whole: Array) -> Array:
        """Returns the array."""
        return whole

    def row_shape(self, shape: Shape) -> Shape:
        """Returns the shape: the rows are the full array."""
        return shape

    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """Returns the arrays, which are their own rows."""
        return list(leaves)

    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Returns the rows, which are the full arrays."""
        return list(rows)

    def apart(self, function: Callable[..., T], rows: Any, full: Any) -> T:
        """Calls the function on this device."""
        return function(self, rows, full)

    def made(self, make: Callable[[], T]) -> T:
        """Makes the state array by array, without compiling."""
        return make()

    def inverses(self, shifted: Mapping[K, Shifted]) -> dict[K, Inverted]:
        """Inverts matrices, those of one size as one batch."""
        return by_name(inverse_many, shifted)

    def roots(self, shifted: Mapping[K, Shifted]) -> dict[K, Array]:
        """Computes roots, those of one size as one batch."""
        return by_name(inverse_root_many, shifted)

    def conditionals(
        self, parts: Mapping[K, tuple[Array, Array, Array]]
    ) -> dict[K, Conditional]:
        """Computes the decompositions one after the other."""
        return by_name(conditionals, parts)

    def each(self, tasks: Mapping[K, Task]) -> dict[K, list[Array]]:
        """Runs the tasks one after the other."""
        return {name: task.function(task.operand) for name, task in tasks.items()}
