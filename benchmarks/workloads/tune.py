"""Tunes first-order optimizers on the tasks, and keeps what was found.

    python benchmarks/workloads/tune.py                      all, into baselines.json
    python benchmarks/workloads/tune.py --tasks GRU --optimizers AdamW
    python benchmarks/workloads/tune.py --part 3 8           the third of eight parts
    python benchmarks/workloads/tune.py --join PART ...      makes one file of several

Each optimizer has 24 trials on each task: twelve rates, each constant and falling to
zero by a cosine over the budget. All trials and seeds of an optimizer run as one
program, made for a GPU. The best has the lowest median loss over the seeds at the end,
on cases of the training set.
"""

from __future__ import annotations

import argparse
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

from workloads import WORKLOADS, Task, training

RECORD = Path(__file__).with_name("baselines.json")
RATES, SEEDS = 12, 3


class Baseline(NamedTuple):
    """An optimizer, by its rate; and between which rates it is tuned."""

    make: Callable[[Any], optax.GradientTransformation]
    lowest: float
    highest: float

    def trials(self) -> list[tuple[float, bool]]:
        """Rates, and whether they fall."""
        rates = np.geomspace(self.lowest, self.highest, RATES)
        return [(float(rate), falls) for rate in rates for falls in (False, True)]


BASELINES = {
    "AdamW": Baseline(lambda rate: optax.adamw(rate, weight_decay=1e-4), 1e-4, 1e-1),
    "Nesterov": Baseline(
        lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 1e-5, 3.0
    ),
    "Muon": Baseline(lambda rate: optax.contrib.muon(rate), 3e-4, 3e-1),
}


def tune(task: Task, baseline: Baseline) -> dict[str, Any]:
    """All trials of one optimizer on one task.

    Args:
        task: what is trained.
        baseline: the optimizer.

    Returns:
        The best trial and its seeds' curves, and every trial's loss at the end.
    """

    def trained(rate: Array, falls: Array, seed: Array) -> training.Result:
        cosine = optax.cosine_decay_schedule(1.0, task.steps)

        def schedule(count: Array) -> Array:
            return rate * jnp.where(falls, cosine(count), 1.0)

        tx = baseline.make(schedule)
        return training.run(task, training.of_optax(task, tx), seed)

    trials = baseline.trials()
    over_seeds = jax.vmap(trained, (None, None, 0))
    over_trials = jax.jit(jax.vmap(over_seeds, (0, 0, None)))
    found = over_trials(
        jnp.asarray([rate for rate, _ in trials], jnp.float32),
        jnp.asarray([falls for _, falls in trials]),
        jnp.arange(SEEDS),
    )
    last = np.asarray(found.curve[..., -1])
    score = np.median(np.where(np.isnan(last), np.inf, last), axis=1)
    best = int(score.argmin())
    return {
        "rate": trials[best][0],
        "falls": trials[best][1],
        "curves": _rounded(found.curve[best]),
        "held out": _rounded(found.held_out[best]),
        "trials": [
            [rate, falls, _number(x)]
            for (rate, falls), x in zip(trials, score, strict=True)
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
