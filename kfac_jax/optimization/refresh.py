"""The refresh of inverses, and of γ with them: of all layers at once, or in turn."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils.ordering import known_false_after
from kfac_jax.devices import Devices
from kfac_jax.devices.planner import balance
from kfac_jax.operator import by_rows
from kfac_jax.operator import inverses as inverses_lib
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.plan.group import Factors, Group, names_of


class Refreshed(NamedTuple):
    """The state after a refresh."""

    factors: Factors
    inverses: Factors
    gamma: Array | None  # [], γ; None if γ = √(λ+η)
    failed: Array  # [] bool, whether an inverse was not finite


def shares(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """Divides groups into shares of about equal cost."""
    owners = balance([group.inversion_cost for group in groups], count)
    pairs = list(zip(groups, owners, strict=True))
    return [[group for group, owner in pairs if owner == i] for i in range(count)]


def refresh(
    groups: Sequence[Group],
    factors: Factors,
    inverses: Factors,
    damping: Array,
    gamma: Array | None,
    due: Sequence[Array],
    informed: Array,
    devices: Devices,
    candidates: Candidates | None,
) -> Refreshed:
    """Renews γ and the inverses where due.

    Args:
      groups: the plan's groups.
      factors: the moving averages.
      inverses: the inverses so far.
      damping: λ + η.
      gamma: γ so far; None if γ = √(λ+η).
      due: for each share of the groups, whether it is due.
      informed: whether there have been statistics.
      devices: the devices.
      candidates: evaluates candidates for γ, or None. With it all groups are one share.

    Returns:
      The state after the refresh.
    """
    every_step = [x for x in groups if x.in_every_step]
    turned = list(groups)
    # Groups whose inverses are renewed in every step take no turns, unless their bases
    # move in a refresh. To choose γ, the inverses of all groups are needed at once.
    if candidates is None:
        turned = [x for x in groups if x.moves or x not in every_step]
    inverses = dict(inverses)
    moving = _of([x for x in groups if x.moves], factors)
    failed = jnp.zeros((), jnp.int32)
    waits: Array | None = None
    for share, now in zip(shares(turned, len(due)), due, strict=True):
        if not share:
            continue
        if waits is not None:
            # Shares run one after the other: batched LAPACK calls that run at the same
            # time can block for ever, see linalg.inverse_many.
            now = now & ~known_false_after(waits)
        own = _of(share, inverses)
        bases = {n: x for n, x in moving.items() if n in names_of(share)}
        work = functools.partial(
            refresh_share, share, factors, damping, devices, candidates
        )
        bases, own, gamma, bad = jax.lax.cond(
            now,
            work,
            lambda bases, own, gamma: (bases, own, gamma, jnp.zeros((), jnp.int32)),
            bases,
            own,
            gamma,
        )
        moving, inverses, failed = moving | bases, inverses | own, failed + bad
        waits = jnp.ravel(jax.tree.leaves(own)[0])[0] if jax.tree.leaves(own) else None
    following = _of(every_step, factors) | moving
    old = _of(every_step, inverses)
    found, unsafe = inverses_lib.refresh(
        every_step, following, old, _squared(damping, gamma)
    )
    # before there are statistics, steps follow the gradient
    inverses |= jax.tree.map(functools.partial(jnp.where, informed), found, old)
    wrong = failed > 0
    if every_step:  # each device has only checked its own rows
        (safe,) = devices.everywhere([unsafe == 0])
        wrong |= ~safe
    return Refreshed(factors | moving, inverses, gamma, wrong)


def _of(groups: Sequence[Group], arrays: Factors) -> Factors:
    return {name: arrays[name] for group in groups for name in group.names}


def refresh_share(
    groups: Sequence[Group],
    factors: Factors,
    damping: Array,
    devices: Devices,
    candidates: Candidates | None,
    moving: Factors,
    old: Factors,
    gamma: Array | None,
) -> tuple[Factors, Factors, Array | None, Array]:
    """Renews the inverses of one share.

    γ is chosen here because a refresh is due whenever γ is: the choice then uses the
    very factors that are inverted, and costs nothing in other steps.

    Args:
      groups: the share.
      factors: the moving averages of all layers.
      damping: λ + η.
      devices: the devices.
      candidates: evaluates candidates for γ, or None.
      moving: the share's factors that are in a basis.
      old: the share's inverses.
      gamma: γ; None if γ = √(λ+η).

    Returns:
      The factors that are in a basis, the inverses, γ, and the number of layers whose
      inversion failed.
    """
    moving = inverses_lib.move([x for x in groups if x.name in moving], moving, devices)
    shapes = {n: s for x in groups for n, s in x.factor_shapes.items()}
    fixed = {n: factors[n] for n in shapes if n not in moving}
    fixed = by_rows.full({n: shapes[n] for n in fixed}, fixed, devices)
    if candidates is not None:
        assert gamma is not None
        gamma = candidates.update(fixed | moving, gamma)
    present = [x for x in groups if x.moves and not x.in_every_step]
    inverses, failed = inverses_lib.refresh(
        groups, fixed | _of(present, moving), old, _squared(damping, gamma), devices
    )
    return moving, inverses, gamma, failed


def _squared(damping: Array, gamma: Array | None) -> Array:
    return damping if gamma is None else jnp.square(gamma)
