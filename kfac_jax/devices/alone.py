"""One device, or many that each do everything."""

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
    """A device that shares nothing: what `devices=None` stands for.

    >>> Alone().size()
    1
    """

    @property
    def cuts_state(self) -> bool:
        """It has all."""
        return False

    def size(self) -> int:
        """One."""
        return 1

    def keepers(self) -> int:
        """One."""
        return 1

    def sharing_only(self) -> "Alone":
        """The same."""
        return self

    def mean(self, tree: T) -> T:
        """The same."""
        return tree

    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """The same."""
        return weight, counts, sums

    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """The same."""
        return list(flags)

    def row_shape(self, shape: Shape) -> Shape:
        """The same."""
        return shape

    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """The same."""
        return list(leaves)

    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """The same."""
        return list(rows)

    def apart(self, function: Callable[..., T], rows: Any, whole: Any) -> T:
        """Calls it for itself."""
        return function(self, rows, whole)

    def made(self, make: Callable[[], T]) -> T:
        """Makes it, array by array."""
        return make()

    def inverses(self, shifted: Mapping[K, Shifted]) -> dict[K, Inverted]:
        """Size by size."""
        return by_name(inverse_many, shifted)

    def roots(self, shifted: Mapping[K, Shifted]) -> dict[K, Array]:
        """Size by size."""
        return by_name(inverse_root_many, shifted)

    def conditionals(
        self, parts: Mapping[K, tuple[Array, Array, Array]]
    ) -> dict[K, Conditional]:
        """One by one."""
        return by_name(conditionals, parts)

    def each(self, tasks: Mapping[K, Task]) -> dict[K, list[Array]]:
        """One by one."""
        return {name: task.function(task.operand) for name, task in tasks.items()}
