"""The paper's MNIST autoencoder in plain JAX: a list of `{"w", "b"}` layers.

784-1000-500-250-30-250-500-1000-784, logistic units, a linear code layer, and logistic
outputs that are folded into the loss (Martens & Grosse 2015, section 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

import kfac_jax

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
L2 = 1e-5  # eta: the loss holds 0.5 * eta * ||theta||^2, biases included
INCOMING = 15  # nonzero weights into each unit at the start

Params = list[dict[str, Array]]


def init_params(seed: int, sizes: Sequence[int] = SIZES) -> Params:
    """Sparse initialisation: 15 weights N(0, 1) into each unit, biases zero."""
    rng = np.random.default_rng(seed)
    return [_init_layer(rng, i, o) for i, o in pairwise(sizes)]


def _init_layer(rng: np.random.Generator, inputs: int, units: int) -> dict[str, Array]:
    weights = np.zeros((inputs, units), np.float32)
    count = min(INCOMING, inputs)
    for unit in range(units):
        incoming = rng.choice(inputs, count, replace=False)
        weights[incoming, unit] = rng.standard_normal(count)
    return {"w": jnp.asarray(weights), "b": jnp.zeros(units, jnp.float32)}


def encode_decode(params: Params, images: ArrayLike) -> Array:
    """Logits of the reconstructed pixels, [cases, 784]."""
    code, last = len(params) // 2 - 1, len(params) - 1
    x = jnp.asarray(images)
    for index, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if index not in (code, last):
            x = jax.nn.sigmoid(x)
    return x


def loss_fn(params: Params, images: ArrayLike) -> Array:
    """Cross-entropy summed over pixels, averaged over cases, plus the l2 penalty."""
    logits = encode_decode(params, images)
    per_pixel = kfac_jax.losses.sigmoid_binary_cross_entropy(logits, images)
    return per_pixel.sum(axis=-1).mean() + 0.5 * L2 * _squared_length(params)


def _squared_length(params: Params) -> Array:
    biases = jnp.concatenate([layer["b"] for layer in params])  # one sum to compile
    vectors = [biases, *(layer["w"] for layer in params)]
    return sum((jnp.vdot(x, x) for x in vectors), start=jnp.zeros(()))


def reconstruct(params: Params, images: ArrayLike) -> Array:
    """Reconstructed pixels in [0, 1], [cases, 784]."""
    return jax.nn.sigmoid(encode_decode(params, images))


def reconstruction_error(params: Params, images: ArrayLike) -> Array:
    """The paper's metric: squared error summed over pixels, averaged over cases."""
    return jnp.mean(jnp.sum((reconstruct(params, images) - images) ** 2, axis=-1))
