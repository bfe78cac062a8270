"""What `bench.py` measured, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from bench_report import NAMES, amortised
from history import QUANTITIES

Row = dict[str, Any]

BARS = ("sgd", "adamw", "kfac-1/8", "kfac", "published", "shampoo", "psgd")


def draw_costs(rows: Sequence[Row], path: Path) -> None:
    """Bars of what a step costs, for each model and optimizer.

    Args:
        rows: what was measured. Where something was not, the bar is a word.
        path: of the figure.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    table = {(row["model"], row["optimizer"]): row for row in rows}
    bars = [name for name in BARS if any((model, name) in table for model in models)]
    figure, axis = plt.subplots(figsize=(14, 5.5), layout="constrained")
    width = 0.85 / max(len(bars), 1)
    for i, name in enumerate(bars):
        places = np.arange(len(models)) + (i - (len(bars) - 1) / 2) * width
        found = [table.get((m, name), {"status": "not run"}) for m in models]
        heights = [amortised(row) or 0.0 for row in found]
        axis.bar(places, heights, width, label=NAMES[name])
        for place, row, height in zip(places, found, heights, strict=True):
            text = f"{height:.2g}" if height else row["status"].split(":")[0]
            turn = 0 if height else 90
            axis.annotate(
                text,
                (place, height),
                (0, 2),
                textcoords="offset points",
                rotation=turn,
                ha="center",
                va="bottom",
                fontsize="x-small",
            )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(models)), [x.replace(", ", ",\n") for x in models])
    axis.set_ylabel("a step with T3 = 20, in gradients")
    figure.legend(loc="outside upper center", ncols=len(BARS), fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_history(history: Sequence[Row], path: Path) -> None:
    """A line for each model over commits, of rows with the last one's device.

    Args:
        history: rows, oldest first; at least one.
        path: of the figure.
    """
    device = history[-1]["device"]
    rows = [row for row in history if row["device"] == device]
    models = list(dict.fromkeys(model for row in rows for model in row["models"]))
    figure, axes = plt.subplots(
        1, len(QUANTITIES), figsize=(15, 5), layout="constrained"
    )
    titles = "T3 = 20, full statistics", "T3 = 20, τ1 = 1/8", "first call"
    for axis, quantity, title in zip(axes, QUANTITIES, titles, strict=True):
        for model in models:
            values = [row["models"].get(model, {}).get(quantity) for row in rows]
            known = [np.nan if value is None else value for value in values]
            axis.plot(range(len(rows)), known, "o-", label=model)
        labels = [row["commit"] + "*" * row["dirty"] for row in rows]
        axis.set_xticks(range(len(rows)), labels, rotation=60, fontsize="small")
        axis.set(title=title, ylabel="gradients", ylim=(0, None))
    if models:
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=4)
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)
