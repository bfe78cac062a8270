"""The pieces of an update: state, checks, factors and inverses, rates, damping."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax import devices as devices_lib
from kfac_jax._jaxpr import axis_types
from kfac_jax._utils.arguments import number
from kfac_jax._utils.dtypes import wide, wide_dtype
from kfac_jax._utils.ordering import known_false_after
from kfac_jax._utils.vectors import inner_product, plane_products
from kfac_jax.curvature import Curvature, Params
from kfac_jax.devices import Distribution
from kfac_jax.optimization.refresh import refresh
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.plan import batch
from kfac_jax.rules import (
    LevenbergMarquardt,
    QuadraticModel,
    RefreshSchedule,
    SeparateDamping,
    Solution,
)
from kfac_jax.statistics import averages
from kfac_jax.statistics.averages import Factors, Statistics

Scalar = float | Array
Schedule = Callable[[Any], Any]


class Info(NamedTuple):
    """What the last update did.

    What was not computed is NaN (∞ under jax_debug_nans).
    """

    loss: Array  # [], h(θ): the `value` passed to update
    damping: Array  # [], λ the update was made with
    factored_damping: Array  # [], γ in its inverses; NaN where that is √(λ+η)
    learning_rate: Array  # [], α
    momentum: Array  # [], μ
    step_scale: Array  # [], by what a limit multiplied α and μ: 1 where none did
    mean_loss: Array  # [], running mean of h(θ), of some 20 steps
    lowest_loss: Array  # [], the lowest value of that mean so far
    rho: Array  # [], ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0)), when it was last measured
    quadratic_change: Array  # [], M(δ) - M(0)
    inverse_refreshes: Array  # [] int32, steps that computed inverses so far
    skipped_updates: Array  # [] int32, updates so far that refused something


class KFACState(NamedTuple):
    """The state of `scale_by_kfac` and `kfac`: a plain pytree with stable names."""

    step: Array  # [] int32, the number of updates so far
    batches: Array  # [] int32, how many of them brought statistics that were accepted
    factors: Factors  # by layer name, moving averages of the factors
    inverses: Factors  # by layer name, of the damped factors
    damping: Array  # [], λ for the next update
    length: Array  # [], running mean of the lengths of steps, 0 where there is no limit
    curvature: Array  # [], running mean of Δᵀ F Δ / Δᵀ Δ, 0 where it is not measured
    factored_damping: Array  # [], γ; NaN where that is √(λ+η)
    velocity: (
        Params  # δ0, the previous update, like the parameters; () in scale_by_kfac
    )
    info: Info


def nan() -> Array:
    """What stands for a number that was not computed."""
    # under jax_debug_nans a NaN would stop the user's program
    config: Any = jax.config
    return jnp.asarray(jnp.inf if config.jax_debug_nans else jnp.nan, float)


def initial_info() -> Info:
    """Before the first step nothing is known."""
    unknown = [
        nan() for _ in range(10)
    ]  # no two fields share a buffer: state is donated
    counts = [jnp.zeros((), jnp.int32) for _ in range(2)]
    return Info._make([*unknown, *counts])


def at(value: Any, step: Array) -> Array:
    """A number, or a schedule's at that step."""
    value = value(step) if callable(value) else value
    return jnp.asarray(axis_types.here(value), float)


def initial_damping(damping: Any) -> Array:
    """λ of the first step."""
    if isinstance(damping, LevenbergMarquardt):
        return jnp.asarray(damping.initial, float)
    return at(damping, jnp.zeros((), jnp.int32))


def initial_factored_damping(rule: SeparateDamping | None, total: Any) -> Array:
    """γ0 if it is separate: as the rule says, or the root of λ0 + η."""
    if rule is None:
        return nan()
    return jnp.sqrt(total) if rule.initial is None else jnp.asarray(rule.initial, float)


