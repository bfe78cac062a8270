"""The training experiments of the paper's section 13."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from autoencoder_model import Params, init_params
from batches import GrowingBatches
from paper_methods import VARIANTS, Baseline, baseline, kfac
from paper_tasks import Images, Task
from training import (
    Evaluate,
    Interrupt,
    Limits,
    Method,
    NoStore,
    Run,
    Trainer,
    train_in_turns,
)

EVALUATE_EVERY = 10
CASES_MEASURED = 5_000  # of either part, at most
BASELINE = "nesterov"
METHODS = (*VARIANTS, BASELINE)

WARM_UP_BATCH = 500
WARM_UP_ITERATIONS = 60  # before batch sizes are compared
COMPARED_ITERATIONS = 20  # a period of T2 and T3


@dataclass(frozen=True)
class Experiment:
    """What all runs of an experiment share."""

    task: Task
    images: Images
    constants: Baseline
    damping: float  # K-FAC's lambda_0

    def method(
        self,
        name: str,
        params: Params,
        seed: int,
        batches: Callable[[int], Any] | None = None,
    ) -> Method:
        """One of `METHODS`."""
        if name == BASELINE:
            method = baseline(self.constants, self.task, self.images, seed)
            return method if batches is None else method._replace(batches=batches)
        variant = VARIANTS[name]
        return kfac(
            variant, self.task, self.images, params, seed, self.damping, batches
        )

    def evaluator(self) -> Evaluate:
        """Params -> (training error, test error), over cases kept on the device."""
        error = jax.jit(self.task.error)
        parts = [jax.device_put(part[:CASES_MEASURED]) for part in self.images]

        def evaluate(params: Params) -> tuple[float, float]:
            train, test = (float(error(params, part)) for part in parts)
            return train, test

        return evaluate


def compare(
    experiment: Experiment,
    names: Sequence[str],
    seed: int,
    seconds: float,
    interrupt: Interrupt,
) -> dict[str, Run]:
    """Trains with each method for the same time, in turns.

    Args:
        experiment: the task.
        names: of `METHODS`.
        seed: of everything random.
        seconds: inside the compiled step, for each.
        interrupt: the flag that Ctrl-C raises.

    Returns:
        The runs by the method's name.
    """
    limits = Limits(seconds=seconds, evaluate_every=EVALUATE_EVERY)
    trainers: list[Trainer] = []
    for name in names:
        params = init_params(seed, experiment.task.sizes)  # each run donates its own
        method = experiment.method(name, params, seed)
        run = Run(params=params, state=method.init(params))
        trainers.append(_trainer(experiment, method, run, limits))
    train_in_turns(trainers, interrupt)
    return {name: trainer.run for name, trainer in zip(names, trainers, strict=True)}


def batch_sizes(
    experiment: Experiment,
    names: Sequence[str],
    sizes: Sequence[int],
    seed: int,
    interrupt: Interrupt,
) -> dict[str, dict[int, float]]:
    """How much the training error falls per iteration, for different batch sizes.

    Each method is first trained with one size; from there on every size goes its own
    way for a few iterations.

    Args:
        experiment: the task.
        names: of `METHODS`.
        sizes: of the batches to compare.
        seed: of everything random.
        interrupt: the flag that Ctrl-C raises.

    Returns:
        For each method and size the mean fall of the error's logarithm per iteration.
    """
    cases = len(experiment.images.train)
    found: dict[str, dict[int, float]] = {}
    for name in names:
        size = min(WARM_UP_BATCH, cases)
        first = _continue(
            experiment, name, None, size, WARM_UP_ITERATIONS, seed, interrupt
        )
        found[name] = {}
        for size in sizes:
            run = _continue(
                experiment, name, first, size, COMPARED_ITERATIONS, seed, interrupt
            )
            before, after = run.curve[0].train_error, run.curve[-1].train_error
            found[name][size] = math.log(before / after) / COMPARED_ITERATIONS
    return found


def _continue(
    experiment: Experiment,
    name: str,
    start: Run | None,
    size: int,
    iterations: int,
    seed: int,
    interrupt: Interrupt,
) -> Run:
    """A run of its own from where another one is, with batches of one size."""
    params = init_params(seed, experiment.task.sizes)
    batches = GrowingBatches((experiment.images.train,), lambda _: size, seed)
    method = experiment.method(name, params, seed, batches)
    run = Run(params=params, state=method.init(params))
    if start is not None:
        params, state = jax.tree.map(np.array, (start.params, start.state))
        run = Run(params=params, state=state, iteration=start.iteration)
    limits = Limits(
        seconds=math.inf, iterations=run.iteration + iterations, evaluate_every=None
    )
    trainer = _trainer(experiment, method, run, limits)
    train_in_turns([trainer], interrupt)
    return trainer.run


def _trainer(
    experiment: Experiment, method: Method, run: Run, limits: Limits
) -> Trainer:
    assert method.batches is not None
    return Trainer(
        method,
        run,
        method.batches,
        experiment.evaluator(),
        limits=limits,
        store=NoStore(),
    )
