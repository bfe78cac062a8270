"""The optimizer behind `kfac`: a preconditioner, and rules for the length of steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import fresh
from kfac_jax._utils.vectors import inner_product
from kfac_jax.optimization.adaptation import adapted, averaged_curvature
from kfac_jax.optimization.checks import check_evaluation
from kfac_jax.optimization.local_model import LocalModel
from kfac_jax.optimization.loss import loss_of, with_loss
from kfac_jax.optimization.preconditioner import Batch, Preconditioner, counted
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.optimization.state import KFACState, at
from kfac_jax.optimization.step import Combined, Rates, Step
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel, Refine
from kfac_jax.statistics.averages import Statistics

SHARE_OF_LOSS = 0.003
"""The default norm constraint, as a share of the loss; see docs/tuning.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A preconditioner, and the rules for the length of its steps: see `kfac`."""

    preconditioner: Preconditioner
    learning_rate: optax.ScalarOrSchedule | QuadraticModel | Refine
    momentum: optax.ScalarOrSchedule | None
    norm_constraint: optax.ScalarOrSchedule | str | None

    @property
    def modelled(self) -> bool:
        """Whether the quadratic model chooses the step's length."""
        return isinstance(self.learning_rate, QuadraticModel | Refine)

    def init(self, params: optax.Params) -> KFACState:
        """The state before the first step."""
        state = self.preconditioner.init(params)
        velocity = jax.tree.map(fresh.zeros_like, params)
        devices = self.preconditioner.devices
        if devices.cuts_state:
            velocity = devices.tree_rows(axis_types.unsharded(velocity))
        return state._replace(velocity=velocity)

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        args: Any = None,
        **others: Any,
    ) -> tuple[optax.Updates, KFACState]:
        """One update."""
        own = self.preconditioner
        batch = own.read("kfac", updates, state, statistics, value, sorted(others))
        tree, rule = own.curvature.tree, own.damping
        if self.modelled or isinstance(rule, LevenbergMarquardt):
            check_evaluation(own.curvature, params, batch.value, args)
        elif params is not None:
            tree.masked_leaves(params, "params")
        velocity = self._velocity(state.velocity)
        count, previous = state.step, [x for x in velocity if x is not None]
        mu = None if self.momentum is None else at(self.momentum, count)
        model = LocalModel(
            own.curvature, params, args, batch.shown, batch.damping, own.devices
        )
        products = {n: (x, -dy) for n, (x, dy) in batch.statistics.products.items()}
        candidates: Candidates | None = None
        if own.factored_damping is not None:
            assert isinstance(self.learning_rate, QuadraticModel)
            candidates = Candidates(
                rule=own.factored_damping,
                due=(count + 1) % own.factored_damping.every == 0,
                rates=self.learning_rate,
                model=model,
                previous=previous,
                momentum=mu,
                products=products,
            )
        down = [None if x is None else -x for x in batch.gradient]
        done = own(state, batch, down, products, candidates)
        direction = [x for x in done.leaves if x is not None]
        step = Step(model, direction, done.square, batch.usable, previous)
        used = state if own.schedule.stale else done.state
        state = done.state
        if isinstance(self.learning_rate, Refine):

            def inverse(rest: list[Array]) -> list[Array]:
                solved, _ = own.apply(used, _fill(rest, batch.gradient), {})
                pairs = zip((x for x in solved if x is not None), rest, strict=True)
                return [x.astype(y.dtype) for x, y in pairs]

            step, found = step.refined(self.learning_rate, inverse)
            chosen = step.refined_rates(self.learning_rate, found, count, state.length)
        else:
            limit = self._constraint(count, batch.value, state.info.lowest_loss)
            chosen = step.rates(self.learning_rate, mu, count, limit, state.length)
        rates = chosen.solution
        moved = step.combine(rates.learning_rate, rates.momentum, batch.value)
        state = _record(state, chosen, batch.value, done.refused | ~moved.finite)
        if isinstance(rule, LevenbergMarquardt):
            state = self._adapt(rule, state, step, moved, chosen, batch)
        else:
            state = state._replace(damping=at(rule, state.step))
        velocity = _fill(own.devices.tree_rows(moved.velocity), velocity)
        state = state._replace(velocity=tree.restore(velocity, state.velocity))
        return tree.restore(_fill(moved.delta, batch.gradient), updates), state

    def _velocity(self, velocity: optax.Updates) -> list[Array | None]:
        """The full leaves of δ0 from the state's (or rows); None where a mask hides."""
        tree, devices = self.preconditioner.curvature.tree, self.preconditioner.devices
        rows = dataclasses.replace(
            tree, shapes=tuple(map(devices.row_shape, tree.shapes))
        )
        leaves = rows.masked_leaves(velocity, "the velocity")
        pairs = zip(leaves, tree.shapes, strict=True)
        shapes = [shape for x, shape in pairs if x is not None]
        found = devices.full([x for x in leaves if x is not None], shapes)
        return _fill(found, leaves)

    def _constraint(
        self, count: Array, value: Array | None, lowest: Array
    ) -> Array | None:
        """The norm constraint of a step.

        By default it is a share of the loss, or of the lowest running mean so far if
        that is smaller: steps must not get longer while the loss grows. A loss of 0
        does not count, see `with_loss`.
        """
        constraint = None if self.modelled else self.norm_constraint
        if constraint is None:
            return None
        if not isinstance(constraint, str):
            return at(constraint, count)
        size = jnp.ones((), float)
        if value is not None:
            lowest = lowest.astype(value.dtype)
            size = jnp.abs(jnp.where(value == 0, lowest, jnp.fmin(value, lowest)))
        return SHARE_OF_LOSS * jnp.where(jnp.isfinite(size), size, 1.0)

    def _adapt(
        self,
        rule: LevenbergMarquardt,
        state: KFACState,
        step: Step,
        moved: Combined,
        chosen: Rates,
        batch: Batch,
    ) -> KFACState:
        """Every T1 steps, measures ρ and changes λ by it."""
        old, gradient = batch.damping, step.model.gradient
        # Outside of the branch, because most callers compute θ + δ as well. XLA then
        # computes it once, which it cannot do across a `cond`.
        params = step.model.moved(moved.delta)
        # a user's α says nothing about Δ, nor does that of a refined Δ, which is 1
        tells = isinstance(self.learning_rate, QuadraticModel)
        alpha = chosen.solution.learning_rate if tells else jnp.zeros(())

        def measure() -> tuple[Array, Array, Array, Array]:
            rho, change, along = step.reduction_ratio(
                params, chosen.solution, self.modelled, batch.value
            )
            rho = jnp.where(moved.finite, rho, jnp.nan)
            usable = step.usable & jnp.isfinite(inner_product(gradient, gradient))
            curvature = averaged_curvature(state.curvature, along)
            loss = loss_of(batch.value)
            found = adapted(rule, old, rho, change, loss, usable, curvature, alpha)
            return found, rho, change, curvature

        def keep() -> tuple[Array, Array, Array, Array]:
            info = state.info
            return old, info.rho, info.quadratic_change, state.curvature

        due = state.step % rule.every == 0
        damping, rho, change, curvature = jax.lax.cond(due, measure, keep)
        info = state.info._replace(rho=rho, quadratic_change=change)
        return state._replace(damping=damping, curvature=curvature, info=info)


def _record(
    state: KFACState, chosen: Rates, value: Array | None, skipped: Array
) -> KFACState:
    rates = chosen.solution
    state = counted(with_loss(state, value), skipped)
    info = state.info._replace(
        step_scale=jnp.asarray(chosen.scale, float),
        learning_rate=jnp.asarray(rates.learning_rate, float),
        momentum=jnp.asarray(rates.momentum, float),
        quadratic_change=jnp.asarray(rates.change, float),
    )
    return state._replace(
        length=jnp.where(skipped, state.length, chosen.length.astype(float)),
        curvature=averaged_curvature(state.curvature, chosen.curvature),
        info=info,
    )


def _fill(parts: list[Array], like: list[Array | None]) -> list[Array | None]:
    """Puts parts in the places of the leaves of `like` that are not None."""
    rest = iter(parts)
    return [None if x is None else next(rest) for x in like]