def advance(
    curvature: Curvature,
    state: KFACState,
    statistics: Statistics,
    damping: Array,
    decay: Any,
    schedule: RefreshSchedule,
    devices: Distribution | None,
    usable: Array,
    candidates: Candidates | None = None,
) -> tuple[KFACState, Array]:
    """Updates factors and, if due, γ and inverses; also tells if it refused anything.

    A batch that is not `usable` is not learnt from.

    Both ε and the refreshes at the first steps count batches that brought statistics: a
    step without any must not pass for the first.
    """
    step, layers = state.step + 1, curvature.layers
    averaged = averages.average(
        layers,
        state.factors,
        statistics,
        state.batches + 1,
        axis_types.here(decay),
        devices,
        usable,
    )
    batches = state.batches + averaged.informed.astype(jnp.int32)
    every = axis_types.here(schedule.every)
    schedule = dataclasses.replace(schedule, every=every)
    turns = schedule.turns(step) & (batches > 0)
    if candidates is not None:  # a traced T3 may not divide T2
        turns |= candidates.due & (batches > 0)
    due = turns | (averaged.informed & (batches <= schedule.warm_up))
    refreshed = refresh(
        layers,
        averaged.factors,
        state.inverses,
        damping + curvature.l2,
        None if candidates is None else state.factored_damping,
        list(due),
        batches > 0,
        devices,
        candidates,
    )
    info = state.info._replace(
        damping=damping,
        inverse_refreshes=state.info.inverse_refreshes + due.any().astype(jnp.int32),
    )
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
    return state, averaged.refused | (refreshed.failed > 0)


def averaged_loss(devices: Distribution | None, value: Any) -> Any:
    """The loss in `value`, over all devices' cases."""
    if devices is None or value is None:
        return value
    return devices.mean(loss_of(value))


def loss_of(value: Any) -> Array:
    """The loss in `value`, which may be `(loss, aux)`; NaN for None."""
    if value is None:
        return nan()
    loss = value[0] if isinstance(value, tuple) and value else value
    number("value, the loss or (loss, aux),", loss, arrays=True)
    return jnp.asarray(loss, float)


def with_loss(state: KFACState, value: Any) -> KFACState:
    """The state after a step at whose start the loss was `value`.

    A loss of exactly 0, as of a batch that a mask hides, says nothing of the scale of
    losses, and one that is not finite neither.
    """
    loss, mean = loss_of(value), state.info.mean_loss
    told, known = jnp.isfinite(loss) & (loss != 0), jnp.isfinite(mean)
    # of what is finite only, for jax_debug_nans
    new = jnp.where(told, loss, 0.0)
    old = jnp.where(known, mean, new)
    weight = jnp.maximum(1 / state.step.astype(mean.dtype), 1 - _KEPT_LOSS)
    mean = jnp.where(told, old + weight * (new - old), mean)
    lowest = jnp.fmin(state.info.lowest_loss, mean)
    return state._replace(
        info=state.info._replace(loss=loss, mean_loss=mean, lowest_loss=lowest)
    )


_KEPT_LOSS = 0.95
"""What a batch's loss leaves of the running mean before."""


def is_usable(value: Any, gradient: list[Array]) -> Array:
    """Whether a batch may be learnt from, for all that its loss says.

    A loss whose square overflows, in the gradient's precision, is taken for one that is
    not finite: with a saturated output, which hides all curvature, there is no other
    sign. To look at the gradient's squares would cost a pass over it.

    Args:
      value: h(θ), as passed to update, or None, of which nothing is said.
      gradient: ∇h, by leaves, of which only the types matter.

    Returns:
      [] bool.
    """
    if value is None:
        return jnp.asarray(True)
    limits = (float(jnp.finfo(wide_dtype(x.dtype)).max) for x in gradient)
    return jnp.abs(loss_of(value)) <= math.sqrt(min(limits, default=math.inf))


class Rates(NamedTuple):
    """What was chosen for a step."""

    solution: Solution  # α, μ and the model's change
    scale: Array  # [], by what a limit multiplied them
    length: Array  # [], the next running mean of lengths
    curvature: Array  # [], Δᵀ F Δ / Δᵀ Δ; NaN where it was not computed


