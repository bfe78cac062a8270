"""The state of an optimizer, and its diagnostics of the last update."""

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
    """Diagnostics of the last update.

    Numbers that were not computed are NaN (∞ under jax_debug_nans).
    """

    loss: Array  # [], h(θ): the `value` passed to update
    damping: Array  # [], the update's λ
    factored_damping: Array  # [], γ in its inverses; NaN if γ = √(λ+η)
    learning_rate: Array  # [], α
    momentum: Array  # [], μ
    step_scale: Array  # [], the factor that a limit multiplied α and μ by; 1 without
    mean_loss: Array  # [], running mean of h(θ), over some 20 steps
    lowest_loss: Array  # [], the lowest value of that mean so far
    rho: Array  # [], ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0)), when it was last measured
    quadratic_change: Array  # [], M(δ) - M(0)
    inverse_refreshes: Array  # [] int32, steps that computed inverses so far
    skipped_updates: Array  # [] int32, updates so far that refused something


class KFACState(NamedTuple):
    """The state of `scale_by_kfac` and `kfac`: a plain pytree with stable names."""

    step: Array  # [] int32, the number of updates so far
    batches: Array  # [] int32, the number of updates whose statistics were accepted
    cases: Array  # [], running mean of the number of cases in those batches
    factors: Factors  # by layer name, moving averages of the factors
    inverses: Factors  # by layer name, inverses of the damped factors
    damping: Array  # [], λ for the next update
    length: Array  # [], running mean of the lengths of steps; 0 if there is no limit
    curvature: Array  # [], running mean of Δᵀ F Δ / Δᵀ Δ; 0 if it is not measured
    factored_damping: Array  # [], γ; NaN if γ = √(λ+η)
    # δ0, the previous update, like the parameters; () in scale_by_kfac
    velocity: optax.Params
    info: Info


def nan() -> Array:
    """The placeholder of a number that was not computed."""
    # under jax_debug_nans a NaN would stop the user's program
    config: Any = jax.config
    return jnp.asarray(jnp.inf if config.jax_debug_nans else jnp.nan, float)


def initial_info() -> Info:
    """The diagnostics before the first step, none of which is known."""
    # A buffer must not be donated twice, and states are donated. So each field gets an
    # array of its own.
    unknown = [nan() for _ in range(10)]
    counts = [jnp.zeros((), jnp.int32) for _ in range(2)]
    return Info._make([*unknown, *counts])


def at(value: optax.ScalarOrSchedule, step: Array) -> Array:
    """The value of a hyperparameter in a step, on the mesh of the step."""
    return jnp.asarray(axis_types.here(schedules.at(value, step)), float)


def initial_damping(damping: optax.ScalarOrSchedule | LevenbergMarquardt) -> Array:
    """λ of the first step."""
    if isinstance(damping, LevenbergMarquardt):
        return jnp.asarray(damping.initial, float)
    return at(damping, jnp.zeros((), jnp.int32))


def initial_factored_damping(rule: SeparateDamping | None, total: Numeric) -> Array:
    """γ of the first step: the rule's, or √(λ+η); NaN without a rule."""
    if rule is None:
        return nan()
    return jnp.sqrt(total) if rule.initial is None else jnp.asarray(rule.initial, float)
