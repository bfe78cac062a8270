"""What the paper's experiments show: figures as PNG, and numbers from the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas
from paper_training import BASELINE, LABELS
from report import Runs, draw, first_below, points, save_figure
from training import Point

AVERAGED = ("diagonal", "tridiagonal")  # whose averages are shown
RATIOS = ("fewer_iterations", "less_time")  # to the baseline's lowest error
ERROR = "squared reconstruction error, training"


def numbers(runs: Runs) -> dict[str, Any]:
    """The paper's comparisons for one seed, from the curves alone.

    Args:
        runs: of one seed, with the same seconds each.

    Returns:
        For each method its iterations and lowest errors; when it reaches the baseline's
        lowest error; and how many iterations the block-tridiagonal structure needs for
        what the block-diagonal one reaches.
    """
    methods: dict[str, Any] = {}
    for name, run in runs.items():
        last = run.curve[-1]
        methods[name] = {
            "iterations": run.iteration,
            "seconds": run.seconds,
            "compile_seconds": run.compile_seconds,
            "lowest_error": points(run).best.min(),
            "last_error": last.train_error,
            "last_averaged_error": last.averaged_error,
            "last_test_error": last.test_error,
        }
        if BASELINE in runs and name != BASELINE:
            goal = points(runs[BASELINE]).best.min()
            pair = [first_below(x, "best", goal) for x in (run, runs[BASELINE])]
            methods[name]["reaches_baseline"] = _ratios(*pair)
    result = {"methods": methods}
    if {"diagonal", "tridiagonal"} <= {*runs}:
        result["tridiagonal_to_diagonal"] = structures(runs)
    return result


def _ratios(point: Point | None, other: Point | None) -> dict[str, float] | None:
    if point is None or other is None:
        return None
    return {
        "iterations": point.iteration,
        "seconds": point.seconds,
        "fewer_iterations": other.iteration / max(point.iteration, 1),
        "less_time": other.seconds / max(point.seconds, 1e-9),
    }


def structures(runs: Runs) -> dict[str, float] | None:
    """Iterations of the block-tridiagonal structure over those of the block-diagonal.

    To the lowest error that both reach within the iterations that both have had.
    """
    pair = [runs["diagonal"], runs["tridiagonal"]]
    both = min(run.iteration for run in pair)
    tables = [points(run) for run in pair]
    goal = max(table[table.iteration <= both].best.min() for table in tables)
    first, second = (first_below(run, "best", goal) for run in pair)
    if first is None or second is None or first.iteration == 0:
        return None
    return {
        "error": goal,
        "diagonal_iterations": first.iteration,
        "tridiagonal_iterations": second.iteration,
        "ratio": second.iteration / first.iteration,
    }


def plot_errors(path: Path, runs: Runs) -> None:
    """Training error against iterations and seconds (the paper's figures 9 and 11)."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    shown = {LABELS[name]: run for name, run in runs.items()}
    for axis, unit in zip(axes, ("iteration", "seconds"), strict=True):
        draw(axis, shown, unit, "best")
        axis.set_xlabel("iterations" if unit == "iteration" else "seconds in the step")
    axes[0].set_ylabel(ERROR)
    axes[0].legend()
    save_figure(figure, path)


def plot_averages(path: Path, runs: Runs) -> None:
    """The error of the iterates and, dashed, of their average."""
    shown = {LABELS[name]: run for name, run in runs.items() if name in AVERAGED}
    figure, axis = plt.subplots(figsize=(6, 4.5))
    draw(axis, shown, "iteration", "train_error")
    draw(axis, shown, "iteration", "averaged_error", ls="--", lw=1, label="_")
    axis.set_xlabel("iterations (average of the iterates: dashed)")
    axis.set_ylabel(ERROR)
    axis.legend()
    save_figure(figure, path)


def plot_batch_sizes(path: Path, rates: Mapping[str, Mapping[int, float]]) -> None:
    """Progress per iteration against the batch size (the paper's figure 10)."""
    table = pandas.DataFrame(rates).rename(columns=LABELS)
    axis = table.plot(marker="o", logx=True, figsize=(6, 4.5))
    axis.set_xticks(table.index, [str(size) for size in table.index])
    axis.minorticks_off()
    axis.set_xlabel("batch size")
    axis.set_ylabel("fall of log(error) per iteration")
    axis.grid(which="both", alpha=0.3)
    save_figure(axis.figure, path)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each seed and method, and the structures' ratio of iterations."""
    rows = [
        {"seed": result["seed"], "method": name}
        | {key: row[key] for key in ("lowest_error", "iterations", "seconds")}
        | {
            key: (row.get("reaches_baseline") or {}).get(key, math.nan)
            for key in RATIOS
        }
        for result in results
        for name, row in result["methods"].items()
    ]
    text = pandas.DataFrame(rows).to_string(
        index=False, float_format=lambda x: f"{x:.4g}", na_rep="-"
    )
    pairs = [
        f"Seed {result['seed']}: block-tridiagonal in {pair['ratio']:.2f} of the "
        f"block-diagonal's iterations to an error of {pair['error']:.3f}."
        for result in results
        if (pair := result.get("tridiagonal_to_diagonal"))
    ]
    return "\n".join([text, *pairs])
