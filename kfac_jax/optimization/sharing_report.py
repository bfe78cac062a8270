"""Who owns what, how much each device keeps, and what they exchange."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax.devices.planner import (
    balance,
    divide,
    pack,
    shared_cost,
    shared_entries,
)
from kfac_jax.devices.rows import row_bytes
from kfac_jax.linalg._psd import padded
from kfac_jax.linalg._shared import LEAVES
from kfac_jax.plan.group import (
    Abstract,
    Decomposed,
    Group,
    abstract_factors,
    abstract_inverses,
)
from kfac_jax.plan.layer import Layer

Arrays = Sequence[tuple[tuple[int, ...], str]]
"""Shapes and types."""

Owners = dict[str, dict[str, tuple[int, ...]]]
"""By layer and factor, the device of each of its matrices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingReport:
    """What devices make of a plan's layers. Print it to see a table.

    Work counts d³ for a matrix `[d, d]`. Bytes moved are those that each device
    receives, with collectives that go around a ring.

    Attributes:
      devices: how many share the inversions.
      keepers: in how many parts the state is cut.
      owners: by layer and factor, the device of each of its matrices; empty if all
        devices invert them together.
      work: each device's work in one refresh of the inverses.
      total_work: that of one device alone.
      state_bytes: what each device keeps of factors, inverses and velocity.
      whole_state_bytes: what one device alone keeps.
      statistics_bytes: moved in each step that brings statistics: of `OverMesh`, and of
        a `shard_map` that checks what varies, the sums of everything on all devices
        (some compilers spare them what they do not keep); else, with `OverAxis`, their
        rows.
      update_bytes: moved in each step, for the update of `kfac`.
      refresh_bytes: moved in each refresh.
    """

    devices: int
    keepers: int
    owners: Mapping[str, Mapping[str, tuple[int, ...]]]
    work: tuple[float, ...]
    total_work: float
    state_bytes: int
    whole_state_bytes: int
    statistics_bytes: float
    update_bytes: float
    refresh_bytes: float

    def __str__(self) -> str:
        """The table."""
        width = max([len("layer"), *map(len, self.owners)])
        lines = [f"{'layer':{width}}  owners of its factors' inverses"]
        for name, part in self.owners.items():
            owners = "  ".join(f"{key}: {_who(own)}" for key, own in part.items())
            lines.append(f"{name:{width}}  {owners}")
        share = max(self.work) / self.total_work if self.total_work else 1.0
        part = "all of it" if self.keepers == 1 else f"1/{self.keepers} of it"
        lines += [
            "",
            f"{self.devices} devices share a refresh; the busiest does {share:.3f} of "
            f"the work (1/{self.devices} is {1 / self.devices:.3f}).",
            f"Each device keeps {_mebibytes(self.state_bytes)} of state, {part}; one "
            f"alone would keep {_mebibytes(self.whole_state_bytes)}.",
            "Each device receives "
            f"{_mebibytes(self.statistics_bytes)} for the statistics and "
            f"{_mebibytes(self.update_bytes)} for the update in a step, and "
            f"{_mebibytes(self.refresh_bytes)} in a refresh.",
        ]
        return "\n".join(lines)


