"""The pieces of an update: state, checks, factors and inverses, rates, damping."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax import _batch
from kfac_jax._dtypes import wide, wide_dtype
from kfac_jax._preconditioner import refresh_inverses
from kfac_jax.curvature import Curvature, Factors, Params, Statistics
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel, Solution

Scalar = float | Array
Schedule = Callable[[Any], Any]


class Info(NamedTuple):
    """What the last update did.

    What was not computed is NaN (∞ under jax_debug_nans).
    """

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
    batches: Array  # [] int32, how many of them brought statistics that were accepted
    factors: Factors  # by layer name, moving averages of the factors
    inverses: Factors  # by layer name, of the damped factors
    damping: Array  # [], λ for the next update
    velocity: (
        Params  # δ0, the previous update, like the parameters; () in scale_by_kfac
    )
    info: Info


def nan() -> Array:
    # under jax_debug_nans a NaN would stop the user's program
    config: Any = jax.config
    return jnp.asarray(jnp.inf if config.jax_debug_nans else jnp.nan, float)


def initial_info() -> Info:
    unknown = [
        nan() for _ in range(6)
    ]  # no two fields share a buffer: state is donated
    counts = [jnp.zeros((), jnp.int32) for _ in range(2)]
    return Info._make([*unknown, *counts])


def check_number(name: str, value: Any, low: float, high: float, closed: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return  # a schedule, a rule or an array
    value = float(value)
    if not (low <= value < high or (closed and value == high)):
        bracket = "]" if closed else ")"
        raise ValueError(f"{name} must be in [{low}, {high}{bracket}; got {value}.")


def check_kind(name: str, value: Any, rules: tuple[type, ...], allowed: str) -> None:
    numeric = isinstance(value, float | int | Array) or hasattr(value, "dtype")
    if isinstance(value, bool) or not (
        numeric or isinstance(value, rules) or callable(value)
    ):
        raise TypeError(f"{name} must be {allowed}; got {type(value).__name__}.")


def at(value: Any, step: Array) -> Array:
    return jnp.asarray(value(step) if callable(value) else value, float)


def initial_damping(damping: Any) -> Array:
    if isinstance(damping, LevenbergMarquardt):
        return jnp.asarray(damping.initial, float)
    return at(damping, jnp.zeros((), jnp.int32))


def check_common(
    curvature: Any, damping: Any, decay: Any, inverse_every: Any, distribution: Any
) -> None:
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "The first argument must be a plan from make_curvature; got "
            f"{type(curvature).__name__}."
        )
    check_kind("damping", damping, (LevenbergMarquardt,), "a number, schedule or rule")
    check_number("damping (λ)", damping, 0.0, float("inf"), False)
    check_number("decay (ε)", decay, 0.0, 1.0, False)
    check_number("inverse_every (T3)", inverse_every, 1, float("inf"), False)
    if distribution is not None:
        raise ValueError(f"distribution must be None; got {distribution!r}.")


def check_update(state: Any, statistics: Any, kind: str) -> None:
    if not isinstance(state, KFACState):
        raise TypeError(
            f"{kind} expects the state made by its init; got {type(state).__name__}. "
            "Call state = tx.init(params) once before the first update."
        )
    if statistics is None:
        raise ValueError(
            f"{kind} needs the step's statistics: value, grads, statistics = "
            "curvature.value_grad_and_statistics(params, ...), then tx.update(grads, "
            "state, params, statistics=statistics). For a step that gathers none "
            "pass curvature.zero_statistics(params)."
        )
    if not isinstance(statistics, Statistics):
        raise TypeError(
            "statistics must be what curvature.value_grad_and_statistics returned; "
            f"got {type(statistics).__name__}."
        )


def advance(
    curvature: Curvature,
    state: KFACState,
    statistics: Statistics,
    damping: Array,
    decay: Any,
    inverse_every: Any,
) -> tuple[KFACState, Array]:
    """Updates factors and, if due, inverses; also tells whether anything was refused.

    Both ε and the refreshes at the first three steps count batches that brought
    statistics: a step without any must not pass for the first.
    """
    step = state.step + 1
    factors, refused = curvature.update_factors_and_count(
        state.factors, statistics, state.batches + 1, decay
    )
    informed = (statistics.weight > 0) & (refused < max(1, curvature.informed_layers))
    batches = state.batches + informed.astype(jnp.int32)
    every = jnp.asarray(inverse_every, jnp.int32)
    due = (informed & (batches <= 3)) | ((step % every == 0) & (batches > 0))
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
    state = state._replace(
        step=step, batches=batches, factors=factors, inverses=inverses, info=info
    )
    return state, (refused > 0) | (failed > 0)


def loss_of(value: Any) -> Array:
    """The loss in `value`, which may be `(loss, aux)`; NaN for None."""
    if value is None:
        return nan()
    return jnp.asarray(value[0] if isinstance(value, tuple) else value, float)


def all_finite(parts: Sequence[Array]) -> Array:
    """Whether a vector and its squared length are finite, in one pass over it."""
    return jnp.isfinite(
        jnp.stack([jnp.square(wide(x)).sum().astype(float) for x in parts])
    ).all()


def dot(u: Sequence[Array], v: Sequence[Array]) -> Array:
    """The inner product of two vectors given by their leaves, in float32 or wider."""
    parts = [jnp.vdot(wide(x), wide(y)) for x, y in zip(u, v, strict=True)]
    return sum(parts[1:], start=parts[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One update's vectors, as lists of leaves (without those a mask hides).

    Attributes:
      curvature: the plan.
      params: the parameters, or None where no rule needs them.
      args: the loss function's further arguments, or None.
      gradient: ∇h.
      direction: Δ, minus the preconditioned gradient.
      previous: δ0.
      damping: λ.
    """

    curvature: Curvature
    params: Params | None
    args: Any
    gradient: list[Array]
    direction: list[Array]
    previous: list[Array]
    damping: Array

    def plane(self, fraction: float) -> tuple[Array, Array]:
        """`F + (λ+η) I` in the plane of Δ and δ0, `[2, 2]`, and ∇h there, `[2]`.

        Args:
          fraction: τ2, the part of the batch that F is computed on.

        Returns:
          The matrix and the slope.
        """
        basis = (self.direction, self.previous)
        part = _batch.take(self.args, fraction)
        treedef = self.curvature.tree.treedef
        vectors = [jax.tree.unflatten(treedef, v) for v in basis]
        fisher = self.curvature.quadratic_form(self.params, vectors, *part)
        gram = jnp.stack([jnp.stack([dot(u, v) for v in basis]) for u in basis])
        total = (self.damping + self.curvature.l2).astype(fisher.dtype)
        slope = jnp.stack([dot(self.gradient, v) for v in basis])
        return (
            fisher + total * gram.astype(fisher.dtype),
            slope.astype(fisher.dtype),
        )

    def constrain(self, alpha: Array, constraint: Any) -> Array:
        """Lowers α so that `α² Δᵀ ∇h` is at most `constraint`."""
        slope = dot(self.gradient, self.direction).astype(alpha.dtype)
        squared = jnp.maximum(-slope * alpha**2, jnp.finfo(alpha.dtype).tiny)
        ratio = jnp.asarray(constraint, alpha.dtype) / squared
        return alpha * jnp.sqrt(jnp.minimum(1.0, ratio))

    def rates(
        self, rule: Any, momentum: Array | None, count: Array, constraint: Any
    ) -> Solution:
        """α and μ, from the quadratic model or as given, and the model's change."""
        if isinstance(rule, QuadraticModel):
            return rule.solve(*self.plane(rule.fraction), momentum)
        assert momentum is not None
        alpha = at(rule, count)
        if constraint is not None:
            alpha = self.constrain(alpha, constraint)
        return Solution(alpha, momentum, nan())

    def combine(self, alpha: Array, mu: Array) -> tuple[list[Array], Array]:
        """`δ = α Δ + μ δ0`, zero where it is not finite, and whether it is finite."""

        def one(d: Array, d0: Array, g: Array) -> Array:
            dtype = wide_dtype(d.dtype)
            moved = alpha.astype(dtype) * wide(d) + mu.astype(dtype) * wide(d0)
            return moved.astype(g.dtype)

        parts = zip(self.direction, self.previous, self.gradient, strict=True)
        delta = [one(d, d0, g) for d, d0, g in parts]
        finite = all_finite(delta)
        return [jnp.where(finite, x, jnp.zeros_like(x)) for x in delta], finite

    def reduction_ratio(
        self, delta: list[Array], rates: Solution, modelled: bool, value: Any
    ) -> tuple[Array, Array]:
        """Measures `ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0))` on this step's own batch.

        Where the loss rises ρ is -∞, whatever the model predicted.

        Args:
          delta: δ.
          rates: α and μ, and the model's change if `modelled`.
          modelled: whether the quadratic model was solved for this step.
          value: h(θ), as passed to update.

        Returns:
          ρ and the predicted change.
        """
        predicted = rates.change
        if not modelled:
            matrix, slope = self.plane(1.0)
            step = jnp.stack([rates.learning_rate, rates.momentum])
            step = step.astype(matrix.dtype)
            predicted = slope @ step + 0.5 * step @ matrix @ step
        tree = jax.tree.unflatten(self.curvature.tree.treedef, delta)
        moved: Any = optax.apply_updates(cast("Any", self.params), tree)
        after = loss_of(self.curvature.loss_fn(moved, *self.args))
        predicted = predicted.astype(after.dtype)
        before = loss_of(value)
        rho = (after - before) / predicted
        return jnp.where(after > before, -jnp.inf, rho), predicted
