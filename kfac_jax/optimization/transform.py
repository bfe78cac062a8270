"""K-FAC as optax transformations that own all their state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax import devices as devices_lib
from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import fresh
from kfac_jax._utils.vectors import inner_product
from kfac_jax.curvature import Curvature, Params
from kfac_jax.devices import Distribution
from kfac_jax.operator import products as products_lib
from kfac_jax.operator.products import Products
from kfac_jax.optimization import by_rows
from kfac_jax.optimization.checks import (
    check_common,
    check_evaluation,
    check_rates,
    check_separate,
    check_state,
    check_update,
)
from kfac_jax.optimization.preconditioner import init_inverses, precondition
from kfac_jax.optimization.separate_damping import Candidates
from kfac_jax.optimization.step import (
    Info as Info,
)
from kfac_jax.optimization.step import (
    KFACState,
    Rates,
    Scalar,
    Schedule,
    Step,
    advance,
    at,
    averaged_curvature,
    averaged_loss,
    initial_damping,
    initial_factored_damping,
    initial_info,
    is_usable,
    loss_of,
    with_loss,
)
from kfac_jax.rules import (
    LevenbergMarquardt,
    QuadraticModel,
    RefreshSchedule,
    SeparateDamping,
    Solution,
    as_schedule,
)
from kfac_jax.statistics.averages import Factors, Statistics, zeros

QUADRATIC_MODEL = QuadraticModel()
MOMENTUM = 0.9
SHARE_OF_LOSS = 0.003
DAMPING = LevenbergMarquardt(0.1, relative_minimum=1e-4, relative_maximum=10.0)
"""What `kfac` does where nothing is chosen; docs/tuning.md tells what that gains."""


def scale_by_kfac(
    curvature: Curvature,
    damping: Scalar | Schedule = 1e-1,
    decay: Scalar = 0.95,
    inverse_every: int | Array | RefreshSchedule = 20,
    *,
    devices: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverse of the damped approximate curvature.

    The result is `(F + (λ+η) I)⁻¹ ∇h`, with factored damping; compose it with a
    learning rate, e.g. `optax.chain(scale_by_kfac(...),
    optax.scale_by_learning_rate(0.1))`. Its update needs `statistics=` from
    `curvature.value_grad_and_statistics`.

    Args:
      curvature: the plan.
      damping: λ, a number or a schedule of the step.
      decay: the largest ε of the factors' moving averages.
      inverse_every: T3, how many steps inverses are kept; they are also computed at the
        first three steps. Or a `RefreshSchedule`.
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
    schedule = as_schedule(inverse_every)
    if isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "LevenbergMarquardt measures whole steps; use kfac(...), or give "
            "scale_by_kfac a number or a schedule as damping: expected one, got "
            f"{damping}."
        )

    def init(params: Params) -> KFACState:
        return _initial(curvature, params, damping, None, devices)

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
        check_update(state, statistics, "scale_by_kfac", sorted(others))
        check_state(curvature, state, devices)
        assert statistics is not None
        grads = curvature.tree.masked_leaves(updates, "grads")
        now = at(damping, state.step)
        value = averaged_loss(devices, value)
        usable = is_usable(value, [x for x in grads if x is not None])
        before = state
        state, refused = advance(
            curvature,
            state,
            statistics,
            now,
            decay,
            schedule,
            devices,
            usable,
        )
        scaled, square = _precondition(
            curvature,
            before,
            state,
            schedule.stale,
            grads,
            statistics.products,
            devices,
        )
        finite = jnp.isfinite(square) & usable
        scaled = [
            None if x is None else jnp.where(finite, x, jnp.zeros_like(x))
            for x in scaled
        ]
        skipped = (refused | ~finite).astype(jnp.int32)
        state = with_loss(state, value)
        info = state.info._replace(skipped_updates=state.info.skipped_updates + skipped)
        state = state._replace(info=info, damping=at(damping, state.step))
        return curvature.tree.restore(scaled, updates), state

    return optax.GradientTransformationExtraArgs(init, _on_any_mesh(update))


def kfac(
    curvature: Curvature,
    learning_rate: Scalar | Schedule | QuadraticModel = QUADRATIC_MODEL,
    momentum: Scalar | Schedule | None = None,
    damping: Scalar | Schedule | LevenbergMarquardt = DAMPING,
    *,
    norm_constraint: Scalar | Schedule | str | None = "auto",
    decay: Scalar = 0.95,
    inverse_every: int | Array | RefreshSchedule = 20,
    factored_damping: SeparateDamping | None = None,
    devices: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The K-FAC optimizer: `δ = α Δ + μ δ0` with `Δ = -(F + (λ+η) I)⁻¹ ∇h`.

    δ0 is the previous update. Updates are ready for `optax.apply_updates`.

    There is nothing to choose: by default the exact quadratic model of each batch
    chooses α and μ, within limits that keep small batches from long steps, and λ adapts
    to how well it predicts, down to 1e-4 of the curvature that steps meet. With these
    rules (`QuadraticModel`, `LevenbergMarquardt`) the update also needs `params`,
    `value=` and `args=`, the loss function's arguments after the parameters;
    `make_step` passes them.

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
      decay: the largest ε of the factors' moving averages.
      inverse_every: T3, how many steps inverses are kept; they are also computed at the
        first three steps. Or a `RefreshSchedule`.
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
    modelled = isinstance(learning_rate, QuadraticModel)
    if momentum is None and not modelled:
        momentum = MOMENTUM
    adaptive = modelled or isinstance(damping, LevenbergMarquardt)

    def init(params: Params) -> KFACState:
        state = _initial(curvature, params, damping, factored_damping, devices)
        velocity = jax.tree.map(fresh.zeros_like, params)
        if devices_lib.by_rows(devices):
            velocity = devices_lib.kept(devices, axis_types.whole(velocity))
        return state._replace(velocity=velocity)

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        args: Any = None,
        **others: Any,
    ) -> tuple[Params, KFACState]:
        check_update(state, statistics, "kfac", sorted(others))
        check_state(curvature, state, devices)
        assert statistics is not None
        if adaptive:
            check_evaluation(curvature, params, value, args)
        elif params is not None:
            curvature.tree.masked_leaves(params, "params")
        value = averaged_loss(devices, value)
        grads = curvature.tree.masked_leaves(updates, "grads")
        velocity = by_rows.velocity(curvature.tree, state.velocity, devices)
        count, now = state.step, state.damping
        if not isinstance(damping, LevenbergMarquardt):
            now = at(damping, count)
        mu = None if momentum is None else at(momentum, count)
        start: dict[str, Any] = {
            "curvature": curvature,
            "params": params,
            "args": args,
            "gradient": [x for x in grads if x is not None],
            "previous": [x for x in velocity if x is not None],
            "damping": now,
            "devices": devices,
        }
        usable = is_usable(value, start["gradient"])
        products = products_lib.negative(statistics.products)
        candidates = None
        if factored_damping is not None:
            assert isinstance(learning_rate, QuadraticModel)
            candidates = Candidates(
                rule=factored_damping,
                due=(count + 1) % factored_damping.every == 0,
                model=learning_rate,
                momentum=mu,
                products=products,
                **start,
            )
        before = state
        state, refused = advance(
            curvature,
            state,
            statistics,
            now,
            decay,
            schedule,
            devices,
            usable,
            candidates,
        )
        down = [None if x is None else -x for x in grads]
        scaled, square = _precondition(
            curvature,
            before,
            state,
            schedule.stale,
            down,
            products,
            devices,
        )
        direction = [x for x in scaled if x is not None]
        step = Step(direction=direction, squared_length=square, usable=usable, **start)
        constraint = None
        if not modelled:
            lowest = state.info.lowest_loss
            constraint = _constraint(norm_constraint, count, value, lowest)
        chosen = step.rates(learning_rate, mu, count, constraint, state.length)
        rates = chosen.solution
        delta, kept, finite = step.combine(rates.learning_rate, rates.momentum, value)
        state = _record(state, chosen, value, refused | ~finite)
        if isinstance(damping, LevenbergMarquardt):
            state = _adapt(damping, state, step, delta, finite, rates, modelled, value)
        else:
            state = state._replace(damping=at(damping, state.step))
        restore = curvature.tree.restore
        kept = devices_lib.kept(devices, kept)
        state = state._replace(velocity=restore(_fill(kept, velocity), state.velocity))
        return restore(_fill(delta, grads), updates), state

    return optax.GradientTransformationExtraArgs(init, _on_any_mesh(update))


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


def _precondition(
    curvature: Curvature,
    before: KFACState,
    after: KFACState,
    stale: bool,
    leaves: list[Array | None],
    products: Products,
    devices: Distribution | None,
) -> tuple[list[Array | None], Array]:
    """Applies inverses; stale ones, and there zero while there are none."""
    state = before if stale else after
    scaled, square = precondition(
        curvature.layers,
        state.factors,
        state.inverses,
        leaves,
        products,
        devices,
    )
    if not stale:
        return scaled, square
    seen = (before.batches > 0).astype(square.dtype)
    scaled = [None if x is None else x * seen.astype(x.dtype) for x in scaled]
    return scaled, square * seen


def _initial(
    curvature: Curvature,
    params: Params,
    damping: Any,
    factored_damping: SeparateDamping | None,
    devices: Distribution | None,
) -> KFACState:
    """The state before the first step, without velocity."""
    curvature.tree.masked_leaves(params, "params")
    layers = curvature.layers

    def fill() -> tuple[Factors, Factors]:
        whole = zeros(layers, "factor_shapes"), init_inverses(layers)
        return devices_lib.kept(devices, whole)

    # on several devices, none of them is to hold all
    factors, inverses = fill() if devices is None else jax.jit(fill)()
    strength = initial_damping(damping)
    return KFACState(
        step=jnp.zeros((), jnp.int32),
        batches=jnp.zeros((), jnp.int32),
        factors=factors,
        inverses=inverses,
        damping=strength,
        length=jnp.zeros((), float),
        curvature=jnp.zeros((), float),
        factored_damping=initial_factored_damping(
            factored_damping, strength + curvature.l2
        ),
        velocity=(),
        info=initial_info(),
    )


def _constraint(given: Any, count: Array, value: Any, lowest: Array) -> Array | None:
    """The norm constraint of a step, from what `kfac` was given.

    With the lowest loss so far it does not grow with a loss that does. A loss of 0 is
    none, see `with_loss`.
    """
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


def _record(state: KFACState, chosen: Rates, value: Any, skipped: Array) -> KFACState:
    count = state.info.skipped_updates + skipped.astype(jnp.int32)
    rates, refused = chosen.solution, skipped
    state = with_loss(state, value)
    state = state._replace(
        length=jnp.where(refused, state.length, chosen.length.astype(float)),
        curvature=averaged_curvature(state.curvature, chosen.curvature),
    )
    info = state.info._replace(
        step_scale=jnp.asarray(chosen.scale, float),
        learning_rate=jnp.asarray(rates.learning_rate, float),
        momentum=jnp.asarray(rates.momentum, float),
        quadratic_change=jnp.asarray(rates.change, float),
        skipped_updates=count,
    )
    return state._replace(info=info)


def _adapt(
    rule: LevenbergMarquardt,
    state: KFACState,
    step: Step,
    delta: list[Array],
    finite: Array,
    rates: Solution,
    modelled: bool,
    value: Any,
) -> KFACState:
    """Every T1 steps, measures ρ and changes λ by it."""
    # outside of the branch: most callers compute it too, and XLA does it once
    moved = step.moved(delta)

    def measure() -> tuple[Array, Array, Array, Array]:
        rho, change, along = step.reduction_ratio(moved, rates, modelled, value)
        rho = jnp.where(finite, rho, jnp.nan)
        # where loss or gradient are not finite already at θ, ρ says nothing about λ,
        # nor where the change is lost in the rounding of the loss
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


def _fill(parts: list[Array], like: list[Array | None]) -> list[Array | None]:
    """Puts parts where `like` has leaves."""
    rest = iter(parts)
    return [None if x is None else next(rest) for x in like]
