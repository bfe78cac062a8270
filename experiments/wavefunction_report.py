"""What the wavefunction experiment shows: numbers as JSON, a table, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas
from report import save_figure, write_json

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
    target: float | None  # the largest difference from the exact energy, if any
    met: bool | None
    parameters: int
    training_seconds: float
    compile_seconds: float
    evaluation_seconds: float
    energies: list[float]  # of each training step's walkers


def save(path: Path, results: dict[str, Result], config: Mapping[str, Any]) -> None:
    """Writes the settings and the results."""
    found = {name: asdict(result) for name, result in results.items()}
    write_json(path, {"config": config, "results": found})


def table(results: dict[str, Result]) -> str:
    """One line for each system."""
    rows = {name: asdict(result) for name, result in results.items()}
    found = pandas.DataFrame.from_dict(rows, orient="index")
    found["difference"] = found.energy - found.exact
    found["met"] = found.met.map({True: "met", False: "missed"})
    shown = ["energy", "standard_error", "exact", "difference", "target", "met"]
    return found[shown].to_string(float_format=lambda x: f"{x:.5f}", na_rep="-")


def windows(energies: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last steps, means and standard errors of consecutive equal parts.

    The errors are from the scatter in each part, as if steps were independent (nearly:
    the walkers move several times between them) and nothing improved.
    """
    size = max(len(energies) // WINDOWS, 2)
    count = len(energies) // size
    # a run that has failed has no number in its last step
    parts = np.asarray(energies[: count * size], float).reshape(count, size)
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
    save_figure(figure, path)
