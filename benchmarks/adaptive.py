"""What a step with the default rules costs, in gradients.

    python benchmarks/adaptive.py    prints the table in docs/performance.md

The gradient and all variants take turns in one process, one step each. Of twenty steps,
the period of the refresh, each is timed twice and the shorter time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import jax
import jax.numpy as jnp
import models

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
PERIOD, WARM_UP = 20, 4


class Training:
    """A run that makes one step at a time."""

    def __init__(
        self,
        model: models.Model,
        plan: dict[str, Any],
        rule: dict[str, Any],
        every: int,
    ) -> None:
        """Compiles, and makes the first steps."""
        curvature = models.plan(model, **plan)
        tx = kfac_jax.kfac(curvature, **rule)
        step = kfac_jax.make_step(curvature, tx, statistics_every=every)
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._params = jax.tree.map(lambda x: jnp.array(x, copy=True), model.params)
        self._state, self._args = tx.init(self._params), model.args
        for _ in range(WARM_UP):
            self()

    def __call__(self) -> Any:
        """The next step; returns the parameters."""
        key = jax.random.key(0)
        self._params, self._state, _ = self._step(
            self._params, self._state, key, *self._args
        )
        return self._params


def seconds(call: Callable[[], Any]) -> float:
    """How long it takes until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def costs(name: str) -> list[float]:
    """Those of the variants, over the gradient's."""
    model = models.MODELS[name]()
    compiled = jax.jit(jax.value_and_grad(model.loss_fn))
    calls = [lambda: compiled(model.params, *model.args)]
    calls += [Training(model, *options) for options in VARIANTS.values()]
    seconds(calls[0])
    turns = [[seconds(call) for call in calls] for _ in range(2 * PERIOD)]
    gradient, *steps = zip(*turns, strict=True)
    return [
        fmean(map(min, times[:PERIOD], times[PERIOD:])) / median(gradient)
        for times in steps
    ]


def main() -> None:
    """Prints the table."""
    columns = [costs(name) for name in NAMES]
    print(f"| | {' | '.join(NAMES)} |")
    print("|---" * (1 + len(NAMES)) + "|")
    for label, row in zip(VARIANTS, zip(*columns, strict=True), strict=True):
        print(f"| {label} | {' | '.join(f'{x:.2f}' for x in row)} |")


if __name__ == "__main__":
    main()
