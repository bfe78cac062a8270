"""What the paper's experiments show: figures as PNG, and numbers from the curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from paper_training import BASELINE
from training import Point, Run

Runs = Mapping[str, Run]  # by the method's name

AVERAGED = ("diagonal", "tridiagonal")  # whose averages are shown


def best(point: Point) -> float:
    """The lower training error of the parameters and of their average."""
    return min(point.train_error, _averaged(point))


def _averaged(point: Point) -> float:
    return math.inf if math.isnan(point.averaged_error) else point.averaged_error


def numbers(runs: Runs) -> dict[str, Any]:
    """The paper's comparisons for one seed, from the curves alone.

    Args:
        runs: of one seed, with the same seconds each.

    Returns:
        For each method its iterations and lowest errors; when it reaches the baseline's
        lowest error; and how many iterations the block-tridiagonal structure needs for
        what the block-diagonal one reaches.
    """
    result: dict[str, Any] = {"methods": {}}
    lowest = {name: min(map(best, run.curve)) for name, run in runs.items()}
    for name, run in runs.items():
        result["methods"][name] = {
            "iterations": run.iteration,
            "seconds": run.seconds,
            "compile_seconds": run.compile_seconds,
            "lowest_error": lowest[name],
            "last_error": run.curve[-1].train_error,
            "last_averaged_error": run.curve[-1].averaged_error,
            "last_test_error": run.curve[-1].test_error,
        }
        if BASELINE in runs and name != BASELINE:
            goal = lowest[BASELINE]
            result["methods"][name]["reaches_baseline"] = _ratios(
                first_below(run, goal), first_below(runs[BASELINE], goal)
            )
    if "diagonal" in runs and "tridiagonal" in runs:
        result["tridiagonal_to_diagonal"] = structures(runs)
    return result


def first_below(run: Run, goal: float) -> Point | None:
    """The first measured point whose error is at most `goal`."""
    return next((point for point in run.curve if best(point) <= goal), None)


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
    goal = max(
        min(best(point) for point in run.curve if point.iteration <= both)
        for run in pair
    )
    points = [first_below(run, goal) for run in pair]
    if points[0] is None or points[1] is None or points[0].iteration == 0:
        return None
    first, second = points
    return {
        "error": goal,
        "diagonal_iterations": first.iteration,
        "tridiagonal_iterations": second.iteration,
        "ratio": second.iteration / first.iteration,
    }


def plot_errors(path: Path, runs: Runs, labels: Mapping[str, str]) -> None:
    """Training error against iterations and seconds (the paper's figures 9 and 11)."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, unit in zip(axes, ("iteration", "seconds"), strict=True):
        _curves(axis, runs, labels, unit, best)
        axis.set_xlabel("iterations" if unit == "iteration" else "seconds in the step")
    axes[0].set_ylabel("squared reconstruction error, training")
    axes[0].legend()
    _save(figure, path)


def plot_averages(path: Path, runs: Runs, labels: Mapping[str, str]) -> None:
    """The error of the iterates and, dashed, of their average."""
    shown = {name: run for name, run in runs.items() if name in AVERAGED}
    figure, axis = plt.subplots(figsize=(6, 4.5))
    _curves(axis, shown, labels, "iteration", lambda point: point.train_error)
    _curves(axis, shown, {}, "iteration", _averaged, ls="--", lw=1)
    axis.set_xlabel("iterations (average of the iterates: dashed)")
    axis.set_ylabel("squared reconstruction error, training")
    axis.legend()
    _save(figure, path)


def plot_batch_sizes(
    path: Path, rates: Mapping[str, Mapping[int, float]], labels: Mapping[str, str]
) -> None:
    """Progress per iteration against the batch size (the paper's figure 10)."""
    figure, axis = plt.subplots(figsize=(6, 4.5))
    for name, found in rates.items():
        axis.plot([*found], [*found.values()], marker="o", label=labels[name])
    axis.set_xscale("log")
    sizes = sorted({size for found in rates.values() for size in found})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("batch size")
    axis.set_ylabel("fall of log(error) per iteration")
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    _save(figure, path)


def _curves(
    axis: Any,
    runs: Runs,
    labels: Mapping[str, str],
    unit: str,
    error: Callable[[Point], float],
    **style: Any,
) -> None:
    for color, (name, run) in enumerate(runs.items()):
        x = [getattr(point, unit) for point in run.curve]
        y = [error(point) for point in run.curve]
        axis.plot(x, y, color=f"C{color}", label=labels.get(name), **style)
    axis.set_yscale("log")
    axis.grid(which="both", alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each seed and method."""
    heads = f"{'seed':>4} {'method':<20}{'lowest':>8} {'its':>5} {'seconds':>8}"
    lines = [f"{heads}  against the baseline's lowest error"]
    for result in results:
        for name, row in result["methods"].items():
            lines.append(
                f"{result['seed']:>4} {name:<20}{row['lowest_error']:8.3f} "
                f"{row['iterations']:5} {row['seconds']:8.1f}{_reached(row)}"
            )
        pair = result.get("tridiagonal_to_diagonal")
        if pair is not None:
            lines.append(
                f"     block-tridiagonal: {pair['ratio']:.2f} of the block-diagonal's "
                f"iterations to an error of {pair['error']:.3f}"
            )
    return "\n".join(lines)


def _reached(row: Mapping[str, Any]) -> str:
    if "reaches_baseline" not in row:
        return ""
    reached = row["reaches_baseline"]
    if reached is None:
        return "  not reached"
    return (
        f"  {reached['fewer_iterations']:.1f} times fewer iterations, "
        f"{reached['less_time']:.2f} times less time"
    )
