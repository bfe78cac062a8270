"""The refresh of inverses, and of γ with them: all layers at once, or in turn."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax import devices as devices_lib
from kfac_jax._utils.ordering import known_false_after
from kfac_jax.devices import Distribution
from kfac_jax.devices.planner import balance
from kfac_jax.optimization import by_rows
from kfac_jax.optimization.preconditioner import (
    init_inverses,
    refresh_factors,
    refresh_inverses,
)
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.plan import Layer
from kfac_jax.statistics.averages import Factors


class Refreshed(NamedTuple):
    """What a refresh leaves."""

    factors: Factors
    inverses: Factors
    gamma: Array | None  # [], γ, where it is apart from λ
    failed: Array  # [] int32, how many layers' inverses were not finite


def shares(layers: Sequence[Layer], count: int) -> list[list[Layer]]:
    """Divides layers into shares of about equal cost; linked ones stay together."""
    together: dict[str, list[Layer]] = {}
    for layer in layers:
        root = layer.name if layer.link is None else layer.link.root
        together.setdefault(root, []).append(layer)
    units = list(together.values())
    owners = balance([sum(x.inversion_cost for x in unit) for unit in units], count)
    return [
        [
            layer
            for unit, owner in zip(units, owners, strict=True)
            if owner == i
            for layer in unit
        ]
        for i in range(count)
    ]


def refresh(
    layers: Sequence[Layer],
    factors: Factors,
    inverses: Factors,
    damping: Array,
    gamma: Array | None,
    due: Sequence[Array],
    informed: Array,
    devices: Distribution | None,
    candidates: Candidates | None,
) -> Refreshed:
    """Renews γ and the inverses where due.

    Args:
      layers: the plan's layers.
      factors: the moving averages.
      inverses: those so far.
      damping: λ + η.
      gamma: γ so far, None where it is √(λ+η).
      due: whether each share of the layers is due.
      informed: whether there have been statistics.
      devices: the devices.
      candidates: what γ is chosen by; then all layers are one share.

    Returns:
      What the refresh leaves.
    """
    every_step = [x for x in layers if x.inverted_in_every_step]
    turned = list(layers)
    if candidates is None:  # or γ is chosen by all
        turned = [x for x in layers if x.carried_shapes or x not in every_step]
    groups, inverses = shares(turned, len(due)), dict(inverses)
    moving = {x.name: factors[x.name] for x in every_step if x.carried_shapes}
    failed = jnp.zeros((), jnp.int32)
    waits: Array | None = None
    for group, now in zip(groups, due, strict=True):
        names = {layer.name for layer in group}
        if not names:
            continue
        if waits is not None:  # one after the other, see linalg.inverse_many
            now = now & ~known_false_after(waits)
        own = {n: x for n, x in inverses.items() if n in names}
        bases = {n: x for n, x in moving.items() if n in names}
        work = functools.partial(
            _refresh_group, group, factors, damping, devices, candidates
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
    following = {x.name: factors[x.name] for x in every_step} | moving
    old = {name: inverses[name] for name in following}
    found, unsafe = refresh_inverses(
        every_step, following, old, _squared(damping, gamma)
    )
    if every_step and devices_lib.by_rows(devices):  # each has seen its own rows
        (safe,) = devices.everywhere([unsafe == 0])
        unsafe = (~safe).astype(jnp.int32)
    # before there are statistics, steps follow the gradient
    inverses |= jax.tree.map(functools.partial(jnp.where, informed), found, old)
    return Refreshed(factors | moving, inverses, gamma, failed + unsafe)


def _refresh_group(
    group: Sequence[Layer],
    factors: Factors,
    damping: Array,
    devices: Distribution | None,
    candidates: Candidates | None,
    moving: Factors,
    old: Factors,
    gamma: Array | None,
) -> tuple[Factors, Factors, Array | None, Array]:
    """The share's factors that are in a basis, inverses, γ, and how many failed.

    γ is chosen inside of the refresh, which is due whenever that is: from the very
    factors that are inverted then, and at no cost in other steps.
    """
    moving = refresh_factors(group, moving, devices)
    fixed = {x.name: factors[x.name] for x in group if x.name not in moving}
    if devices_lib.by_rows(devices):
        fixed = by_rows.whole(group, fixed, "factor_shapes", devices)
    if candidates is not None:
        assert gamma is not None
        before = init_inverses(group) if devices_lib.by_rows(devices) else old
        gamma = candidates.update(fixed | moving, before, gamma)
    inverses, failed = refresh_inverses(
        group,
        fixed,
        old,
        _squared(damping, gamma),
        devices,
    )
    return moving, inverses, gamma, failed


def _squared(damping: Array, gamma: Array | None) -> Array:
    return damping if gamma is None else jnp.square(gamma)
