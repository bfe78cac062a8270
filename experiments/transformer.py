"""A transformer over characters in plain JAX: stacked layers, scanned and checkpointed.

Pre-norm blocks of causal attention and a GELU network, learned positions, an output
layer of its own. Parameters are a dict; the layers' lie stacked, [layers, ...].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kfac_jax

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of the network."""

    vocabulary: int
    context: int = 128  # characters that it sees, exactly
    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 512  # units of a block's network


def init_params(shape: Shape, seed: int) -> Params:
    """Normal weights of variance 1/inputs, smaller where they add to the residual."""
    keys = jax.random.split(jax.random.key(seed), shape.layers + 3)
    layers = [_init_layer(shape, key) for key in keys[3:]]
    width = shape.width
    return {
        "tokens": 0.02 * jax.random.normal(keys[0], (shape.vocabulary, width)),
        "positions": 0.02 * jax.random.normal(keys[1], (shape.context, width)),
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        "norm": _init_norm(width),
        "output": _init_dense(keys[2], width, shape.vocabulary),
    }


def _init_layer(shape: Shape, key: Array) -> Params:
    keys = jax.random.split(key, 4)
    width, hidden = shape.width, shape.hidden
    residual = 1 / math.sqrt(2 * shape.layers)  # that many terms are added up
    return {
        "attention_norm": _init_norm(width),
        "query_key_value": _init_dense(keys[0], width, 3 * width),
        "attended": _init_dense(keys[1], width, width, residual),
        "network_norm": _init_norm(width),
        "hidden": _init_dense(keys[2], width, hidden),
        "network": _init_dense(keys[3], hidden, width, residual),
    }


def _init_norm(width: int) -> dict[str, Array]:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def _init_dense(
    key: Array, inputs: int, outputs: int, scale: float = 1.0
) -> dict[str, Array]:
    deviation = scale / math.sqrt(inputs)
    weights = deviation * jax.random.normal(key, (inputs, outputs))
    return {"w": weights, "b": jnp.zeros(outputs)}


def logits_of(params: Params, inputs: Array, heads: int) -> Array:
    """Logits of the character after each.

    Args:
        params: the parameters; their layers stacked, or a list.
        inputs: [windows, context] int32.
        heads: attention heads.

    Returns:
        [windows, context, vocabulary].
    """
    x = params["tokens"][inputs] + params["positions"]

    @jax.checkpoint
    def step(x: Array, layer: Params) -> tuple[Array, None]:
        return block(layer, x, heads), None

    if isinstance(params["layers"], list):  # written out, nothing computed twice
        for layer in params["layers"]:
            x = block(layer, x, heads)
    else:
        x, _ = jax.lax.scan(step, x, params["layers"])
    return _dense(params["output"], _norm(params["norm"], x))


def block(layer: Params, x: Array, heads: int) -> Array:
    """One layer: attention and a network, each added to what comes in."""
    x = x + _attention(layer, _norm(layer["attention_norm"], x), heads)
    h = jax.nn.gelu(_dense(layer["hidden"], _norm(layer["network_norm"], x)))
    return x + _dense(layer["network"], h)


def loss_fn(params: Params, inputs: Array, targets: Array, *, heads: int) -> Array:
    """Cross-entropy in nats, averaged over all characters of all windows."""
    logits = logits_of(params, inputs, heads)
    return kfac_jax.losses.softmax_cross_entropy_with_integer_labels(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    ).mean()


def _dense(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def _norm(layer: dict[str, Array], x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["shift"]


def _attention(layer: Params, x: Array, heads: int) -> Array:
    """Each character attends to itself and to those before it."""
    windows, context, width = x.shape
    joined = _dense(layer["query_key_value"], x)
    split = joined.reshape(windows, context, 3, heads, width // heads)
    query, key, value = jnp.moveaxis(split, 2, 0)
    scores = jnp.einsum("bqhi,bkhi->bhqk", query, key) / math.sqrt(width // heads)
    causal = jnp.tril(jnp.ones((context, context), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    attended = jnp.einsum("bhqk,bkhi->bqhi", weights, value)
    return _dense(layer["attended"], attended.reshape(windows, context, width))
