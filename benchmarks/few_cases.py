"""What preconditioning a gradient as a product saves with few cases (appendix C).

    python benchmarks/few_cases.py            four batch sizes, a few minutes
    python benchmarks/few_cases.py --quick    a smoke test

The MNIST autoencoder without its penalty, with fixed rates and full statistics. Steps
with `Kronecker(gradient_products=True)`, without it, and of the gradient alone take
turns; times are medians of steps without a refresh of the inverses.
"""

from __future__ import annotations

import argparse
import functools
import os

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import optax
import step_cost  # finds the examples
from autoencoder_model import encode_decode
from step_cost import QUICK, Built, Variant

import kfac_jax

BATCH_SIZES = (16, 64, 128, 256)


def loss_fn(params: step_cost.Params, images: jax.Array) -> jax.Array:
    """The autoencoder's cross entropy."""
    logits = encode_decode(params, images)
    values = kfac_jax.losses.sigmoid_binary_cross_entropy(logits, images)
    return values.sum(axis=-1).mean()


def gradient(params: step_cost.Params, images: jax.Array) -> Built:
    """The unit of the ratios."""
    del images

    def step(carry, images, iteration):
        del iteration
        return jax.value_and_grad(loss_fn)(carry, images), jnp.int32(0)

    return Built(step, params)


def kfac(params: step_cost.Params, images: jax.Array, *, products: bool) -> Built:
    """K-FAC with fixed rates."""
    block = kfac_jax.blocks.Kronecker(gradient_products=products)
    curvature = kfac_jax.make_curvature(loss_fn, params, images, blocks=block)
    tx = kfac_jax.kfac(curvature, 1e-3, 0.9, 1.0)
    key = jax.random.key(0)

    def step(carry, images, iteration):
        params, state = carry
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, images, rng=jax.random.fold_in(key, iteration)
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value
        )
        carry = optax.apply_updates(params, updates), state
        return carry, state.info.inverse_refreshes

    return Built(step, (params, tx.init(params)))


VARIANTS = {
    "gradient": Variant("gradient only", gradient, advances=False),
    "matrices": Variant("matrices", functools.partial(kfac, products=False)),
    "products": Variant("products", functools.partial(kfac, products=True)),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    sizes = QUICK if args.quick else step_cost.FULL
    step_cost.VARIANTS = VARIANTS
    print("Ordinary step, as a multiple of the gradient's:")
    print(f"{'batch':>6}{'gradient, ms':>14}{'matrices':>10}{'products':>10}")
    for batch in BATCH_SIZES[:1] if args.quick else BATCH_SIZES:
        times = step_cost.measure_step_times([*VARIANTS], sizes._replace(batch=batch))
        unit = times["gradient"].ordinary
        ratios = [times[name].ordinary / unit for name in ("matrices", "products")]
        print(f"{batch:>6}{unit * 1e3:>14.2f}{ratios[0]:>10.2f}{ratios[1]:>10.2f}")


if __name__ == "__main__":
    main()
