"""Models of images."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from tests.helpers import models
from tests.helpers.model_kinds._kind import (
    Kind,
    N,
    classifier,
    conv,
    dense,
    kernel,
    layer_norm,
    linear,
    linen,
    maker,
    norm,
)


class NnxViT(nnx.Module):
    """Patches, a class token, learned positions, a block before the norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Conv(2, 4, (2, 2), (2, 2), padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 4)))
        self.positions = nnx.Param(jax.random.normal(rngs(), (1, 5, 4)))
        self.norm1, self.norm2 = (
            nnx.LayerNorm(4, rngs=rngs),
            nnx.LayerNorm(4, rngs=rngs),
        )
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.embed(x)
        x = x.reshape(len(x), -1, 4)
        token = jnp.broadcast_to(self.token[...], (len(x), 1, 4))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        x = x + self.attention(self.norm1(x))
        x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


def nnx_vit() -> Kind:
    graph, params, rest = nnx.split(NnxViT(nnx.Rngs(0)), nnx.Param, ...)
    apply = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)  # noqa: E731
    return classifier(apply, params, models.array(0, N, 4, 4, 2))


def _windows(x: Any, m: int) -> Any:
    b, h, w, c = x.shape
    x = x.reshape(b, h // m, m, w // m, m, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, m * m, c)


def _unwindows(x: Array, m: int, h: int, w: int) -> Array:
    x = x.reshape(-1, h // m, w // m, m, m, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h, w, x.shape[-1])


def _relative_positions(m: int) -> np.ndarray:
    at = np.stack(np.meshgrid(*2 * [np.arange(m)], indexing="ij"), -1).reshape(-1, 2)
    offsets = at[:, None] - at[None] + m - 1
    return offsets[..., 0] * (2 * m - 1) + offsets[..., 1]


def _shift_mask(h: int, w: int, m: int, shift: int) -> np.ndarray:
    """Positions that a shift made neighbours do not see each other."""
    regions = np.zeros((1, h, w, 1))
    cuts = (slice(0, -m), slice(-m, -shift), slice(-shift, None))
    for i, (a, b) in enumerate(itertools.product(cuts, cuts)):
        regions[:, a, b] = i
    ids = _windows(regions, m)[..., 0]
    return np.where(ids[:, :, None] == ids[:, None], 0.0, -100.0)


def _swin_block(p: Any, x: Array, m: int, shift: int, heads: int) -> Array:
    b, h, w, c = x.shape
    y = layer_norm(p["norm1"], x)
    if shift:
        y = jnp.roll(y, (-shift, -shift), axis=(1, 2))
    y = _windows(y, m)
    qkv = dense(p["qkv"], y).reshape(len(y), m * m, 3, heads, c // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / (c // heads) ** 0.5
    bias = p["table"][_relative_positions(m).reshape(-1)].reshape(m * m, m * m, heads)
    scores = scores + bias.transpose(2, 0, 1)[None]
    if shift:
        mask = _shift_mask(h, w, m, shift)
        scores = scores.reshape(b, len(mask), heads, m * m, m * m)
        scores = (scores + mask[None, :, None]).reshape(-1, heads, m * m, m * m)
    y = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(-1, m * m, c)
    y = _unwindows(dense(p["out"], y), m, h, w)
    if shift:
        y = jnp.roll(y, (shift, shift), axis=(1, 2))
    x = x + y
    y = layer_norm(p["norm2"], x)
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], y)))


def swin() -> Kind:
    """A block of windows, one of shifted windows, and merged patches."""
    new, d = maker(1), 4

    def block():
        return {
            "norm1": norm(d),
            "qkv": linear(new, d, 3 * d),
            "table": 0.1 * new(9, 2),
            "out": linear(new, d, d),
            "norm2": norm(d),
            "up": linear(new, d, d),
            "down": linear(new, d, d),
        }

    params = {
        "embed": linear(new, 2, d),
        "blocks": [block(), block()],
        "merge_norm": norm(4 * d),
        "merge": new(4 * d, d),
        "head": linear(new, d, 3),
    }

    def apply(p, x):
        x = dense(p["embed"], x)
        for i, block in enumerate(p["blocks"]):
            x = _swin_block(block, x, 2, i, 2)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = layer_norm(p["merge_norm"], jnp.concatenate(parts, -1)) @ p["merge"]
        return dense(p["head"], x.mean((1, 2)))

    return classifier(apply, params, models.array(0, N, 4, 4, 2))


