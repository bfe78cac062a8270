"""Flows, autoencoders and denoisers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax import losses
from tests.helpers import models
from tests.helpers.model_kinds._kind import (
    KEY,
    Kind,
    N,
    Term,
    conv,
    dense,
    kernel,
    linear,
    maker,
    norm,
    regression,
)


def real_nvp() -> Kind:
    """Coupling layers; point and log-determinant are registered as one convex loss."""
    new, d, hidden = maker(9), 4, 4
    masks = [np.arange(d) % 2 == i % 2 for i in range(3)]
    params = [
        {
            "hidden": linear(new, d, hidden),
            "scale": linear(new, hidden, d),
            "shift": linear(new, hidden, d),
        }
        for _ in masks
    ]

    def outputs(params, x):
        total = jnp.zeros(len(x))
        for p, mask in zip(params, masks, strict=True):
            h = jnp.tanh(dense(p["hidden"], x * mask))
            log_scale = jnp.where(mask, 0.0, jnp.tanh(dense(p["scale"], h)))
            shift = jnp.where(mask, 0.0, dense(p["shift"], h))
            x = x * jnp.exp(log_scale) + shift
            total = total + log_scale.sum(-1)
        return jnp.concatenate([x, total[:, None]], axis=-1)

    def per_case(z):
        return jnp.square(z[:-1]).sum() / 2 - z[-1]

    def loss_fn(params, x):
        return losses.convex(per_case, outputs(params, x)).mean()

    x = models.array(0, N, d)
    return Kind(loss_fn, params, (x,), (Term(outputs, per_case),))


def vae() -> Kind:
    """Reparameterised by a key among the arguments; the KL term is a rest."""
    new, d, hidden, latent = maker(10), 5, 4, 2
    params = {
        "encoder": linear(new, d, hidden),
        "mean": linear(new, hidden, latent),
        "log_var": linear(new, hidden, latent),
        "decoder": linear(new, latent, hidden),
        "logits": linear(new, hidden, d),
    }

    def encode(p, x, key):
        h = jnp.tanh(dense(p["encoder"], x))
        mean, log_var = dense(p["mean"], h), dense(p["log_var"], h)
        noise = jax.random.normal(key, mean.shape)
        return mean + jnp.exp(log_var / 2) * noise, mean, log_var

    def outputs(p, x, key):
        z, *_ = encode(p, x, key)
        return dense(p["logits"], jnp.tanh(dense(p["decoder"], z)))

    def loss_fn(p, x, key):
        z, mean, log_var = encode(p, x, key)
        logits = dense(p["logits"], jnp.tanh(dense(p["decoder"], z)))
        kl = (jnp.exp(log_var) + mean**2 - 1.0 - log_var).sum(-1) / 2
        fit = losses.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        return (fit + kl).mean()

    def per_case(z, x):
        return (jnp.logaddexp(0.0, z) - x * z).sum()

    x = (models.array(0, N, d) > 0).astype(float)
    return Kind(loss_fn, params, (x, KEY), (Term(outputs, per_case, (x,)),))


def _attention(p: Any, x: Array) -> Array:
    q, k, v = jnp.split(dense(p["qkv"], x), 3, axis=-1)
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / q.shape[-1] ** 0.5
    return x + dense(p["out"], jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v))


def _group_norm(p: Any, x: Array, groups: int) -> Array:
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, groups, c // groups)
    mean, var = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
    y = ((y - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape)
    return y * p["g"] + p["b"]


def diffusion() -> Kind:
    """A block of a U-Net that predicts noise: times by FiLM, attention over pixels."""
    new, d = maker(11), 4
    params = {
        "time": [linear(new, d, d), linear(new, d, d)],
        "in": kernel(new, 3, 1, d),
        "norm1": norm(d),
        "conv1": kernel(new, 1, d, d),
        "film": linear(new, d, 2 * d),
        "norm2": norm(d),
        "conv2": kernel(new, 1, d, d),
        "attention": {"qkv": linear(new, d, 3 * d), "out": linear(new, d, d)},
        "out": kernel(new, 3, d, 1),
    }
    signal = jnp.linspace(1.0, 0.1, 10)

    def apply(p, x, times, noise):
        s = signal[times][:, None, None, None]
        x = jnp.sqrt(s) * x + jnp.sqrt(1.0 - s) * noise
        angles = times[:, None] * jnp.exp(-jnp.arange(d // 2))
        t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        t = dense(p["time"][1], jax.nn.silu(dense(p["time"][0], t)))
        x = conv(p["in"], x)
        h = conv(p["conv1"], jax.nn.silu(_group_norm(p["norm1"], x, 2)))
        scale, shift = jnp.split(dense(p["film"], jax.nn.silu(t)), 2, axis=-1)
        h = _group_norm(p["norm2"], h, 2)
        h = h * (1.0 + scale[:, None, None]) + shift[:, None, None]
        x = x + conv(p["conv2"], jax.nn.silu(h))
        b, height, width, c = x.shape
        x = _attention(p["attention"], x.reshape(b, -1, c)).reshape(b, height, width, c)
        return conv(p["out"], x)

    x, noise = models.array(0, N, 3, 3, 1), models.array(1, N, 3, 3, 1)
    return regression(apply, params, x, models.classes(3, 10, N), noise)
