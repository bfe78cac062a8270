"""The steps of `natural_gradient`: one damped system of all rows of a batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import arguments, fresh
from kfac_jax._utils.vectors import inner_product
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices
from kfac_jax.linalg._solve import clipped_solve
from kfac_jax.optimization.adaptation import (
    adapted,
    averaged_curvature,
    reduction_ratio,
)
from kfac_jax.optimization.checks import check_evaluation
from kfac_jax.optimization.loss import loss_of
from kfac_jax.optimization.state import at, initial_damping
from kfac_jax.plan import batch
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel
from kfac_jax.statistics import sample_space
from kfac_jax.statistics.averages import Statistics, check_statistics


class NaturalGradientState(NamedTuple):
    """The state of `natural_gradient`."""

    step: Array  # [] int32, the number of updates so far
    direction: optax.Params  # φ, the last direction; () without momentum
    learning_rate: Array  # [], of the last update; NaN before
    fallbacks: Array  # [] int32, updates for which T + λ had no Cholesky factor
    skipped_updates: Array  # [] int32, updates that were not finite, and zero
    damping: Array  # [], λ of the next update
    curvature: Array  # [], the running mean of φᵀ F φ / φᵀ φ; 0 before a rule knows it
    rho: Array  # [], the last reduction ratio of a rule for λ; NaN before


class _System(NamedTuple):
    """The damped problem of one batch."""

    matrix: Array  # T
    rows: sample_space.Products
    damping: Array  # λ + l2
    params: Sequence[Array]  # the parameters' leaves


class _Direction(NamedTuple):
    """φ, and what the length of a step depends on."""

    leaves: list[Array]
    square: Array  # φᵀ F φ
    inner: Array  # gᵀ φ
    length: Array  # φᵀ φ
    fallback: Array  # [] bool, whether T + λ had no Cholesky factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSpaceMethod:
    """The transformation's two functions: see `natural_gradient`."""

    curvature: Curvature
    learning_rate: optax.ScalarOrSchedule | QuadraticModel
    damping: optax.ScalarOrSchedule | LevenbergMarquardt
    decay: float  # μ
    norm_constraint: optax.ScalarOrSchedule | None
    devices: Devices

    def init(self, params: optax.Params) -> NaturalGradientState:
        """The state before the first step."""
        self.curvature.tree.leaves(params, "params")
        direction = jax.tree.map(fresh.zeros_like, params) if self.decay else ()
        return NaturalGradientState(
            step=jnp.zeros((), jnp.int32),
            direction=direction,
            learning_rate=jnp.full((), jnp.nan, float),
            fallbacks=jnp.zeros((), jnp.int32),
            skipped_updates=jnp.zeros((), jnp.int32),
            damping=initial_damping(self.damping),
            curvature=jnp.zeros((), float),
            rho=jnp.full((), jnp.nan, float),
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        args: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        """One step."""
        del extra
        args = self._checked(state, params, statistics, value, args)
        params = axis_types.here(params)
        gradient = self.curvature.tree.leaves(updates, "updates")
        assert statistics is not None
        system = self._system(state, params, statistics, args)
        phi = self._direction(gradient, state, system)
        rate = self._rate(phi, state, system)
        finite = jnp.isfinite(phi.inner) & jnp.isfinite(phi.length) & jnp.isfinite(rate)
        result = [
            jnp.where(finite, -rate.astype(x.dtype) * x, 0).astype(g.dtype)
            for g, x in zip(gradient, phi.leaves, strict=True)
        ]
        delta = jax.tree.unflatten(self.curvature.tree.treedef, result)
        new = state._replace(
            step=state.step + 1,
            direction=self._kept(phi, state, finite),
            learning_rate=jnp.where(finite, rate, 0.0).astype(float),
            fallbacks=state.fallbacks + phi.fallback.astype(jnp.int32),
            skipped_updates=state.skipped_updates + (~finite).astype(jnp.int32),
        )
        rule = self.damping
        if not isinstance(rule, LevenbergMarquardt):
            return delta, new._replace(damping=at(rule, new.step))
        loss = self.devices.mean(loss_of(value))
        curved = phi.square + system.damping * phi.length
        taken = _Taken(
            finite,
            jnp.isfinite(loss) & jnp.isfinite(inner_product(gradient, gradient)),
            0.5 * rate**2 * curved - rate * phi.inner,
            phi.square / jnp.where(phi.length > 0, phi.length, 1),
        )

        def loss_after() -> Array:
            assert params is not None
            moved = optax.apply_updates(params, delta)
            after = loss_of(self.curvature.loss_fn(moved, *args))
            return self.devices.mean(after)

        return delta, _adapt(rule, new, taken, loss, loss_after)

    def _checked(
        self, state: Any, params: Any, statistics: Any, value: Any, args: Any
    ) -> tuple[Any, ...]:
        """Checks the arguments of an update; the loss function's further arguments."""
        what = "the state of natural_gradient, from init"
        arguments.instance("state", state, NaturalGradientState, what)
        check_statistics(statistics)
        if params is None or not isinstance(args, tuple | list):
            raise ValueError(
                "natural_gradient multiplies by the batch's Jacobian: pass params and "
                "args= (a tuple of the loss function's arguments after the parameters) "
                f"to update; got {'no params' if params is None else 'params'}, "
                f"args={arguments.shown(args)}."
            )
        if isinstance(self.damping, LevenbergMarquardt):
            check_evaluation(self.curvature, params, value, args)
        if sample_space.NAME not in statistics.layers:
            raise ValueError(
                "statistics must be of a plan of the sample space; got those of layers "
                f"{[*statistics.layers]}. Use what this very plan returned."
            )
        return axis_types.here(tuple(args))

    def _system(
        self, state: Any, params: Any, statistics: Statistics, args: tuple[Any, ...]
    ) -> _System:
        plan, rule = self.curvature, self.damping
        adaptive = isinstance(rule, LevenbergMarquardt)
        given = state.damping if adaptive else at(rule, state.step)
        part = batch.take(args, plan.statistics_fraction, plan.in_batch)
        drawn = sample_space.sampled(statistics)
        matrix = sample_space.gram(plan, params, part, drawn, self.devices)
        rows = sample_space.products(plan, params, part, drawn, self.devices)
        lam = jnp.asarray(given, matrix.dtype) + plan.l2
        # of less, rounding would decide
        lam = jnp.maximum(lam, jnp.finfo(matrix.dtype).eps * jnp.trace(matrix))
        return _System(matrix, rows, lam, plan.tree.leaves(params, "params"))

    def _direction(
        self, gradient: Sequence[Array], state: Any, system: _System
    ) -> _Direction:
        """`φ = μ φ' + (F + λ)⁻¹ (g - μ F φ')`."""
        matrix, rows, lam = system.matrix, system.rows, system.damping
        last = [self.decay * x for x in jax.tree.leaves(state.direction)]
        penalty = [self.curvature.l2 * x for x in system.params]
        right, errors, empty = _in_rows(gradient, penalty, rows, matrix)
        # the same flag on all devices, as the gradient is
        pushed = jax.lax.cond(
            empty, lambda: jnp.zeros_like(errors), lambda: rows.push(right)
        )
        if self.decay:
            errors = errors - rows.push(last)
        # (F + λ)⁻¹ (Uᵀ e + r) = Uᵀ (T + λ)⁻¹ (e - U r / λ) + r / λ
        solved, fallback = clipped_solve(
            matrix, lam, (errors - pushed / lam).astype(matrix.dtype)
        )
        phi = [
            r / lam.astype(r.dtype) + x.astype(r.dtype)
            for r, x in zip(right, rows.pull(solved), strict=True)
        ]
        if self.decay:
            phi = [x + y for x, y in zip(phi, last, strict=True)]
        moved = rows.push(phi)
        return _Direction(
            phi,
            jnp.vdot(moved, moved),
            inner_product(gradient, phi),
            inner_product(phi, phi),
            fallback,
        )

    def _rate(self, phi: _Direction, state: Any, system: _System) -> Array:
        """η, given or by the quadratic model, within the norm constraint."""
        if isinstance(self.learning_rate, QuadraticModel):
            curved = phi.square + system.damping * phi.length
            positive = jnp.where(curved > 0, curved, 1)
            rate = jnp.where(curved > 0, phi.inner / positive, 0.0)
        else:
            rate = at(self.learning_rate, state.step)
        if self.norm_constraint is not None:
            most = at(self.norm_constraint, state.step)
            # the last direction's part outside of this batch's rows has no length in F
            square = phi.length if self.decay else phi.square
            longest = jnp.sqrt(most / jnp.where(square > 0, square, 1))
            rate = jnp.where(rate * rate * square > most, longest, rate)
        return rate

    def _kept(self, phi: _Direction, state: Any, finite: Array) -> Any:
        """The direction for the next step's momentum."""
        if not self.decay:
            return ()
        old = jax.tree.leaves(state.direction)
        kept = [
            jnp.where(finite, x, y).astype(y.dtype)
            for x, y in zip(phi.leaves, old, strict=True)
        ]
        return jax.tree.unflatten(self.curvature.tree.treedef, kept)


class _Taken(NamedTuple):
    """What a rule for λ needs of a step."""

    finite: Array  # [] bool, whether it is not zero for want of finite numbers
    usable: Array  # [] bool, whether loss and gradient are finite before it
    predicted: Array  # [], M(δ) - M(0)
    along: Array  # [], φᵀ F φ / φᵀ φ


def _adapt(
    rule: LevenbergMarquardt,
    state: NaturalGradientState,
    step: _Taken,
    loss: Array,
    loss_after: Callable[[], Array],
) -> NaturalGradientState:
    """Every T1 steps, measures ρ and changes λ by it."""
    old = state.damping

    def measure() -> tuple[Array, Array, Array]:
        after = loss_after()
        predicted = step.predicted.astype(after.dtype)
        rho = reduction_ratio(loss, after, predicted)
        rho = jnp.where(step.finite, rho, jnp.nan).astype(float)
        curvature = averaged_curvature(state.curvature, step.along)
        found = adapted(rule, old, rho, predicted, loss, step.usable, curvature)
        return found, rho, curvature

    def keep() -> tuple[Array, Array, Array]:
        return old, state.rho, state.curvature

    due = state.step % rule.every == 0
    found, rho, curvature = jax.lax.cond(due, measure, keep)
    return state._replace(damping=found, rho=rho, curvature=curvature)


def _in_rows(
    gradient: Sequence[Array],
    penalty: Sequence[Array],
    rows: sample_space.Products,
    matrix: Array,
) -> tuple[list[Array], Array, Array]:
    """Divides a gradient in `Uᵀ e` and a rest.

    The gradient is `c (Uᵀ e + η θ)` with the factor c of a transformation before, plus
    what a transformation has added. Of that, what is rounding is left out: it would be
    divided by λ.

    Args:
      gradient: the gradient's leaves.
      penalty: η θ.
      rows: products with U.
      matrix: T.

    Returns:
      The rest, penalty included; e: that of the registered losses, times c; or, where
      it is not known, e with `T e = U g`. And whether the rest is zero.
    """
    if rows.errors is None:
        least = jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
        least = jnp.where(least > 0, least, 1)
        pushed = rows.push(gradient).astype(matrix.dtype)
        errors, factor = clipped_solve(matrix, least, pushed)[0], jnp.ones(())
        penalty = [jnp.zeros_like(x) for x in penalty]  # what is in U is part of it
    else:
        errors, factor = rows.errors, None
    known = [
        x.astype(g.dtype) + own.astype(g.dtype)
        for g, x, own in zip(gradient, rows.pull(errors), penalty, strict=True)
    ]
    if factor is None:
        size = inner_product(known, known)
        factor = inner_product(gradient, known) / jnp.where(size > 0, size, 1)
    scaled = [factor.astype(x.dtype) * x for x in known]
    rest = [g - x for g, x in zip(gradient, scaled, strict=True)]
    limit = rows.epsilon * inner_product(gradient, gradient)
    rounding = inner_product(rest, rest) <= limit
    total = [
        jnp.where(rounding, 0, x) + factor.astype(x.dtype) * own.astype(x.dtype)
        for x, own in zip(rest, penalty, strict=True)
    ]
    empty = rounding & (inner_product(penalty, penalty) == 0)
    return total, factor * errors, empty
