"""A training run that may be killed at any moment.

    killed_training.py FOLDER STEPS EVERY

It needs the experiments on its path. It goes on from the checkpoint in the folder, if
there is one, and writes one after each step, by the experiments' `Checkpoints`.
Inverses are refreshed after EVERY steps.

It says on standard output what it is about to do and what it has done, a line each:
`resumed k`, then for each step `training k`, `trained k`, `saving k` and `saved k`, and
at the end `finished` with a digest of parameters and state. What is said is true: a
step has been computed by then, a checkpoint is on disk.
"""

import hashlib
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import Checkpoints
from training import Run

import kfac_jax

WIDTHS = (24, 200, 200, 10)
CASES = 64


def loss_fn(params, x, labels):
    """A classifier's mean cross entropy."""
    h = x
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["weight"] + layer["bias"])
    z = h @ params[-1]["weight"] + params[-1]["bias"]
    losses = kfac_jax.losses
    return losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()


def make_params():
    """The same in each process."""
    rng = np.random.default_rng(0)
    return [
        {
            "weight": jnp.asarray(rng.normal(0, i**-0.5, (i, o)), jnp.float32),
            "bias": jnp.zeros(o, jnp.float32),
        }
        for i, o in itertools.pairwise(WIDTHS)
    ]


def batch(iteration):
    """A function of the iteration: there is no place in the data to be lost."""
    rng = np.random.default_rng(iteration)
    x = rng.standard_normal((CASES, WIDTHS[0]), np.float32)
    return x, np.argmax(x[:, : WIDTHS[-1]], axis=1)


def make_step(params, every):
    """All that keeps something between steps: rules for α, μ, λ and γ, refreshes."""
    plan = kfac_jax.make_curvature(loss_fn, params, *batch(0))
    tx = kfac_jax.kfac(
        plan,
        kfac_jax.QuadraticModel(),
        None,
        kfac_jax.LevenbergMarquardt(1.0, every=2),
        inverse_every=every,
        factored_damping=kfac_jax.SeparateDamping(every=2 * every),
    )

    def step(params, state, args, iteration):
        key = jax.random.fold_in(jax.random.key(0), iteration)
        value, grads, statistics = plan.value_grad_and_statistics(
            params, *args, rng=key
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return jax.tree.map(jnp.add, params, updates), state

    return tx.init, jax.jit(step, donate_argnums=(0, 1))


def digest(tree):
    """Of every bit of it."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def say(*words):
    print(*words, flush=True)


def main(folder, steps, every):
    """Trains from where the folder's checkpoint is to that many steps."""
    params = make_params()
    init, step = make_step(params, every)
    run = Run(params=params, state=init(params))
    with Checkpoints(folder, {"widths": list(WIDTHS)}) as checkpoints:
        run = checkpoints.restore(run)
        say("resumed", run.iteration)
        while run.iteration < steps:
            number = run.iteration + 1
            say("training", number)
            iteration = jnp.int32(run.iteration)
            arrays = step(run.params, run.state, batch(run.iteration), iteration)
            run.params, run.state = jax.block_until_ready(arrays)
            run.iteration = number
            say("trained", number)
            say("saving", number)
            checkpoints.save(run)
            say("saved", number)
    say("finished", digest((run.params, run.state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
