"""Compares optimizers' constants on a grid, by validation cases (`--tune`).

Each trial is a run of a stated number of iterations, so that other load on the machine
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas
from training import Constants, Interrupt, Limits, Problem, start, train_in_turns


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What to try of an optimizer."""

    iterations: int  # of each
    grid: Mapping[str, tuple[float, ...]]  # constant -> its values


def tune(
    constants: Mapping[str, Constants],
    trials: Mapping[str, Trials],
    problem: Problem,
    seed: int,
    path: Path,
    interrupt: Interrupt,
) -> None:
    """Runs every trial, and prints and keeps the table.

    Args:
        constants: those that are not tried, by the optimizer's name.
        trials: by the same names.
        problem: with validation cases as its test.
        seed: of everything random.
        path: of the table, a row for each trial, written after each.
        interrupt: the flag that Ctrl-C raises.
    """
    rows: list[dict[str, Any]] = []
    for name, fixed in constants.items():
        iterations, grid = trials[name].iterations, trials[name].grid
        limits = Limits(seconds=math.inf, iterations=iterations, evaluate_every=None)
        for values in product(*grid.values()):
            tried = dict(zip(grid, values, strict=True))
            trainer = start(replace(fixed, **tried), problem, seed, limits)
            train_in_turns([trainer], interrupt)
            if interrupt.requested:
                return
            run, last = trainer.run, trainer.run.curve[-1]
            errors = {"validation": last.test_error, "training": last.train_error}
            pace = {"iterations": run.iteration, "seconds": run.seconds}
            rows.append({"optimizer": name} | tried | errors | pace)
            table = pandas.DataFrame(rows)
            table.to_csv(path, index=False)
        mine = table[table.optimizer == name]
        print(mine.sort_values("validation").dropna(axis=1).to_string(index=False))
