"""Trains a task: what all that compares optimizers on tasks has in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from workloads.task import Params, Task

EVERY = 10  # steps between the points of a curve


class Trainer(NamedTuple):
    """How an optimizer starts and steps."""

    init: Callable[[Params], Any]
    step: Callable[..., tuple[Params, Any, Array]]
    """`(params, state, key, *batch) -> params, state, loss`."""


class Result(NamedTuple):
    """Of one run."""

    curve: Array  # [steps / EVERY], the loss on cases of the training set
    held_out: Array  # [2], loss and error on held-out data at the end
    largest: Array  # [], the largest loss of a batch


def of_optax(task: Task, tx: optax.GradientTransformation) -> Trainer:
    """A first-order optimizer."""

    def step(params: Params, state: Any, key: Array, *batch: Array) -> Any:
        del key
        loss, grads = jax.value_and_grad(task.loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return Trainer(tx.init, step)


def run(task: Task, trainer: Trainer, seed: Array, steps: int | None = None) -> Result:
    """Trains from a seed, which may be traced; to be compiled as one program."""
    start, batches, own = jax.random.split(jax.random.key(seed), 3)
    params = task.init(start)
    shown = tuple(x[: task.evaluated] for x in task.train)

    def one(carry: Any, count: Array) -> Any:
        params, state, largest = carry
        batch = task.batch(jax.random.fold_in(batches, count), task.train)
        key = jax.random.fold_in(own, count)
        params, state, loss = trainer.step(params, state, key, *batch)
        # NaN counts as infinite
        largest = jnp.maximum(largest, jnp.where(jnp.isnan(loss), jnp.inf, loss))
        return (params, state, largest), None

    def several(carry: Any, first: Array) -> Any:
        carry, _ = jax.lax.scan(one, carry, first + jnp.arange(EVERY))
        return carry, task.evaluate(carry[0], *shown)[0]

    starts = EVERY * jnp.arange((steps or task.steps) // EVERY)
    carry = params, trainer.init(params), jnp.zeros(())
    (params, _, largest), curve = jax.lax.scan(several, carry, starts)
    held_out = jnp.stack(task.evaluate(params, *task.held_out))
    return Result(curve, held_out, largest)


def seeds(task: Task, trainer: Trainer, count: int = 3, **options: Any) -> Result:
    """Several seeds, one after the other in one program; `[count, ...]`."""
    return jax.jit(partial(jax.lax.map, partial(run, task, trainer, **options)))(
        jnp.arange(count)
    )
