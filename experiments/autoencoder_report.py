"""What the autoencoder example shows besides the curves: digits as they come out."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from autoencoder_model import reconstruct
from training import Run

IMAGES_SHOWN = 12


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
