"""A task whose gradient is an average over samples of the model itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kfac_jax
from workloads import data
from workloads.task import Params, Task, rows, stack, through

PIXELS, ACTIONS = 784, 10


def digits() -> Task:
    """A policy and a value 784-128-(10, 1): which digit is this? Right answers pay 1.

    Actions are drawn from the policy. Rewards of other actions are not seen, and the
    returned loss need not fall. The curve is of how often an action drawn is wrong.
    """
    images, labels, test_images, test_labels = map(jnp.asarray, data.digits())

    def heads(params: list[Params], x: Array) -> tuple[Array, Array]:
        both = through(params, x)
        return both[:, :ACTIONS], both[:, ACTIONS:]

    def loss_fn(params: list[Params], x: Array, y: Array, noise: Array) -> Array:
        logits, value = heads(params, x)
        action = jax.lax.stop_gradient(logits + noise).argmax(-1)
        reward = (action == y).astype(x.dtype)[:, None]
        kfac_jax.register_softmax_cross_entropy_loss(logits)
        kfac_jax.register_squared_error_loss(value, reward, weight=0.5)
        log_policy = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_policy, action[:, None], 1)
        actor = -(jax.lax.stop_gradient(reward - value) * chosen).mean()
        entropy = -(jnp.exp(log_policy) * log_policy).sum(-1).mean()
        return actor + 0.5 * jnp.square(value - reward).mean() - 0.01 * entropy

    def batch(key: Array, arrays: Any) -> Any:
        first, second = jax.random.split(key)
        x, y = rows(256)(first, arrays[:2])
        return x, y, jax.random.gumbel(second, (len(y), ACTIONS))

    def evaluate(
        params: list[Params], x: Array, y: Array, noise: Array
    ) -> tuple[Array, Array]:
        del noise
        logits, _ = heads(params, x)
        right = jnp.take_along_axis(jax.nn.softmax(logits), y[:, None], 1)
        return 1 - right.mean(), (logits.argmax(-1) != y).mean()

    def noise(y: Array) -> Array:
        return jnp.zeros((len(y), ACTIONS))

    return Task(
        loss_fn=loss_fn,
        init=lambda key: stack(key, PIXELS, 128, ACTIONS + 1),
        batch=batch,
        train=(images, labels, noise(labels)),
        held_out=(test_images, test_labels, noise(test_labels)),
        evaluate=evaluate,
        steps=300,
    )
