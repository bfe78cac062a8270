"""What an experiment shows: plots, curves as JSON, and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas
from training import Point, Run

Runs = Mapping[str, Run]  # by how the method is called
Row = dict[tuple[str, str], float]  # of a table with two lines of heads

# Of what runs have used: a field, its plural, and how much more counts as no more. The
# last step of a run ends a little after the time is over.
UNITS = ("iteration", "iterations", 1.0), ("seconds", "seconds", 1.01)


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


def save_curves(path: Path, runs: Runs, config: Mapping[str, Any]) -> None:
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
    write_json(path, {"config": config, "results": results})


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes JSON, with the device that it was computed on."""
    device = jax.devices()[0].device_kind
    text = json.dumps(without_nan({"device": device, **contents}), indent=1)
    path.write_text(text + "\n")


def without_nan(value: Any) -> Any:
    """NaN as null: plain JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def plot_curves(path: Path, runs: Runs, measures: Measures) -> None:
    """Both errors against iterations and seconds; on one axis the test is dashed."""
    if measures.together:
        rows = {f"{measures.train} (test: dashed)": ("train_error", "test_error")}
    else:
        rows = {measures.train: ("train_error",), measures.test: ("test_error",)}
    size = (11, 0.5 + 4 * len(rows))
    figure, axes = plt.subplots(
        len(rows), 2, figsize=size, sharex="col", sharey="row", squeeze=False
    )
    for (label, errors), pair in zip(rows.items(), axes, strict=True):
        for axis, unit in zip(pair, ("iteration", "seconds"), strict=True):
            draw(axis, runs, unit, errors[0])
            if len(errors) > 1:
                draw(axis, runs, unit, errors[1], ls="--", lw=1, label="_")
        pair[0].set_ylabel(label)
    axes[-1, 0].set_xlabel("iterations")
    axes[-1, 1].set_xlabel("seconds in the compiled step (on CPUs, of all cores)")
    axes[0, 0].legend()
    save_figure(figure, path)


def draw(axis: Any, runs: Runs, unit: str, error: str, **style: Any) -> None:
    """A line for each run: a column of its points against another, by log scale."""
    for color, (name, run) in enumerate(runs.items()):
        table = points(run)
        own = {"label": name, "color": f"C{color}"} | style
        axis.plot(table[unit], table[error], **own)
    axis.set_yscale("log")
    axis.grid(which="both", alpha=0.3)


def save_figure(figure: Any, path: Path) -> None:
    """Writes it, and forgets it."""
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def points(run: Run) -> pandas.DataFrame:
    """The curve as a table; "best" is the lower of both training errors."""
    table = pandas.DataFrame([asdict(point) for point in run.curve])
    table["best"] = table[["train_error", "averaged_error"]].min(axis=1)
    return table


def first_below(run: Run, error: str, goal: float) -> Point | None:
    """The first measured point whose error is at most `goal`."""
    (places,) = np.nonzero(points(run)[error].to_numpy() <= goal)
    return run.curve[places[0]] if len(places) else None


def statement(runs: Runs, measures: Measures) -> str:
    """The comparison as a table, from the curves alone."""
    tell = _lowest if measures.baseline is None else _last
    rows = {name: tell(name, runs, measures) for name in runs}
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.insert(
        0, ("compilation", "seconds"), [run.compile_seconds for run in runs.values()]
    )
    table.columns = pandas.MultiIndex.from_tuples(table.columns)
    text = table.to_string(float_format=lambda x: f"{x:.4g}", na_rep="-")
    return f"{measures.explanation}\n{text}"


def _lowest(name: str, runs: Runs, _: Measures) -> Row:
    """The lowest training errors in what all have had, and when the first had them."""
    row: Row = {}
    for unit, units, slack in UNITS:
        limit = min(getattr(run, unit) for run in runs.values())
        within = [p for p in runs[name].curve if getattr(p, unit) <= slack * limit]
        point = min(within, key=lambda point: point.train_error)
        head = f"within {limit:.4g} {units}"
        row |= {(head, "train"): point.train_error, (head, "test"): point.test_error}
    first, *_ = runs
    goal = points(runs[name]).train_error.min()
    there = first_below(runs[first], "train_error", goal)
    return row | _arrival(f"{first} is there", there)


def _last(name: str, runs: Runs, measures: Measures) -> Row:
    """The last errors, where all rates have fallen to zero."""
    run = runs[name]
    head, point = "at the end", run.curve[-1]
    row = {(head, "train"): point.train_error, (head, "test"): point.test_error}
    row |= _arrival(head, point)
    if measures.baseline in runs:
        goal = runs[measures.baseline].curve[-1].test_error
        at = first_below(run, "test_error", goal)
        row |= _arrival(f"at {measures.baseline}'s last test error", at)
    return row


def _arrival(head: str, point: Point | None) -> Row:
    """When a point was; NaN if it was not."""
    when = (point.iteration, point.seconds) if point else (math.nan, math.nan)
    return {(head, "iterations"): when[0], (head, "seconds"): when[1]}
