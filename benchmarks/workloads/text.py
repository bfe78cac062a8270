"""Tasks on Jane Austen's novels, character by character."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import kfac_jax
from workloads import data
from workloads.task import Params, Task, apply, dense, stack

CONTEXT, EVALUATED = 64, 128


def _windows(key: Array, text: Array, count: int, length: int) -> Array:
    starts = jax.random.randint(key, (count,), 0, len(text) - length)
    return text[starts[:, None] + jnp.arange(length)[None]]


def _fixed(text: np.ndarray, count: int, length: int) -> Array:
    """Windows that lie equally far apart."""
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return jnp.asarray(text[starts[:, None] + np.arange(length)])


def _cross_entropy(logits: Array, targets: Array) -> Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


def transformer(width: int, masked: float) -> Task:
    """Two pre-norm layers on 16 windows of 64; some targets may be masked.

    The cases are the characters, of which the masked ones do not count.
    """
    import transformer as model

    train, test, alphabet = data.novels()
    shape = model.Shape(
        vocabulary=alphabet, context=CONTEXT, width=width, layers=2, hidden=4 * width
    )
    text = jnp.asarray(train)

    def init(key: Array) -> Params:
        return _initial(model, shape, key)

    def loss_fn(params: Params, tokens: Array, targets: Array, kept: Array) -> Array:
        logits = model.logits_of(params, tokens, shape.heads)
        logits, targets = logits.reshape(-1, alphabet), targets.reshape(-1)
        kept = kept.reshape(-1)
        share = kept.mean()
        kfac_jax.register_softmax_cross_entropy_loss(
            logits, targets, mask=kept, weight=1 / share
        )
        return (_cross_entropy(logits, targets) * kept).mean() / share

    def batch(key: Array, arrays: Any) -> Any:
        del arrays  # windows begin anywhere
        first, second = jax.random.split(key)
        found = _windows(first, text, 16, CONTEXT + 1)
        kept = jax.random.uniform(second, (16, CONTEXT)) >= masked
        return found[:, :-1], found[:, 1:], kept.astype(jnp.float32)

    def evaluate(params: Params, windows: Array) -> tuple[Array, Array]:
        logits = model.logits_of(params, windows[:, :-1], shape.heads)
        loss = _cross_entropy(logits, windows[:, 1:]).mean()
        return loss, loss

    return Task(
        loss_fn=loss_fn,
        init=init,
        batch=batch,
        train=(_fixed(train, EVALUATED, CONTEXT + 1),),
        held_out=(_fixed(test, EVALUATED, CONTEXT + 1),),
        evaluate=evaluate,
        steps=300,
    )


def _initial(model: Any, shape: Any, key: Array) -> Params:
    """The example's parameters, from a key that may be traced."""
    keys = jax.random.split(key, shape.layers + 3)
    layers = [model._init_layer(shape, k) for k in keys[3:]]
    width = shape.width
    return {
        "tokens": 0.02 * jax.random.normal(keys[0], (shape.vocabulary, width)),
        "positions": 0.02 * jax.random.normal(keys[1], (shape.context, width)),
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        "norm": model._init_norm(width),
        "output": model._init_dense(keys[2], width, shape.vocabulary),
    }


def tied() -> Task:
    """The next of eight characters, by a table that is the output layer, too."""
    train, test, alphabet = data.novels()
    text, seen, width = jnp.asarray(train), 8, 32

    def init(key: Array) -> Params:
        first, second, third = jax.random.split(key, 3)
        return {
            "table": 0.1 * jax.random.normal(first, (alphabet, width)),
            "hidden": stack(second, seen * width, 128, width),
            "output": dense(third, width, alphabet)["b"],
        }

    def logits(params: Params, context: Array) -> Array:
        x = params["table"][context].reshape(len(context), -1)
        for layer in params["hidden"]:
            x = jnp.tanh(apply(layer, x))
        return x @ params["table"].T + params["output"]

    def loss_fn(params: Params, windows: Array) -> Array:
        loss = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
        return loss(logits(params, windows[:, :-1]), windows[:, -1]).mean()

    def batch(key: Array, arrays: Any) -> Any:
        del arrays
        return (_windows(key, text, 256, seen + 1),)

    def evaluate(params: Params, windows: Array) -> tuple[Array, Array]:
        loss = _cross_entropy(logits(params, windows[:, :-1]), windows[:, -1]).mean()
        return loss, loss

    return Task(
        loss_fn=loss_fn,
        init=init,
        batch=batch,
        train=(_fixed(train, 4000, seen + 1),),
        held_out=(_fixed(test, 4000, seen + 1),),
        evaluate=evaluate,
        steps=300,
    )