def _attend(p: Any, queries: Array, memory: Array) -> Array:
    q, k, v = queries @ p["q"], memory @ p["k"], memory @ p["v"]
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
    return queries + weights @ v @ p["o"]


def detr() -> Kind:
    """Learned queries see each other, then the image."""
    new, d = maker(18), 4
    attention = lambda: {name: new(d, d) for name in "qkvo"}  # noqa: E731
    params = {
        "embed": linear(new, 2, d),
        "queries": new(2, d),
        "own": attention(),
        "cross": attention(),
        "head": linear(new, d, 3),
    }

    def apply(p, x):
        memory = dense(p["embed"], x)
        queries = jnp.broadcast_to(p["queries"], (len(x), 2, d))
        queries = _attend(p["own"], queries, queries)
        return dense(p["head"], _attend(p["cross"], queries, memory))

    return classifier(apply, params, models.array(0, N, 5, 2))


def convnext() -> Kind:
    """A depthwise kernel of 7 × 7, a layer norm, an inverted bottleneck, a gamma."""
    new, d = maker(2), 4
    params = {
        "stem": kernel(new, 2, 2, d),
        "depthwise": kernel(new, 7, 1, d),
        "norm": norm(d),
        "up": linear(new, d, 2 * d),
        "down": linear(new, 2 * d, d),
        "gamma": 0.5 * jnp.ones(d),
        "head": linear(new, d, 3),
    }

    def apply(p, x):
        x = conv(p["stem"], x, stride=2)
        y = layer_norm(p["norm"], conv(p["depthwise"], x, groups=d))
        y = dense(p["down"], jax.nn.gelu(dense(p["up"], y)))
        x = x + p["gamma"] * y
        return dense(p["head"], x.mean((1, 2)))

    return classifier(apply, params, models.array(0, N, 8, 8, 2))


class InvertedResidual(nn.Module):
    """Expanded, convolved by channel, projected."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        width = 2 * x.shape[-1]
        normal = functools.partial(nn.BatchNorm, use_running_average=True)
        h = nn.relu6(normal()(nn.Conv(width, (1, 1), use_bias=False)(x)))
        strides = (self.stride, self.stride)
        h = nn.Conv(width, (3, 3), strides, feature_group_count=width, use_bias=False)(
            h
        )
        h = nn.Conv(self.features, (1, 1), use_bias=False)(nn.relu6(normal()(h)))
        h = normal()(h)
        return x + h if x.shape == h.shape else h


class MobileNet(nn.Module):
    """With batch norms whose statistics are frozen, as in fine-tuning."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(3, (3, 3), (2, 2), use_bias=False)(x))
        x = InvertedResidual(3, 1)(x)
        x = InvertedResidual(4, 2)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def mobilenet() -> Kind:
    x = models.array(0, N, 6, 6, 2)
    return classifier(*linen(MobileNet(), x), x)


def unet() -> Kind:
    """Pooled, up again by a transposed convolution, with a skip connection."""
    new = maker(3)
    params = {
        "fine": kernel(new, 3, 1, 3),
        "coarse": kernel(new, 1, 3, 4),
        "middle": kernel(new, 3, 4, 4),
        "up": kernel(new, 2, 4, 3),
        "joined": kernel(new, 3, 6, 3),
        "out": kernel(new, 1, 3, 2),
    }

    def apply(p, x):
        fine = jax.nn.relu(conv(p["fine"], x))
        pooled = jax.lax.reduce_window(
            fine, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        x = jax.nn.relu(conv(p["coarse"], pooled))
        x = jax.nn.relu(conv(p["middle"], x))
        up = jax.lax.conv_transpose(x, p["up"]["w"], (2, 2), "SAME") + p["up"]["b"]
        x = jnp.concatenate([fine, up], axis=-1)
        return conv(p["out"], jax.nn.relu(conv(p["joined"], x)))

    return classifier(apply, params, models.array(0, 2, 4, 4, 1))
