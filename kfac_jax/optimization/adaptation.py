"""How λ follows a step's reduction ratio: what K-FAC and the natural gradient share."""

import jax.numpy as jnp
from jax import Array

from kfac_jax.rules import LevenbergMarquardt

_CURVATURE_DECAY = 0.9
"""The decay of the running mean of the curvature along steps."""


def reduction_ratio(before: Array, after: Array, predicted: Array) -> Array:
    """`ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0))`.

    If the loss rises, ρ is -∞, whatever the model predicted.

    Args:
      before: h(θ).
      after: h(θ + δ), on the same batch.
      predicted: M(δ) - M(0).

    Returns:
      ρ, `[]`.

    References:
      Martens & Grosse 2015, section 6.5.
    """
    rho = (after - before) / predicted
    return jnp.where(after > before, -jnp.inf, rho)


def adapted(
    rule: LevenbergMarquardt,
    damping: Array,
    rho: Array,
    predicted: Array,
    loss: Array,
    usable: Array,
    curvature: Array,
    alpha: Array | float = 0.0,
) -> Array:
    """The next λ.

    ρ says nothing about λ if loss or gradient are not finite already at θ, or if the
    change is smaller than the rounding of the loss.

    Args:
      rule: the rule.
      damping: λ.
      rho: ρ; NaN where the step was not finite.
      predicted: M(δ) - M(0).
      loss: h(θ).
      usable: `[]` bool, whether loss and gradient are finite at θ.
      curvature: the running mean of `Δᵀ F Δ / Δᵀ Δ`.
      alpha: the quadratic model's α for K-FAC's direction; 0 for others.

    Returns:
      λ, within the rule's limits.
    """
    # A cross entropy is a difference of logits, so its rounding is absolute, however
    # small it is: hence at least that of a loss of 1.
    rounding = 16 * jnp.finfo(loss.dtype).eps * jnp.maximum(jnp.abs(loss), 1.0)
    tells = usable & ~(jnp.abs(predicted.astype(loss.dtype)) < rounding)
    unchanged = rule.clip(damping, curvature)
    return jnp.where(tells, rule.update(damping, rho, curvature, alpha), unchanged)


def averaged_curvature(old: Array, new: Array) -> Array:
    """Updates the running mean with a measurement; the first one replaces it."""
    new = new.astype(old.dtype)
    decay = _CURVATURE_DECAY
    mean = jnp.where(old > 0, decay * old + (1 - decay) * new, new)
    return jnp.where(jnp.isfinite(new) & (new >= 0), mean, old)
