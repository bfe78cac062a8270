"""When inverses are refreshed."""

import dataclasses
import numbers

import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import arguments, schedules


@dataclasses.dataclass(frozen=True)
class RefreshSchedule:
    """Refreshes inverses every T3 steps, at once or in turn, for now or the next step.

    Staggered, with several `shares`, a share of the layers is refreshed at a time, all
    of them once in T3 steps: steps then take about equally long. Layers with linked
    neighbours (`BlockTridiagonal`) stay together. While an average is young, in the
    first three steps (`warm_up`), all are refreshed in each.

    Stale, a step uses the inverses (and bases) of the step before, and the next one
    what it computes: nothing waits for a refresh, which can run beside the model. The
    first step then has no inverses yet, and moves nothing.

    Attributes:
      every: T3, in steps; a number or a schedule of the step.
      shares: into how many shares of about equal cost the layers are divided.
      stale: whether refreshed inverses wait for the next step.
      phase: which of T3 steps refreshes: step k, counted from 1, with `k mod T3` equal
        to `phase mod T3`.
      warm_up: how many of the first steps refresh all layers; only steps that bring
        statistics are counted for this, all steps for T3 and phase.

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
        """Whose turn it is at a step, counted from 1: `[shares]`."""
        arguments.integer("step", step, arrays=True)
        every = axis_types.here(schedules.at(self.every, step - 1))
        every = jnp.asarray(every, jnp.int32)
        starts = jnp.arange(self.shares, dtype=jnp.int32) * every // self.shares
        return (step - self.phase) % every == starts


def as_schedule(
    inverse_every: optax.ScalarOrSchedule | RefreshSchedule,
) -> RefreshSchedule:
    """A number of steps as the schedule that it stands for."""
    if isinstance(inverse_every, RefreshSchedule):
        return inverse_every
    return RefreshSchedule(inverse_every)
