"""Samples electrons from psi^2 and measures their energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import folx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from wavefunction_systems import System, potential

LogPsi = Callable[[Array], Array]  # electrons [electrons, 3] -> log |psi|

ACCEPTANCE = 0.5  # what the step width is adapted to


class Walkers(NamedTuple):
    """The state of the Markov chains."""

    electrons: Array  # [walkers, electrons, 3]
    width: Array  # [], of a Metropolis step
    key: Array


def start(system: System, count: int, dtype: jnp.dtype, key: Array) -> Walkers:
    """Electrons near the nuclei, dealt out in turn."""
    key, now = jax.random.split(key)
    sites = [i for i, z in enumerate(system.charges) for _ in range(int(z))]
    centers = jnp.asarray([system.positions[i] for i in sites], dtype)
    spread = jax.random.normal(now, (count, system.electrons, 3), dtype)
    return Walkers(centers + spread, jnp.asarray(0.5, dtype), key)


def metropolis(
    log_psi: LogPsi, walkers: Walkers, steps: int, adaptation: ArrayLike = 1.0
) -> tuple[Walkers, Array]:
    """Moves all walkers by Metropolis steps, which leave psi^2 as it is.

    Args:
        log_psi: of one walker.
        walkers: where they are.
        steps: how often each is asked to move all of its electrons.
        adaptation: how much the width goes towards an acceptance of one half: 1, or 0
            where it must not depend on what was sampled.

    Returns:
        The walkers, and which part of the moves they accepted.
    """
    batched = jax.vmap(log_psi)
    key, now = jax.random.split(walkers.key)

    def move(
        carry: tuple[Array, Array, Array], key: Array
    ) -> tuple[tuple[Array, Array, Array], None]:
        electrons, logs, accepted = carry
        propose, decide = jax.random.split(key)
        noise = jax.random.normal(propose, electrons.shape, electrons.dtype)
        moved = electrons + walkers.width * noise
        moved_logs = batched(moved)
        odds = jnp.log(jax.random.uniform(decide, logs.shape, logs.dtype))
        yes = odds < 2 * (moved_logs - logs)
        electrons = jnp.where(yes[:, None, None], moved, electrons)
        logs = jnp.where(yes, moved_logs, logs)
        return (electrons, logs, accepted + yes.mean(dtype=logs.dtype)), None

    logs = batched(walkers.electrons)
    first = walkers.electrons, logs, jnp.zeros((), logs.dtype)
    (electrons, _, accepted), _ = jax.lax.scan(
        move, first, jax.random.split(now, steps)
    )
    acceptance = accepted / steps
    width = walkers.width * jnp.exp(0.2 * adaptation * (acceptance - ACCEPTANCE))
    return Walkers(electrons, width, key), acceptance


def local_energy(system: System, log_psi: LogPsi, electrons: Array) -> Array:
    """`(H psi) / psi` of one walker, electrons `[electrons, 3]`.

    The kinetic part is `-1/2 sum_i (d^2 f / dx_i^2 + (df / dx_i)^2)` with f = log |psi|
    and the sum over all coordinates, by one forward pass that carries values, slopes
    and the Laplacian (arXiv:2307.08214).
    """
    f = folx.forward_laplacian(log_psi)(electrons)
    slopes = f.jacobian.dense_array
    return potential(system, electrons) - 0.5 * (f.laplacian + (slopes**2).sum())


def clipped(energies: Array, window: float = 5.0) -> Array:
    """Outliers brought to the edge of a window around the median.

    Its half width is so many mean distances from the median. Local energies have heavy
    tails, as they are infinite at nodes of psi; clipped ones serve the gradient only.
    """
    median = jnp.median(energies)
    half = window * jnp.abs(energies - median).mean()
    return jnp.clip(energies, median - half, median + half)


def standard_error(series: np.ndarray) -> float:
    """Of the mean of independent stationary chains, `[walkers, times]`.

    The values of a chain are correlated, but its mean is one number, independent of the
    other chains' means: what these scatter holds the correlation, whatever its form.
    """
    means = series.mean(1)
    return float(means.std(ddof=1) / len(means) ** 0.5)


def correlation_time(series: np.ndarray) -> float:
    """How many times of a chain count as one that is independent of the rest."""
    chains, times = series.shape
    independent = series.std() / (chains * times) ** 0.5
    return float((standard_error(series) / independent) ** 2)