def _who(owners: tuple[int, ...]) -> str:
    if not owners:
        return "all"
    return ", ".join(str(owner) for owner in sorted(set(owners)))


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def report(
    groups: Sequence[Group],
    parameters: Arrays,
    devices: int,
    keepers: int,
    scatters: bool,
) -> SharingReport:
    """Works out what the devices do.

    Args:
      groups: the plan's groups.
      parameters: shapes and types.
      devices: how many share the inversions.
      keepers: in how many parts the state is cut.
      scatters: whether devices receive only their rows of the statistics' sums.

    Returns:
      The report.
    """
    alone = _Work(devices, [x for x in groups if not x.wants_roots])
    roots = _Work(devices, [x for x in groups if x.wants_roots], share=False)
    single = _Singles(devices, groups)
    factors, inverses = (
        _arrays(f(groups)) for f in (abstract_factors, abstract_inverses)
    )
    ring, around = _received(devices), _received(keepers)
    rest = [x for x in groups if not x.solves_by_rows]
    products = [layer for x in groups if x.solves_by_rows for layer in x.layers]

    def cut(arrays: Arrays) -> int:
        """How many bytes the rows of all devices are, filled up."""
        return keepers * _bytes(arrays, keepers)

    owners: Owners = {name: {} for x in groups for name in x.names}
    for part in (alone, roots, single):
        for name, own in part.owners().items():
            owners[name] |= own
    work = zip(alone.each(), roots.each(), single.each(), strict=True)
    whole = [*factors, *inverses, *parameters]
    return SharingReport(
        devices=devices,
        keepers=keepers,
        owners=owners,
        work=tuple(map(sum, work)),
        total_work=alone.total + roots.total + single.total,
        state_bytes=_bytes(whole, keepers),
        whole_state_bytes=_bytes(whole),
        statistics_bytes=around * cut(factors)
        + 2 * _received(devices // keepers) * _bytes(factors, keepers)
        if scatters
        else 2 * ring * _bytes(factors),
        # the velocity, two rounds of products, inverses that are applied whole
        update_bytes=around
        * (
            cut(parameters)
            + sum(_rounds(layer, keepers) for layer in products)
            + cut(_arrays(abstract_inverses(rest)))
        ),
        refresh_bytes=around * cut(factors)
        + ring * (alone.gathered + roots.gathered + 2 * single.bytes),
    )


def _rounds(layer: Layer, keepers: int) -> int:
    """How many bytes two products' rows are, of all devices together."""
    shape, itemsize = layer.shape, jnp.dtype(layer.dtype).itemsize
    rows, columns = (-(-n // keepers) * keepers for n in (shape.inputs, shape.outputs))
    each = rows * shape.outputs + columns * shape.inputs
    return math.prod(shape.lead) * each * itemsize


def _received(devices: int) -> float:
    """What part of an array gathered from devices each of them receives."""
    return (devices - 1) / devices


def _arrays(abstract: Abstract) -> list[tuple[tuple[int, ...], str]]:
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(abstract)]


class _Work:
    """Matrices that are inverted (or their roots), by stacks of one padded size."""

    def __init__(
        self, devices: int, groups: Sequence[Group], share: bool = True
    ) -> None:
        self.devices = devices
        # layer, factor, how many, their size, type: as the inversion gets them
        self.parts = [
            (layer, name, math.prod(x.shape[:-2]), x.shape[-1], str(x.dtype))
            for group in groups
            for (layer, name), x in _matrices(group).items()
        ]
        counts: dict[tuple[int, str], int] = {}
        for _, _, k, d, dtype in self.parts:
            key = padded(d), dtype
            counts[key] = counts.get(key, 0) + k
        self.stacks = [(k, d, dtype) for (d, dtype), k in counts.items()]
        self.divisions = divide([(k, d) for k, d, _ in self.stacks], devices, share)
        self.total = sum(k * float(d) ** 3 for k, d, _ in self.stacks)
        self.gathered = sum(
            map(self._exchanged, {dtype for _, _, dtype in self.stacks})
        )

    def _exchanged(self, dtype: str) -> float:
        """How many bytes all devices together gather of one type."""
        itemsize = jnp.dtype(dtype).itemsize
        shared = sum(
            k * shared_entries(d, LEAVES) * itemsize
            for (k, d, kind), division in zip(self.stacks, self.divisions, strict=True)
            if kind == dtype and division.shared
        )
        own = [
            (division, d)
            for (_, d, kind), division in zip(self.stacks, self.divisions, strict=True)
            if kind == dtype and not division.shared
        ]
        if not own:
            return shared
        own.sort(key=lambda pair: -pair[1])
        packing = pack([division for division, _ in own], [d**2 for _, d in own])
        return shared + self.devices * packing.length * itemsize

    def each(self) -> list[float]:
        work = [0.0] * self.devices
        for (k, d, _), division in zip(self.stacks, self.divisions, strict=True):
            for device, count in enumerate(division.counts):
                work[device] += int(count) * float(d) ** 3
                if division.shared:
                    work[device] += k * shared_cost(d, self.devices, LEAVES)
        return work

    def owners(self) -> Owners:
        left = {
            (d, dtype): [*map(int, division.owners)]
            for (_, d, dtype), division in zip(self.stacks, self.divisions, strict=True)
        }
        result: Owners = {}
        for layer, name, k, d, dtype in self.parts:
            own = left[padded(d), dtype]
            owners = tuple(owner for owner in own[:k] if owner >= 0)
            result.setdefault(layer, {})[name] = owners
            del own[:k]
        return result


def _matrices(group: Group) -> dict[tuple[str, str], Any]:
    """What a group has inverted, as abstract arrays."""
    shapes = group.factor_shapes
    factors = {
        x.name: {n: jax.ShapeDtypeStruct(s, x.dtype) for n, s in shapes[x.name].items()}
        for x in group.layers
    }
    wanted = jax.eval_shape(lambda factors: group.to_invert(factors, 1.0)[0], factors)
    return {name: damped.factor for name, damped in wanted.items()}


class _Singles:
    """What is decomposed one by one: bases, and pairs of linked layers."""

    def __init__(self, devices: int, groups: Sequence[Group]) -> None:
        self.devices = devices
        bases = [part for x in groups if x.moves for part in x.decomposed]
        links = [x.decomposed for x in groups if not x.moves]
        self.parts: list[Decomposed] = []
        self.places: list[int] = []
        for some in (bases, *links):  # each is divided by itself
            self.parts += some
            self.places += balance([part.cost for part in some], devices)
        self.total = sum(part.cost for part in self.parts)
        self.bytes = sum(part.bytes for part in self.parts)

    def each(self) -> list[float]:
        work = [0.0] * self.devices
        for part, owner in zip(self.parts, self.places, strict=True):
            work[owner] += part.cost
        return work

    def owners(self) -> Owners:
        result: Owners = {}
        for part, owner in zip(self.parts, self.places, strict=True):
            result.setdefault(part.layer, {})[part.name] = (owner,)
        return result


def _bytes(arrays: Arrays, keepers: int = 1) -> int:
    return sum(row_bytes(s, keepers, jnp.dtype(dtype).itemsize) for s, dtype in arrays)
