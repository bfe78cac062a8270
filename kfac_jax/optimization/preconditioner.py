"""The common part of both transformations: factors, inverses, and their application."""

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
    """The information about its batch that an update gets."""

    gradient: list[Array | None]  # ∇h by leaves, None where a mask hides them
    statistics: Statistics
    value: Array | None  # h(θ) over all devices' cases
    usable: Array  # [] bool: whether to use the batch, as far as the loss tells
    damping: Array  # [], λ of this update

    @property
    def shown(self) -> list[Array]:
        """The leaves of ∇h that no mask hides."""
        return [x for x in self.gradient if x is not None]


class Preconditioned(NamedTuple):
    """A preconditioned vector, and the state after its batch."""

    state: KFACState
    leaves: list[Array | None]  # the preconditioned vector, None where a mask hides it
    square: Array  # [], its squared length
    refused: Array  # [] bool: whether statistics or inverses were refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """The part of an optimizer that does not depend on the choice of the step's length.

    Attributes:
      curvature: the plan.
      damping: λ: a number, a schedule or a rule.
      decay: the largest ε: a number or a schedule.
      schedule: when inverses are refreshed.
      devices: the devices that share the work.
      factored_damping: the rule for γ; None for γ = √(λ+η).
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
            full = averages.init_factors(groups), inverses_lib.initial(groups)
            return self.devices.tree_rows(full)

        factors, inverses = self.devices.made(fill)
        strength = initial_damping(self.damping)
        return KFACState(
            step=jnp.zeros((), jnp.int32),
            batches=jnp.zeros((), jnp.int32),
            cases=jnp.zeros((), float),
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
        """Checks the arguments of an update.

        Args:
          kind: the transformation's name, for messages.
          updates: ∇h.
          state: the state.
          statistics: the batch's statistics.
          value: h(θ), or `(h(θ), aux)`, or None.
          others: the names of further keyword arguments.

        Returns:
          The batch.

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
        """λ of the next update, which a rule has left in the state."""
        if isinstance(self.damping, LevenbergMarquardt):
            return state.damping
        return at(self.damping, state.step)

    def advance(
        self, state: KFACState, batch: Batch, candidates: Candidates | None = None
    ) -> tuple[KFACState, Array]:
        """Updates factors and, if due, γ and inverses.

        The statistics of a batch that is not usable are ignored. The decay ε and the
        refreshes of the first steps depend on the number of batches with accepted
        statistics, not on the number of steps: a step without statistics must not count
        as the first.

        Args:
          state: the state.
          batch: the batch.
          candidates: evaluates candidates for γ; None if γ = √(λ+η).

        Returns:
          The state, and whether statistics or inverses were refused.
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
            state.cases,
        )
        batches = state.batches + averaged.informed.astype(jnp.int32)
        turns = self.schedule.turns(step) & (batches > 0)
        if candidates is not None:
            # γ changes inside of a refresh, so one is due whenever γ is. T3 may be
            # traced, so it cannot be checked to divide T2.
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
            cases=averaged.cases,
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
        """Updates factors and inverses, and applies the inverses to a vector.

        With a schedule that is `stale`, the inverses of the previous state are applied,
        so that nothing waits for a refresh. Before the first batch there are none, and
        the result is zero.

        Args:
          state: the state.
          batch: the batch.
          vector: ∇h or -∇h, by leaves.
          products: X and dY, where one of the vector's matrices may be `Xᵀ dY`.
          candidates: evaluates candidates for γ; None if γ = √(λ+η).

        Returns:
          The new state, and the preconditioned vector.
        """
        after, refused = self.advance(state, batch, candidates)
        stale = self.schedule.stale
        leaves, square = self.apply(state if stale else after, vector, products)
        if stale:
            seen = (state.batches > 0).astype(square.dtype)
            leaves = [None if x is None else x * seen.astype(x.dtype) for x in leaves]
            square = square * seen
        return Preconditioned(after, leaves, square, refused)

    def apply(
        self, state: KFACState, vector: list[Array | None], products: Products
    ) -> tuple[list[Array | None], Array]:
        """Applies a state's inverses to a vector.

        Args:
          state: the state.
          vector: by leaves.
          products: X and dY, where one of the vector's matrices may be `Xᵀ dY`.

        Returns:
          The product, and its squared length.
        """
        return inverses_lib.precondition(
            self.curvature.groups,
            state.factors,
            state.inverses,
            vector,
            products,
            self.devices,
        )


def counted(state: KFACState, skipped: Array) -> KFACState:
    """Counts an update as skipped, if it refused something."""
    count = state.info.skipped_updates + skipped.astype(jnp.int32)
    return state._replace(info=state.info._replace(skipped_updates=count))
