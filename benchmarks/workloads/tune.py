"""Tunes optimizers on the tasks, and keeps what was found.

    python benchmarks/workloads/tune.py                      all, into baselines.json
    python benchmarks/workloads/tune.py --tasks GRU --optimizers AdamW
    python benchmarks/workloads/tune.py --part 3 8           the third of eight parts
    python benchmarks/workloads/tune.py --join PART ...      makes one file of several

Each optimizer has 24 trials on each task: twelve rates (of K-FAC three, with four
constant λ), each constant and falling to zero by a cosine over the budget. All trials
and seeds of an optimizer run as one program, made for a GPU. The best has the lowest
median loss over the seeds at the end, on cases of the training set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import kfac_jax
from workloads import WORKLOADS, Task, training

RECORD = Path(__file__).with_name("baselines.json")
RATES, SEEDS = 12, 3


class Baseline(NamedTuple):
    """An optimizer, made by its rate and a further number, and its trials."""

    make: Callable[[Task, Any, Any], training.Trainer]
    rates: tuple[float, ...]
    further: tuple[float, ...] = (0.0,)

    def trials(self) -> list[tuple[float, float, bool]]:
        """Rates, further numbers, and whether rates fall."""
        return [*itertools.product(self.rates, self.further, (False, True))]


def of_optax(make: Callable[[Any], optax.GradientTransformation], *ends: float) -> Any:
    """A first-order optimizer, with rates between two ends."""

    def made(task: Task, schedule: Any, further: Any) -> training.Trainer:
        del further
        return training.of_optax(task, make(schedule))

    return Baseline(made, tuple(map(float, np.geomspace(*ends, RATES))))


def of_kfac(task: Task, schedule: Any, damping: Any) -> training.Trainer:
    """K-FAC with a schedule of its rate, and a constant λ."""
    params, batch = task.example()
    curvature = kfac_jax.make_curvature(
        task.loss_fn, params, *batch, on_unmatched="ignore"
    )
    tx = kfac_jax.kfac(curvature, schedule, 0.9, lambda count: damping)
    return training.Trainer(tx.init, kfac_jax.make_step(curvature, tx))


BASELINES = {
    "AdamW": of_optax(lambda rate: optax.adamw(rate, weight_decay=1e-4), 1e-4, 1e-1),
    "Nesterov": of_optax(
        lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 1e-5, 3.0
    ),
    "Muon": of_optax(lambda rate: optax.contrib.muon(rate), 3e-4, 3e-1),
    "K-FAC": Baseline(of_kfac, (0.05, 0.2, 0.8), (1e-3, 1e-2, 1e-1, 1.0)),
}


def tune(task: Task, baseline: Baseline) -> dict[str, Any]:
    """All trials of one optimizer on one task.

    Args:
        task: what is trained.
        baseline: the optimizer.

    Returns:
        The best trial and its seeds' curves, and every trial's loss at the end.
    """

    def trained(rate: Array, further: Array, falls: Array, seed: Array) -> Any:
        cosine = optax.cosine_decay_schedule(1.0, task.steps)

        def schedule(count: Array) -> Array:
            return rate * jnp.where(falls, cosine(count), 1.0)

        return training.run(task, baseline.make(task, schedule, further), seed)

    trials = baseline.trials()
    over_seeds = jax.vmap(trained, (None, None, None, 0))
    over_trials = jax.jit(jax.vmap(over_seeds, (0, 0, 0, None)))
    rates, further, falls = zip(*trials, strict=True)
    found = over_trials(
        jnp.asarray(rates, jnp.float32),
        jnp.asarray(further, jnp.float32),
        jnp.asarray(falls),
        jnp.arange(SEEDS),
    )
    last = np.asarray(found.curve[..., -1])
    score = np.median(np.where(np.isnan(last), np.inf, last), axis=1)
    best = int(score.argmin())
    return {
        "rate": rates[best],
        "further": further[best],
        "falls": falls[best],
        "curves": _rounded(found.curve[best]),
        "held out": _rounded(found.held_out[best]),
        "trials": [
            [*trial, _number(x)] for trial, x in zip(trials, score, strict=True)
        ],
    }


def _rounded(x: Array) -> Any:
    return [[_number(value) for value in row] for row in np.asarray(x)]


def _number(x: Any) -> float | None:
    """Four digits; None for what is not finite, which JSON has not."""
    return float(f"{float(x):.4g}") if np.isfinite(x) else None


def join(paths: list[Path]) -> dict[str, Any]:
    """One record of several."""
    joined: dict[str, Any] = {}
    for path in paths:
        record = json.loads(path.read_text("utf-8"))
        tasks = joined.get("tasks", {})
        for name, found in record["tasks"].items():
            tasks[name] = tasks.get(name, {}) | found
        joined = record | {"tasks": tasks}
    return joined


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--optimizers", nargs="+", choices=BASELINES, default=list(BASELINES))
    add("--part", nargs=2, type=int, default=(0, 1), metavar=("WHICH", "OF"))
    add("--join", nargs="+", type=Path)
    add("--output", type=Path, default=RECORD)
    arguments = parser.parse_args()
    if arguments.join:
        record = join(arguments.join)
    else:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "every": training.EVERY,
            "tasks": {},
        }
    which, of = arguments.part
    pairs = [(t, o) for t in arguments.tasks for o in arguments.optimizers]
    for task, optimizer in [] if arguments.join else pairs[which::of]:
        start = time.perf_counter()
        found = tune(WORKLOADS[task](), BASELINES[optimizer])
        record["tasks"].setdefault(task, {})[optimizer] = found
        seconds = time.perf_counter() - start
        print(f"{task}, {optimizer}: {found['rate']:.2g} ({seconds:.0f} s)", flush=True)
        arguments.output.write_text(json.dumps(record) + "\n", "utf-8")
    arguments.output.write_text(json.dumps(record) + "\n", "utf-8")


if __name__ == "__main__":
    main()
