"""The paper's MNIST autoencoder in plain JAX: a list of `{"w", "b"}` layers.

784-1000-500-250-30-250-500-1000-784, logistic units, a linear code layer, and logistic
outputs that are folded into the loss (Martens & Grosse 2015, section 13).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import kfac_jax

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
L2 = 1e-5  # eta: the loss holds 0.5 * eta * ||theta||^2, biases included

Params = list[dict[str, Array]]


@partial(jax.jit, static_argnums=1)
def init_params(seed: int, sizes: tuple[int, ...] = SIZES) -> Params:
    """Sparse initialisation: 15 weights N(0, 1) into each unit, biases zero."""
    weights = kfac_jax.initializers.sparse_normal(incoming=15)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": weights(key, shape, jnp.float32), "b": jnp.zeros(shape[1:], jnp.float32)}
        for key, shape in zip(keys, pairwise(sizes), strict=True)
    ]


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
    return per_pixel.sum(axis=-1).mean() + 0.5 * L2 * squared_length(params)


def squared_length(params: Params) -> Array:
    """`||theta||^2`."""
    biases = jnp.concatenate([layer["b"] for layer in params])  # one sum to compile
    vectors = [biases, *(layer["w"] for layer in params)]
    return sum((jnp.vdot(x, x) for x in vectors), start=jnp.zeros(()))


def reconstruct(params: Params, images: ArrayLike) -> Array:
    """Reconstructed pixels in [0, 1], [cases, 784]."""
    return jax.nn.sigmoid(encode_decode(params, images))


def reconstruction_error(params: Params, images: ArrayLike) -> Array:
    """The paper's metric: squared error summed over pixels, averaged over cases."""
    return jnp.mean(jnp.sum((reconstruct(params, images) - images) ** 2, axis=-1))
