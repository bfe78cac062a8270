"""The natural gradient in the sample space, as an optax transformation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils import arguments, schedules
from kfac_jax._utils.vectors import inner_product
from kfac_jax.curvature import Curvature
from kfac_jax.linalg._solve import clipped_solve
from kfac_jax.operator.structures import check_sample_space
from kfac_jax.optimization.adaptation import (
    adapted,
    averaged_curvature,
    reduction_ratio,
)
from kfac_jax.optimization.checks import check_evaluation, check_plan
from kfac_jax.optimization.loss import loss_of
from kfac_jax.optimization.state import at, initial_damping
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel
from kfac_jax.statistics import sample_space
from kfac_jax.statistics.averages import Statistics, check_statistics


@dataclasses.dataclass(frozen=True)
class Spring:
    """The momentum of SPRING: the direction stays near a decayed last one.

    `φ = μ φ' + (F + λ I)⁻¹ (g - μ F φ')`, where φ' is the last direction: of all
    directions that solve the damped problem, the one that is nearest to `μ φ'`.

    Attributes:
      decay: μ, in [0, 1). 0 is MinSR, the plain natural gradient.

    References:
      Goldshlager, Abrahamsen, Lin 2024, arXiv:2401.10190.

    >>> Spring()
    Spring(decay=0.99)
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        """Checks the range."""
        arguments.number("decay (μ)", self.decay)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay (μ) must be in [0, 1); got {self.decay!r}.")


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


