"""The loss of a batch, as `value=` tells it."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils.arguments import number
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.devices import Devices
from kfac_jax.optimization.state import KFACState, nan


def averaged_loss(devices: Devices, value: Any) -> Array | None:
    """The loss in what `update` got as `value`, over all devices' cases.

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


def _loss_in(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def with_loss(state: KFACState, value: Array | None) -> KFACState:
    """The state after a step at whose start the loss was `value`.

    A loss of exactly 0, as of a batch that a mask hides, says nothing of the scale of
    losses, and one that is not finite neither.
    """
    loss, mean = loss_of(value), state.info.mean_loss
    told, known = jnp.isfinite(loss) & (loss != 0), jnp.isfinite(mean)
    # of what is finite only, for jax_debug_nans
    new = jnp.where(told, loss, 0.0)
    old = jnp.where(known, mean, new)
    weight = jnp.maximum(1 / state.step.astype(mean.dtype), 1 - _KEPT_LOSS)
    mean = jnp.where(told, old + weight * (new - old), mean)
    lowest = jnp.fmin(state.info.lowest_loss, mean)
    return state._replace(
        info=state.info._replace(loss=loss, mean_loss=mean, lowest_loss=lowest)
    )


_KEPT_LOSS = 0.95
"""What a batch's loss leaves of the running mean before."""


def is_usable(value: Array | None, gradient: list[Array]) -> Array:
    """Whether a batch may be learnt from, as far as the loss tells.

    A loss whose square overflows, in the gradient's precision, is taken for one that is
    not finite: with a saturated output, which hides all curvature, there is no other
    sign. To look at the gradient's squares would cost a pass over it.

    Args:
      value: h(θ), as passed to update, or None, of which nothing is said.
      gradient: ∇h, by leaves, of which only the types matter.

    Returns:
      [] bool.
    """
    if value is None:
        return jnp.asarray(True)
    limits = (float(jnp.finfo(wide_dtype(x.dtype)).max) for x in gradient)
    return jnp.abs(loss_of(value)) <= math.sqrt(min(limits, default=math.inf))
