"""Trains a character transformer on Jane Austen's novels with K-FAC, EKFAC and AdamW.

The transformer is plain JAX. Each optimizer gets the same batches and the same number
of seconds (on CPUs the process's own, of all cores), in turns, and its rate falls to
zero over that time. With the defaults it takes about seven minutes on two CPU cores,
after a download of 1.6 MB:

    python experiments/language_model.py
    python experiments/language_model.py --seconds 1200 --optimizers kfac adamw
    python experiments/language_model.py --tune

It writes curves.png, curves.json and checkpoints to the output folder. Ctrl-C saves
what there is; `--resume` goes on where a run stopped. Errors are measured on the last
twentieth of the text; `--tune` compares constants on the twentieth before it.
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

import austen
import experiment
import jax
import numpy as np
from batches import Windows, windows
from jax import Array
from methods import AdamW, KFac
from report import Measures
from training import Problem
from transformer import Params, Shape, init_params, loss_fn
from tuning import Trials

WINDOWS_MEASURED = 256  # of training and of held-out text, evenly spaced
WINDOWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Options(experiment.Options):
    """Trains a character transformer on Jane Austen with K-FAC, EKFAC and AdamW.

    Constants are those of lowest validation loss in the trials of docs/tuning.md.
    """

    optimizers: tuple[Literal["kfac", "ekfac", "adamw"], ...] = (
        "kfac",
        "ekfac",
        "adamw",
    )
    batch_size: int = 16
    seconds: float = 150.0
    output: Path = Path("language_model_results")
    kfac: KFac = KFac(damping=3e-3, constraint=1e-3, warm_up=0.4)
    ekfac: KFac = KFac(damping=3e-3, constraint=1e-3, warm_up=0.3, eigen=True)
    adamw: AdamW = AdamW(rate=5e-3, decay=0.1, warm_up=0.8)


OF_KFAC = {"damping": (1e-3, 3e-3, 1e-2), "constraint": (1e-3, 3e-3)}
OF_ADAMW = {"rate": (3e-3, 5e-3, 7e-3), "warm_up": (0.2, 0.4)}
TRIALS = {
    "kfac": Trials(iterations=393, grid=OF_KFAC),
    "ekfac": Trials(iterations=311, grid=OF_KFAC),
    "adamw": Trials(iterations=528, grid=OF_ADAMW),
}
MEASURES = Measures(
    train="cross-entropy, nats per character",
    test="held-out text",
    explanation=(
        "Cross-entropy in nats per character, on text of the training part and on\n"
        "held-out text, at the end of the budget."
    ),
    baseline="AdamW",
)


def load(options: Options) -> Problem:
    """The text, and the transformer."""
    corpus = austen.load(options.cache)
    held_out = corpus.validation if options.tune else corpus.test
    shape = Shape(vocabulary=len(corpus.alphabet))
    loss = partial(loss_fn, heads=shape.heads)
    return Problem(
        init_params=partial(init_params, shape),
        loss_fn=loss,
        batches=Windows(corpus.train, shape.context, options.batch_size, options.seed),
        evaluate=_evaluator(loss, corpus.train, held_out, shape.context),
    )


def _evaluator(
    loss: Callable[..., Array], train: np.ndarray, held_out: np.ndarray, context: int
) -> Callable[[Params], tuple[float, float]]:
    """Params -> (training, held-out) loss, over fixed windows kept on the device."""
    some, others = _in_portions(train, context), _in_portions(held_out, context)

    @jax.jit
    def measure(params: Params, portions: list[Array]) -> Array:
        return jax.lax.map(lambda portion: loss(params, *portion), portions).mean()

    def evaluate(params: Params) -> tuple[float, float]:
        return float(measure(params, some)), float(measure(params, others))

    return evaluate


def _in_portions(tokens: np.ndarray, context: int) -> list[Array]:
    """Evenly spaced inputs and targets, [portions, WINDOWS_AT_ONCE, context]."""
    starts = np.linspace(0, len(tokens) - context - 1, WINDOWS_MEASURED).astype(int)
    pair = windows(tokens, starts, context)
    return jax.device_put([x.reshape(-1, WINDOWS_AT_ONCE, context) for x in pair])


EXPERIMENT = experiment.Experiment(
    options=Options,
    load=load,
    measures=MEASURES,
    evaluate_every=100,
    trials=TRIALS,
)

if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT))
