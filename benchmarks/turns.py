"""Programs that take turns in one process, so that a busy moment meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp

PERIOD = 20  # steps, that of the refresh
WARM_UP = 4  # steps before anything is timed


class Training:
    """A run that makes one step at a time, always of the same batch."""

    def __init__(
        self, init: Callable[..., Any], step: Callable[..., Any], params: Any, args: Any
    ) -> None:
        """Compiles, and makes the first steps.

        Args:
            init: makes the state from the parameters.
            step: `(params, state, key, *args) -> params, state, loss`.
            params: where to start; they are copied.
            args: the batch.
        """
        self._params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        self._state, self._args = init(self._params), args
        self._step = jax.jit(step, donate_argnums=(0, 1))
        start = time.perf_counter()
        jax.block_until_ready(self())
        self.first = time.perf_counter() - start  # seconds of the first step
        for _ in range(WARM_UP - 1):
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


def means(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Mean seconds of each over a period.

    Every step of the period is timed twice, a period apart; the shorter time counts.
    """
    turns = [[seconds(call) for call in calls] for _ in range(2 * PERIOD)]
    return [
        fmean(map(min, times[:PERIOD], times[PERIOD:]))
        for times in zip(*turns, strict=True)
    ]
