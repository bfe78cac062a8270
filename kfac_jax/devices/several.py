"""Several devices: the common part of `OverAxis` and `OverMesh`."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import Array

from kfac_jax.devices.base import Devices, Shifted, Task, by_name
from kfac_jax.linalg._coherence import Conditional, conditionals
from kfac_jax.linalg._psd import Inverted, inverse_many, inverse_root_many
from kfac_jax.linalg._shared import Columns, shared_inverse

K = TypeVar("K")
T = TypeVar("T")

Shared = Callable[[Array, Columns], Array]
"""A function of `[k, d, d]` that all devices compute together."""


class Several(Devices):
    """Devices that share the work, and may keep rows of the state."""

    state_axes: str | tuple[str, ...]

    @property
    def cuts_state(self) -> bool:
        """Whether there are axes along which the state is cut."""
        return bool(self.state_axes)

    @abc.abstractmethod
    def map(
        self,
        stacks: Sequence[Array],
        function: Callable[[Array], Array],
        shared: Shared | None = None,
    ) -> list[Array]:
        """Applies a function of `[k, d, d]`, each device to the matrices it owns.

        Args:
          stacks: `[k, d, d]` matrices, the same on all devices.
          function: of matrices that come as `[k, d, d]`; it treats them one by one, and
            its cost grows as `k d³`.
          shared: a function with the same results that all devices compute together,
            for matrices too large for one device.

        Returns:
          The results, the same on all devices.
        """

    def made(self, make: Callable[[], T]) -> T:
        """Makes the state in one compiled program, which shards it at once."""
        return jax.jit(make)()

    def inverses(self, shifted: Mapping[K, Shifted]) -> dict[K, Inverted]:
        """Each device inverts its matrices; all together invert those too large."""
        apply = functools.partial(self.map, shared=shared_inverse)
        return by_name(functools.partial(inverse_many, apply=apply), shifted)

    def roots(self, shifted: Mapping[K, Shifted]) -> dict[K, Array]:
        """Each device computes the roots of its matrices."""
        return by_name(functools.partial(inverse_root_many, apply=self.map), shifted)

    def conditionals(
        self, parts: Mapping[K, tuple[Array, Array, Array]]
    ) -> dict[K, Conditional]:
        """Each device computes the decompositions that it owns."""

        def each(*columns: Sequence[Any]) -> list[list[Array]]:
            tasks = dict(zip(parts, map(Task, *columns), strict=True))
            return [*self.each(tasks).values()]

        return by_name(functools.partial(conditionals, each=each), parts)
