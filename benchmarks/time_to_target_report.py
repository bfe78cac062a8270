"""What `time_to_target.py` tells: when targets were reached, a table, a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from time_to_target_problems import TASKS, Task
from training import Point, Run

LABELS = {"kfac": "K-FAC", "adamw": "AdamW", "nesterov": "SGD, Nesterov"}
COLOURS = {"kfac": "C3", "adamw": "C0", "nesterov": "C2"}
FIRST_ORDER = ("adamw", "nesterov")


class Success(NamedTuple):
    """When a target was reached; both infinite if it was not."""

    steps: float
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether it was."""
        return math.isfinite(self.steps)


MISSED = Success(math.inf, math.inf)


class Outcome(NamedTuple):
    """A finished run of the benchmark."""

    task: str
    optimizer: str
    seed: int
    run: Run
    success: Success


def success(curve: Sequence[Point], target: float) -> Success:
    """When a curve first came down to a target.

    Between two measurements the error is taken to fall exponentially with the steps.

    Args:
        curve: measurements, in order.
        target: of the training error, above zero.

    Returns:
        The steps and the seconds.
    """
    before = None
    for point in curve:
        if point.train_error <= target:
            if before is None:
                return Success(point.iteration, point.seconds)
            whole = math.log(before.train_error / point.train_error)
            part = math.log(before.train_error / target) / whole
            return Success(
                before.iteration + part * (point.iteration - before.iteration),
                before.seconds + part * (point.seconds - before.seconds),
            )
        before = point
    return MISSED


def table(outcomes: Sequence[Outcome]) -> str:
    """Medians over seeds, and their ratios to the best first-order optimizer's."""
    lines = []
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.task == task]
        names = dict.fromkeys(outcome.optimizer for outcome in mine)
        medians = {name: _median(mine, name) for name in names}
        # by seconds: the ratios of steps are to the same optimizer
        best = min(
            (medians[name] for name in names if name in FIRST_ORDER),
            key=lambda median: median.seconds,
            default=MISSED,
        )
        lines.append(f"\n{task}: {TASKS[task].measure}, to {TASKS[task].target:g}")
        lines.append(
            f"  {'':<14}{'reached':>8}{'seconds':>10}{'ratio':>8}{'steps':>8}"
            f"{'ratio':>8}{'ms/step':>9}{'compile, s':>12}"
        )
        lines += [_row(mine, name, medians[name], best) for name in names]
    return "\n".join(lines)


def _median(outcomes: Sequence[Outcome], name: str) -> Success:
    """Over seeds; a run that missed counts as infinitely long."""
    found = [o.success for o in outcomes if o.optimizer == name]
    steps, seconds = zip(*found, strict=True)
    return Success(_middle(steps), _middle(seconds))


def _middle(values: Sequence[float]) -> float:
    """The median; of an even number the higher of the two in the middle."""
    return sorted(values)[len(values) // 2]


def _row(outcomes: Sequence[Outcome], name: str, median: Success, best: Success) -> str:
    mine = [outcome for outcome in outcomes if outcome.optimizer == name]
    reached = sum(outcome.success.reached for outcome in mine)
    milliseconds = 1000 * np.median(
        [outcome.run.seconds / max(outcome.run.iteration, 1) for outcome in mine]
    )
    compiling = np.median([outcome.run.compile_seconds for outcome in mine])
    return (
        f"  {LABELS[name]:<14}{f'{reached}/{len(mine)}':>8}"
        f"{_number(median.seconds, '.1f'):>10}{_ratio(median.seconds, best.seconds):>8}"
        f"{_number(median.steps, '.0f'):>8}{_ratio(median.steps, best.steps):>8}"
        f"{milliseconds:9.0f}{compiling:12.1f}"
    )


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "missed"


def _ratio(value: float, best: float) -> str:
    if not (math.isfinite(value) and math.isfinite(best)):
        return "-"
    return f"{value / best:.2f}"


def plot(path: Path, outcomes: Sequence[Outcome]) -> None:
    """The curves, the bands from the lowest to the highest seed, the targets."""
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    figure, grid = plt.subplots(
        len(tasks), 2, figsize=(11, 3.6 * len(tasks)), squeeze=False
    )
    for task, axes in zip(tasks, grid, strict=True):
        mine = [outcome for outcome in outcomes if outcome.task == task]
        for axis, unit in zip(axes, ("seconds", "iteration"), strict=True):
            for name in dict.fromkeys(outcome.optimizer for outcome in mine):
                curves = [o.run.curve for o in mine if o.optimizer == name]
                _band(axis, curves, unit, name)
            _decorate(axis, TASKS[task], unit, mine)
    grid[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _band(axis: plt.Axes, curves: list[list[Point]], unit: str, name: str) -> None:
    """The median over seeds, as far as all of them go, and their range."""
    places = [[getattr(point, unit) for point in curve] for curve in curves]
    errors = [[point.train_error for point in curve] for curve in curves]
    shared = np.linspace(0, min(max(place) for place in places), 200)
    pairs = zip(places, errors, strict=True)
    values = np.array([np.interp(shared, place, error) for place, error in pairs])
    colour = COLOURS[name]
    axis.fill_between(shared, values.min(0), values.max(0), color=colour, alpha=0.25)
    axis.plot(shared, np.median(values, 0), color=colour, label=LABELS[name])
    for place, error in zip(places, errors, strict=True):  # what goes on beyond
        axis.plot(place, error, color=colour, alpha=0.3, linewidth=0.7)


def _decorate(
    axis: plt.Axes, task: Task, unit: str, outcomes: Sequence[Outcome]
) -> None:
    axis.axhline(task.target, color="black", linestyle="--", linewidth=0.8)
    start = min(outcome.run.curve[0].train_error for outcome in outcomes)
    axis.set(
        title=task.name,
        xlabel="seconds in steps" if unit == "seconds" else "steps",
        ylabel=task.measure.split(",")[0].split(" of ")[0],
        yscale="log",
        ylim=(0.8 * task.target, 1.2 * start),
    )
