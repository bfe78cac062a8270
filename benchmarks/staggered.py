"""How much longer the longest step takes than others, by the refresh schedule.

    python benchmarks/staggered.py            some two minutes
    python benchmarks/staggered.py --quick    a smoke test

The MNIST autoencoder with all adaptive rules, τ1 = 1/8, batch 500, T3 = 20. Of each
place in the period of 20 steps the median time over periods is taken; the longest of
these is compared with their median.
"""

from __future__ import annotations

import argparse
import os
import time

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import numpy as np
import optax
import step_cost  # finds the examples
from autoencoder_model import L2, loss_fn

import kfac_jax

PERIOD = 20
SCHEDULES = {
    "all at once": kfac_jax.RefreshSchedule(PERIOD),
    "2 shares": kfac_jax.RefreshSchedule(PERIOD, shares=2),
    "8 shares": kfac_jax.RefreshSchedule(PERIOD, shares=8),
}


def place_times(
    schedule: kfac_jax.RefreshSchedule, batch: int, periods: int
) -> np.ndarray:
    """The median time of the steps at each place in the period, in seconds."""
    params, images = step_cost.make_params(), step_cost.make_images(batch)
    curvature = kfac_jax.make_curvature(
        loss_fn, params, images, l2=L2, statistics_fraction=1 / 8
    )
    tx = kfac_jax.kfac(
        curvature,
        kfac_jax.QuadraticModel(fraction=1 / 4),
        None,
        kfac_jax.LevenbergMarquardt(150.0),
        inverse_every=schedule,
    )

    def step(carry, iteration):
        params, state = carry
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, images, rng=jax.random.fold_in(jax.random.key(0), iteration)
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(images,)
        )
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=0)
    carry = params, tx.init(params)
    for iteration in range(PERIOD):  # in its first three steps all is refreshed
        carry = compiled(carry, iteration)
    times = np.empty((periods, PERIOD))
    for period, place in np.ndindex(*times.shape):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        carry = compiled(carry, PERIOD * (period + 1) + place)
        jax.block_until_ready(carry)
        times[period, place] = time.perf_counter() - start
    return np.median(times, axis=0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    print(f"{'':<14}{'median, ms':>12}{'longest / median':>18}")
    for name, schedule in SCHEDULES.items():
        times = place_times(schedule, *((64, 1) if args.quick else (500, 5)))
        median = np.median(times)
        print(f"{name:<14}{median * 1e3:>12.1f}{times.max() / median:>18.2f}")


if __name__ == "__main__":
    main()
