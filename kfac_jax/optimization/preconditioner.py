"""What both transformations do first: factors and inverses, and a gradient by them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices
from kfac_jax.operator import inverses as inverses_lib
from kfac_jax.optimization.checks import check_state, check_update
from kfac_jax.optimization.loss import averaged_loss, is_usable
from kfac_jax.optimization.refresh import refresh
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.optimization.state import (
    KFACState,
    at,
    initial_damping,
    initial_factored_damping,
    initial_info,
)
from kfac_jax.plan.group import Factors, Products
from kfac_jax.rules import LevenbergMarquardt, RefreshSchedule, SeparateDamping
from kfac_jax.statistics import averages
from kfac_jax.statistics.averages import Statistics


class Batch(NamedTuple):
    """What an update gets to know of its batch."""

    gradient: list[Array | None]  # ∇h by leaves, None where a mask hides them
    statistics: Statistics
    value: Array | None  # h(θ) over all devices' cases
    usable: Array  # [] bool: whether it may be learnt from, as far as the loss tells
    damping: Array  # [], λ of this update

    @property
    def shown(self) -> list[Array]:
        """∇h without what a mask hides."""
        return [x for x in self.gradient if x is not None]


class Preconditioned(NamedTuple):
    """What became of it."""

    state: KFACState
    leaves: list[Array | None]
    square: Array  # [], the squared length of the result
    refused: Array  # [] bool: whether statistics or inverses were


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """The part of an optimizer that is the same whatever decides its steps' length.

    Attributes:
      curvature: the plan.
      damping: λ: a number, a schedule or a rule.
      decay: the largest ε: a number or a schedule.
      schedule: when inverses are refreshed.
      devices: which share the work.
      factored_damping: the rule for γ, or None for √(λ+η).
    """

    curvature: Curvature
    damping: optax.ScalarOrSchedule | LevenbergMarquardt
    decay: optax.ScalarOrSchedule
    schedule: RefreshSchedule
    devices: Devices
    factored_damping: SeparateDamping | None = None

    def init(self, params: optax.Params) -> KFACState:
        """The state before the first step, without velocity."""
        self.curvature.tree.masked_leaves(params, "params")
        groups = self.curvature.groups

        def fill() -> tuple[Factors, Factors]:
            whole = averages.init_factors(groups), inverses_lib.initial(groups)
            return self.devices.kept(whole)

        factors, inverses = self.devices.made(fill)
        strength = initial_damping(self.damping)
        return KFACState(
            step=jnp.zeros((), jnp.int32),
            batches=jnp.zeros((), jnp.int32),
            factors=factors,
            inverses=inverses,
            damping=strength,
            length=jnp.zeros((), float),
            curvature=jnp.zeros((), float),
            factored_damping=initial_factored_damping(
                self.factored_damping, strength + self.curvature.l2
            ),
            velocity=(),
            info=initial_info(),
        )

    def read(
        self,
        kind: str,
        updates: optax.Updates,
        state: Any,
        statistics: Statistics | None,
        value: Any,
        others: Sequence[str],
    ) -> Batch:
        """Checks what an update got.

        Args:
          kind: of the transformation.
          updates: ∇h.
          state: the state.
          statistics: the batch's.
          value: h(θ), or `(h(θ), aux)`, or None.
          others: keywords that are not its own.

        Returns:
          What is known of the batch.

        Raises:
          TypeError: if the state or the statistics are of the wrong type.
          ValueError: if they are of another plan, or there are no statistics.
        """
        check_update(state, statistics, kind, others)
        assert statistics is not None
        check_state(self.curvature, state, self.devices)
        gradient = self.curvature.tree.masked_leaves(updates, "grads")
        value = averaged_loss(self.devices, value)
        usable = is_usable(value, [x for x in gradient if x is not None])
        return Batch(gradient, statistics, value, usable, self.damping_of(state))

    def damping_of(self, state: KFACState) -> Array:
        """λ of the next update: a rule has left it in the state."""
        if isinstance(self.damping, LevenbergMarquardt):
            return state.damping
        return at(self.damping, state.step)

    def advance(
        self, state: KFACState, batch: Batch, candidates: Candidates | None = None
    ) -> tuple[KFACState, Array]:
        """Updates factors and, if due, γ and inverses.

        A batch that is not usable is not learnt from. Both ε and the refreshes at the
        first steps count batches that brought statistics: a step without any must not
        pass for the first.

        Args:
          state: the state.
          batch: the batch.
          candidates: what γ is chosen by, if it is apart from λ.

        Returns:
          The state, and whether anything was refused.
        """
        step, groups = state.step + 1, self.curvature.groups
        averaged = averages.average(
            groups,
            state.factors,
            batch.statistics,
            state.batches + 1,
            at(self.decay, state.step),
            self.devices,
            batch.usable,
        )
        batches = state.batches + averaged.informed.astype(jnp.int32)
        turns = self.schedule.turns(step) & (batches > 0)
        if candidates is not None:  # a traced T3 may not divide T2
            turns |= candidates.due & (batches > 0)
        due = turns | (averaged.informed & (batches <= self.schedule.warm_up))
        refreshed = refresh(
            groups,
            averaged.factors,
            state.inverses,
            batch.damping + self.curvature.l2,
            None if candidates is None else state.factored_damping,
            list(due),
            batches > 0,
            self.devices,
            candidates,
        )
        refreshes = state.info.inverse_refreshes + due.any().astype(jnp.int32)
        info = state.info._replace(damping=batch.damping, inverse_refreshes=refreshes)
        if refreshed.gamma is not None:
            info = info._replace(factored_damping=refreshed.gamma)
            state = state._replace(factored_damping=refreshed.gamma)
        state = state._replace(
            step=step,
            batches=batches,
            factors=refreshed.factors,
            inverses=refreshed.inverses,
            info=info,
        )
        return state, averaged.refused | refreshed.failed

    def __call__(
        self,
        state: KFACState,
        batch: Batch,
        vector: list[Array | None],
        products: Products,
        candidates: Candidates | None = None,
    ) -> Preconditioned:
        """Learns from a batch, and applies the inverses to a vector.

        Stale inverses are those of the state before; while there are none the result
        is zero.

        Args:
          state: the state.
          batch: the batch.
          vector: ∇h or -∇h, by leaves.
          products: what its matrices may be products of.
          candidates: what γ is chosen by, if it is apart from λ.

        Returns:
          The new state, and the result.
        """
        after, refused = self.advance(state, batch, candidates)
        stale = self.schedule.stale
        used = state if stale else after
        leaves, square = inverses_lib.precondition(
            self.curvature.groups,
            used.factors,
            used.inverses,
            vector,
            products,
            self.devices,
        )
        if stale:
            seen = (state.batches > 0).astype(square.dtype)
            leaves = [None if x is None else x * seen.astype(x.dtype) for x in leaves]
            square = square * seen
        return Preconditioned(after, leaves, square, refused)


def counted(state: KFACState, skipped: Array) -> KFACState:
    """With an update more that refused something, if it did."""
    count = state.info.skipped_updates + skipped.astype(jnp.int32)
    return state._replace(info=state.info._replace(skipped_updates=count))
