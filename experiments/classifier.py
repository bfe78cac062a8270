"""Trains a convolutional network on Fashion-MNIST with K-FAC, EKFAC and AdamW.

The network is written with flax's nnx. Each optimizer gets the same batches and the
same number of seconds (on CPUs the process's own, of all cores), in turns, and its rate
falls to zero over that time. With the defaults it takes about six minutes on two CPU
cores, after a download of 31 MB:

    python experiments/classifier.py
    python experiments/classifier.py --seconds 600 --optimizers kfac adamw
    python experiments/classifier.py --tune

It writes curves.png, curves.json and checkpoints to the output folder. Ctrl-C saves
what there is; `--resume` goes on where a run stopped. `--tune` trains on 55,000 of the
training images, and compares constants by the errors on the other 5,000.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import experiment
import fashion
import jax
import jax.numpy as jnp
from batches import Batches
from fashion import Cases
from flax import nnx
from jax import Array
from methods import AdamW, KFac
from report import Measures
from training import Problem
from tuning import Trials

import kfac_jax

VALIDATION_CASES = 5_000  # the last of the training images, held out by --tune
TRAINING_CASES_MEASURED = 5_000
CASES_AT_ONCE = 500  # in a measurement, which would else need gigabytes

MEAN, DEVIATION = 0.286, 0.353  # of the training images' pixels


@dataclass(frozen=True, kw_only=True)
class Options(experiment.Options):
    """Trains a convolutional network on Fashion-MNIST with K-FAC, EKFAC and AdamW.

    Constants are those of lowest validation error in the trials of docs/tuning.md.
    """

    optimizers: tuple[Literal["kfac", "ekfac", "adamw"], ...] = (
        "kfac",
        "ekfac",
        "adamw",
    )
    batch_size: int = 256
    seconds: float = 130.0
    output: Path = Path("classifier_results")
    kfac: KFac = KFac(damping=0.1, constraint=1e-2, warm_up=0.2)
    ekfac: KFac = KFac(damping=0.01, constraint=1e-3, warm_up=0.3, eigen=True)
    adamw: AdamW = AdamW(rate=1.2e-2, decay=0.01, warm_up=0.4)


OF_KFAC = {"damping": (0.03, 0.1, 0.3), "constraint": (3e-3, 1e-2)}
OF_ADAMW = {"rate": (8e-3, 1.2e-2, 1.6e-2), "warm_up": (0.2, 0.4)}
TRIALS = {
    "kfac": Trials(iterations=246, grid=OF_KFAC),
    "ekfac": Trials(iterations=210, grid=OF_KFAC),
    "adamw": Trials(iterations=295, grid=OF_ADAMW),
}
MEASURES = Measures(
    train="training loss",
    test="test error rate, %",
    explanation=(
        "Training loss (cross-entropy, nats; no penalty) and test error rate (%), at\n"
        "the end of the budget."
    ),
    together=False,
    baseline="AdamW",
)


class Network(nnx.Module):
    """Three 3x3 convolutions, each with a pooling, then two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(3 * 3 * 64, 128, rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Logits, [cases, 10], of images [cases, 28, 28, 1]."""
        x = (images - MEAN) / DEVIATION
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), (2, 2))
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.output(x)


# The network without its parameters: static, so that what is below is pure.
STRUCTURE, _ = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))), nnx.Param)


def init_params(seed: int) -> nnx.State:
    """The parameters at the start."""
    return nnx.split(Network(nnx.Rngs(seed)), nnx.Param)[1]


def logits_of(params: nnx.State, images: Array) -> Array:
    """The network as a pure function."""
    return nnx.merge(STRUCTURE, params)(images)


def loss_fn(params: nnx.State, images: Array, labels: Array) -> Array:
    """Cross-entropy, averaged over cases."""
    logits = logits_of(params, images)
    return kfac_jax.losses.softmax_cross_entropy_with_integer_labels(
        logits, labels
    ).mean()


def load(options: Options) -> Problem:
    """The images, and the network."""
    train, test = fashion.load(options.cache)
    if options.tune:
        test = Cases(*[array[-VALIDATION_CASES:] for array in train])
        train = Cases(*[array[:-VALIDATION_CASES] for array in train])
    return Problem(
        init_params=init_params,
        loss_fn=loss_fn,
        batches=Batches(tuple(train), options.batch_size, options.seed),
        evaluate=_evaluator(train, test),
    )


def _evaluator(train: Cases, test: Cases) -> Callable[[nnx.State], tuple[float, float]]:
    """Params -> (training loss, test error rate in %), over fixed cases."""
    some = _in_portions(Cases(*[array[:TRAINING_CASES_MEASURED] for array in train]))
    held_out = _in_portions(test)

    @jax.jit
    def measure(params: nnx.State, portions: Cases) -> tuple[Array, Array]:
        def one(portion: Cases) -> tuple[Array, Array]:
            wrong = logits_of(params, portion.images).argmax(-1) != portion.labels
            return loss_fn(params, *portion), wrong.mean()

        return jax.tree.map(jnp.mean, jax.lax.map(one, portions))

    def evaluate(params: nnx.State) -> tuple[float, float]:
        return float(measure(params, some)[0]), 100 * float(
            measure(params, held_out)[1]
        )

    return evaluate


def _in_portions(cases: Cases) -> Cases:
    """The same on the device, [portions, CASES_AT_ONCE, ...]."""
    shaped = [x.reshape(-1, CASES_AT_ONCE, *x.shape[1:]) for x in cases]
    return Cases(*jax.device_put(shaped))


EXPERIMENT = experiment.Experiment(
    options=Options,
    load=load,
    measures=MEASURES,
    evaluate_every=100,
    trials=TRIALS,
)

if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT))
