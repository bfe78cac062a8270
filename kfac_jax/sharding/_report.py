"""Who owns what, how much each device keeps, and what they exchange."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from kfac_jax.layers import Layer
from kfac_jax.linalg._psd import padded
from kfac_jax.linalg._shared import LEAVES
from kfac_jax.sharding._planner import Division, divide, shared_cost
from kfac_jax.sharding._rows import row_bytes

Parts = Sequence[tuple[str, str, int, int, str]]
"""Layer, factor, how many matrices, their size, and type."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingReport:
    """What a distribution makes of a plan's layers. Print it to see a table.

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
      statistics_bytes: moved in each step that brings statistics.
      update_bytes: moved in each step, for the update.
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
    layers: Sequence[Layer],
    parameters: Sequence[tuple[tuple[int, ...], str]],
    devices: int,
    keepers: int,
) -> SharingReport:
    """Works out what the devices do.

    Args:
      layers: the plan's layers.
      parameters: shapes and types.
      devices: how many share the inversions.
      keepers: in how many parts the state is cut.

    Returns:
      The report.
    """
    parts = _matrices(layers)
    stacks, divisions = _divided(parts, devices)
    work = [0.0] * devices
    for (_, d, _), division in zip(stacks, divisions, strict=True):
        for device, count in enumerate(division.counts):
            work[device] += int(count) * float(d) ** 3
            if division.shared:
                work[device] += len(division.owners) * shared_cost(d, devices, LEAVES)
    everyone = sum(x.inversion_cost for x in layers if not _shares(x))
    factors = [(s, x.dtype) for x in layers for s in x.factor_shapes.values()]
    inverses = [(s, x.dtype) for x in layers for s in x.inverse_shapes.values()]
    ring = (devices - 1) / devices
    around = (keepers - 1) / keepers
    statistics = ring * _bytes(factors) * (1 if keepers == devices else 2)
    gathered = sum(
        devices * division.slots * d**2 * jnp.dtype(dtype).itemsize
        for (_, d, dtype), division in zip(stacks, divisions, strict=True)
    )
    return SharingReport(
        devices=devices,
        keepers=keepers,
        owners=_owners(layers, parts, stacks, divisions),
        work=tuple(x + everyone for x in work),
        total_work=everyone + sum(k * float(d) ** 3 for k, d, _ in stacks),
        state_bytes=_bytes([*factors, *inverses, *parameters], keepers),
        whole_state_bytes=_bytes([*factors, *inverses, *parameters]),
        statistics_bytes=statistics,
        update_bytes=around * 3 * _bytes(parameters),
        refresh_bytes=around * _bytes(factors) + ring * gathered,
    )


def _shares(layer: Layer) -> bool:
    return layer.block is not None and layer.link is None and not layer.carried_shapes


def _matrices(layers: Sequence[Layer]) -> Parts:
    """What is inverted, in the order in which the inversion gets it."""
    return [
        (layer.name, name, math.prod(x.shape[:-2]), x.shape[-1], str(x.dtype))
        for layer in layers
        if layer.block is not None and _shares(layer)
        for name, x in layer.damped.items()
        if name not in layer.block.elementwise
    ]


def _divided(
    parts: Parts, devices: int
) -> tuple[list[tuple[int, int, str]], list[Division]]:
    """The stacks `(k, d, type)` that they make, and how these are divided."""
    counts: dict[tuple[int, str], int] = {}
    for _, _, k, d, dtype in parts:
        key = padded(d), dtype
        counts[key] = counts.get(key, 0) + k
    stacks = [(k, d, dtype) for (d, dtype), k in counts.items()]
    return stacks, divide([(k, d) for k, d, _ in stacks], devices)


def _owners(
    layers: Sequence[Layer],
    parts: Parts,
    stacks: Sequence[tuple[int, int, str]],
    divisions: Sequence[Division],
) -> dict[str, dict[str, tuple[int, ...]]]:
    left = {
        (d, dtype): [*map(int, division.owners)]
        for (_, d, dtype), division in zip(stacks, divisions, strict=True)
    }
    result: dict[str, dict[str, tuple[int, ...]]] = {x.name: {} for x in layers}
    for layer, name, k, d, dtype in parts:
        own = left[padded(d), dtype]
        result[layer][name] = tuple(owner for owner in own[:k] if owner >= 0)
        del own[:k]
    return result


def _bytes(arrays: Sequence[tuple[tuple[int, ...], str]], keepers: int = 1) -> int:
    return sum(row_bytes(s, keepers, jnp.dtype(dtype).itemsize) for s, dtype in arrays)
