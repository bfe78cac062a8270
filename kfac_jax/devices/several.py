"""Several devices: what those along an axis and those of a mesh have in common."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax import Array

from kfac_jax.devices.base import Devices, Shifted
from kfac_jax.linalg._coherence import Conditional, conditionals
from kfac_jax.linalg._psd import Inverted, inverse_many, inverse_root_many
from kfac_jax.linalg._shared import Columns, shared_inverse

T = TypeVar("T")

Shared = Callable[[Array, Columns], Array]
"""A function of `[k, d, d]` that all devices compute together."""


class Several(Devices):
    """Devices that share the work, and may keep a part of the state each."""

    state_axes: str | tuple[str, ...]

    @property
    def cuts_state(self) -> bool:
        """Along axes of the state, if there are any."""
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
          shared: the same by all devices, for matrices too large for one.

        Returns:
          Its results, the same on all devices.
        """

    def made(self, make: Callable[[], T]) -> T:
        """Makes it in one program."""
        return jax.jit(make)()

    def inverses(self, shifted: Shifted) -> list[Inverted]:
        """Each device inverts what it owns, all together what is too large for one."""
        return inverse_many(shifted, functools.partial(self.map, shared=shared_inverse))

    def roots(self, shifted: Shifted) -> list[Array]:
        """Each device those of what it owns."""
        return inverse_root_many(shifted, self.map)

    def conditionals(
        self, parts: Sequence[tuple[Array, Array, Array]]
    ) -> list[Conditional]:
        """Each device decomposes what it owns."""
        return conditionals(parts, self.each)
