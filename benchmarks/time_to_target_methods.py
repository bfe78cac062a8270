"""The optimizers that `time_to_target.py` compares, each with all its constants.

Rates rise linearly over `warm_up` steps. Then they stay, or, with a `horizon`, fall
linearly to zero at that step; nothing depends on when a target is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from training import Method, Problem, Progress, PyTree

import kfac_jax

__all__ = ["METHODS", "AdamW", "Constants", "KFac", "Nesterov", "scheduled"]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """`optax.adamw`."""

    batch: int  # cases in a step
    rate: float
    warm_up: int  # steps
    horizon: int | None = None  # steps
    decay: float = 0.0  # of the weights
    b1: float = 0.9
    b2: float = 0.999

    def method(self, problem: Problem, params: PyTree, seed: int) -> Method:
        """The optimizer for a problem."""
        del params, seed

        def transformation(rate: Array | float) -> optax.GradientTransformation:
            return optax.adamw(rate, self.b1, self.b2, weight_decay=self.decay)

        def step(params, state, batch, iteration, fraction):
            del fraction
            rate = self.rate * scheduled(iteration, self.warm_up, self.horizon)
            value, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
            updates, state = transformation(rate).update(grads, state, params)
            progress = Progress(value, jnp.nan, rate, jnp.nan)
            return optax.apply_updates(params, updates), state, progress

        return Method("AdamW", transformation(self.rate).init, step)


@dataclass(frozen=True, kw_only=True)
class Nesterov:
    """`optax.sgd` with Nesterov's momentum, fixed or rising as by Sutskever et al."""

    batch: int  # cases in a step
    rate: float
    warm_up: int  # steps
    momentum: float  # the highest
    horizon: int | None = None  # steps
    # steps between rises of the momentum, `min(1 - 1/2/floor(t/period + 1), highest)`
    period: int | None = None

    def method(self, problem: Problem, params: PyTree, seed: int) -> Method:
        """The optimizer for a problem."""
        del params, seed

        def transformation(
            rate: Array | float, momentum: Array | float
        ) -> optax.GradientTransformation:
            return optax.sgd(rate, momentum, nesterov=True)

        def step(params, state, batch, iteration, fraction):
            del fraction
            rate = self.rate * scheduled(iteration, self.warm_up, self.horizon)
            momentum = jnp.float32(self.momentum)
            if self.period is not None:
                rising = 1 - 0.5 / (iteration // self.period + 1)
                momentum = jnp.minimum(rising, momentum)
            value, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
            updates, state = transformation(rate, momentum).update(grads, state, params)
            progress = Progress(value, jnp.nan, rate, momentum)
            return optax.apply_updates(params, updates), state, progress

        return Method("Nesterov", transformation(0.0, 0.0).init, step)


@dataclass(frozen=True, kw_only=True)
class KFac:
    """`kfac_jax.kfac`, with given rates or with those of the quadratic model."""

    batch: int  # cases in a step
    rate: float | None  # alpha; None: alpha and mu are the quadratic model's
    damping: float  # lambda, or where its adaptation starts
    warm_up: int = 1  # steps; for a given rate, and the constraint
    horizon: int | None = None  # steps; likewise
    momentum: float | None = 0.9  # mu, None with the quadratic model
    constraint: float | None = None  # highest alpha^2 D'g
    damping_factor: float | None = None  # omega_1; None: lambda stays
    damping_minimum: float = 0.0
    statistics_fraction: float = 0.125  # tau_1
    quadratic_fraction: float = 0.25  # tau_2
    inverse_every: int = 20  # T3
    l2: float = 0.0  # eta, as in the loss

    def method(self, problem: Problem, params: PyTree, seed: int) -> Method:
        """The optimizer for a problem."""
        curvature = kfac_jax.make_curvature(
            problem.loss_fn,
            params,
            *problem.batches(0),
            statistics_fraction=self.statistics_fraction,
            on_unmatched="error",
            l2=self.l2,
        )
        key = jax.random.key(seed)

        def step(params, state, batch, iteration, fraction):
            del fraction
            part = scheduled(iteration, self.warm_up, self.horizon)
            value, grads, statistics = curvature.value_grad_and_statistics(
                params, *batch, rng=jax.random.fold_in(key, iteration)
            )
            updates, state = self._transformation(curvature, part).update(
                grads, state, params, statistics=statistics, value=value, args=batch
            )
            info = state.info
            progress = Progress(value, info.damping, info.learning_rate, info.momentum)
            return optax.apply_updates(params, updates), state, progress

        return Method("K-FAC", self._transformation(curvature, 1.0).init, step)

    def _transformation(
        self, curvature: kfac_jax.Curvature, part: Array | float
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer at a part of its highest rate; its state is the same at all."""
        rates: dict[str, Any] = {"learning_rate": None, "momentum": None}
        if self.rate is None:
            rates["learning_rate"] = kfac_jax.QuadraticModel(
                fraction=self.quadratic_fraction, largest_momentum=None, longest=None
            )
        else:
            rates = {"learning_rate": self.rate * part, "momentum": self.momentum}
        if self.constraint is not None:  # a squared length
            rates["norm_constraint"] = self.constraint * part**2
        damping = self.damping
        if self.damping_factor is not None:
            damping = kfac_jax.LevenbergMarquardt(
                self.damping,
                factor=self.damping_factor,
                minimum=self.damping_minimum,
            )
        return kfac_jax.kfac(
            curvature, damping=damping, inverse_every=self.inverse_every, **rates
        )


Constants = AdamW | Nesterov | KFac

METHODS: dict[str, type[Constants]] = {
    "kfac": KFac,
    "adamw": AdamW,
    "nesterov": Nesterov,
}


def scheduled(iteration: Array | int, warm_up: int, horizon: int | None) -> Array:
    """The part of its highest value that a rate has at a step, counted from 0.

    >>> [float(scheduled(i, 2, 6)) for i in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    rising = (jnp.asarray(iteration, jnp.float32) + 1) / warm_up
    if horizon is None:
        return jnp.minimum(rising, 1.0)
    falling = (horizon - iteration) / (horizon - warm_up)
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)
