"""What comparisons of optimizers share: options, training in turns, a report.

An experiment describes itself by an `Experiment` and calls `main`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report
from archives import DataError
from checkpoints import Checkpoints
from options import parse
from training import Interrupt, Limits, Problem, Trainer, start, train_in_turns
from tuning import Trials, tune


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every experiment.

    Each adds the constants of its optimizers, under the names that `optimizers` has,
    and defaults.
    """

    optimizers: tuple[str, ...]  # which, in order
    batch_size: int  # cases in a step, for all optimizers
    # in steps, for each optimizer: of the process's own time on all cores, so that a
    # busy machine takes none of it; of the wall clock on accelerators
    seconds: float
    # stop each after so many, even if --seconds are not over; schedules follow them
    iterations: int | None = None
    seed: int = 0  # of everything random
    output: Path  # folder
    resume: bool = False  # continue what is in --output
    checkpoint_every: float = 60.0  # seconds between saves
    cache: Path | None = None  # folder of downloads, else ~/.cache/kfac_jax
    tune: bool = False  # compare constants on validation cases instead of training

    @property
    def config(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued."""
        free = ("optimizers", "seconds", "iterations", "output", "resume", "tune")
        free = (*free, "checkpoint_every", "cache")
        return {k: v for k, v in asdict(self).items() if k not in free}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A problem, optimizers, and how they are compared."""

    options: type[Options]
    load: Callable[[Any], Problem]  # options -> the problem, for `tune` its validation
    measures: report.Measures
    evaluate_every: int
    trials: Mapping[str, Trials] = field(default_factory=dict)  # of --tune, by names


def main(experiment: Experiment, arguments: list[str] | None = None) -> int:
    """Runs an experiment; returns the exit status."""
    options = parse(experiment.options, arguments)
    try:
        if options.tune:
            interrupted = _tune(experiment, options)
        else:
            interrupted = _compare(experiment, options)
    except KeyboardInterrupt:
        print("Stopped at once by Ctrl-C; the last checkpoints stand.", file=sys.stderr)
        return 130
    except (DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if interrupted:
        print("Stopped by Ctrl-C. Continue with the same options and --resume.")
        return 130
    return 0


def _compare(experiment: Experiment, options: Options) -> bool:
    """Every optimizer, in turns, and a report; says whether Ctrl-C cut them short."""
    problem = experiment.load(options)
    limits = Limits(
        seconds=options.seconds,
        iterations=options.iterations,
        checkpoint_every=options.checkpoint_every,
        evaluate_every=experiment.evaluate_every,
    )
    trainers: list[Trainer] = []
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        for name in options.optimizers:
            folder = options.output / "checkpoints" / name
            store = stack.enter_context(Checkpoints(folder, options.config))
            begin = store.restore if options.resume else store.clear
            constants = getattr(options, name)
            trainers.append(
                start(constants, problem, options.seed, limits, store.save, begin)
            )
            if report_of_plan := trainers[-1].method.report:
                print(f"\n{report_of_plan}\n")
        train_in_turns(trainers, interrupt)
    runs = {trainer.method.name: trainer.run for trainer in trainers}
    report.save_curves(options.output / "curves.json", runs, options.config)
    report.plot_curves(options.output / "curves.png", runs, experiment.measures)
    problem.plot(options.output, runs)
    print(f"\n{report.statement(runs, experiment.measures)}")
    print(f"Plots, curves and checkpoints: {options.output}")
    return interrupt.requested


def _tune(experiment: Experiment, options: Options) -> bool:
    """Every trial; says whether Ctrl-C cut them short."""
    if not experiment.trials:
        raise ValueError("This experiment has no trials: run it without --tune.")
    problem = experiment.load(options)
    constants = {name: getattr(options, name) for name in options.optimizers}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "trials.csv"
    with Interrupt() as interrupt:
        tune(constants, experiment.trials, problem, options.seed, path, interrupt)
    print(f"Trials: {path}")
    return interrupt.requested
