"""Gradients preconditioned by their layers' inputs, for other optimizers."""

import dataclasses

import optax

from kfac_jax._utils import arguments
from kfac_jax.blocks import Identity, InputOnly
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Sharing
from kfac_jax.operator.input_powers import InputPower
from kfac_jax.operator.single import Single
from kfac_jax.optimization.checks import check_plan
from kfac_jax.optimization.transform import scale_by_kfac
from kfac_jax.plan import Layer
from kfac_jax.plan.group import Group
from kfac_jax.rules import RefreshSchedule


def scale_by_inputs(
    curvature: Curvature,
    power: float = -1.0,
    damping: optax.ScalarOrSchedule = 1e-1,
    decay: optax.ScalarOrSchedule = 0.95,
    inverse_every: optax.ScalarOrSchedule | RefreshSchedule = 20,
    *,
    devices: Sharing | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient of each weight by a power of its inputs' second moments.

    The result is `(A + λ ā I)^p G` for a weight with the gradient G `[inputs, outputs]`
    and `A = E[x xᵀ]`, where ā is the mean of A's eigenvalues. So λ has no unit. A bias
    belongs to its weight, as the input 1. Other parameters keep their gradient.

    Chain it before another optimizer, as Newton-Muon does before Muon. Its update needs
    `statistics=` from `curvature.value_grad_and_statistics`; with `make_step` that is a
    step's usual call.

    Args:
      curvature: a plan with `blocks.InputOnly`, as of `estimation_mode="inputs"`.
      power: p, in [-1, 0). Others than -1 take an eigendecomposition in a refresh.
      damping: λ, relative to ā; a number or a schedule of the step.
      decay: the largest ε of the moving averages of A, a number or a schedule.
      inverse_every: T3, how many steps powers are kept; they are also computed at the
        first three steps. A number, a schedule, or a `RefreshSchedule`.
      devices: how several devices share the work, as for `kfac`.

    Returns:
      The transformation. Its state is a `KFACState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is out of its range, or if no layer has that block.

    References:
      Benzing 2022 (arXiv:2201.12250). Newton-Muon: arXiv:2604.01472.

    >>> import jax, jax.numpy as jnp, optax, kfac_jax
    >>> def loss_fn(w, x, y):  # nothing is registered
    ...     return jnp.square(x @ w - y).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> curvature = kfac_jax.make_curvature(loss_fn, w, x, y, estimation_mode="inputs")
    >>> tx = optax.chain(scale_by_inputs(curvature), optax.contrib.muon(0.1))
    >>> step = jax.jit(kfac_jax.make_step(curvature, tx))
    >>> w, state, value = step(w, tx.init(w), jax.random.key(0), x, y)
    >>> float(value)
    9.0
    """
    check_plan(curvature)
    arguments.number("power (p)", power)
    if not -1 <= power < 0:
        raise ValueError(f"power (p) must be in [-1, 0); got {power}.")
    blocks = [layer.block for layer in curvature.layers]
    others = [x for x in blocks if not isinstance(x, InputOnly | Identity | None)]
    if others or not any(isinstance(x, InputOnly) for x in blocks):
        raise ValueError(
            "scale_by_inputs needs layers with blocks.InputOnly(), and no other "
            "statistics: expected a plan of "
            'make_curvature(..., estimation_mode="inputs"), got blocks '
            f"{sorted({repr(x) for x in blocks})}."
        )
    groups = tuple(_with_power(layer, float(power)) for layer in curvature.layers)
    own = dataclasses.replace(curvature, groups=groups)
    return scale_by_kfac(own, damping, decay, inverse_every, devices=devices)


def _with_power(layer: Layer, power: float) -> Group:
    """The group for that power; without a block if it has no inputs."""
    if isinstance(layer.block, InputOnly):
        return InputPower(layer, power)
    return Single(dataclasses.replace(layer, block=None))
