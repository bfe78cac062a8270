"""K-FAC as optax transformations that own all their state."""

from typing import Any

import jax.numpy as jnp
import optax

from kfac_jax.curvature import Curvature
from kfac_jax.devices import Sharing, checked
from kfac_jax.optimization.checks import (
    check_common,
    check_mode,
    check_rates,
    check_separate,
)
from kfac_jax.optimization.loss import with_loss
from kfac_jax.optimization.on_any_mesh import on_any_mesh
from kfac_jax.optimization.optimizer import Optimizer
from kfac_jax.optimization.preconditioner import Preconditioner, counted
from kfac_jax.optimization.state import KFACState, at
from kfac_jax.rules import (
    LevenbergMarquardt,
    QuadraticModel,
    Refine,
    RefreshSchedule,
    SeparateDamping,
    as_schedule,
)
from kfac_jax.statistics.averages import Statistics

QUADRATIC_MODEL = QuadraticModel()
MOMENTUM = 0.9
DAMPING = LevenbergMarquardt(
    0.1, relative_minimum=1e-4, relative_maximum=10.0, trusted_factor=1 / 3
)
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
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        **others: Any,
    ) -> tuple[optax.Updates, KFACState]:
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
        state = counted(with_loss(done.state, batch.value), done.refused | ~finite)
        state = state._replace(damping=at(damping, state.step))
        return curvature.tree.restore(scaled, updates), state

    return optax.GradientTransformationExtraArgs(
        preconditioner.init, on_any_mesh(update)
    )


def kfac(
    curvature: Curvature,
    learning_rate: optax.ScalarOrSchedule | QuadraticModel | Refine = QUADRATIC_MODEL,
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
    rules (`QuadraticModel` or `Refine`, `LevenbergMarquardt`) the update also needs
    `params`, `value=` and `args=`, the loss function's arguments after the parameters;
    `make_step` passes them.

    Schedules are functions of the step, counted from 0, as those of optax.

    A factor, inverse or update that is not finite never enters the state: the last good
    one stays, the update is zero, and `state.info.skipped_updates` counts it. A batch
    whose loss, `value=`, is not finite (nor its square, which in float32 overflows from
    1.8e19) is not used at all.

    Args:
      curvature: the plan.
      learning_rate: α, a number, a schedule of the step, a `QuadraticModel`, or
        `Refine`: conjugate gradients on the exact curvature.
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
    check_mode(curvature)
    check_rates(learning_rate, momentum, norm_constraint)
    if factored_damping is not None:
        check_separate(factored_damping, learning_rate, damping, schedule, curvature.l2)
    if momentum is None and not isinstance(learning_rate, QuadraticModel | Refine):
        momentum = MOMENTUM
    preconditioner = Preconditioner(
        curvature=curvature,
        damping=damping,
        decay=decay,
        schedule=schedule,
        devices=checked(devices),
        factored_damping=factored_damping,
    )
    optimizer = Optimizer(
        preconditioner=preconditioner,
        learning_rate=learning_rate,
        momentum=momentum,
        norm_constraint=norm_constraint,
    )
    return optax.GradientTransformationExtraArgs(
        optimizer.init, on_any_mesh(optimizer.update)
    )
