"""How the published Optimizer adapts λ: what it predicts, and when it measures."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils.vectors import tree_product
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices
from kfac_jax.optimization.loss import loss_of
from kfac_jax.optimization.state import KFACState
from kfac_jax.rules import LevenbergMarquardt

Params = Any


class Measured(NamedTuple):
    """What one step says about λ; NaN where it was not computed."""

    damping: Array  # [], λ for the next step
    new_loss: Array  # [], h(θ+δ)
    change: Array  # [], what the quadratic model predicted for it
    rho: Array  # [], ρ = (h(θ+δ) - h(θ)) / change


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
        self,
        curvature: Curvature,
        params: Params,
        batch: Any,
        loss: Array,
        grads: Params,
        updates: Params,
        state: KFACState,
        devices: Devices,
    ) -> Measured:
        """Predicts, and if it is time measures and adapts.

        Args:
          curvature: the plan.
          params: the parameters, before the step.
          batch: the step's batch.
          loss: h(θ).
          grads: ∇h.
          updates: δ.
          state: the state after the step, whose λ is the step's own.
          devices: over which devices the batch is spread.

        Returns:
          λ for the next step, and what was found.
        """
        damping, loss = state.info.damping, jnp.asarray(loss, float)
        square = tree_product(updates, updates)
        penalty = 0.5 * curvature.l2 * square
        penalty = penalty + 0.5 * damping * square if self.damped else penalty

        def predict() -> Array:
            if self.exact:
                form = curvature.quadratic_form(params, [updates], batch)
                form = devices.mean(form)[0, 0]
            else:
                moved = curvature.approximation(state.factors).matvec(updates)
                form = tree_product(updates, moved)
            return 0.5 * form + penalty + tree_product(updates, grads)

        def measure(change: Array | None) -> Measured:
            after = loss_of(
                curvature.loss_fn(optax.apply_updates(params, updates), batch)
            )
            after = devices.mean(after)
            change = jnp.asarray(predict() if change is None else change, float)
            rho = (after - loss) / change
            assert self.rule is not None
            # where loss or gradient are not finite already at θ, ρ says nothing about λ
            known = jnp.isfinite(loss) & jnp.isfinite(tree_product(grads, grads))
            adapted = jnp.where(known, self.rule.update(damping, rho), damping)
            return Measured(adapted, after, change, rho)

        unknown = jnp.full((), self.unknown, loss.dtype)
        change = None
        if self.modelled:
            whole = state.info.quadratic_change
            change = whole if self.damped else whole - 0.5 * damping * square
            change = change.astype(float)
        kept = Measured(
            damping, unknown, unknown if change is None else change, unknown
        )
        if self.rule is None:
            return kept
        due = state.step % self.rule.every == 0
        return jax.lax.cond(due, lambda: measure(change), lambda: kept)
