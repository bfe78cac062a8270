"""What the autoencoder example shows: plots, curves as JSON, and a plain statement."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import jax
import matplotlib.pyplot as plt
import numpy as np
from autoencoder_model import reconstruct
from training import Point, Run

IMAGES_SHOWN = 12


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
    path.write_text(json.dumps(_without_nan(contents), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    """NaN as null: plain JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def plot_curves(path: Path, runs: dict[str, Run]) -> None:
    """Training error (solid) and test error (dashed) against iterations and seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, unit in zip(axes, ("iteration", "seconds"), strict=True):
        for color, (name, run) in enumerate(runs.items()):
            x = [getattr(point, unit) for point in run.curve]
            train = [point.train_error for point in run.curve]
            test = [point.test_error for point in run.curve]
            axis.plot(x, train, color=f"C{color}", label=name)
            axis.plot(x, test, color=f"C{color}", linestyle="--", linewidth=1)
        axis.set_yscale("log")
        axis.grid(which="both", alpha=0.3)
    axes[0].set_xlabel("iterations")
    axes[1].set_xlabel("seconds in the compiled step")
    axes[0].set_ylabel("squared reconstruction error (test: dashed)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_reconstructions(path: Path, runs: dict[str, Run], images: np.ndarray) -> None:
    """Held-out digits above each optimizer's reconstructions of them."""
    shown = images[:IMAGES_SHOWN]
    rows = {"original": shown} | {
        name: np.asarray(reconstruct(run.params, shown)) for name, run in runs.items()
    }
    figure, axes = plt.subplots(len(rows), 1, figsize=(IMAGES_SHOWN, 1.2 * len(rows)))
    for axis, (name, pixels) in zip(axes, rows.items(), strict=True):
        strip = pixels.reshape(-1, 28, 28).transpose(1, 0, 2).reshape(28, -1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def statement(runs: dict[str, Run]) -> str:
    """The comparison in words and numbers, from the curves alone."""
    iterations = min(run.iteration for run in runs.values())
    seconds = min(run.seconds for run in runs.values())
    compile_times = [
        f"{name} {run.compile_seconds:.1f} s" for name, run in runs.items()
    ]
    lines = [
        "Lowest training error: squared reconstruction error, summed over the 784",
        "pixels, mean over cases. In brackets the test error at the same iteration.",
        f"Within {iterations} iterations each:",
        *_table(runs, "iteration", iterations),
        f"Within {seconds:.3g} seconds each:",
        *_table(runs, "seconds", seconds),
        *_catching_up(runs),
        f"Compile time, not counted above: {', '.join(compile_times)}.",
    ]
    return "\n".join(lines)


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


def _catching_up(runs: dict[str, Run]) -> list[str]:
    """When the first method reaches the lowest error of each other one."""
    (name, first), *others = runs.items()
    lines = []
    for other, run in others:
        best = _best(run, "seconds", run.seconds)
        reached = [p for p in first.curve if p.train_error <= best.train_error]
        if not reached:
            lines.append(f"{name} does not reach {other}'s {best.train_error:.3f}.")
            continue
        fewer = best.iteration / max(reached[0].iteration, 1)
        sooner = best.seconds / max(reached[0].seconds, 1e-9)
        lines.append(
            f"{name} reaches {other}'s {best.train_error:.3f} after "
            f"{reached[0].iteration} iterations ({other}: {best.iteration}, "
            f"{fewer:.1f} times as many) and {reached[0].seconds:.0f} seconds "
            f"({other}: {best.seconds:.0f}, {sooner:.1f} times as long)."
        )
    return lines
