"""The state of an optimizer, and what it says of the last update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import Numeric
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import schedules
from kfac_jax.plan.group import Factors
from kfac_jax.rules import LevenbergMarquardt, SeparateDamping


class Info(NamedTuple):
    """What the last update did.

    What was not computed is NaN (∞ under jax_debug_nans).
    """

    loss: Array  # [], h(θ): the `value` passed to update
    damping: Array  # [], λ the update was made with
    factored_damping: Array  # [], γ in its inverses; NaN where that is √(λ+η)
    learning_rate: Array  # [], α
    momentum: Array  # [], μ
    step_scale: Array  # [], by what a limit multiplied α and μ: 1 where none did
    mean_loss: Array  # [], running mean of h(θ), of some 20 steps
    lowest_loss: Array  # [], the lowest value of that mean so far
    rho: Array  # [], ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0)), when it was last measured
    quadratic_change: Array  # [], M(δ) - M(0)
    inverse_refreshes: Array  # [] int32, steps that computed inverses so far
    skipped_updates: Array  # [] int32, updates so far that refused something


class KFACState(NamedTuple):
    """The state of `scale_by_kfac` and `kfac`: a plain pytree with stable names."""

    step: Array  # [] int32, the number of updates so far
    batches: Array  # [] int32, how many of them brought statistics that were accepted
    factors: Factors  # by layer name, moving averages of the factors
    inverses: Factors  # by layer name, of the damped factors
    damping: Array  # [], λ for the next update
    length: Array  # [], running mean of the lengths of steps, 0 where there is no limit
    curvature: Array  # [], running mean of Δᵀ F Δ / Δᵀ Δ, 0 where it is not measured
    factored_damping: Array  # [], γ; NaN where that is √(λ+η)
    # δ0, the previous update, like the parameters; () in scale_by_kfac
    velocity: optax.Params
    info: Info


def nan() -> Array:
    """What stands for a number that was not computed."""
    # under jax_debug_nans a NaN would stop the user's program
    config: Any = jax.config
    return jnp.asarray(jnp.inf if config.jax_debug_nans else jnp.nan, float)


def initial_info() -> Info:
    """Before the first step nothing is known."""
    # no two fields share a buffer: state is donated
    unknown = [nan() for _ in range(10)]
    counts = [jnp.zeros((), jnp.int32) for _ in range(2)]
    return Info._make([*unknown, *counts])


def at(value: optax.ScalarOrSchedule, step: Array) -> Array:
    """A hyperparameter's value, on the mesh that the step is on."""
    return jnp.asarray(axis_types.here(schedules.at(value, step)), float)


def initial_damping(damping: optax.ScalarOrSchedule | LevenbergMarquardt) -> Array:
    """λ of the first step."""
    if isinstance(damping, LevenbergMarquardt):
        return jnp.asarray(damping.initial, float)
    return at(damping, jnp.zeros((), jnp.int32))


def initial_factored_damping(rule: SeparateDamping | None, total: Numeric) -> Array:
    """γ0 if it is separate: as the rule says, or the root of λ0 + η."""
    if rule is None:
        return nan()
    return jnp.sqrt(total) if rule.initial is None else jnp.asarray(rule.initial, float)
