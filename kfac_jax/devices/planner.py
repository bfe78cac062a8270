"""Which device does what, and what each gets to do and to receive by it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kfac_jax.linalg._shared import LEAVES

ALL = -1
"""The owner of what all devices invert together."""

_SMALLEST_SHARED = 1024
"""Below, exchanging columns takes longer than it saves."""


def assign(sizes: Sequence[int], devices: int, share: bool = True) -> list[int]:
    """Gives matrices owners: the largest first, each to the device with least to do.

    What is more than a device's part of the whole work belongs to all.

    Args:
      sizes: d of each `d × d` matrix; its cost is d³.
      devices: how many there are.
      share: whether a matrix may belong to all.

    Returns:
      The owner of each, or `ALL`.

    >>> assign([4, 2, 2, 2, 3], 2)
    [0, 1, 1, 1, 1]
    >>> assign([2000, 1000, 1000], 2)
    [-1, 0, 1]
    """
    part = sum(size**3 for size in sizes) / devices
    by_all = [share and size >= _SMALLEST_SHARED and size**3 > part for size in sizes]
    own = [size**3 for size, each in zip(sizes, by_all, strict=True) if not each]
    owners = iter(balance(own, devices))
    return [ALL if each else next(owners) for each in by_all]


def balance(costs: Sequence[float], count: int) -> list[int]:
    """Divides work: the most costly first, each to the one with least to do.

    >>> balance([8, 1, 1, 1, 4], 2)
    [0, 1, 1, 1, 1]
    """
    loads = [0.0] * count
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def shared_cost(size: int, devices: int, leaves: int) -> float:
    """What each device does to invert a matrix together, where alone it is d³.

    Counts multiply-adds as `linalg.shared_inverse` makes them: twice `d³ / 4` for the
    inverse from its root, and for each root of `[d, d]` but the `leaves` at the end,
    which all devices compute, four products of `[d/2, d/2]`.
    """
    cost, parts, d = size**3 / 2, 1, size
    while parts < leaves:
        cost += parts * 4 * (d / 2) ** 3
        parts, d = 2 * parts, d // 2
    return cost / devices + parts * d**3


def shared_entries(size: int, leaves: int) -> float:
    """How many entries they gather of each other for it, in all.

    Two parts of the inverse, and for each root that is not a leaf three quarters.
    """
    entries, parts, d = 3 * size**2 / 4, 1, size
    while parts < leaves:
        entries += parts * 3 * (d / 2) ** 2
        parts, d = 2 * parts, d // 2
    return entries


@dataclasses.dataclass(frozen=True)
class Division:
    """How the matrices of one size are divided.

    Attributes:
      owners: the device of each, `[k]`; `ALL` for all of them together.
      counts: how many each device has, `[devices]`.
      order: the matrices by device, `[k]`.
    """

    owners: np.ndarray
    counts: np.ndarray
    order: np.ndarray

    @property
    def shared(self) -> bool:
        """Whether they belong to all; of one size all do or none."""
        return bool((self.owners == ALL).any())

    @property
    def slots(self) -> int:
        """How many the device with most has."""
        return int(self.counts.max())

    @property
    def first(self) -> np.ndarray:
        """Where each device's start in `order`, `[devices]`."""
        return np.cumsum(self.counts) - self.counts

    @property
    def places(self) -> np.ndarray:
        """Where each matrix is among its device's, `[k]`."""
        places = np.empty_like(self.order)
        own = self.owners[self.order]
        places[self.order] = np.arange(len(self.order)) - self.first[own]
        return places


def divide(
    stacks: Sequence[tuple[int, int]], devices: int, share: bool = True
) -> list[Division]:
    """Divides stacks of k matrices `[d, d]`, given as `(k, d)`."""
    sizes = [d for k, d in stacks for _ in range(k)]
    owners = np.asarray(assign(sizes, devices, share), int)
    divisions: list[Division] = []
    for k, _ in stacks:
        own, owners = np.split(owners, [k])
        counts = np.bincount(own[own != ALL], minlength=devices)
        divisions.append(Division(own, counts, np.argsort(own, kind="stable")))
    return divisions


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where in a flat array a device has its results, of all sizes behind each other.

    Attributes:
      starts: where those of each stack start on each device, `[stacks, devices]`.
      length: how long the array is, the same on all devices.
    """

    starts: np.ndarray
    length: int


def pack(divisions: Sequence[Division], sizes: Sequence[int]) -> Packing:
    """Packs results so that what the devices exchange is hardly more than they have.

    Args:
      divisions: of stacks that have owners.
      sizes: how many entries each of a stack's results has.

    Returns:
      The packing. In the order of the stacks, `slots` results may be written at a
      start: what is too much is overwritten, or behind the last.
    """
    counts = np.stack([division.counts for division in divisions])
    entries = counts * np.asarray(sizes)[:, None]
    starts = np.cumsum(entries, axis=0) - entries
    slots = np.asarray([division.slots for division in divisions])
    ends = starts + (slots * np.asarray(sizes))[:, None]
    return Packing(starts, int(ends.max()))


class Stack(NamedTuple):
    """Matrices `[number, size, size]` that are inverted as one batch."""

    number: int
    size: int
    dtype: np.dtype[Any]


class Exchange(NamedTuple):
    """How devices hand out what has owners, of one type."""

    stacks: list[int]
    packing: Packing


@dataclasses.dataclass(frozen=True)
class Allotment:
    """Which device inverts what, and how they hand out the results.

    Attributes:
      devices: how many there are.
      stacks: what is inverted.
      divisions: of each stack.
      exchanges: of what has owners, one for each type.
    """

    devices: int
    stacks: Sequence[Stack]
    divisions: Sequence[Division]
    exchanges: Sequence[Exchange]

    @property
    def work(self) -> np.ndarray:
        """Multiply-adds of each device, `[devices]`; d³ for a matrix of its own."""
        work = np.zeros(self.devices)
        for (k, d, _), division in zip(self.stacks, self.divisions, strict=True):
            by_all = k * shared_cost(d, self.devices, LEAVES) if division.shared else 0
            work += division.counts * float(d) ** 3 + by_all
        return work

    @property
    def total_work(self) -> float:
        """What one device alone would have to do."""
        return sum(k * float(d) ** 3 for k, d, _ in self.stacks)

    @property
    def gathered_bytes(self) -> float:
        """What all devices gather of each other."""
        by_all = sum(
            k * shared_entries(d, LEAVES) * dtype.itemsize
            for (k, d, dtype), x in zip(self.stacks, self.divisions, strict=True)
            if x.shared
        )
        own = sum(
            packing.length * self.stacks[members[0]].dtype.itemsize
            for members, packing in self.exchanges
        )
        return by_all + self.devices * own


def allot(stacks: Sequence[Stack], devices: int, share: bool) -> Allotment:
    """Divides stacks of matrices, which may belong to all devices if they `share`."""
    divisions = divide([(k, d) for k, d, _ in stacks], devices, share)
    exchanges: list[Exchange] = []
    owned = [i for i, division in enumerate(divisions) if not division.shared]
    for dtype in dict.fromkeys(stacks[i].dtype for i in owned):
        members = [i for i in owned if stacks[i].dtype == dtype]
        members.sort(key=lambda i: -stacks[i].size)  # then least is empty
        sizes = [stacks[i].size ** 2 for i in members]
        packing = pack([divisions[i] for i in members], sizes)
        exchanges.append(Exchange(members, packing))
    return Allotment(devices, stacks, divisions, exchanges)
