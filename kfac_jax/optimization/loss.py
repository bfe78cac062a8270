"""The loss of a batch, from the argument `value=` of an update."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils.arguments import number
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax._utils.trees import rebuilt
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices
from kfac_jax.optimization.state import KFACState, nan


def averaged_loss(devices: Devices, value: Any) -> Array | None:
    """The loss in `value`, averaged over all devices; None without a value.

    Raises:
      TypeError: if it is no number.
    """
    if value is None:
        return None
    number("value, the loss or (loss, aux),", _loss_in(value), arrays=True)
    return devices.mean(loss_of(value))


def loss_of(value: Any) -> Array:
    """The loss in `value`, which may be `(loss, aux)`; NaN for None."""
    return nan() if value is None else jnp.asarray(_loss_in(value), float)


def loss_at(curvature: Curvature, params: optax.Params, args: Any) -> Array:
    """The loss of a batch, in whatever trace the caller is."""
    return loss_of(curvature.loss_fn(params, *rebuilt(args)))


def _loss_in(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def with_loss(state: KFACState, value: Array | None) -> KFACState:
    """Records the loss at the start of a step, and updates its running means.

    The means ignore losses that are not finite, and losses of exactly 0: those are of
    batches that a mask hides, and do not tell the scale of losses.
    """
    loss, mean = loss_of(value), state.info.mean_loss
    counts, has_mean = jnp.isfinite(loss) & (loss != 0), jnp.isfinite(mean)
    # computed from finite numbers only, for jax_debug_nans
    new = jnp.where(counts, loss, 0.0)
    old = jnp.where(has_mean, mean, new)
    weight = jnp.maximum(1 / state.step.astype(mean.dtype), 1 - _LOSS_DECAY)
    mean = jnp.where(counts, old + weight * (new - old), mean)
    lowest = jnp.fmin(state.info.lowest_loss, mean)
    return state._replace(
        info=state.info._replace(loss=loss, mean_loss=mean, lowest_loss=lowest)
    )


_LOSS_DECAY = 0.95
"""The decay of the running mean of the loss."""


def is_usable(value: Array | None, gradient: list[Array]) -> Array:
    """Whether an update may use its batch, as far as the loss tells.

    A loss whose square overflows in the gradient's precision counts as not finite: with
    a saturated output, which hides all curvature, there is no other sign. To look at
    the gradient's squares instead would cost a pass over it.

    Args:
      value: h(θ), as passed to update. None counts as usable.
      gradient: ∇h, by leaves; only the types matter.

    Returns:
      [] bool.
    """
    if value is None:
        return jnp.asarray(True)
    limits = (float(jnp.finfo(wide_dtype(x.dtype)).max) for x in gradient)
    return jnp.abs(loss_of(value)) <= math.sqrt(min(limits, default=math.inf))
