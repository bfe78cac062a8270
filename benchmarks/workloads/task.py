"""What a training task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = Any
Arrays = tuple[Array, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A loss to be trained, and on what.

    Attributes:
        loss_fn: `(params, *batch) -> loss`, which registers its losses.
        init: parameters from a key.
        batch: a batch from a key and the training set.
        train: the training set, arrays with the cases in front.
        held_out: other data like it.
        evaluate: `(params, *set) -> (loss, error)` of a set; the error is what people
            report, of which less is better.
        steps: the budget.
        evaluated: how many cases of the training set curves are taken on.
    """

    loss_fn: Callable[..., Array]
    init: Callable[[Array], Params]
    batch: Callable[[Array, Arrays], Arrays]
    train: Arrays
    held_out: Arrays
    evaluate: Callable[..., tuple[Array, Array]]
    steps: int
    evaluated: int = 2000

    def example(self) -> tuple[Params, Arrays]:
        """Shapes of the parameters and of a batch, for a plan."""
        key = jax.random.key(0)
        batch = lambda key: self.batch(key, self.train)  # noqa: E731
        return jax.eval_shape(self.init, key), jax.eval_shape(batch, key)


def rows(count: int) -> Callable[[Array, Arrays], Arrays]:
    """Batches of that many cases, drawn with replacement."""

    def batch(key: Array, data: Arrays) -> Arrays:
        chosen = jax.random.randint(key, (count,), 0, len(data[0]))
        return tuple(x[chosen] for x in data)

    return batch


def dense(key: Array, inputs: int, outputs: int, scale: float = 1.0) -> Params:
    """A layer with normal weights of variance `scale² / inputs`, biases zero."""
    w = jax.random.normal(key, (inputs, outputs)) * (scale / inputs**0.5)
    return {"w": w, "b": jnp.zeros(outputs)}


def apply(layer: Params, x: Array) -> Array:
    """The layer's outputs."""
    return x @ layer["w"] + layer["b"]


def through(layers: list[Params], x: Array) -> Array:
    """Outputs of layers with tanh in between."""
    for layer in layers[:-1]:
        x = jnp.tanh(apply(layer, x))
    return apply(layers[-1], x)


def stack(key: Array, *sizes: int, scale: float = 1.0) -> list[Params]:
    """Several layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [dense(k, i, o, scale) for k, i, o in pairs]