def natural_gradient(
    curvature: Curvature,
    learning_rate: optax.ScalarOrSchedule | QuadraticModel = 0.1,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt = 1e-3,
    momentum: float | Spring = 0.0,
    *,
    norm_constraint: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The exact natural gradient `-η (F + (λ+l2) I)⁻¹ g`, with SPRING's momentum.

    F is that of the batch, of all parameters together: no blocks, no averages. With the
    rows `U` of the batch, `F = Uᵀ U`, it is `(g - Uᵀ (T + λ I)⁻¹ U g) / λ`, where
    `T = U Uᵀ` has as many rows as all cases have outputs (or samples). For batches with
    fewer rows than parameters, such as those of wavefunctions and of PDEs. In exact
    modes and with targets the gradient of the registered losses is `Uᵀ e`, and what is
    computed is `Uᵀ (T + λ I)⁻¹ e`, which stays accurate for a small λ.

    Args:
      curvature: a plan with `structure=SampleSpace()`.
      learning_rate: η, a number, a schedule of the step, or `QuadraticModel()`: the
        step to the minimum of the damped quadratic model along the direction.
      damping: λ > 0, a number, a schedule, or a `LevenbergMarquardt` rule, which
        evaluates the loss after a step and needs `value=`.
      momentum: `Spring(μ)`, or 0.
      norm_constraint: the largest `η² φᵀ F φ`, a number or a schedule; None for none.

    Returns:
      The transformation. `update` needs `params`, `statistics=` of
      `value_grad_and_statistics`, and `args=`, the loss function's arguments after the
      parameters; `make_step` passes them. λ is at least `ε tr T`, with the precision ε
      of T. Where `T + λ I` has no Cholesky factor, an eigendecomposition with
      eigenvalues of at least zero is used; an update that is not finite is zero. Both
      are counted in the state.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: for another structure, or if a number is out of its range.

    References:
      Goldshlager et al. 2024, arXiv:2401.10190; Chen & Heyl 2024 (MinSR),
      arXiv:2302.01941.

    >>> import jax, jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.eye(3), jnp.zeros((3, 2))
    >>> curvature = kfac_jax.make_curvature(
    ...     loss_fn, w, x, y, structure=kfac_jax.SampleSpace(),
    ...     estimation_mode="fisher_exact")
    >>> tx = kfac_jax.natural_gradient(curvature, 1.0, damping=1e-4)
    >>> step = jax.jit(kfac_jax.make_step(curvature, tx))
    >>> w, state, first = step(w, tx.init(w), jax.random.key(0), x, y)
    >>> w, state, second = step(w, state, jax.random.key(1), x, y)
    >>> round(float(first), 3), bool(second < 1e-6)
    (2.0, True)
    """
    check_plan(curvature)
    check_sample_space("natural_gradient", curvature.structure)
    inf = float("inf")
    if not isinstance(learning_rate, QuadraticModel):
        what = "a number, a schedule or QuadraticModel()"
        schedules.check("learning_rate", learning_rate, 0.0, inf, allowed=what)
    if not isinstance(damping, LevenbergMarquardt):
        what = "a number, schedule or rule"
        schedules.check("damping", damping, 0.0, inf, symbol="λ", allowed=what)
    if isinstance(damping, float | int) and damping == 0:
        raise ValueError("damping (λ) must be positive in the sample space; got 0.")
    none = arguments.is_number(momentum) and momentum == 0
    if not isinstance(momentum, Spring) and not none:
        raise TypeError(
            "momentum must be kfac_jax.Spring(μ) or 0; got "
            f"{arguments.shown(momentum)}."
        )
    if norm_constraint is not None:
        schedules.check("norm_constraint", norm_constraint, 0.0, inf)
    decay = momentum.decay if isinstance(momentum, Spring) else 0.0

    def init(params: optax.Params) -> NaturalGradientState:
        curvature.tree.leaves(params, "params")
        direction = jax.tree.map(jnp.zeros_like, params) if decay else ()
        counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
        unknown, zero = jnp.full((), jnp.nan, float), jnp.zeros((), float)
        strength = initial_damping(damping)
        return NaturalGradientState(
            counts[0],
            direction,
            unknown,
            counts[1],
            counts[2],
            strength,
            zero,
            unknown,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        args: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        del extra
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
        given = state.damping
        if isinstance(damping, LevenbergMarquardt):
            check_evaluation(curvature, params, value, args)
        else:
            given = at(damping, state.step)
        assert statistics is not None
        gradient = curvature.tree.leaves(updates, "updates")
        matrix = statistics.layers.get(sample_space.NAME, {}).get("gram")
        if matrix is None:
            raise ValueError(
                "statistics must be of a plan of the sample space; got those of layers "
                f"{[*statistics.layers]}. Use what this very plan returned."
            )
        rows = sample_space.products(curvature, params, tuple(args), statistics)
        lam = jnp.asarray(given, matrix.dtype) + curvature.l2
        # of less, rounding would decide
        lam = jnp.maximum(lam, jnp.finfo(matrix.dtype).eps * jnp.trace(matrix))
        last = [decay * x for x in jax.tree.leaves(state.direction)]
        right, errors = _in_rows(gradient, rows, matrix)
        pushed = rows.push(right)
        if decay:
            past = rows.push(last)
            errors = errors - past
        # (F + λ)⁻¹ (Uᵀ e + r) = Uᵀ (T + λ)⁻¹ (e - U r / λ) + r / λ
        solved, fallback = clipped_solve(
            matrix, lam, (errors - pushed / lam).astype(matrix.dtype)
        )
        pulled = rows.pull(solved)
        phi = [
            r / lam.astype(r.dtype) + x.astype(r.dtype)
            for r, x in zip(right, pulled, strict=True)
        ]
        if decay:
            phi = [x + y for x, y in zip(phi, last, strict=True)]
        moved = rows.push(phi)
        square = jnp.vdot(moved, moved)  # φᵀ F φ
        inner, length = inner_product(gradient, phi), inner_product(phi, phi)
        if isinstance(learning_rate, QuadraticModel):
            curved = square + lam * length
            rate = jnp.where(curved > 0, inner / jnp.where(curved > 0, curved, 1), 0.0)
        else:
            rate = jnp.asarray(schedules.at(learning_rate, state.step), float)
        if norm_constraint is not None:
            most = jnp.asarray(schedules.at(norm_constraint, state.step), float)
            longest = jnp.sqrt(most / jnp.where(square > 0, square, 1))
            rate = jnp.where(rate * rate * square > most, longest, rate)
        finite = jnp.isfinite(inner) & jnp.isfinite(length) & jnp.isfinite(rate)
        tree = curvature.tree.treedef
        result = [
            jnp.where(finite, -rate.astype(x.dtype) * x, 0).astype(g.dtype)
            for g, x in zip(gradient, phi, strict=True)
        ]
        direction: Any = ()
        if decay:
            old = jax.tree.leaves(state.direction)
            kept = [
                jnp.where(finite, x, y).astype(y.dtype)
                for x, y in zip(phi, old, strict=True)
            ]
            direction = jax.tree.unflatten(tree, kept)
        delta = jax.tree.unflatten(tree, result)
        state = state._replace(
            step=state.step + 1,
            direction=direction,
            learning_rate=jnp.where(finite, rate, 0.0).astype(float),
            fallbacks=state.fallbacks + fallback.astype(jnp.int32),
            skipped_updates=state.skipped_updates + (~finite).astype(jnp.int32),
        )
        if not isinstance(damping, LevenbergMarquardt):
            return delta, state._replace(damping=at(damping, state.step))
        loss = loss_of(value)
        taken = _Taken(
            finite,
            jnp.isfinite(loss) & jnp.isfinite(inner_product(gradient, gradient)),
            0.5 * rate**2 * (square + lam * length) - rate * inner,
            square / jnp.where(length > 0, length, 1),
        )

        def loss_after() -> Array:
            moved = optax.apply_updates(params, delta)
            return loss_of(curvature.loss_fn(moved, *args))

        return delta, _adapt(damping, state, taken, loss, loss_after)

    return optax.GradientTransformationExtraArgs(init, update)


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
    gradient: Sequence[Array], rows: sample_space.Products, matrix: Array
) -> tuple[list[Array], Array]:
    """Divides a gradient in `Uᵀ e` and a rest.

    A rest that is rounding is left out: it would be divided by λ.

    Args:
      gradient: the gradient's leaves.
      rows: products with U.
      matrix: T.

    Returns:
      The rest, and e: that of the registered losses, with a factor as the gradient may
      have been scaled; or, where it is not known, e with `T e = U g`.
    """
    if rows.errors is None:
        least = jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
        least = jnp.where(least > 0, least, 1)
        pushed = rows.push(gradient).astype(matrix.dtype)
        errors, factor = clipped_solve(matrix, least, pushed)[0], jnp.ones(())
    else:
        errors, factor = rows.errors, None
    pulled = zip(gradient, rows.pull(errors), strict=True)
    own = [x.astype(g.dtype) for g, x in pulled]
    if factor is None:
        size = inner_product(own, own)
        factor = inner_product(gradient, own) / jnp.where(size > 0, size, 1)
    rest = [g - factor.astype(g.dtype) * x for g, x in zip(gradient, own, strict=True)]
    epsilon = jnp.finfo(jnp.result_type(*gradient)).eps
    rounding = inner_product(rest, rest) <= epsilon * inner_product(gradient, gradient)
    return [jnp.where(rounding, 0, x) for x in rest], factor * errors
