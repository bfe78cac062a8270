"""What every example does: options, training in turns, checkpoints, plots and numbers.

An example describes itself by an `Example` and calls `main`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import report
from batches import Source
from checkpoints import Checkpoints
from data_files import DataError
from training import (
    Evaluate,
    Interrupt,
    Limits,
    Method,
    PyTree,
    Run,
    Trainer,
    train_in_turns,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be learned: the model, its loss and the data."""

    init_params: Callable[[int], PyTree]  # seed -> params
    loss_fn: Callable[..., Any]  # params, *batch -> a scalar
    batches: Source
    evaluate: Evaluate
    # output folder, runs -> nothing; draws what the example shows besides the curves
    plot: Callable[[Path, dict[str, Run]], None] = lambda folder, runs: None


# The constants, the problem, the parameters (for their shapes) and the seed of what is
# sampled -> the method.
Build = Callable[[Any, Problem, PyTree, int], Method]


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example: its problem, its optimizers, and how it reports."""

    name: str  # of its output folder, less "_results"
    summary: str  # one line for --help
    methods: Mapping[str, Build]  # the optimizers, by the names of --optimizers
    settings: Any  # the constants' defaults: a frozen dataclass of `option` fields
    measures: report.Measures
    batch_size: int
    seconds: float
    evaluate_every: int
    add_options: Callable[[argparse.ArgumentParser], None]
    identity: tuple[str, ...] = ()  # its own options that a resumed run must share
    # the options -> the problem; with args.tune, one that judges by validation cases
    load: Callable[[argparse.Namespace], Problem]
    # instead of training, with --tune; returns whether Ctrl-C cut it short
    tune: Callable[[Example, argparse.Namespace, Problem], bool] | None = None
    tune_iterations: str = ""  # the default of --tune-iterations


def option(default: Any, explanation: str) -> Any:
    """A field of settings, with the line that --help shows for it."""
    return field(default=default, metadata={"help": explanation})


def main(example: Example, arguments: list[str] | None) -> int:
    """Runs an example; returns the exit status."""
    args = _parse(example, arguments)
    try:
        problem = example.load(args)
        if example.tune is not None and args.tune:
            interrupted = example.tune(example, args, problem)
        else:
            runs, interrupted = _train_all(example, args, problem)
            _report(example, args, runs, problem)
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


def settings_of(example: Example, args: argparse.Namespace) -> Any:
    """The optimizers' constants as the options say."""
    values = {s.name: getattr(args, s.name) for s in fields(example.settings)}
    return type(example.settings)(**values)


def config_of(example: Example, args: argparse.Namespace) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    names = (*example.identity, "batch_size", "seed")
    shared = {name: getattr(args, name) for name in names}
    return shared | asdict(settings_of(example, args))


def _train_all(
    example: Example, args: argparse.Namespace, problem: Problem
) -> tuple[dict[str, Run], bool]:
    """Every optimizer, in turns; also says whether Ctrl-C cut them short."""
    limits = Limits(
        seconds=args.seconds,
        iterations=args.iterations,
        checkpoint_every=args.checkpoint_every,
        evaluate_every=example.evaluate_every,
    )
    settings, config = settings_of(example, args), config_of(example, args)
    trainers = {}
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        for name in args.optimizers:
            folder = args.output / "checkpoints" / name
            store = stack.enter_context(Checkpoints(folder, config))
            params = problem.init_params(args.seed)
            method = example.methods[name](settings, problem, params, args.seed)
            if method.report:
                print(f"\n{method.report}\n")
            run = Run(params=params, state=method.init(params))
            trainers[name] = Trainer(
                method,
                _start(store, run, args.resume),
                problem.batches,
                problem.evaluate,
                limits=limits,
                store=store,
            )
        train_in_turns(list(trainers.values()), interrupt)
    runs = {trainer.method.name: trainer.run for trainer in trainers.values()}
    return runs, interrupt.requested


def _start(store: Checkpoints, run: Run, resume: bool) -> Run:
    if not resume:
        store.clear()
        return run
    run = store.restore(run)
    print(f"Resuming after {run.iteration} iterations, {run.seconds:.1f} s.")
    return run


def _report(
    example: Example, args: argparse.Namespace, runs: dict[str, Run], problem: Problem
) -> None:
    report.save_curves(args.output / "curves.json", runs, config_of(example, args))
    report.plot_curves(args.output / "curves.png", runs, example.measures)
    problem.plot(args.output, runs)
    print()
    print(report.statement(runs, example.measures))
    print(f"Plots, curves and checkpoints: {args.output}")


def _parse(example: Example, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=example.summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    example.add_options(parser)
    _add_run_options(example, parser)
    if example.tune is not None:
        _add_tune_options(example, parser)
    _add_optimizer_options(example, parser)
    return parser.parse_args(arguments)


def add_data_options(parser: argparse.ArgumentParser, on_disk: str) -> None:
    """Where the data is, for the examples' own `add_options`."""
    add = parser.add_argument_group("data").add_argument
    add("--data-path", type=Path, help=f"the data on disk: {on_disk}")
    add("--cache", type=Path, help="folder for the download, else ~/.cache/kfac_jax")


def _add_run_options(example: Example, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    methods, output = tuple(example.methods), Path(f"{example.name}_results")
    add("--optimizers", nargs="+", choices=methods, default=methods, help="in order")
    add("--batch-size", type=int, default=example.batch_size, help="per step, for all")
    add(
        "--seconds",
        type=positive,
        default=example.seconds,
        help="in steps, per optimizer: of the process's own time on all cores, so that "
        "a busy machine takes none of it; of the wall clock on accelerators",
    )
    add(
        "--iterations",
        type=int,
        help="stop each after so many, even if --seconds are not over; schedules then "
        "follow the iterations",
    )
    add("--seed", type=int, default=0, help="of everything random")
    add("--output", type=Path, default=output, help="folder")
    add("--resume", action="store_true", help="continue what is in --output")
    add("--checkpoint-every", type=float, default=60.0, help="seconds between saves")


def positive(text: str) -> float:
    """An option's number above zero."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _add_tune_options(example: Example, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tuning").add_argument
    add(
        "--tune",
        action="store_true",
        help="compare constants on validation cases instead of training",
    )
    add(
        "--tune-iterations",
        nargs="+",
        metavar="N",
        default=example.tune_iterations.split(),
        help="of each trial: a number for all optimizers, or name=number for each",
    )


def _add_optimizer_options(example: Example, parser: argparse.ArgumentParser) -> None:
    """One option for each field of the settings."""
    add = parser.add_argument_group("optimizers").add_argument
    for setting in fields(example.settings):
        name = "--" + setting.name.replace("_", "-")
        default = getattr(example.settings, setting.name)
        add(name, type=type(default), default=default, help=setting.metadata["help"])
