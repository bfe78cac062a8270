"""How the published Optimizer adapts λ: what it predicts, and when it measures."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree
from jax import Array

from kfac_jax.compat._norms import tree_product
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices
from kfac_jax.optimization.loss import loss_of
from kfac_jax.optimization.state import KFACState
from kfac_jax.rules import LevenbergMarquardt


class Measured(NamedTuple):
    """What one step says about λ; NaN where it was not computed."""

    damping: Array  # [], λ for the next step
    new_loss: Array  # [], h(θ+δ)
    change: Array  # [], what the quadratic model predicted for it
    rho: Array  # [], ρ = (h(θ+δ) - h(θ)) / change


class Made(NamedTuple):
    """A step that was made."""

    params: optax.Params  # θ, before it
    batch: ArrayTree
    loss: Array  # [], h(θ)
    grads: ArrayTree  # ∇h
    updates: ArrayTree  # δ


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adaptation:
    """Adapts λ as published.

    Attributes:
      rule: the Levenberg-Marquardt rule; None if λ is given.
      modelled: whether the quadratic model chooses the learning rate. It is then what
        predicts. Otherwise the approximate curvature does, or with `exact` the exact.
      exact: see there.
      damped: whether the prediction includes ½ λ δᵀδ.
      unknown: what stands for what was not computed.
    """

    rule: LevenbergMarquardt | None
    modelled: bool
    exact: bool
    damped: bool
    unknown: float

    def __call__(
        self, curvature: Curvature, made: Made, state: KFACState, devices: Devices
    ) -> Measured:
        """Predicts, and if it is time measures and adapts.

        Args:
          curvature: the plan.
          made: the step.
          state: the state after the step, whose λ is the step's own.
          devices: over which devices the batch is spread.

        Returns:
          λ for the next step, and what was found.
        """
        damping, loss = state.info.damping, jnp.asarray(made.loss, float)
        unknown = jnp.full((), self.unknown, loss.dtype)
        square = tree_product(made.updates, made.updates)
        change = None
        if self.modelled:
            whole = state.info.quadratic_change
            change = whole if self.damped else whole - 0.5 * damping * square
            change = change.astype(float)
        kept = Measured(
            damping, unknown, unknown if change is None else change, unknown
        )
        rule = self.rule
        if rule is None:
            return kept

        def measured() -> Measured:
            moved = optax.apply_updates(made.params, made.updates)
            after = devices.mean(loss_of(curvature.loss_fn(moved, made.batch)))
            predicted = change
            if predicted is None:
                predicted = self._predicted(curvature, made, state, devices)
            rho = (after - loss) / predicted
            # where loss or gradient are not finite already at θ, ρ says nothing about λ
            known = jnp.isfinite(tree_product(made.grads, made.grads))
            adapted = rule.update(damping, rho)
            adapted = jnp.where(jnp.isfinite(loss) & known, adapted, damping)
            return Measured(adapted, after, predicted, rho)

        return jax.lax.cond(state.step % rule.every == 0, measured, lambda: kept)

    def _predicted(
        self, curvature: Curvature, made: Made, state: KFACState, devices: Devices
    ) -> Array:
        """How much the loss is to change, by the curvature where that is no model."""
        updates = made.updates
        if self.exact:
            form = curvature.quadratic_form(made.params, [updates], made.batch)
            form = devices.mean(form)[0, 0]
        else:
            moved = curvature.approximation(state.factors).matvec(updates)
            form = tree_product(updates, moved)
        square = tree_product(updates, updates)
        penalty = 0.5 * curvature.l2 * square
        penalty += 0.5 * state.info.damping * square if self.damped else 0.0
        change = 0.5 * form + penalty + tree_product(updates, made.grads)
        return jnp.asarray(change, float)
