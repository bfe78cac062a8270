"""The schedule of refreshes of inverses."""

import dataclasses
import numbers

import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import arguments, schedules


@dataclasses.dataclass(frozen=True)
class RefreshSchedule:
    """Refreshes inverses every T3 steps, of all layers at once or in turn.

    With several `shares` refreshes are staggered: one share of the layers is refreshed
    at a time, and each share once in T3 steps, so that steps take about equally long.
    Linked layers (`BlockTridiagonal`) are in one share. In the first three steps
    (`warm_up`), while averages change fast, all layers are refreshed in each step.

    With `stale` a step uses the inverses (and bases) of the step before, and those that
    it computes are for the next step. Then nothing waits for a refresh, which can run
    beside the model. The first step has no inverses yet, and its update is zero.

    Attributes:
      every: T3, in steps; a number or a schedule of the step.
      shares: the number of shares, of about equal cost, that layers are divided into.
      stale: whether refreshed inverses are used from the next step on only.
      phase: the step that refreshes, out of T3: step k, counted from 1, with `k mod T3`
        equal to `phase mod T3`.
      warm_up: the number of first steps that refresh all layers. Only steps with
        statistics count for this, while all steps count for T3 and phase.

    References:
      Martens & Grosse 2015, section 8, for T3 and the first three steps. Osawa et al.
      2019 (arXiv:1811.12019) for stale factors.

    >>> [RefreshSchedule(4, shares=2).turns(step).tolist() for step in range(1, 5)]
    [[False, False], [False, True], [False, False], [True, False]]
    """

    every: optax.ScalarOrSchedule = 20
    _: dataclasses.KW_ONLY
    shares: int = 1
    stale: bool = False
    phase: int = 0
    warm_up: int = 3

    def __post_init__(self) -> None:
        """Checks the ranges."""
        arguments.count("shares", self.shares, 1)
        arguments.flag("stale", self.stale)
        for name in ("phase", "warm_up"):
            arguments.count(name, getattr(self, name), 0)
        if callable(self.every):
            return
        arguments.number("every (T3)", self.every, arrays=True)
        if (
            isinstance(self.every, numbers.Real)
            and not float(self.every) >= self.shares
        ):
            raise ValueError(
                "Each of T3 steps refreshes at most one share: expected every (T3) of "
                f"at least shares; got {self.every} and {self.shares}. Raise T3, or "
                "lower shares."
            )
        arguments.integer("every (T3)", self.every, arrays=True)

    def turns(self, step: Array | int) -> Array:
        """Whether it is each share's turn at a step, counted from 1: `[shares]`."""
        arguments.integer("step", step, arrays=True)
        every = axis_types.here(schedules.at(self.every, step - 1))
        every = jnp.asarray(every, jnp.int32)
        starts = jnp.arange(self.shares, dtype=jnp.int32) * every // self.shares
        return (step - self.phase) % every == starts


def as_schedule(
    inverse_every: optax.ScalarOrSchedule | RefreshSchedule,
) -> RefreshSchedule:
    """Turns a number of steps into a schedule; returns schedules unchanged."""
    if isinstance(inverse_every, RefreshSchedule):
        return inverse_every
    return RefreshSchedule(inverse_every)
