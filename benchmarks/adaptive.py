"""What a step with the default rules costs, in gradients.

    python benchmarks/adaptive.py    prints the table in docs/performance.md

The gradient and all variants take turns in one process, one step each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import models
import turns

import kfac_jax

NAMES = "autoencoder, batch 512", "transformer, 8 x 128 tokens", "convnet, batch 128"
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "`kfac(curvature)`": ({}, {}, 1),
    "`statistics_every=5`, `decay=0.8`": ({}, {"decay": 0.8}, 5),
    "the same, `statistics_fraction=1/8`": (
        {"statistics_fraction": 1 / 8},
        {"decay": 0.8},
        5,
    ),
}
"""Options of the plan and of `kfac`, and how often there are statistics."""


def training(
    model: models.Model, plan: dict[str, Any], rule: dict[str, Any], every: int
) -> turns.Training:
    """A run with one variant."""
    curvature = models.plan(model, **plan)
    tx = kfac_jax.kfac(curvature, **rule)
    step = kfac_jax.make_step(curvature, tx, statistics_every=every)
    return turns.Training(tx.init, step, model.params, model.args)


def costs(name: str) -> list[float]:
    """Those of the variants, over the gradient's."""
    model = models.MODELS[name]()
    compiled = jax.jit(jax.value_and_grad(model.loss_fn))
    calls: list[Callable[[], Any]] = [lambda: compiled(model.params, *model.args)]
    calls += [training(model, *options) for options in VARIANTS.values()]
    turns.seconds(calls[0])
    gradient, *steps = turns.means(calls)
    return [step / gradient for step in steps]


def main() -> None:
    """Prints the table."""
    columns = [costs(name) for name in NAMES]
    print(f"| | {' | '.join(NAMES)} |")
    print("|---" * (1 + len(NAMES)) + "|")
    for label, row in zip(VARIANTS, zip(*columns, strict=True), strict=True):
        print(f"| {label} | {' | '.join(f'{x:.2f}' for x in row)} |")


if __name__ == "__main__":
    main()
