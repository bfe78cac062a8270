"""Tasks that are no images and no text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kfac_jax
from workloads import data
from workloads.task import Params, Task, rows, stack, through


def tabular() -> Task:
    """The progress of a disease from ten measurements, 10-64-64-1."""
    x, y, test_x, test_y = map(jnp.asarray, data.patients())

    def loss_fn(params: Params, x: Array, y: Array) -> Array:
        return kfac_jax.losses.squared_error(through(params, x), y).sum(-1).mean()

    def evaluate(params: Params, x: Array, y: Array) -> tuple[Array, Array]:
        loss = jnp.square(through(params, x) - y).sum(-1).mean()
        return loss, loss

    return Task(
        loss_fn=loss_fn,
        init=lambda key: stack(key, 10, 64, 64, 1),
        batch=rows(64),
        train=(x, y),
        held_out=(test_x, test_y),
        evaluate=evaluate,
        steps=300,
    )


def pinn() -> Task:
    """Poisson's equation on the unit square, whose solution is known."""

    def source(x: Array) -> Array:
        return -2 * jnp.pi**2 * jnp.sin(jnp.pi * x).prod(-1, keepdims=True)

    def solution(x: Array) -> Array:
        return jnp.sin(jnp.pi * x).prod(-1, keepdims=True)

    def laplacian(params: Params, points: Array) -> Array:
        def second(direction: Array) -> Array:
            along = jnp.broadcast_to(direction, points.shape)
            slope = lambda x: jax.jvp(  # noqa: E731
                lambda x: through(params, x), (x,), (along,)
            )[1]
            return jax.jvp(slope, (points,), (along,))[1]

        return second(jnp.eye(2)[0]) + second(jnp.eye(2)[1])

    def loss_fn(params: Params, points: Array, wall: Array) -> Array:
        error = kfac_jax.losses.squared_error
        inside = error(laplacian(params, points), source(points)).sum(-1).mean()
        outside = error(through(params, wall), jnp.zeros((len(wall), 1)))
        return inside + outside.sum(-1).mean()

    def batch(key: Array, arrays: Any) -> Any:
        del arrays
        return _points(key)

    def evaluate(params: Params, points: Array, wall: Array) -> tuple[Array, Array]:
        inside = jnp.square(laplacian(params, points) - source(points)).mean()
        outside = jnp.square(through(params, wall)).mean()
        error = jnp.square(through(params, points) - solution(points)).mean()
        return inside + outside, jnp.sqrt(error)

    return Task(
        loss_fn=loss_fn,
        init=lambda key: stack(key, 2, 64, 64, 64, 1),
        batch=batch,
        train=_points(jax.random.key(11)),
        held_out=_points(jax.random.key(12)),
        evaluate=evaluate,
        steps=300,
    )


def _points(key: Array, count: int = 512) -> tuple[Array, Array]:
    """Points within the square, and on its wall."""
    first, second, third = jax.random.split(key, 3)
    inside = jax.random.uniform(first, (count, 2))
    along = jax.random.uniform(second, (count,))
    side = jax.random.randint(third, (count,), 0, 4)
    fixed = (side % 2).astype(along.dtype)
    wall = jnp.stack(
        [jnp.where(side < 2, along, fixed), jnp.where(side < 2, fixed, along)], -1
    )
    return inside, wall
