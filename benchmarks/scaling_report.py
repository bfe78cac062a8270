"""Exponents of what scaling.py measures, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

FITTED = 3  # the largest sizes, at which the leading term dominates

Results = dict[str, Any]

PARTS = ("gradient", "statistics", "preconditioning", "refresh")

THEORY: dict[str, dict[str, float]] = {
    "width": dict(zip(PARTS, (2, 2, 3, 3), strict=True)),
    "batch": dict(zip(PARTS, (1, 1, 0, 0), strict=True)),
    "depth, written out": dict.fromkeys((*PARTS, "planning", "compilation"), 1),
    "depth, scanned": {**dict.fromkeys(PARTS, 1), "planning": 0, "compilation": 0},
    "devices": dict.fromkeys(
        (
            "gradient and statistics",
            "refresh of 32 factors",
            "refresh of 2 factors",
            "preconditioning",
            "inverses kept",
        ),
        -1,
    ),
}
"""Exponents, by what grows and by quantity."""

OTHER_UNITS = {"compilation": "instructions", "inverses kept": "bytes"}


def exponent(sizes: list[int], values: list[float | None]) -> float | None:
    """The slope over the largest sizes; None where something was not measured."""
    pairs = list(zip(sizes, values, strict=True))[-FITTED:]
    if any(value is None or value <= 0 for _, value in pairs):
        return None
    return float(np.polyfit(*np.log(np.asarray(pairs, float).T), 1)[0])


def values_of(sweep: Results, quantity: str, unit: str) -> list[float | None]:
    """Of all sizes; None where there are none, or of a quantity lost in noise."""
    return [point.get(quantity, {}).get(unit) for point in sweep["points"]]


def exponents(sweeps: Sequence[Results]) -> list[Results]:
    """A row for each quantity and what it grows with: fitted exponents, and theory's.

    Args:
        sweeps: sizes and points, by what grows.

    Returns:
        Rows. "counted" is the exponent from what `of` names: FLOPs, or bytes or
        instructions where that is what there is.
    """
    rows: list[Results] = []
    for sweep in sweeps:
        for quantity, theory in THEORY[sweep["name"]].items():
            of = OTHER_UNITS.get(quantity, "flops")
            seconds, counted = (
                exponent(sweep["sizes"], values_of(sweep, quantity, unit))
                for unit in ("seconds", of)
            )
            rows.append(
                {
                    "cost": quantity,
                    "grows with": sweep["name"],
                    "seconds": seconds,
                    "counted": counted,
                    "of": of,
                    "theory": theory,
                }
            )
    return rows


def table(results: Results) -> str:
    """Exponents and targets, in Markdown."""
    lines = [
        "| cost | grows with | from seconds | from FLOPs | theory |",
        "|---|---|---|---|---|",
    ]
    for row in results["exponents"]:
        of = "" if row["of"] == "flops" else f" ({row['of']})"
        cells = _cell(row["seconds"]), _cell(row["counted"]) + of, f"{row['theory']:g}"
        lines.append("| " + " | ".join((row["cost"], row["grows with"], *cells)) + " |")
    lines += [
        "",
        *_notes(results),
        "",
        "| target | value | limit | |",
        "|---|---|---|---|",
    ]
    for row in results["targets"]:
        value, limit = row["value"], row["limit"]
        verdict = "met" if value <= limit else "MISSED"
        lines.append(f"| {row['name']} | {value:.2f} | {limit:g} | {verdict} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def _notes(results: Results) -> list[str]:
    """What the table's numbers are."""
    lines = []
    for sweep in results["sweeps"]:
        fitted = ", ".join(map(str, sweep["sizes"][-FITTED:]))
        lines.append(f"* {sweep['name']}: {sweep['fixed']}; fitted at {fitted}.")
    return [
        *lines,
        "* The larger a factor, the more products with zeros its refresh leaves out: "
        "the exponent comes up to 3 only beyond these widths.",
        "* Devices are simulated, so that seconds would mean nothing; all run one "
        "program, as long as the most loaded one's part. Two large factors they invert "
        "together, but all of them the small blocks on the diagonals.",
        "* –: not measured, or within the noise. XLA counts a loop's body once, so "
        "there are no FLOPs of what is scanned.",
    ]


def draw(results: Results, path: Path) -> None:
    """Writes a figure of every cost over what it grows with, and the fitted lines.

    Args:
        results: from `measure`.
        path: of the figure; its suffix says of which format.
    """
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    sweeps = {sweep["name"]: sweep for sweep in results["sweeps"]}
    places = iter(axes.flat)
    for name in ("width", "batch", "depth, written out", "depth, scanned"):
        _panel(next(places), sweeps[name], PARTS, "seconds")
    axis = next(places)
    for name in ("depth, written out", "depth, scanned"):
        _panel(axis, sweeps[name], ("planning", "compilation"), "seconds", name[7:])
    axis.set(title="planning and compilation", xlabel="depth")
    counted = [x for x in THEORY["devices"] if x not in OTHER_UNITS]
    _panel(next(places), sweeps["devices"], counted, "flops")
    axes.flat[-1].set_ylabel("FLOPs of one device")
    figure.suptitle(
        "How costs grow; in brackets the fitted exponent, then the theory's"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(
    axis: Axes, sweep: Results, quantities: Sequence[str], unit: str, note: str = ""
) -> None:
    """Measured points and, over the sizes it was fitted at, the line."""
    for quantity in quantities:
        values = values_of(sweep, quantity, unit)
        slope = exponent(sweep["sizes"], values)
        label = ", ".join(filter(None, (quantity, note)))
        theory = THEORY[sweep["name"]][quantity]
        points = np.asarray([np.nan if v is None else v for v in values], float)
        points[points <= 0] = np.nan
        label += f" ({_cell(slope)}, {theory:g})"
        (drawn,) = axis.plot(sweep["sizes"], points, "o", label=label)
        if slope is not None:
            sizes = np.asarray(sweep["sizes"][-FITTED:], float)
            middle = np.log(points[-FITTED:]).mean() - slope * np.log(sizes).mean()
            line = np.exp(middle) * sizes**slope
            axis.plot(sizes, line, color=drawn.get_color())
    axis.set(xscale="log", yscale="log", ylabel=unit, xlabel=sweep["name"])
    axis.set_title(sweep["fixed"], fontsize="medium")
    axis.set_xticks(sweep["sizes"], [str(size) for size in sweep["sizes"]])
    axis.minorticks_off()
    axis.legend(fontsize="small")
