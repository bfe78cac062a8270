"""Small training tasks on real data, for tests, benchmarks and tuning alike.

    from workloads import WORKLOADS
    task = WORKLOADS["MLP, batch 128"]()

A task is pure: a loss function that registers its losses, initial parameters by seed,
and batches by key. `training.run` trains one with any optimizer, given as a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from workloads import actor_critic, images, others, text
from workloads.task import Task as Task

WORKLOADS: dict[str, Callable[[], Task]] = {
    "MLP, batch 32": partial(images.mlp, 32, 600),
    "MLP, batch 128": partial(images.mlp, 128, 300),
    "MLP, batch 1024": partial(images.mlp, 1024, 150),
    "convnet": images.convnet,
    "ResNet, group norm": images.resnet,
    "convnet, batch norm": images.batch_norm,
    "autoencoder, batch 500": partial(images.autoencoder, 500, 150),
    "autoencoder, batch 2000": partial(images.autoencoder, 2000, 75),
    "VAE": images.vae,
    "GRU": images.gru,
    "transformer": partial(text.transformer, 64, 0.0),
    "transformer, masked": partial(text.transformer, 96, 0.05),
    "tied embedding": text.tied,
    "tabular regression": others.tabular,
    "PINN": others.pinn,
    "actor-critic": actor_critic.digits,
}
"""By name. Those of text fetch their data once, from a Debian package."""

OF_TEXT = ("transformer", "transformer, masked", "tied embedding")

SHORT = (
    "MLP, batch 32",
    "MLP, batch 128",
    "convnet",
    "PINN",
    "tabular regression",
)
"""Of data that need no download, and quick: what CI runs."""
