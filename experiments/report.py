"""What an example shows: plots, curves as JSON, and a plain statement."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import jax
import matplotlib.pyplot as plt
import numpy as np
from training import Point, Run


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What the two errors in a curve are, and how they are told.

    Without a baseline, rates do not fall: the lowest training errors so far are told,
    and when the first method reaches the others'. With one, they fall to zero at the
    end of the budget: the last errors are told, and when each other method reaches the
    baseline's last test error.
    """

    train: str  # label of the training error's axis
    test: str  # and of the test error's, or what its dashed line is on the same axis
    explanation: str  # the statement's first lines
    together: bool = True  # both on the same axis
    baseline: str | None = None  # a method's name, as it is shown


def save_curves(path: Path, runs: dict[str, Run], config: dict[str, Any]) -> None:
    """Writes the settings and every point of every curve as JSON."""
    results = {
        name: {
            "compile_seconds": run.compile_seconds,
            "iterations": run.iteration,
            "seconds": run.seconds,
            "curve": [asdict(point) for point in run.curve],
        }
        for name, run in runs.items()
    }
    device = jax.devices()[0].device_kind
    contents = {"config": config, "device": device, "results": results}
    path.write_text(json.dumps(without_nan(contents), indent=1) + "\n")


def without_nan(value: Any) -> Any:
    """NaN as null: plain JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def plot_curves(path: Path, runs: dict[str, Run], measures: Measures) -> None:
    """Both errors against iterations and seconds; on one axis the test is dashed."""
    if measures.together:
        rows = [(f"{measures.train} (test: dashed)", ("train_error", "test_error"))]
    else:
        rows = [(measures.train, ("train_error",)), (measures.test, ("test_error",))]
    size = (11, 0.5 + 4 * len(rows))
    figure, axes = plt.subplots(
        len(rows), 2, figsize=size, sharex="col", sharey="row", squeeze=False
    )
    for (label, errors), pair in zip(rows, axes, strict=True):
        for axis, unit in zip(pair, ("iteration", "seconds"), strict=True):
            _plot_panel(axis, runs, unit, errors)
        pair[0].set_ylabel(label)
    axes[-1, 0].set_xlabel("iterations")
    axes[-1, 1].set_xlabel("seconds in the compiled step (on CPUs, of all cores)")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_panel(
    axis: Any, runs: dict[str, Run], unit: str, errors: tuple[str, ...]
) -> None:
    for color, (name, run) in enumerate(runs.items()):
        x = [getattr(point, unit) for point in run.curve]
        for error, style in zip(errors, ({}, {"ls": "--", "lw": 1}), strict=False):
            y = [getattr(point, error) for point in run.curve]
            label = None if style else name
            axis.plot(x, y, color=f"C{color}", label=label, **style)
    axis.set_yscale("log")
    axis.grid(which="both", alpha=0.3)


def statement(runs: dict[str, Run], measures: Measures) -> str:
    """The comparison in words and numbers, from the curves alone."""
    compile_times = [
        f"{name} {run.compile_seconds:.1f} s" for name, run in runs.items()
    ]
    tell = _lowest if measures.baseline is None else _last
    lines = [
        measures.explanation,
        *tell(runs, measures),
        f"Compile time, not counted above: {', '.join(compile_times)}.",
    ]
    return "\n".join(lines)


def _lowest(runs: dict[str, Run], _: Measures) -> list[str]:
    """The lowest training errors within what all have had."""
    iterations = min(run.iteration for run in runs.values())
    seconds = min(run.seconds for run in runs.values())
    first, *others = runs
    lines = [
        f"Within {iterations} iterations each:",
        *_table(runs, "iteration", iterations),
        f"Within {seconds:.3g} seconds each (on CPUs, of all cores):",
        *_table(runs, "seconds", seconds),
    ]
    for other in others:
        best = _best(runs[other], "seconds", runs[other].seconds)
        lines.append(_catching_up(first, runs[first], other, best, "train_error"))
    return lines


def _last(runs: dict[str, Run], measures: Measures) -> list[str]:
    """The last errors, where all rates have fallen to zero."""
    lines = [f"  {'':<9}{'training':>9} {'test':>9}"]
    for name, run in runs.items():
        point = run.curve[-1]
        lines.append(
            f"  {name:<9}{point.train_error:9.4f} {point.test_error:9.4f}   after "
            f"{point.iteration} iterations, {point.seconds:.0f} s"
        )
    if measures.baseline in runs:
        target = runs[measures.baseline].curve[-1]
        for name in runs:
            if name != measures.baseline:
                lines.append(
                    _catching_up(
                        name, runs[name], measures.baseline, target, "test_error"
                    )
                )
    return lines


def _table(runs: dict[str, Run], unit: str, limit: float) -> list[str]:
    """One line for each method, with the ratio to the first."""
    points = {name: _best(run, unit, limit) for name, run in runs.items()}
    (reference, first), *others = points.items()
    lines = [f"  {reference:<9}{_errors(first)}"]
    for name, point in others:
        ratio = point.train_error / first.train_error
        lines.append(f"  {name:<9}{_errors(point)}   {ratio:.2f} times {reference}'s")
    return lines


def _best(run: Run, unit: str, limit: float) -> Point:
    """The measured point of lowest training error up to an iteration or second.

    The last step of a run ends a little after the time is over: 1 % is allowed for it.
    """
    if unit == "seconds":
        limit *= 1.01
    reached = [point for point in run.curve if getattr(point, unit) <= limit]
    return min(reached, key=lambda point: point.train_error)


def _errors(point: Point) -> str:
    return f"{point.train_error:8.3f}  ({point.test_error:.3f})"


def _catching_up(name: str, run: Run, other: str, target: Point, error: str) -> str:
    """When a method reaches another's error."""
    goal = getattr(target, error)
    reached = [point for point in run.curve if getattr(point, error) <= goal]
    if not reached:
        return f"{name} does not reach {other}'s {goal:.3f}."
    fewer = target.iteration / max(reached[0].iteration, 1)
    sooner = target.seconds / max(reached[0].seconds, 1e-9)
    return (
        f"{name} reaches {other}'s {goal:.3f} after {reached[0].iteration} iterations "
        f"({other}: {target.iteration}, {fewer:.1f} times as many) and "
        f"{reached[0].seconds:.0f} seconds ({other}: {target.seconds:.0f}, "
        f"{sooner:.1f} times as long)."
    )
