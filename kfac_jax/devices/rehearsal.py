"""What a step would have devices do and exchange, noted instead of done."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax.devices.base import Shifted, Task
from kfac_jax.devices.planner import ALL, Stack, allot, balance
from kfac_jax.devices.rows import Shape, own_shape
from kfac_jax.devices.several import Several, Shared
from kfac_jax.linalg._psd import Inverted, padded

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


class Rehearsal(Several):
    """Devices to trace a step with, by `jax.eval_shape`; shapes are those on one.

    Attributes:
      owners: the device of each matrix, by name; none if all invert it together.
      work: multiply-adds of each device, d³ for a matrix `[d, d]`.
      total_work: those of one device alone.
      received: how many bytes each device has received, by collectives that go around
        a ring.
    """

    def __init__(self, devices: int, keepers: int, scatters: bool) -> None:
        """Nothing is noted yet.

        Args:
          devices: how many there are.
          keepers: in how many parts they keep the state.
          scatters: whether they receive only their rows of the statistics' sums.
        """
        self._devices, self._keepers, self._scatters = devices, keepers, scatters
        self.state_axes = ("state",) if keepers > 1 else ()
        self.owners: dict[Any, tuple[int, ...]] = {}
        self.work = np.zeros(devices)
        self.total_work = self.received = 0.0
        self._by_size: dict[tuple[int, Any], list[int]] = {}

    def _gather(self, size: float, devices: int) -> None:
        """Receives an array of so many bytes, of which each device had a part."""
        self.received += size * (devices - 1) / devices

    def size(self) -> int:
        """The number of devices that share the work."""
        return self._devices

    def keepers(self) -> int:
        """The number of parts that the state is cut into."""
        return self._keepers

    # ------------------------------------------------------------------ collectives

    def mean(self, tree: T) -> T:
        """Returns the tree; an exchange of a few numbers is not counted."""
        return tree

    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """Returns the flags; an exchange of a few bits is not counted."""
        return list(flags)

    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """Counts the bytes of the sums; a sum moves twice the bytes of a gathering."""
        rows = self.tree_rows(sums)
        if self._scatters:
            self._gather(self._keepers * nbytes(rows), self._keepers)
            self._gather(2 * nbytes(rows), self._devices // self._keepers)
        else:
            self._gather(2 * nbytes(sums), self._devices)
        return weight, counts, rows

    def parts(self) -> int:
        """The number of devices."""
        return self._devices

    def joined(self, part: Array, axis: int = 0) -> Array:
        """Counts the bytes of gathering; parts are taken for equal."""
        self._gather(self._devices * nbytes(part), self._devices)
        return jnp.concatenate([part] * self._devices, axis)

    def own(self, whole: Array) -> Array:
        """A device's part."""
        return whole[: len(whole) // self._devices]

    # ------------------------------------------------------------------------- rows

    def row_shape(self, shape: Shape) -> Shape:
        """The shape of a device's rows."""
        return own_shape(shape, self._keepers) if self.cuts_state else shape

    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """A device's rows."""
        return [jnp.zeros(self.row_shape(x.shape), x.dtype) for x in leaves]

    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Counts the bytes of gathering rows, if devices keep rows."""
        self._gather(self._keepers * nbytes(rows), self._keepers)
        return [jnp.zeros(s, x.dtype) for x, s in zip(rows, shapes, strict=True)]

    def gather(self, parts: Sequence[Array]) -> list[Array]:
        """The devices' parts behind each other, `[devices · rows, ...]`."""
        return self.full(parts, [(len(x) * self._keepers, *x.shape[1:]) for x in parts])

    def own_part(self, x: Array) -> Array:
        """A device's part of the first axis, filled up with zeros."""
        return jnp.zeros((-(-len(x) // self._keepers), *x.shape[1:]), x.dtype)

    def apart(self, function: Callable[..., T], rows: Any, full: Any) -> T:
        """Calls it: every device runs this."""
        return function(self, rows, full)

    # --------------------------------------------------------------------- inversion

    def inverses(self, shifted: Mapping[K, Shifted]) -> dict[K, Inverted]:
        """Inverts, and records the owners."""
        found = super().inverses(shifted)
        self._own(shifted)
        return found

    def roots(self, shifted: Mapping[K, Shifted]) -> dict[K, Array]:
        """Computes roots, and records the owners."""
        found = super().roots(shifted)
        self._own(shifted)
        return found

    def _own(self, shifted: Mapping[K, Shifted]) -> None:
        """Records the owners by name; `map` only saw stacks of one size and type."""
        for name, (x, shift) in shifted.items():
            stack = self._by_size[padded(x.shape[-1]), x.dtype]
            own = [stack.pop(0) for _ in range(shift.size)]
            self.owners[name] = tuple(owner for owner in own if owner != ALL)

    def map(
        self,
        stacks: Sequence[Array],
        function: Callable[[Array], Array],
        shared: Shared | None = None,
    ) -> list[Array]:
        """Records the planner's decisions."""
        sizes = [Stack(len(x), x.shape[-1], x.dtype) for x in stacks]
        allotment = allot(sizes, self._devices, shared is not None)
        self.work += allotment.work
        self.total_work += allotment.total_work
        self._gather(allotment.gathered_bytes, self._devices)
        for x, division in zip(sizes, allotment.divisions, strict=True):
            self._by_size[x.size, x.dtype] = division.owners.tolist()
        return list(stacks)

    def each(self, tasks: Mapping[K, Task]) -> dict[K, list[Array]]:
        """Records the planner's decisions, and finds the results' shapes."""
        costs = [task.cost for task in tasks.values()]
        owners = balance(costs, self._devices)
        self.owners |= {name: (own,) for name, own in zip(tasks, owners, strict=True)}
        np.add.at(self.work, owners, costs)
        self.total_work += sum(costs)
        found = {name: task.function(task.operand) for name, task in tasks.items()}
        self._gather(2 * nbytes(found), self._devices)
        return found


def nbytes(tree: Any) -> int:
    """The number of bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
