"""What preconditioning a gradient as a product saves with few cases (appendix C).

    python benchmarks/few_cases.py            four batch sizes, a few minutes
    python benchmarks/few_cases.py --quick    a smoke test

The MNIST autoencoder without its penalty, with fixed rates and full statistics. Steps
with `Kronecker(gradient_products=True)`, without it, and of the gradient alone take
turns; times are medians of steps without a refresh of the inverses.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
import optax
from cost import Runner, take_turns
from models import MODELS, Model, autoencoder_model  # finds the experiments
from optimizers import INVERSE_EVERY, RATES, Program, gradient

import kfac_jax

BATCH_SIZES = (16, 64, 128, 256)


def loss_fn(params: Any, images: jax.Array) -> jax.Array:
    """The autoencoder's cross entropy."""
    logits = autoencoder_model.encode_decode(params, images)
    values = kfac_jax.losses.sigmoid_binary_cross_entropy(logits, images)
    return values.sum(axis=-1).mean()


def kfac(model: Model, *, products: bool) -> Program:
    """K-FAC with fixed rates."""
    block = kfac_jax.blocks.Kronecker(gradient_products=products)
    curvature = kfac_jax.make_curvature(
        model.loss_fn, model.params, *model.args, blocks=block
    )
    tx = kfac_jax.kfac(
        curvature, norm_constraint=None, inverse_every=INVERSE_EVERY, **RATES
    )

    def step(carry: Any, key: Any, args: Any) -> Any:
        params, state = carry
        _, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return Program(step, (model.params, tx.init(model.params)))


VARIANTS = {
    "gradient": gradient,
    "matrices": lambda model: kfac(model, products=False),
    "products": lambda model: kfac(model, products=True),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    print("Ordinary step, as a multiple of the gradient's:")
    print(f"{'batch':>6}{'gradient, ms':>14}{'matrices':>10}{'products':>10}")
    whole = MODELS["autoencoder, batch 512"]()
    for batch in BATCH_SIZES[:1] if args.quick else BATCH_SIZES:
        runners = {
            name: Runner(
                build,
                Model(
                    loss_fn,
                    jax.tree.map(lambda x: x.copy(), whole.params),
                    (whole.args[0][:batch],),
                ),
            )
            for name, build in VARIANTS.items()
        }
        take_turns(runners, 0, INVERSE_EVERY)  # past the refreshes of the first steps
        taken = take_turns(runners, 0 if args.quick else 15, 2 * INVERSE_EVERY)
        unit, matrices, products = (
            np.median([s for s, count in steps if count % INVERSE_EVERY])
            for steps in taken.values()
        )
        ratios = f"{matrices / unit:>10.2f}{products / unit:>10.2f}"
        print(f"{batch:>6}{unit * 1e3:>14.2f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