class Combined(NamedTuple):
    """The update of one step, by leaves."""

    delta: list[Array]  # δ, or zero
    kept: list[Array]  # δ0 of the next step
    finite: Array  # []: whether δ was accepted


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One update's vectors, as lists of leaves (without those a mask hides).

    Attributes:
      curvature: the plan.
      params: the parameters, or None where no rule needs them.
      args: the loss function's further arguments, or None.
      gradient: ∇h.
      direction: Δ, minus the preconditioned gradient.
      squared_length: ΔᵀΔ, or somewhat more.
      usable: whether h(θ) is finite, as far as it is known.
      previous: δ0.
      damping: λ.
      devices: over which devices the batch is spread.
    """

    curvature: Curvature
    params: Params | None
    args: Any
    gradient: list[Array]
    direction: list[Array]
    squared_length: Array
    usable: Array
    previous: list[Array]
    damping: Array
    devices: Distribution | None

    def plane(self, fraction: float) -> tuple[Array, Array]:
        """`F + (λ+η) I` in the plane of Δ and δ0, `[2, 2]`, and ∇h there, `[2]`.

        Args:
          fraction: τ2, the part of the batch that F is computed on.

        Returns:
          The matrix and the slope.
        """
        basis = (self.direction, self.previous)
        part = batch.take(self.args, fraction, self.curvature.batch_argnums)
        treedef = self.curvature.tree.treedef
        vectors = [jax.tree.unflatten(treedef, v) for v in basis]
        fisher = self.curvature.quadratic_form(self.params, vectors, *part)
        fisher = devices_lib.mean(self.devices, fisher)
        gram, slope = plane_products(self.gradient, *basis)
        total = (self.damping + self.curvature.l2).astype(fisher.dtype)
        matrix = fisher + total * gram.astype(fisher.dtype)
        return matrix, slope.astype(fisher.dtype)

    def along(self, matrix: Array) -> Array:
        """`Δᵀ F Δ / Δᵀ Δ` from the matrix of `plane`; 0 where Δ is."""
        square = self.squared_length.astype(matrix.dtype)
        total = (self.damping + self.curvature.l2).astype(matrix.dtype)
        ratio = matrix[0, 0] / jnp.where(square > 0, square, 1.0)
        return jnp.where(square > 0, ratio - total, 0.0)

    def constrain(self, alpha: Array, constraint: Array) -> Array:
        """Lowers α so that `-α² Δᵀ ∇h` is at most `constraint`."""
        slope = inner_product(self.gradient, self.direction).astype(alpha.dtype)
        squared = jnp.maximum(-slope * alpha**2, jnp.finfo(alpha.dtype).tiny)
        ratio = constraint.astype(alpha.dtype) / squared
        return alpha * jnp.sqrt(jnp.minimum(1.0, ratio))

    @jax.named_scope("kfac_rates")
    def rates(
        self,
        rule: Any,
        momentum: Array | None,
        count: Array,
        constraint: Array | None,
        length: Array,
    ) -> Rates:
        """α and μ, from the quadratic model or as given, within their limits.

        Args:
          rule: a quadratic model, a number or a schedule.
          momentum: μ; None lets the model choose it.
          count: how many steps there were.
          constraint: the largest `-α² Δᵀ ∇h` of a given α, or None.
          length: the running mean of the lengths of steps.

        Returns:
          What was chosen.
        """
        if isinstance(rule, QuadraticModel):
            matrix, slope = self.plane(rule.fraction)
            free = rule.solve(matrix, slope, momentum)
            step = jnp.stack([free.learning_rate, free.momentum]).astype(slope.dtype)
            solution, scale, length = rule.limit(free, slope @ step, length, count)
            return Rates(solution, scale, length, self.along(matrix))
        assert momentum is not None
        alpha = given = at(rule, count)
        if constraint is not None:
            alpha = self.constrain(alpha, constraint)
        scale = jnp.where(given == 0, 1.0, alpha / jnp.where(given == 0, 1.0, given))
        return Rates(Solution(alpha, momentum, nan()), scale, length, nan())

    @jax.named_scope("kfac_update")
    def combine(self, alpha: Array, mu: Array, value: Any) -> Combined:
        """`δ = α Δ + μ δ0`, if it is certain to be finite.

        That is decided before δ is computed, from the lengths of Δ and δ0, which saves
        passes over δ. It is also made to wait for the loss, the last reader of the
        parameters, so that donated ones can be updated in place.

        Args:
          alpha: α.
          mu: μ.
          value: h(θ), as passed to update, or None.

        Returns:
          δ, zero where refused; the next δ0, which then stays; whether δ is finite.
        """
        u, v = self.direction, self.previous
        squares = jnp.stack([self.squared_length, inner_product(v, v)])
        rates = jnp.stack([alpha, mu]).astype(squares.dtype)
        length = (jnp.abs(rates) * jnp.sqrt(squares)).sum()
        limits = (float(jnp.finfo(x.dtype).max) for x in self.gradient)
        largest = min(limits, default=float("inf"))
        finite = self.usable & (length <= largest)
        finite &= ~known_false_after(loss_of(value))
        delta: list[Array] = []
        kept: list[Array] = []
        for d, d0, g in zip(u, v, self.gradient, strict=True):
            dtype = wide_dtype(d.dtype)
            moved = alpha.astype(dtype) * wide(d) + mu.astype(dtype) * wide(d0)
            moved = moved.astype(g.dtype)
            kept.append(jnp.where(finite, moved.astype(d0.dtype), d0))
            # the same array where it can be, for one pass less
            moved = kept[-1] if d0.dtype == g.dtype else moved
            delta.append(jnp.where(finite, moved, jnp.zeros_like(moved)))
        return Combined(delta, kept, finite)

    def moved(self, delta: list[Array]) -> Params:
        """θ + δ."""
        tree = jax.tree.unflatten(self.curvature.tree.treedef, delta)
        params = axis_types.here(self.params)
        return optax.apply_updates(params, tree)

    @jax.named_scope("kfac_damping")
    def reduction_ratio(
        self, moved: Params, rates: Solution, modelled: bool, value: Any
    ) -> tuple[Array, Array, Array]:
        """Measures `ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0))` on this step's own batch.

        Where the loss rises ρ is -∞, whatever the model predicted.

        Args:
          moved: θ + δ.
          rates: α and μ, and the model's change if `modelled`.
          modelled: whether the quadratic model was solved for this step.
          value: h(θ), as passed to update.

        Returns:
          ρ, the predicted change, and `Δᵀ F Δ / Δᵀ Δ` unless `modelled`.
        """
        predicted, along = rates.change, nan()
        if not modelled:
            matrix, slope = self.plane(1.0)
            along = self.along(matrix).astype(float)
            step = jnp.stack([rates.learning_rate, rates.momentum])
            step = step.astype(matrix.dtype)
            predicted = slope @ step + 0.5 * step @ matrix @ step

        def loss(params: Params) -> Array:
            return loss_of(self.curvature.loss_fn(params, *self.args))

        after = axis_types.explicit(loss, self.params)(moved)
        after = devices_lib.mean(self.devices, after)
        predicted = predicted.astype(after.dtype)
        before = loss_of(value)
        rho = (after - before) / predicted
        return jnp.where(after > before, -jnp.inf, rho), predicted, along


_KEPT_CURVATURE = 0.9
"""What a measurement of the curvature along a step leaves of the mean before."""


def averaged_curvature(old: Array, new: Array) -> Array:
    """The running mean with a measurement; the first of them is taken as it is."""
    new = new.astype(old.dtype)
    mean = jnp.where(old > 0, _KEPT_CURVATURE * old + (1 - _KEPT_CURVATURE) * new, new)
    return jnp.where(jnp.isfinite(new) & (new >= 0), mean, old)
