"""The natural gradient in the sample space, as an optax transformation."""

from typing import Any

import optax

from kfac_jax._utils import arguments, schedules
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Sharing, checked
from kfac_jax.operator.structures import check_sample_space
from kfac_jax.optimization.checks import check_plan
from kfac_jax.optimization.on_any_mesh import on_any_mesh
from kfac_jax.optimization.sample_space_method import SampleSpaceMethod
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel, Spring


def natural_gradient(
    curvature: Curvature,
    learning_rate: optax.ScalarOrSchedule | QuadraticModel = 0.1,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt = 1e-3,
    momentum: float | Spring = 0.0,
    *,
    norm_constraint: optax.ScalarOrSchedule | None = None,
    devices: Sharing | None = None,
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
        step to the minimum of the damped quadratic model along the direction, without
        the options that it has in `kfac`.
      damping: λ > 0, a number, a schedule, or a `LevenbergMarquardt` rule, which
        evaluates the loss after a step and needs `value=`.
      momentum: `Spring(μ)`, or 0.
      norm_constraint: the largest `η² φᵀ F φ`, a number or a schedule; None for none.
        With `Spring` it is the largest `η² φᵀ φ`: this batch's F does not see what is
        left of directions of other batches.
      devices: `OverAxis(axis)` in a step that every device runs on its part of the
        batch: each multiplies its rows by those of all, and T is solved with on each.
        Gradients must be averages already. Under `jit` with sharded arrays nothing need
        be said, though `OverMesh(mesh)` may be.

    Returns:
      The transformation. `update` needs `params`, `statistics=` of
      `value_grad_and_statistics`, and `args=`, the loss function's arguments after the
      parameters; `make_step` passes them. λ is at least `ε tr T`, with the precision ε
      of T. Where `T + λ I` has no Cholesky factor, an eigendecomposition with
      eigenvalues of at least zero is used; an update that is not finite is zero. Both
      are counted in the state.

      Of the gradient, what is neither of the registered losses nor of the l2 penalty,
      and is smaller than the root of the program's precision, is taken for rounding and
      left out: put `optax.add_decayed_weights` after this. On a mesh with Explicit axes
      the loss function runs with Auto ones here, and may not name shardings.

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
    _check(learning_rate, damping, momentum, norm_constraint)
    together = checked(devices)
    if together.cuts_state:
        raise ValueError(
            "natural_gradient keeps no factors that devices could have a part of: "
            f"expected no state_axes, got {together}. Leave them out."
        )
    method = SampleSpaceMethod(
        curvature=curvature,
        learning_rate=learning_rate,
        damping=damping,
        decay=momentum.decay if isinstance(momentum, Spring) else 0.0,
        norm_constraint=norm_constraint,
        devices=together,
    )
    return optax.GradientTransformationExtraArgs(
        method.init, on_any_mesh(method.update)
    )


def _check(
    learning_rate: Any, damping: Any, momentum: Any, norm_constraint: Any
) -> None:
    """Checks the arguments that are numbers, schedules or rules."""
    inf = float("inf")
    plain = QuadraticModel()
    if isinstance(learning_rate, QuadraticModel) and learning_rate != plain:
        raise ValueError(
            "natural_gradient takes the step to the minimum along its direction, on "
            "the whole batch and without a limit: expected QuadraticModel() without "
            f"options, got {learning_rate!r}. Use norm_constraint to limit steps."
        )
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
