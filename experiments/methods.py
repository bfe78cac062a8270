"""The optimizers that the classifier and the language model compare.

K-FAC, EKFAC and AdamW, all with the same schedule of their rate: up from zero at the
start of the budget, down to zero at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from experiment import Problem, option
from jax import Array
from training import Method, Progress, PyTree
from tuning import Grids

import kfac_jax

CONSTRAINT = "highest limit of alpha^2 D'g, for direction D and gradient g"

WARM_UP = "part of the budget in which the rate rises"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Constants of the optimizers, shared by the examples; each has its own values."""

    kfac_rate: float = option(0.1, "K-FAC: highest learning rate, alpha")
    kfac_damping: float = option(1e-3, "K-FAC: lambda")
    kfac_constraint: float = option(1e-2, f"K-FAC: {CONSTRAINT}")
    kfac_warm_up: float = option(0.3, f"K-FAC: {WARM_UP}")
    ekfac_rate: float = option(0.1, "EKFAC: highest learning rate, alpha")
    ekfac_damping: float = option(1e-3, "EKFAC: lambda")
    ekfac_constraint: float = option(1e-2, f"EKFAC: {CONSTRAINT}")
    ekfac_warm_up: float = option(0.3, f"EKFAC: {WARM_UP}")
    adamw_rate: float = option(1e-3, "AdamW: highest learning rate")
    adamw_decay: float = option(1e-2, "AdamW: weight decay")
    adamw_warm_up: float = option(0.3, f"AdamW: {WARM_UP}")
    momentum: float = option(0.9, "K-FAC, EKFAC: mu")
    inverse_every: int = option(20, "K-FAC, EKFAC: steps between inverses, T3")
    statistics_fraction: float = option(0.25, "K-FAC, EKFAC: part of a batch, tau1")


def grids(
    dampings: tuple[float, ...],
    constraints: tuple[float, ...],
    adamw_rates: tuple[float, ...],
) -> Grids:
    """The constants that `--tune` compares: as many trials for each optimizer.

    Args:
        dampings: of K-FAC and EKFAC, three.
        constraints: of K-FAC and EKFAC, two. (They limit most steps, not the rate.)
        adamw_rates: of AdamW, three; each is tried with two warm-ups.

    Returns:
        The values to try, for each optimizer.
    """
    return {
        "kfac": {"kfac_damping": dampings, "kfac_constraint": constraints},
        "ekfac": {"ekfac_damping": dampings, "ekfac_constraint": constraints},
        "adamw": {"adamw_rate": adamw_rates, "adamw_warm_up": (0.2, 0.4)},
    }


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


def _kfac(settings: Settings, problem: Problem, params: PyTree, seed: int) -> Method:
    constants = _Constants(
        "K-FAC",
        kfac_jax.blocks.Kronecker(),
        settings.kfac_rate,
        settings.kfac_damping,
        settings.kfac_constraint,
        settings.kfac_warm_up,
    )
    return _with_curvature(constants, settings, problem, params, seed)


def _ekfac(settings: Settings, problem: Problem, params: PyTree, seed: int) -> Method:
    constants = _Constants(
        "EKFAC",
        kfac_jax.blocks.Eigen(),
        settings.ekfac_rate,
        settings.ekfac_damping,
        settings.ekfac_constraint,
        settings.ekfac_warm_up,
    )
    return _with_curvature(constants, settings, problem, params, seed)


class _Constants(NamedTuple):
    name: str
    blocks: kfac_jax.blocks.Block
    rate: float
    damping: float
    constraint: float
    warm_up: float


def _with_curvature(
    constants: _Constants,
    settings: Settings,
    problem: Problem,
    params: PyTree,
    seed: int,
) -> Method:
    """K-FAC with fixed damping and momentum."""
    curvature = kfac_jax.make_curvature(
        problem.loss_fn,
        params,
        *problem.batches(0),
        blocks=constants.blocks,
        statistics_fraction=settings.statistics_fraction,
        on_unmatched="error",
    )
    key = jax.random.key(seed)

    def transformation(part: float | Array) -> optax.GradientTransformationExtraArgs:
        """The optimizer at a part of its highest rate; its state does not depend on it.

        Most steps are as long as the constraint allows, so that it follows the schedule
        too: as the square, as it limits a squared length.
        """
        return kfac_jax.kfac(
            curvature,
            learning_rate=constants.rate * part,
            momentum=settings.momentum,
            damping=constants.damping,
            norm_constraint=constants.constraint * part**2,
            inverse_every=settings.inverse_every,
        )

    def step(params, state, batch, iteration, fraction):
        part = scheduled(1.0, constants.warm_up, fraction)
        value, grads, statistics = curvature.value_grad_and_statistics(
            params,
            *batch,
            rng=jax.random.fold_in(key, iteration),
            factors=state.factors,  # EKFAC's basis
        )
        updates, state = transformation(part).update(
            grads, state, params, statistics=statistics
        )
        info = state.info
        progress = Progress(value, constants.damping, info.learning_rate, info.momentum)
        return optax.apply_updates(params, updates), state, progress

    report = f"{constants.name} covers the parameters so:\n{curvature}"
    return Method(constants.name, transformation(1.0).init, step, report)


def _adamw(settings: Settings, problem: Problem, params: PyTree, seed: int) -> Method:
    del params, seed

    def transformation(rate: float | Array) -> optax.GradientTransformation:
        """The optimizer at a rate, which its state does not depend on."""
        return optax.adamw(rate, weight_decay=settings.adamw_decay)

    def step(params, state, batch, iteration, fraction):
        del iteration
        now = scheduled(settings.adamw_rate, settings.adamw_warm_up, fraction)
        value, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
        updates, state = transformation(now).update(grads, state, params)
        progress = Progress(value, jnp.nan, now, jnp.nan)
        return optax.apply_updates(params, updates), state, progress

    return Method("AdamW", transformation(settings.adamw_rate).init, step)


METHODS = {"kfac": _kfac, "ekfac": _ekfac, "adamw": _adamw}
