"""The networks that scaling.py makes larger: equal dense layers, and a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax.losses import softmax_cross_entropy_with_integer_labels, squared_error

VOCABULARY = 96


class Problem(NamedTuple):
    """What is trained, and on what."""

    loss_fn: Callable[..., Any]  # (params, *args) -> loss
    params: Any
    args: tuple[Array, ...]


def dense_net(width: int, depth: int, batch: int, scanned: bool = False) -> Problem:
    """Layers of as many outputs as inputs, each followed by tanh.

    Args:
        width: of all layers.
        depth: how many layers.
        batch: how many cases.
        scanned: whether the layers are stacked and scanned, or written out one by one
            with parameters of their own.

    Returns:
        The problem.
    """
    rng = np.random.default_rng(0)
    layers = [_normal(rng, width, width) for _ in range(depth)]
    args = _normal(rng, batch, width), _normal(rng, batch, width)
    if scanned:
        return Problem(_scanned_dense_loss, jnp.stack(layers), args)
    return Problem(_dense_loss, layers, args)


def _dense_loss(params: list[Array], x: Array, y: Array) -> Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return squared_error(x, y).sum(-1).mean()


def _scanned_dense_loss(params: Array, x: Array, y: Array) -> Array:
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)
    return squared_error(x, y).sum(-1).mean()


class Transformer(NamedTuple):
    """The sizes of a transformer and of its batch."""

    width: int = 128
    heads: int = 4
    tokens: int = 128
    batch: int = 16


def transformer(sizes: Transformer, depth: int, scanned: bool) -> Problem:
    """Next-token cross entropy.

    Args:
        sizes: all but the depth.
        depth: how many layers.
        scanned: whether the layers are stacked, scanned and rematerialised, or written
            out one by one with parameters of their own.

    Returns:
        The problem.
    """
    rng = np.random.default_rng(0)
    d = sizes.width
    layers = [_init_layer(rng, d, sizes.heads) for _ in range(depth)]
    params = {
        "tokens": _normal(rng, VOCABULARY, d),
        "positions": _normal(rng, sizes.tokens, d),
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers) if scanned else layers,
        "norm": jnp.ones(d),
        "head": _normal(rng, d, VOCABULARY),
    }
    ids = rng.integers(0, VOCABULARY, (sizes.batch, sizes.tokens + 1))
    loss_fn = _scanned_loss if scanned else _written_out_loss
    return Problem(loss_fn, params, (jnp.asarray(ids, jnp.int32),))


def _init_layer(rng: np.random.Generator, d: int, heads: int) -> dict[str, Array]:
    return {
        "norm1": jnp.ones(d),
        "qkv": _normal(rng, d, 3, heads, d // heads),
        "out": _normal(rng, d, d).reshape(heads, d // heads, d),
        "norm2": jnp.ones(d),
        "up": _normal(rng, d, 4 * d),
        "up_bias": jnp.zeros(4 * d),
        "down": _normal(rng, 4 * d, d),
        "down_bias": jnp.zeros(d),
    }


def _scanned_loss(params: Any, ids: Array) -> Array:
    body = jax.checkpoint(lambda x, p: (_layer(x, p), None))
    x, _ = jax.lax.scan(body, _embedded(params, ids), params["layers"])
    return _next_token_loss(params, x, ids)


def _written_out_loss(params: Any, ids: Array) -> Array:
    x = _embedded(params, ids)
    for layer in params["layers"]:
        x = _layer(x, layer)
    return _next_token_loss(params, x, ids)


def _embedded(params: Any, ids: Array) -> Array:
    return params["tokens"][ids[:, :-1]] + params["positions"]


def _next_token_loss(params: Any, x: Array, ids: Array) -> Array:
    logits = _normalized(x, params["norm"]) @ params["head"]
    values = softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return values.sum(-1).mean()


def _layer(x: Array, p: dict[str, Array]) -> Array:
    q, k, v = jnp.einsum("btd,dchk->cbthk", _normalized(x, p["norm1"]), p["qkv"])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
    up = jax.nn.gelu(_normalized(x, p["norm2"]) @ p["up"] + p["up_bias"])
    return x + up @ p["down"] + p["down_bias"]


def _normalized(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    """Normal weights of variance 1/inputs."""
    return jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)
