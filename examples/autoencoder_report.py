"""What the autoencoder example shows: plots, curves as JSON, and a plain statement."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    runs = {name: run for name, run in runs.items() if run.iteration}
    if not runs:
        return "No iterations were run."
    iterations = min(run.iteration for run in runs.values())
    seconds = min(run.seconds for run in runs.values())
    lines = [
        "Training error: squared reconstruction error summed over the 784 pixels, mean",
        "over cases (test error in brackets).",
        *_table(runs, "iteration", iterations, f"after {iterations} iterations each"),
        *_table(runs, "seconds", seconds, f"after {seconds:.3g} seconds each"),
        *_catching_up(runs),
        "Compile time, not counted above: "
        + ", ".join(f"{name} {run.compile_seconds:.1f} s" for name, run in runs.items())
        + ".",
    ]
    return "\n".join(lines)


def _table(runs: dict[str, Run], unit: str, at: float, title: str) -> list[str]:
    reference = next(iter(runs))
    errors = {name: _error_at(run.curve, unit, at) for name, run in runs.items()}
    tests = {
        name: _error_at(run.curve, unit, at, "test_error") for name, run in runs.items()
    }
    lines = [f"{title}:"]
    for name, error in errors.items():
        line = f"  {name:<9} {error:8.3f}  (test {tests[name]:.3f})"
        if name != reference:
            line += f"   {error / errors[reference]:.2f} times {reference}'s"
        lines.append(line)
    return lines


def _error_at(
    curve: Sequence[Point], unit: str, at: float, quantity: str = "train_error"
) -> float:
    """A curve's error at a given iteration or second, log-linear between its points."""
    x = [getattr(point, unit) for point in curve]
    y = [np.log(getattr(point, quantity)) for point in curve]
    return float(np.exp(np.interp(at, x, y)))


def _catching_up(runs: dict[str, Run]) -> list[str]:
    """When the first method reaches the error at which each other one ends."""
    (name, first), *others = runs.items()
    lines = []
    for other, run in others:
        error = run.curve[-1].train_error
        reached = next((p for p in first.curve if p.train_error <= error), None)
        if reached is None:
            lines.append(f"{name} does not reach {other}'s final error {error:.3f}.")
            continue
        lines.append(
            f"{name} reaches {other}'s final error {error:.3f} within "
            f"{reached.iteration} iterations ({run.iteration / reached.iteration:.1f} "
            f"times fewer) and {reached.seconds:.0f} seconds "
            f"({run.seconds / reached.seconds:.1f} times sooner)."
        )
    return lines
