"""Optimizers as methods of a comparison, from optax transformations.

A rate that ends with the budget, which may be of seconds, is no schedule of optax's:
the transformation is made in each step, and its state does not depend on the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from training import Method, Problem, Progress, PyTree

import kfac_jax


def first_order(
    name: str,
    problem: Problem,
    make: Callable[..., optax.GradientTransformation],
    rates: Callable[[Array | int, Array | float], Mapping[str, Any]],
) -> Method:
    """A method that needs the gradient alone.

    Args:
        name: to be shown.
        problem: for its loss function.
        make: rates -> the transformation.
        rates: iteration, fraction of the budget -> "learning_rate", and "momentum" if
            there is one.

    Returns:
        The method.
    """

    def step(params, state, batch, iteration, fraction):
        now = rates(iteration, fraction)
        value, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
        updates, state = make(**now).update(grads, state, params)
        momentum = now.get("momentum", jnp.nan)
        progress = Progress(value, jnp.nan, now["learning_rate"], momentum)
        return optax.apply_updates(params, updates), state, progress

    return Method(name, make(**rates(0, 0.0)).init, step)


def second_order(
    name: str,
    problem: Problem,
    params: PyTree,
    seed: int,
    make: Callable[[kfac_jax.Curvature, Array | float], Any],
    **plan: Any,
) -> Method:
    """K-FAC, in steps of `kfac_jax.make_step`.

    Args:
        name: to be shown.
        problem: what is trained.
        params: for their shapes.
        seed: of the samples.
        make: plan, fraction of the budget -> the transformation.
        **plan: options of `make_curvature`.

    Returns:
        The method.
    """
    curvature = kfac_jax.make_curvature(
        problem.loss_fn, params, *problem.batches(0), **plan
    )
    key = jax.random.key(seed)

    def step(params, state, batch, iteration, fraction):
        step = kfac_jax.make_step(curvature, make(curvature, fraction))
        now = jax.random.fold_in(key, iteration)
        params, state, value = step(params, state, now, *batch)
        info = optax.tree.get(state, "info")
        progress = Progress(value, info.damping, info.learning_rate, info.momentum)
        return params, state, progress

    report = f"{name} covers the parameters so:\n{curvature}"
    return Method(name, make(curvature, 0.0).init, step, report)


def scheduled(peak: float, warm_up: float, fraction: Array | float) -> Array:
    """A rate that rises linearly from zero to its peak, then falls linearly to zero.

    Args:
        peak: the highest rate.
        warm_up: the fraction at which it is reached.
        fraction: of the budget that is used.

    Returns:
        The rate now.

    Raises:
        ValueError: the warm-up is out of its range.

    >>> [round(float(scheduled(1.0, 0.2, f)), 3) for f in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not 0 < warm_up < 1:
        raise ValueError(f"warm_up must be between 0 and 1; got {warm_up}.")
    return peak * jnp.minimum(fraction / warm_up, (1 - fraction) / (1 - warm_up))


@dataclass(frozen=True, kw_only=True)
class KFac:
    """K-FAC with fixed damping and momentum, and a rate that rises and falls."""

    damping: float  # lambda
    constraint: float  # highest limit of alpha^2 D'g, for direction D and gradient g
    warm_up: float  # part of the budget in which the rate rises
    rate: float = 0.1  # highest learning rate, alpha
    momentum: float = 0.9  # mu
    inverse_every: int = 20  # steps between inverses, T3
    statistics_fraction: float = 0.25  # part of a batch, tau1
    eigen: bool = False  # EKFAC

    def method(self, problem: Problem, params: PyTree, seed: int) -> Method:
        """See `training.Constants`."""
        blocks = kfac_jax.blocks
        return second_order(
            "EKFAC" if self.eigen else "K-FAC",
            problem,
            params,
            seed,
            self._make,
            blocks=blocks.Eigen() if self.eigen else blocks.Kronecker(),
            statistics_fraction=self.statistics_fraction,
            on_unmatched="error",
        )

    def _make(self, curvature: kfac_jax.Curvature, fraction: Array | float) -> Any:
        """The transformation at its rate now.

        Most steps are as long as the constraint allows, so that it follows the schedule
        too: as the square, as it limits a squared length.
        """
        part = scheduled(1.0, self.warm_up, fraction)
        return kfac_jax.kfac(
            curvature,
            learning_rate=self.rate * part,
            momentum=self.momentum,
            damping=self.damping,
            norm_constraint=self.constraint * part**2,
            inverse_every=self.inverse_every,
        )


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """`optax.adamw` with a rate that rises and falls."""

    rate: float  # highest learning rate
    decay: float  # of the weights
    warm_up: float  # part of the budget in which the rate rises

    def method(self, problem: Problem, params: PyTree, seed: int) -> Method:
        """See `training.Constants`."""
        del params, seed

        def rates(_: Array | int, fraction: Array | float) -> Mapping[str, Any]:
            return {"learning_rate": scheduled(self.rate, self.warm_up, fraction)}

        make = partial(optax.adamw, weight_decay=self.decay)
        return first_order("AdamW", problem, make, rates)
