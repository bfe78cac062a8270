"""Compares optimizers' constants on a grid, by validation cases (`--tune`).

Every optimizer gets the same number of trials, each for a stated number of iterations,
so that other load on the machine changes nothing. Results are kept after each trial;
with `--resume`, those that are there are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from experiment import Example, Problem, config_of, settings_of
from training import Interrupt, Limits, NoStore, Run, Trainer, train_in_turns

# optimizer -> setting -> the values to try
Grids = Mapping[str, Mapping[str, Sequence[float]]]
Trial = dict[str, Any]  # a row of the table, as kept in the file


def tune(
    grids: Grids, example: Example, args: argparse.Namespace, problem: Problem
) -> bool:
    """Runs every trial, and prints and keeps the table.

    Args:
        grids: the values to try, for each optimizer.
        example: whose optimizers to tune.
        args: the options.
        problem: with validation cases as its test.

    Returns:
        Whether Ctrl-C cut it short.

    Raises:
        ValueError: the numbers of iterations are not as the option wants them, or the
            kept trials are of other settings.
    """
    iterations = _iterations(args.tune_iterations, args.optimizers)
    path = args.output / "tuning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = config_of(example, args)
    trials = _kept(path, config) if args.resume else []
    todo = [
        (name, values)
        for name in args.optimizers
        for values in combinations(grids[name])
        if not _find(trials, name, values, iterations[name])
    ]
    with Interrupt() as interrupt:
        for count, (name, values) in enumerate(todo, 1):
            print(f"Trial {count} of {len(todo)}: {name}, {_words(values)}")
            settings = dataclasses.replace(settings_of(example, args), **values)
            run = _run_trial(
                example, problem, name, settings, args.seed, iterations[name], interrupt
            )
            if interrupt.requested:
                break
            trials.append(_row(name, values, iterations[name], run))
            path.write_text(json.dumps({"config": config, "trials": trials}, indent=1))
    print(table(trials, grids))
    print(f"Kept in {path}")
    return interrupt.requested


def combinations(grid: Mapping[str, Sequence[float]]) -> Iterator[dict[str, float]]:
    """Every combination of the settings' values.

    >>> list(combinations({"rate": (1, 2), "damping": (3,)}))
    [{'rate': 1, 'damping': 3}, {'rate': 2, 'damping': 3}]
    """
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _iterations(texts: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """For each optimizer, from `N` or `name=N ...`."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            found = dict.fromkeys(names, int(texts[0]))
        else:
            pairs = [text.split("=") for text in texts]
            found = {name: int(number) for name, number in pairs}
        if min(found[name] for name in names) < 1:
            raise ValueError("below 1")
    except (ValueError, KeyError) as error:
        raise ValueError(
            "--tune-iterations must be one number, or name=number for each of "
            f"{', '.join(names)}, all at least 1; got {' '.join(texts)}."
        ) from error
    return found


def _run_trial(
    example: Example,
    problem: Problem,
    name: str,
    settings: Any,
    seed: int,
    iterations: int,
    interrupt: Interrupt,
) -> Run:
    params = problem.init_params(seed)
    method = example.methods[name](settings, problem, params, seed)
    limits = Limits(seconds=math.inf, iterations=iterations, evaluate_every=None)
    trainer = Trainer(
        method,
        Run(params=params, state=method.init(params)),
        problem.batches,
        problem.evaluate,
        limits=limits,
        store=NoStore(),
    )
    train_in_turns([trainer], interrupt)
    return trainer.run


def _row(name: str, values: dict[str, float], iterations: int, run: Run) -> Trial:
    """What is kept of a trial; the errors of one that diverged are infinite."""
    point = run.curve[-1]
    errors = {"training": point.train_error, "validation": point.test_error}
    broken = run.iteration < iterations or not all(map(math.isfinite, errors.values()))
    return {
        "optimizer": name,
        "values": values,
        "iterations": iterations,
        **(dict.fromkeys(errors, math.inf) if broken else errors),
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
    }


def _kept(path: Path, config: dict[str, Any]) -> list[Trial]:
    """The trials in the file; Python's JSON reads its own Infinity back."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["config"] != config:
        raise ValueError(
            f"The trials in {path} were run with other settings: {kept['config']}. Use "
            "the same ones, or start without --resume."
        )
    print(f"Resuming after {len(kept['trials'])} trials.")
    return kept["trials"]


def _find(
    trials: list[Trial], name: str, values: dict[str, float], iterations: int
) -> bool:
    wanted = (name, values, iterations)
    return wanted in [(t["optimizer"], t["values"], t["iterations"]) for t in trials]


def _words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{setting} {value:g}" for setting, value in values.items())


def table(trials: list[Trial], grids: Grids) -> str:
    """The results, one line for each trial, and which is best for each optimizer."""
    lines = [f"\n{'validation':>10} {'training':>9} {'its':>5} {'ms/it':>6}"]
    for name in dict.fromkeys(trial["optimizer"] for trial in trials):
        mine = [trial for trial in trials if trial["optimizer"] == name]
        best = min(mine, key=lambda trial: trial["validation"])
        for trial in mine:
            pace = 1000 * trial["seconds"] / trial["iterations"]
            mark = "  best" + _edge(trial, grids[name]) if trial is best else ""
            lines.append(
                f"{trial['validation']:10.4f} {trial['training']:9.4f} "
                f"{trial['iterations']:5} {pace:6.0f}  {_words(trial['values'])}{mark}"
            )
    return "\n".join(lines)


def _edge(trial: Trial, grid: Mapping[str, Sequence[float]]) -> str:
    """Says which of the best values are the last of their kind."""
    ends = [
        name
        for name, value in trial["values"].items()
        if len(grid[name]) > 2 and value in (min(grid[name]), max(grid[name]))
    ]
    return f", at the edge of the grid in {' and '.join(ends)}" if ends else ""
