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

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import austen
import experiment
import jax
import numpy as np
from batches import Windows, windows
from jax import Array
from methods import METHODS, Settings, grids
from report import Measures
from transformer import Params, Shape, init_params, loss_fn
from tuning import tune

WINDOWS_MEASURED = 256  # of training and of held-out text, evenly spaced
WINDOWS_AT_ONCE = 32

# Those of lowest validation loss in the trials of docs/tuning.md.
SETTINGS = Settings(
    kfac_damping=3e-3,
    kfac_constraint=1e-3,
    kfac_warm_up=0.4,
    ekfac_damping=3e-3,
    ekfac_constraint=1e-3,
    ekfac_warm_up=0.3,
    adamw_rate=5e-3,
    adamw_decay=0.1,
    adamw_warm_up=0.8,
)
GRIDS = grids((1e-3, 3e-3, 1e-2), (1e-3, 3e-3), (3e-3, 5e-3, 7e-3))
MEASURES = Measures(
    train="cross-entropy, nats per character",
    test="held-out text",
    explanation=(
        "Cross-entropy in nats per character, on text of the training part and on\n"
        "held-out text, at the end of the budget."
    ),
    baseline="AdamW",
)


def _load(args: argparse.Namespace) -> experiment.Problem:
    corpus = austen.load(args.data_path, args.cache)
    held_out = corpus.validation if args.tune else corpus.test
    shape = Shape(vocabulary=len(corpus.alphabet))
    loss = partial(loss_fn, heads=shape.heads)
    return experiment.Problem(
        init_params=partial(init_params, shape),
        loss_fn=loss,
        batches=Windows(corpus.train, shape.context, args.batch_size, args.seed),
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


def _add_options(parser: argparse.ArgumentParser) -> None:
    experiment.add_data_options(
        parser, "the .deb, or a folder of its Rdata.rdx and .rdb"
    )


EXAMPLE = experiment.Example(
    name="language_model",
    summary=str(__doc__).split("\n\n")[0],
    methods=METHODS,
    settings=SETTINGS,
    measures=MEASURES,
    batch_size=16,
    seconds=150.0,
    evaluate_every=100,
    add_options=_add_options,
    load=_load,
    tune=partial(tune, GRIDS),
    tune_iterations="kfac=393 ekfac=311 adamw=528",
)
main = partial(experiment.main, EXAMPLE)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
