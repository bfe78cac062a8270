"""The figures of `paper_fisher`: matrices over parameters, as images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # matplotlib requires it

WHITE = 0.99  # the quantile of absolute values that is white
GREYS = 32  # in a file, to keep it small

Panel = tuple[np.ndarray, np.ndarray]  # a matrix, and its means in blocks


def plot_fisher(
    path: Path, fisher: np.ndarray, kronecker: np.ndarray, layers: int
) -> None:
    """F, F~ and their difference, on one scale (the paper's figure 2)."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4))
    panels = {
        "exact Fisher |F|": fisher,
        "Kronecker |F̃|": kronecker,
        "|F − F̃|": fisher - kronecker,
    }
    for axis, (title, matrix) in zip(axes, panels.items(), strict=True):
        _matrix(axis, matrix, title, _white(fisher), layers)
    _save(figure, path)


def plot_inverse(path: Path, kronecker: Panel, inverse: Panel) -> None:
    """The damped F~ and its inverse, with means in blocks (the paper's figure 3)."""
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 8.8))
    panels = {"F̃": kronecker, "F̃⁻¹": inverse}
    for row, (name, (matrix, mean)) in zip(axes, panels.items(), strict=True):
        _matrix(row[0], matrix, f"|{name}|, damped", _white(matrix), len(mean))
        _averages(row[1], mean, f"mean of |{name}| in each block")
    _save(figure, path)


def plot_structures(
    path: Path, inverse: np.ndarray, inverses: Mapping[str, np.ndarray], layers: int
) -> None:
    """Both structures' inverses, and what they lack of F~'s (the paper's figure 6)."""
    figure, axes = plt.subplots(len(inverses), 2, figsize=(8.5, 8.8))
    white = _white(inverse)
    for row, (name, found) in zip(axes, inverses.items(), strict=True):
        title = name.replace("_", "-")
        _matrix(row[0], found, f"{title} inverse", white, layers)
        _matrix(row[1], found - inverse, "its difference from F̃⁻¹", white, layers)
    _save(figure, path)


def _white(matrix: np.ndarray) -> float:
    return float(np.quantile(np.abs(matrix), WHITE))


def _matrix(
    axis: Any, matrix: np.ndarray, title: str, white: float, layers: int
) -> None:
    """Roots of absolute values, so that small ones show; lines between layers."""
    axis.imshow(np.sqrt(np.abs(matrix)), cmap="gray", vmin=0, vmax=np.sqrt(white))
    for place in np.linspace(0, len(matrix), layers + 1)[1:-1] - 0.5:
        axis.axhline(place, color="white", ls="--", lw=1)
        axis.axvline(place, color="white", ls="--", lw=1)
    axis.set(title=f"{title}; white: {white:.2g}", xticks=[], yticks=[])


def _averages(axis: Any, mean: np.ndarray, title: str) -> None:
    """A small matrix, with its numbers."""
    axis.imshow(mean, cmap="gray", vmin=0)
    for (i, j), value in np.ndenumerate(mean):
        color = "black" if value > mean.max() / 2 else "white"
        axis.text(j, i, f"{value:.2g}", ha="center", va="center", color=color)
    axis.set(title=title, xticks=[], yticks=[])


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]
    Image.fromarray(pixels).convert("L").quantize(GREYS).save(path, optimize=True)
    plt.close(figure)
