"""K-FAC as optax transformations that own all their state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax import _batch
from kfac_jax._preconditioner import (
    init_inverses,
    precondition,
    refresh_inverses,
)
from kfac_jax.curvature import Curvature, Factors, Params, Statistics
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel

Scalar = float | Array
Schedule = Callable[[Any], Any]


class Info(NamedTuple):
    """What the last update did; what was not computed is NaN."""

    loss: Array  # [], h(θ): the `value` passed to update
    damping: Array  # [], λ the update was made with
    learning_rate: Array  # [], α
    momentum: Array  # [], μ
    rho: Array  # [], ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0)), when it was last measured
    quadratic_change: Array  # [], M(δ) - M(0)
    inverse_refreshes: Array  # [] int32, how often the inverses were computed so far
    skipped_updates: Array  # [] int32, updates that refused something not finite so far


class KFACState(NamedTuple):
    """The state of `scale_by_kfac` and `kfac`: a plain pytree with stable names."""

    step: Array  # [] int32, the number of updates so far
    factors: Factors  # by layer name, moving averages of the factors
    inverses: Factors  # by layer name, of the damped factors
    damping: Array  # [], λ for the next update
    velocity: Params  # δ0, the previous update, like the parameters; () in scale_by_kfac
    info: Info


def _nan() -> Array:
    return jnp.asarray(jnp.nan, float)


def _initial_info() -> Info:
    unknown = [_nan() for _ in range(6)]  # no two fields share a buffer: state is donated
    return Info(*unknown, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _check_number(name: str, value: Any, low: float, high: float, closed: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        return  # a schedule, a rule or an array
    if not (low <= value < high or (closed and value == high)):
        bracket = "]" if closed else ")"
        raise ValueError(f"{name} must be in [{low}, {high}{bracket}; got {value}.")


def _check_kind(name: str, value: Any, rules: tuple[type, ...], allowed: str) -> None:
    numeric = isinstance(value, float | int | Array) or hasattr(value, "dtype")
    if isinstance(value, bool) or not (
        numeric or isinstance(value, rules) or callable(value)
    ):
        raise TypeError(f"{name} must be {allowed}; got {type(value).__name__}.")


def _at(value: Any, step: Array) -> Array:
    return jnp.asarray(value(step) if callable(value) else value, float)


def _initial_damping(damping: Any) -> Array:
    if isinstance(damping, LevenbergMarquardt):
        return jnp.asarray(damping.initial, float)
    return _at(damping, jnp.zeros((), jnp.int32))


def _check_common(
    curvature: Any, damping: Any, decay: Any, inverse_every: Any, distribution: Any
) -> None:
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "The first argument must be a plan from make_curvature; got "
            f"{type(curvature).__name__}."
        )
    _check_kind(
        "damping", damping, (LevenbergMarquardt,), "a number, schedule or rule"
    )
    _check_number("damping (λ)", damping, 0.0, float("inf"), False)
    _check_number("decay (ε)", decay, 0.0, 1.0, False)
    _check_number("inverse_every (T3)", inverse_every, 1, float("inf"), False)
    if distribution is not None:
        raise ValueError(f"distribution must be None; got {distribution!r}.")


def _check_update(state: Any, statistics: Any, kind: str) -> None:
    if not isinstance(state, KFACState):
        raise TypeError(
            f"{kind} expects the state made by its init; got {type(state).__name__}. Call "
            "state = tx.init(params) once before the first update."
        )
    if statistics is None:
        raise ValueError(
            f"{kind} needs the step's statistics: value, grads, statistics = "
            "curvature.value_grad_and_statistics(params, ...), then tx.update(grads, "
            "state, params, statistics=statistics). For a step that gathers none pass "
            "curvature.zero_statistics(params)."
        )
    if not isinstance(statistics, Statistics):
        raise TypeError(
            "statistics must be what curvature.value_grad_and_statistics returned; got "
            f"{type(statistics).__name__}."
        )


def _advance(
    curvature: Curvature,
    state: KFACState,
    statistics: Statistics,
    damping: Array,
    decay: Any,
    inverse_every: Any,
) -> tuple[KFACState, Array]:
    """Updates factors and, if due, inverses; also tells whether anything was refused."""
    step = state.step + 1
    factors, refused = curvature.update_factors_and_count(
        state.factors, statistics, step, decay
    )
    due = (step <= 3) | (step % jnp.asarray(inverse_every, jnp.int32) == 0)
    total = damping + curvature.l2
    inverses, failed = jax.lax.cond(
        due,
        lambda old: refresh_inverses(curvature.layers, factors, old, total),
        lambda old: (old, jnp.zeros((), jnp.int32)),
        state.inverses,
    )
    info = state.info._replace(
        damping=damping,
        inverse_refreshes=state.info.inverse_refreshes + due.astype(jnp.int32),
    )
    state = state._replace(step=step, factors=factors, inverses=inverses, info=info)
    return state, (refused > 0) | (failed > 0)


def _all_finite(tree: Any) -> Array:
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(finite).all() if finite else jnp.asarray(True)


def scale_by_kfac(
    curvature: Curvature,
    damping: Scalar | Schedule = 1e-3,
    decay: Scalar = 0.95,
    inverse_every: int | Array = 20,
    *,
    distribution: None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverse of the damped approximate curvature.

    The result is `(F + (λ+η) I)⁻¹ ∇h`, with factored damping; compose it with a learning
    rate, e.g. `optax.chain(scale_by_kfac(...), optax.scale_by_learning_rate(0.1))`. Its
    update needs `statistics=` from `curvature.value_grad_and_statistics`.

    Args:
      curvature: the plan.
      damping: λ, a number or a schedule of the step.
      decay: the largest ε of the factors' moving averages.
      inverse_every: T3, how many steps inverses are kept; they are also computed at the
        first three steps.
      distribution: how work is shared over devices; None for none.

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
    _check_common(curvature, damping, decay, inverse_every, distribution)
    if isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "LevenbergMarquardt measures whole steps; use kfac(...), or give "
            "scale_by_kfac a number or a schedule."
        )

    def init(params: Params) -> KFACState:
        return KFACState(
            step=jnp.zeros((), jnp.int32),
            factors=curvature.init_factors_masked(params),
            inverses=init_inverses(curvature.layers),
            damping=_initial_damping(damping),
            velocity=(),
            info=_initial_info(),
        )

    def update(
        updates: Params,
        state: KFACState,
        params: Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        **_: Any,
    ) -> tuple[Params, KFACState]:
        del params
        _check_update(state, statistics, "scale_by_kfac")
        assert statistics is not None
        grads = curvature.tree.masked_leaves(updates, "grads")
        now = _at(damping, state.step)
        state, refused = _advance(
            curvature, state, statistics, now, decay, inverse_every
        )
        scaled = precondition(curvature.layers, state.inverses, grads)
        finite = _all_finite([x for x in scaled if x is not None])
        scaled = [
            None if x is None else jnp.where(finite, x, jnp.zeros_like(x))
            for x in scaled
        ]
        skipped = (refused | ~finite).astype(jnp.int32)
        info = state.info._replace(
            loss=_loss(value),
            skipped_updates=state.info.skipped_updates + skipped,
        )
        state = state._replace(
            info=info, damping=_at(damping, state.step)
        )
        return curvature.tree.restore(scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


def _loss(value: Any) -> Array:
    if value is None:
        return _nan()
    return jnp.asarray(value[0] if isinstance(value, tuple) else value, float)


def kfac(
    curvature: Curvature,
    learning_rate: Scalar | Schedule | QuadraticModel = 0.1,
    momentum: Scalar | Schedule | None = 0.9,
    damping: Scalar | Schedule | LevenbergMarquardt = 1e-3,
    *,
    norm_constraint: Scalar | None = None,
    decay: Scalar = 0.95,
    inverse_every: int | Array = 20,
    distribution: None = None,
) -> optax.GradientTransformationExtraArgs:
    """The K-FAC optimizer: `δ = α Δ + μ δ0` with `Δ = -(F + (λ+η) I)⁻¹ ∇h`.

    δ0 is the previous update. Updates are ready for `optax.apply_updates`.

    With the adaptive rules (`QuadraticModel`, `LevenbergMarquardt`) the update also needs
    `params`, `value=` and `args=`, the loss function's arguments after the parameters.
    They suit large batches; with small ones fixed rates are safer.

    A factor, inverse or update that is not finite never enters the state: the last good
    one stays, the update is zero, and `state.info.skipped_updates` counts it.

    Args:
      curvature: the plan.
      learning_rate: α, a number, a schedule of the step, or a `QuadraticModel`.
      momentum: μ, a number or a schedule; None lets the quadratic model choose it.
      damping: λ, a number, a schedule, or a `LevenbergMarquardt` rule.
      norm_constraint: the largest `α² Δᵀ ∇h` of a step; larger ones are scaled down. None
        for no limit. Only with a given learning rate.
      decay: the largest ε of the factors' moving averages.
      inverse_every: T3, how many steps inverses are kept; they are also computed at the
        first three steps.
      distribution: how work is shared over devices; None for none.

    Returns:
      The transformation. Its state is a `KFACState`, whose `info` says what happened.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is out of its range or options exclude each other.

    References:
      Martens & Grosse 2015, Algorithm 2 (section 9), without its sections 4.3 and 6.6.

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
    >>> bool(loss_fn(optax.apply_updates(w, updates), x, y) < 1e-3 * value)
    True
    """
    _check_common(curvature, damping, decay, inverse_every, distribution)
    _check_kind(
        "learning_rate", learning_rate, (QuadraticModel,), "a number, schedule or rule"
    )
    _check_number("learning_rate (α)", learning_rate, 0.0, float("inf"), False)
    model = learning_rate if isinstance(learning_rate, QuadraticModel) else None
    if momentum is None and model is None:
        raise ValueError(
            "momentum=None lets the quadratic model choose it; pass "
            "learning_rate=QuadraticModel(), or a number as momentum."
        )
    if momentum is not None:
        _check_kind("momentum", momentum, (), "a number, a schedule or None")
        _check_number("momentum (μ)", momentum, 0.0, 1.0, True)
    if norm_constraint is not None and model is not None:
        raise ValueError(
            "norm_constraint limits steps of a given learning rate; with QuadraticModel "
            "leave it None."
        )
    _check_number("norm_constraint", norm_constraint, 0.0, float("inf"), False)
    adaptive = model is not None or isinstance(damping, LevenbergMarquardt)

    def init(params: Params) -> KFACState:
        factors = curvature.init_factors_masked(params)
        return KFACState(
            step=jnp.zeros((), jnp.int32),
            factors=factors,
            inverses=init_inverses(curvature.layers),
            damping=_initial_damping(damping),
            velocity=jax.tree.map(jnp.zeros_like, params),
            info=_initial_info(),
        )

    def update(
        updates: Params,
        state: KFACState,
        params: Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        args: Any = None,
        **_: Any,
    ) -> tuple[Params, KFACState]:
        _check_update(state, statistics, "kfac")
        assert statistics is not None
        if adaptive and (params is None or value is None or args is None):
            raise ValueError(
                "QuadraticModel and LevenbergMarquardt evaluate the loss function: pass "
                "params, value= and args= (a tuple of the loss function's arguments after "
                "the parameters) to update."
            )
        grads = curvature.tree.masked_leaves(updates, "grads")
        velocity = curvature.tree.masked_leaves(state.velocity, "the velocity")
        count = state.step
        now = (
            state.damping
            if isinstance(damping, LevenbergMarquardt)
            else _at(damping, count)
        )
        state, refused = _advance(
            curvature, state, statistics, now, decay, inverse_every
        )
        present = [i for i, x in enumerate(grads) if x is not None]
        g = [grads[i] for i in present]
        d0 = [velocity[i] for i in present]
        d = [
            -x
            for x in precondition(curvature.layers, state.inverses, grads)
            if x is not None
        ]
        mu = None if momentum is None else _at(momentum, count)

        def plane(fraction: float) -> tuple[Array, Array]:
            """`F + (λ+η) I` and the slope in the plane of Δ and δ0."""
            part = _batch.take(args, fraction)
            trees = [jax.tree.unflatten(curvature.tree.treedef, v) for v in (d, d0)]
            fisher = curvature.quadratic_form(params, trees, *part)
            gram = jnp.stack([jnp.stack([_dot(u, v) for v in (d, d0)]) for u in (d, d0)])
            total = (now + curvature.l2).astype(fisher.dtype)
            slope = jnp.stack([_dot(g, d), _dot(g, d0)])
            return fisher + total * gram.astype(fisher.dtype), slope.astype(fisher.dtype)

        if model is not None:
            alpha, mu, change = model.solve(*plane(model.fraction), mu)
        else:
            assert mu is not None
            alpha, change = _at(learning_rate, count), _nan()
            if norm_constraint is not None:
                squared = -_dot(g, d) * alpha**2
                alpha = alpha * jnp.sqrt(
                    jnp.minimum(1.0, norm_constraint / jnp.maximum(squared, 1e-30))
                )
        delta = [
            (alpha * x + mu * y).astype(like.dtype)
            for x, y, like in zip(d, d0, g, strict=True)
        ]
        # the size of Δ tells whether it is finite, in one pass that writes nothing
        finite = jnp.isfinite(_dot(d, d)) & jnp.isfinite(alpha) & jnp.isfinite(mu)
        delta = [jnp.where(finite, x, jnp.zeros_like(x)) for x in delta]
        kept = [jnp.where(finite, x, y) for x, y in zip(delta, d0, strict=True)]
        next_damping, rho = now, state.info.rho
        if isinstance(damping, LevenbergMarquardt):
            rule = damping

            def measure() -> tuple[Array, Array, Array]:
                predicted = change
                if model is None:
                    matrix, slope = plane(1.0)
                    c = jnp.stack([alpha, mu]).astype(matrix.dtype)
                    predicted = slope @ c + 0.5 * c @ matrix @ c
                moved = optax.apply_updates(
                    params, jax.tree.unflatten(curvature.tree.treedef, delta)
                )
                after = _loss(curvature.loss_fn(moved, *args))
                predicted = predicted.astype(after.dtype)
                ratio = (after - _loss(value)) / predicted
                ratio = jnp.where(finite, ratio, jnp.nan)
                return rule.update(now, ratio), ratio, predicted

            next_damping, rho, change = jax.lax.cond(
                state.step % rule.every == 0,
                measure,
                lambda: (now, rho, jnp.asarray(change, float)),
            )
        elif callable(damping):
            next_damping = _at(damping, state.step)
        info = state.info._replace(
            loss=_loss(value),
            learning_rate=jnp.asarray(alpha, float),
            momentum=jnp.asarray(mu, float),
            rho=rho,
            quadratic_change=jnp.asarray(change, float),
            skipped_updates=state.info.skipped_updates
            + (refused | ~finite).astype(jnp.int32),
        )
        new_velocity: list[Array | None] = [None] * len(grads)
        result: list[Array | None] = [None] * len(grads)
        for i, x, y in zip(present, delta, kept, strict=True):
            result[i], new_velocity[i] = x, y.astype(d0[present.index(i)].dtype)
        state = state._replace(
            damping=next_damping,
            velocity=curvature.tree.restore(new_velocity),
            info=info,
        )
        return curvature.tree.restore(result), state

    return optax.GradientTransformationExtraArgs(init, update)


def _dot(u: list[Array], v: list[Array]) -> Array:
    parts = [
        jnp.vdot(x.astype(_wide(x)), y.astype(_wide(y)))
        for x, y in zip(u, v, strict=True)
    ]
    return sum(parts[1:], start=parts[0])


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
