"""K-FAC as optax transformations that own all their state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import fresh
from kfac_jax._utils.vectors import inner_product
from kfac_jax.curvature import Curvature, Params
from kfac_jax.devices import Sharing, checked
from kfac_jax.optimization.checks import (
    check_common,
    check_evaluation,
    check_rates,
    check_separate,
)
from kfac_jax.optimization.loss import loss_of, with_loss
from kfac_jax.optimization.preconditioner import Batch, Preconditioner
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.optimization.state import KFACState, at
from kfac_jax.optimization.step import Rates, Step, averaged_curvature
from kfac_jax.plan.group import Products
from kfac_jax.rules import (
    LevenbergMarquardt,
    QuadraticModel,
    RefreshSchedule,
    SeparateDamping,
    Solution,
    as_schedule,
)
from kfac_jax.statistics.averages import Statistics

QUADRATIC_MODEL = QuadraticModel()
MOMENTUM = 0.9
SHARE_OF_LOSS = 0.003
DAMPING = LevenbergMarquardt(0.1, relative_minimum=1e-4, relative_maximum=10.0)
"""What `kfac` does where nothing is chosen; docs/tuning.md tells what that gains."""


def scale_by_kfac(
    curvature: Curvature,
    damping: optax.ScalarOrSchedule = 1e-1,
    decay: optax.ScalarOrSchedule = 0.95,
    inverse_every: optax.ScalarOrSchedule | RefreshSchedule = 20,
    *,
    devices: Sharing | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverse of the damped approximate curvature.

    The result is `(F + (λ+η) I)⁻¹ ∇h`, with factored damping; compose it with a
    learning rate, e.g. `optax.chain(scale_by_kfac(...),
    optax.scale_by_learning_rate(0.1))`. Its update needs `statistics=` from
    `curvature.value_grad_and_statistics`.

    Args:
      curvature: the plan.
      damping: λ, a number or a schedule of the step.
      decay: the largest ε of the factors' moving averages, a number or a schedule.
      inverse_every: T3, how many steps inverses are kept, a number or a schedule; they
        are also computed at the first three steps. Or a `RefreshSchedule`.
      devices: how several devices share the inversions: `OverAxis` in a step that
        each of them runs on its part of the batch, `OverMesh` in one under `jit`; None
        if each is to do all.

    Returns:
      The transformation. Its state is a `KFACState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is out of its range.

    References:
      Martens & Grosse 2015, sections 4.2, 5, 6.3 and 8.

    >>> import jax, jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    >>> tx = scale_by_kfac(curvature)
    >>> state = tx.init(w)
    >>> value, grads, statistics = curvature.value_grad_and_statistics(
    ...     w, x, y, rng=jax.random.key(0))
    >>> updates, state = tx.update(grads, state, w, statistics=statistics)
    >>> updates.shape
    (3, 2)
    """
    check_common(curvature, damping, decay, inverse_every, devices)
    if isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "LevenbergMarquardt measures whole steps; use kfac(...), or give "
            "scale_by_kfac a number or a schedule as damping: expected one, got "
            f"{damping}."
        )
    preconditioner = Preconditioner(
        curvature=curvature,
        damping=damping,
        decay=decay,
        schedule=as_schedule(inverse_every),
        devices=checked(devices),
    )

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        **others: Any,
    ) -> tuple[Params, KFACState]:
        del params
        batch = preconditioner.read(
            "scale_by_kfac", updates, state, statistics, value, sorted(others)
        )
        done = preconditioner(state, batch, batch.gradient, batch.statistics.products)
        finite = jnp.isfinite(done.square) & batch.usable
        scaled = [
            None if x is None else jnp.where(finite, x, jnp.zeros_like(x))
            for x in done.leaves
        ]
        state = _counted(with_loss(done.state, batch.value), done.refused | ~finite)
        state = state._replace(damping=at(damping, state.step))
        return curvature.tree.restore(scaled, updates), state

    return optax.GradientTransformationExtraArgs(
        preconditioner.init, _on_any_mesh(update)
    )


