"""Who owns what, how much each device keeps, and what they exchange."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.curvature import Curvature
from kfac_jax.devices.rehearsal import Rehearsal, nbytes
from kfac_jax.operator import inverses as inverses_lib
from kfac_jax.optimization.refresh import refresh
from kfac_jax.plan.group import Factors
from kfac_jax.statistics import averages


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
    curvature: Curvature, devices: int, keepers: int, scatters: bool
) -> SharingReport:
    """Rehearses the parts of a step, and asks the devices what they had to do.

    Args:
      curvature: the plan.
      devices: how many share the inversions.
      keepers: in how many parts the state is cut.
      scatters: whether devices receive only their rows of the statistics' sums.

    Returns:
      The report.
    """
    groups, tree = curvature.groups, curvature.tree

    def whole() -> tuple[Factors, Factors, list[Array]]:
        velocity = map(jnp.zeros, tree.shapes, tree.dtypes)
        return averages.init_factors(groups), inverses_lib.initial(groups), [*velocity]

    def gather(over: Rehearsal, factors: Factors, *_: Any) -> Any:
        statistics = averages.zero_statistics(groups)
        return averages.average(groups, factors, statistics, 1, 0.95, over)

    def invert(over: Rehearsal, factors: Factors, inverses: Factors, _: Any) -> Any:
        now = jnp.asarray(True)
        rest = jnp.ones(()), None, [now], now, over, None
        return refresh(groups, factors, inverses, *rest).inverses

    def apply(
        over: Rehearsal, factors: Factors, inverses: Factors, velocity: list[Array]
    ) -> Any:
        vector = over.full(velocity, tree.shapes)
        return inverses_lib.precondition(groups, factors, inverses, vector, {}, over)

    def rehearsed(part: Callable[..., Any]) -> Rehearsal:
        over = Rehearsal(devices, keepers, scatters)
        jax.eval_shape(lambda: part(over, *over.tree_rows(whole())))
        return over

    refreshed, alone = rehearsed(invert), jax.eval_shape(whole)
    owners: dict[str, dict[str, tuple[int, ...]]]
    owners = {name: {} for group in groups for name in group.names}
    for (layer, name), own in refreshed.owners.items():
        owners[layer][name] = own
    return SharingReport(
        devices=devices,
        keepers=keepers,
        owners=owners,
        work=tuple(refreshed.work.tolist()),
        total_work=refreshed.total_work,
        state_bytes=nbytes(jax.eval_shape(refreshed.tree_rows, alone)),
        whole_state_bytes=nbytes(alone),
        statistics_bytes=rehearsed(gather).received,
        update_bytes=rehearsed(apply).received,
        refresh_bytes=refreshed.received,
    )
