"""What the wavefunction example shows: numbers as JSON, a table, and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from report import without_nan  # which has chosen a way to plot without a display

WINDOWS = 50  # points of a curve


@dataclass(frozen=True, kw_only=True)
class Result:
    """What training and evaluating one system gave; energies in hartree."""

    exact: float
    energy: float  # with the parameters at the end
    standard_error: float
    deviation: float  # of local energies; of an exact psi it is zero
    correlation_time: float  # of them, in calls of the sampler
    acceptance: float
    target: (
        float | None
    )  # the largest difference from the exact energy, if there is one
    met: bool | None
    parameters: int
    training_seconds: float
    compile_seconds: float
    evaluation_seconds: float
    energies: list[float]  # of each training step's walkers


def save(path: Path, results: dict[str, Result], config: dict[str, Any]) -> None:
    """Writes the settings and the results."""
    contents = {
        "config": config,
        "device": jax.devices()[0].device_kind,
        "results": {name: asdict(result) for name, result in results.items()},
    }
    path.write_text(json.dumps(without_nan(contents), indent=1) + "\n")


def table(results: dict[str, Result]) -> str:
    """One line for each system."""
    lines = [f"{'':<4}{'energy':>10} {'error':>8} {'exact':>10} {'difference':>11}"]
    for name, result in results.items():
        difference = result.energy - result.exact
        line = (
            f"{name:<4}{result.energy:10.5f} {result.standard_error:8.5f} "
            f"{result.exact:10.5f} {difference:11.5f}"
        )
        if result.target is not None:
            verdict = "met" if result.met else "missed"
            line += f"   target {result.target:g} {verdict}"
        lines.append(line)
    return "\n".join(lines)


def windows(energies: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last steps, means and standard errors of consecutive equal parts.

    The errors are from the scatter in each part, as if steps were independent (nearly:
    the walkers move several times between them) and nothing improved.
    """
    size = max(len(energies) // WINDOWS, 2)
    count = len(energies) // size
    parts = np.asarray(energies[: count * size]).reshape(count, size)
    steps = size * np.arange(1, count + 1)
    return steps, parts.mean(1), parts.std(1, ddof=1) / size**0.5


def plot(path: Path, results: dict[str, Result]) -> None:
    """Each system's energy against steps, and its distance from the exact one."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(1 + 3.5 * len(results), 6), squeeze=False
    )
    for (upper, lower), (name, result) in zip(axes.T, results.items(), strict=True):
        steps, means, errors = windows(result.energies)
        upper.errorbar(steps, means, errors, fmt=".-", lw=1, label="training")
        upper.axhline(result.exact, color="k", lw=1, label="exact")
        upper.errorbar(
            [steps[-1] * 1.05],
            [result.energy],
            [result.standard_error],
            fmt="s",
            color="C1",
            label="evaluation",
        )
        late = means[len(means) // 4 :]
        margin = max(np.ptp(late), abs(late.mean() - result.exact), 1e-4)
        upper.set_ylim(result.exact - margin, result.exact + 2 * margin)
        upper.set_title(name)
        lower.errorbar(steps, np.abs(means - result.exact), errors, fmt=".-", lw=1)
        lower.axhline(abs(result.energy - result.exact), color="C1")
        if result.target is not None:
            lower.axhline(result.target, color="k", ls="--", lw=1, label="target")
            lower.legend()
        lower.set_yscale("log")
        lower.set_xlabel("steps")
    axes[0, 0].set_ylabel("energy, hartree")
    axes[1, 0].set_ylabel("|energy - exact|, hartree")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
