"""Gives the published release of kfac-jax the names that the experiments use.

It has the same import name as this package, but no losses that compute and register in
one call. `add` makes them of its own register functions; where this package is
installed it does nothing.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import optax
from jax import Array

import kfac_jax

IS_PUBLISHED = not hasattr(kfac_jax, "make_curvature")


def add() -> None:
    """Adds `losses` and `initializers`, if this is the published release."""
    if IS_PUBLISHED:
        kfac_jax.losses = types.SimpleNamespace(
            softmax_cross_entropy_with_integer_labels=_softmax,
            sigmoid_binary_cross_entropy=_sigmoid,
            squared_error=_squared,
        )
        kfac_jax.initializers = types.SimpleNamespace(sparse_normal=_sparse_normal)


def _softmax(logits: Array, labels: Array) -> Array:
    kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def _sigmoid(logits: Array, labels: Array) -> Array:
    kfac_jax.register_sigmoid_cross_entropy_loss(logits, labels)
    return optax.losses.sigmoid_binary_cross_entropy(logits, labels)


def _squared(predictions: Array, targets: Array) -> Array:
    kfac_jax.register_squared_error_loss(predictions, targets)
    return optax.losses.squared_error(predictions, targets)


def _sparse_normal(incoming: int) -> jax.nn.initializers.Initializer:
    """As many weights into each unit on average: the cost is the same."""

    def draw(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        kept, values = jax.random.split(key)
        mask = jax.random.bernoulli(kept, incoming / shape[0], shape)
        return jnp.where(mask, jax.random.normal(values, shape, dtype), 0)

    return draw