def kfac(
    curvature: Curvature,
    learning_rate: optax.ScalarOrSchedule | QuadraticModel = QUADRATIC_MODEL,
    momentum: optax.ScalarOrSchedule | None = None,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt = DAMPING,
    *,
    norm_constraint: optax.ScalarOrSchedule | str | None = "auto",
    decay: optax.ScalarOrSchedule = 0.95,
    inverse_every: optax.ScalarOrSchedule | RefreshSchedule = 20,
    factored_damping: SeparateDamping | None = None,
    devices: Sharing | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The K-FAC optimizer: `δ = α Δ + μ δ0` with `Δ = -(F + (λ+η) I)⁻¹ ∇h`.

    δ0 is the previous update. Updates are ready for `optax.apply_updates`.

    There is nothing to choose: by default the exact quadratic model of each batch
    chooses α and μ, within limits that keep small batches from long steps, and λ adapts
    to how well it predicts, down to 1e-4 of the curvature that steps meet. With these
    rules (`QuadraticModel`, `LevenbergMarquardt`) the update also needs `params`,
    `value=` and `args=`, the loss function's arguments after the parameters;
    `make_step` passes them.

    Schedules are functions of the step, counted from 0, as those of optax.

    A factor, inverse or update that is not finite never enters the state: the last good
    one stays, the update is zero, and `state.info.skipped_updates` counts it. A batch
    whose loss, `value=`, is not finite (nor its square, which in float32 overflows from
    1.8e19) is not used at all.

    Args:
      curvature: the plan.
      learning_rate: α, a number, a schedule of the step, or a `QuadraticModel`.
      momentum: μ, a number or a schedule; None lets the quadratic model choose it, and
        is 0.9 with a given learning rate.
      damping: λ, a number, a schedule, or a `LevenbergMarquardt` rule.
      norm_constraint: the largest `-α² Δᵀ ∇h` of a step, a number or a schedule; larger
        ones are scaled down. "auto", with a given learning rate, which alone it is for,
        is `0.003 |h|`, of this batch or of the lowest running mean of h (of 1 without
        `value=`); give a number where the loss may cross zero. None for no
        limit. Where it limits most steps, it is what decides their length: let it fall
        (as the square) where the learning rate does.
      decay: the largest ε of the factors' moving averages, a number or a schedule.
      inverse_every: T3, how many steps inverses are kept, a number or a schedule; they
        are also computed at the first three steps. Or a `RefreshSchedule`.
      factored_damping: γ, the damping of the approximate Fisher: None for √(λ+η), or a
        `SeparateDamping` rule, which needs a `QuadraticModel` and a T2 that T3 divides.
      devices: how several devices share the inversions: `OverAxis` in a step that
        each of them runs on its part of the batch, `OverMesh` in one under `jit`; None
        if each is to do all.

    Returns:
      The transformation. Its state is a `KFACState`, whose `info` says what happened.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is out of its range or options exclude each other.

    References:
      Martens & Grosse 2015, Algorithm 2 (section 9); its section 4.3 is the plan's
      `structure=BlockTridiagonal()`.

    >>> import jax, jax.numpy as jnp, optax, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.eye(3), jnp.zeros((3, 2))
    >>> curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    >>> tx = kfac(curvature, kfac_jax.QuadraticModel(), None, 1e-3)
    >>> state = tx.init(w)
    >>> value, grads, statistics = curvature.value_grad_and_statistics(
    ...     w, x, y, rng=jax.random.key(0))
    >>> updates, state = tx.update(
    ...     grads, state, w, statistics=statistics, value=value, args=(x, y))
    >>> bool(loss_fn(optax.apply_updates(w, updates), x, y) < value)
    True
    """
    check_common(curvature, damping, decay, inverse_every, devices)
    schedule = as_schedule(inverse_every)
    check_rates(learning_rate, momentum, norm_constraint)
    if factored_damping is not None:
        check_separate(factored_damping, learning_rate, damping, schedule, curvature.l2)
    if momentum is None and not isinstance(learning_rate, QuadraticModel):
        momentum = MOMENTUM
    optimizer = _Optimizer(
        curvature=curvature,
        damping=damping,
        decay=decay,
        schedule=schedule,
        devices=checked(devices),
        factored_damping=factored_damping,
        learning_rate=learning_rate,
        momentum=momentum,
        norm_constraint=norm_constraint,
    )
    return optax.GradientTransformationExtraArgs(
        optimizer.init, _on_any_mesh(optimizer.update)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Optimizer(Preconditioner):
    """A preconditioner with what decides the length of its steps: see `kfac`."""

    learning_rate: optax.ScalarOrSchedule | QuadraticModel
    momentum: optax.ScalarOrSchedule | None
    norm_constraint: optax.ScalarOrSchedule | str | None

    @property
    def modelled(self) -> bool:
        """Whether the quadratic model chooses α."""
        return isinstance(self.learning_rate, QuadraticModel)

    def init(self, params: Params) -> KFACState:
        """The state before the first step."""
        state = super().init(params)
        velocity = jax.tree.map(fresh.zeros_like, params)
        if self.devices.cuts_state:
            velocity = self.devices.kept(axis_types.whole(velocity))
        return state._replace(velocity=velocity)

    def update(
        self,
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        args: Any = None,
        **others: Any,
    ) -> tuple[Params, KFACState]:
        """One update."""
        batch = self.read("kfac", updates, state, statistics, value, sorted(others))
        tree = self.curvature.tree
        if self.modelled or isinstance(self.damping, LevenbergMarquardt):
            check_evaluation(self.curvature, params, batch.value, args)
        elif params is not None:
            tree.masked_leaves(params, "params")
        velocity = self._velocity(state.velocity)
        count, previous = state.step, [x for x in velocity if x is not None]
        mu = None if self.momentum is None else at(self.momentum, count)
        products = {n: (x, -dy) for n, (x, dy) in batch.statistics.products.items()}
        done = self(
            state,
            batch,
            [None if x is None else -x for x in batch.gradient],
            products,
            self._candidates(count, params, args, batch, previous, mu, products),
        )
        state = done.state
        step = Step(
            curvature=self.curvature,
            params=params,
            args=args,
            gradient=batch.shown,
            direction=[x for x in done.leaves if x is not None],
            squared_length=done.square,
            usable=batch.usable,
            previous=previous,
            damping=batch.damping,
            devices=self.devices,
        )
        limit = self._constraint(count, batch.value, state.info.lowest_loss)
        chosen = step.rates(self.learning_rate, mu, count, limit, state.length)
        rates = chosen.solution
        delta, kept, finite = step.combine(
            rates.learning_rate, rates.momentum, batch.value
        )
        state = _record(state, chosen, batch.value, done.refused | ~finite)
        if isinstance(self.damping, LevenbergMarquardt):
            state = self._adapt(self.damping, state, step, delta, finite, rates, batch)
        else:
            state = state._replace(damping=at(self.damping, state.step))
        kept = _fill(self.devices.kept(kept), velocity)
        state = state._replace(velocity=tree.restore(kept, state.velocity))
        return tree.restore(_fill(delta, batch.gradient), updates), state

    def _velocity(self, kept: Any) -> list[Array | None]:
        """The leaves of δ0, whole, None where a mask hides them."""
        tree, devices = self.curvature.tree, self.devices
        shapes = tuple(map(devices.kept_shape, tree.shapes))
        rows = dataclasses.replace(tree, shapes=shapes)
        leaves = rows.masked_leaves(kept, "the velocity")
        places = [i for i, x in enumerate(leaves) if x is not None]
        found = devices.whole(
            [x for x in leaves if x is not None], [tree.shapes[i] for i in places]
        )
        result: list[Array | None] = [None] * len(leaves)
        for i, x in zip(places, found, strict=True):
            result[i] = x
        return result

    def _candidates(
        self,
        count: Array,
        params: Params | None,
        args: Any,
        batch: Batch,
        previous: list[Array],
        momentum: Array | None,
        products: Products,
    ) -> Candidates | None:
        """What γ is chosen by, if a rule chooses it."""
        rule = self.factored_damping
        if rule is None:
            return None
        assert isinstance(self.learning_rate, QuadraticModel)
        return Candidates(
            rule=rule,
            due=(count + 1) % rule.every == 0,
            model=self.learning_rate,
            curvature=self.curvature,
            params=params,
            args=args,
            gradient=batch.shown,
            previous=previous,
            damping=batch.damping,
            momentum=momentum,
            products=products,
            devices=self.devices,
        )

    def _constraint(self, count: Array, value: Any, lowest: Array) -> Array | None:
        """The norm constraint of a step.

        With the lowest loss so far it does not grow with a loss that does. A loss of 0
        is none, see `with_loss`.
        """
        given = None if self.modelled else self.norm_constraint
        if given is None:
            return None
        if not isinstance(given, str):
            return at(given, count)
        size = jnp.ones((), float)
        if value is not None:
            loss = loss_of(value)
            lowest = lowest.astype(loss.dtype)
            size = jnp.abs(jnp.where(loss == 0, lowest, jnp.fmin(loss, lowest)))
        return SHARE_OF_LOSS * jnp.where(jnp.isfinite(size), size, 1.0)

    def _adapt(
        self,
        rule: LevenbergMarquardt,
        state: KFACState,
        step: Step,
        delta: list[Array],
        finite: Array,
        rates: Solution,
        batch: Batch,
    ) -> KFACState:
        """Every T1 steps, measures ρ and changes λ by it."""
        value = batch.value
        # outside of the branch: most callers compute it too, and XLA does it once
        moved = step.moved(delta)

        def measure() -> tuple[Array, Array, Array, Array]:
            rho, change, along = step.reduction_ratio(
                moved, rates, self.modelled, value
            )
            rho = jnp.where(finite, rho, jnp.nan)
            # where loss or gradient are not finite already at θ, ρ says nothing about
            # λ, nor where the change is lost in the rounding of the loss
            square = inner_product(step.gradient, step.gradient)
            known = step.usable & jnp.isfinite(square)
            loss = loss_of(value)
            # (that of a cross entropy is of its logits: of nats, however small it is)
            rounding = 16 * jnp.finfo(loss.dtype).eps * jnp.maximum(jnp.abs(loss), 1.0)
            known &= ~(jnp.abs(change.astype(loss.dtype)) < rounding)
            curvature = averaged_curvature(state.curvature, along)
            adapted = rule.update(step.damping, rho, curvature)
            kept = rule.clip(step.damping, curvature)
            return jnp.where(known, adapted, kept), rho, change, curvature

        def keep() -> tuple[Array, Array, Array, Array]:
            info = state.info
            return step.damping, info.rho, info.quadratic_change, state.curvature

        due = state.step % rule.every == 0
        damping, rho, change, curvature = jax.lax.cond(due, measure, keep)
        info = state.info._replace(rho=rho, quadratic_change=change)
        return state._replace(damping=damping, curvature=curvature, info=info)


def _on_any_mesh(update: Callable[..., Any]) -> Callable[..., Any]:
    """An update that need not know how its arrays are sharded, see `axis_types`.

    Results get the shardings of the gradients and of the state. What the loss function
    is evaluated on stays as it is.
    """

    @functools.wraps(update)
    def wrapped(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        **rest: Any,
    ) -> tuple[Params, KFACState]:
        params = axis_types.here(params)

        def inside(updates: Params, state: Any, statistics: Any, value: Any) -> Any:
            return update(
                updates, state, params, statistics=statistics, value=value, **rest
            )

        run = axis_types.auto(inside, (updates, state))
        return run(updates, state, statistics, value)

    return wrapped


def _counted(state: KFACState, skipped: Array) -> KFACState:
    """With an update more that refused something, if it did."""
    count = state.info.skipped_updates + skipped.astype(jnp.int32)
    return state._replace(info=state.info._replace(skipped_updates=count))


def _record(state: KFACState, chosen: Rates, value: Any, skipped: Array) -> KFACState:
    rates = chosen.solution
    state = _counted(with_loss(state, value), skipped)
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
    """Puts parts where `like` has leaves."""
    rest = iter(parts)
    return [None if x is None else next(rest) for x in like]
