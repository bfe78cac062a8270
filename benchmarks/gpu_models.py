"""The models that gpu.py steps, as large as they are trained, and tiny to try it.

Layers of equal shape are stacked and scanned, so that a network is compiled no slower
for being deep. Parameters and data are random, made on the device by one program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

import jax
import jax.numpy as jnp
import wavefunction_methods
import wavefunction_model
from jax import Array
from wavefunction_systems import SYSTEMS

from kfac_jax import losses

Params = Any


class Model(NamedTuple):
    """What is trained, and on what."""

    loss_fn: Callable[..., Any]  # (params, *args) -> loss
    init: Callable[[Array], tuple[Params, tuple[Array, ...]]]  # key -> params, args
    estimation_mode: str = "fisher_gradients"

    def shapes(self) -> tuple[Params, tuple[Any, ...]]:
        """Of parameters and arguments, without making them."""
        return jax.eval_shape(self.init, jax.random.key(0))


class Draw:
    """Draws arrays, each with a key of its own."""

    def __init__(self, key: Array) -> None:
        """Starts from a key."""
        self._key, self._count = key, 0

    def _next(self) -> Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Normal numbers with a standard deviation."""
        return scale * jax.random.normal(self._next(), shape)

    def uniform(self, *shape: int) -> Array:
        """Numbers between 0 and 1."""
        return jax.random.uniform(self._next(), shape)

    def classes(self, count: int, *shape: int) -> Array:
        """Whole numbers below `count`."""
        return jax.random.randint(self._next(), shape, 0, count)

    def dense(self, *shape: int) -> Params:
        """Weight and bias of `[..., inputs, outputs]`, perhaps a stack of them."""
        *stack, inputs, outputs = shape
        w = self.normal(*shape, scale=inputs**-0.5)
        return {"w": w, "b": jnp.zeros((*stack, outputs))}


def dense(x: Array, p: Params) -> Array:
    """A dense layer."""
    return x @ p["w"] + p["b"]


# ----------------------------------------------------------------------- transformers


class Transformer(NamedTuple):
    """The sizes of a transformer and of its batch."""

    width: int
    heads: int
    layers: int
    batch: int
    tokens: int  # for images, with the class's
    classes: int  # or the vocabulary
    pixels: int = 0  # numbers in a patch of an image


GPT2 = Transformer(768, 12, 12, 8, 1024, 50304)  # as in nanoGPT, 124M parameters
VIT = Transformer(768, 12, 12, 64, 197, 1000, 3 * 16 * 16)  # B/16, for 224 x 224


def gpt2(sizes: Transformer = GPT2) -> Model:
    """Next-token cross entropy; the table is the output layer, too.

    Layers are rematerialised: their attention takes 0.4 GB for each matrix of scores.
    """
    d = sizes.width

    def init(key: Array) -> tuple[Params, tuple[Array, ...]]:
        draw = Draw(key)
        params = {
            "tokens": draw.normal(sizes.classes, d, scale=0.02),
            "positions": draw.normal(sizes.tokens, d, scale=0.02),
            "layers": _layers(draw, sizes),
            "norm": _norm(d),
        }
        return params, (draw.classes(sizes.classes, sizes.batch, sizes.tokens + 1),)

    def loss_fn(params: Params, ids: Array) -> Array:
        x = params["tokens"][ids[:, :-1]] + params["positions"]
        layer = partial(_layer, heads=sizes.heads, causal=True)
        body = jax.checkpoint(lambda x, p: (layer(x, p), None))
        x, _ = jax.lax.scan(body, x, params["layers"])
        logits = _normalized(x, params["norm"]) @ params["tokens"].T
        values = losses.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return values.sum(-1).mean()

    return Model(loss_fn, init)


def vit(sizes: Transformer = VIT) -> Model:
    """A vision transformer with a token for the class; nothing is rematerialised."""
    d = sizes.width

    def init(key: Array) -> tuple[Params, tuple[Array, ...]]:
        draw = Draw(key)
        params = {
            "patches": draw.dense(sizes.pixels, d),
            "class": jnp.zeros(d),
            "positions": draw.normal(sizes.tokens, d, scale=0.02),
            "layers": _layers(draw, sizes),
            "norm": _norm(d),
            "head": draw.dense(d, sizes.classes),
        }
        images = draw.normal(sizes.batch, sizes.tokens - 1, sizes.pixels)
        return params, (images, draw.classes(sizes.classes, sizes.batch))

    def loss_fn(params: Params, images: Array, labels: Array) -> Array:
        x = dense(images, params["patches"])
        first = jnp.broadcast_to(params["class"], (len(x), 1, d))
        x = jnp.concatenate([first, x], 1) + params["positions"]
        layer = partial(_layer, heads=sizes.heads, causal=False)
        x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])
        logits = dense(_normalized(x, params["norm"])[:, 0], params["head"])
        loss = losses.softmax_cross_entropy_with_integer_labels
        return loss(logits, labels).mean()

    return Model(loss_fn, init)


def _layers(draw: Draw, sizes: Transformer) -> Params:
    n, d = sizes.layers, sizes.width
    return {
        "norm1": _norm(n, d),
        "qkv": draw.dense(n, d, 3 * d),
        "out": draw.dense(n, d, d),
        "norm2": _norm(n, d),
        "up": draw.dense(n, d, 4 * d),
        "down": draw.dense(n, 4 * d, d),
    }


def _layer(x: Array, p: Params, *, heads: int, causal: bool) -> Array:
    b, t, d = x.shape
    parts = dense(_normalized(x, p["norm1"]), p["qkv"])
    q, k, v = (y.reshape(b, t, heads, -1) for y in jnp.split(parts, 3, -1))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    x = x + dense(mixed.reshape(b, t, d), p["out"])
    hidden = jax.nn.gelu(dense(_normalized(x, p["norm2"]), p["up"]))
    return x + dense(hidden, p["down"])


def _norm(*shape: int) -> Params:
    return {"scale": jnp.ones(shape), "shift": jnp.zeros(shape)}


def _normalized(x: Array, p: Params) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["shift"]


# --------------------------------------------------------------------------- ResNet-50


class ResNet(NamedTuple):
    """The sizes of a network of bottleneck blocks and of its batch."""

    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    groups: int = 32  # of its group norms
    batch: int = 64
    side: int = 224
    classes: int = 1000


def resnet50(sizes: ResNet = ResNet()) -> Model:  # noqa: B008 - an immutable tuple
    """Bottleneck blocks with group norms; those of a stage but its first are scanned.

    As usual now (v1.5), the stride of a stage is that of the 3 x 3 convolution.
    """
    stages = range(len(sizes.blocks))

    def init(key: Array) -> tuple[Params, tuple[Array, ...]]:
        draw = Draw(key)
        params: Params = {"stem": _conv_and_norm(draw, (), 7, 3, sizes.width)}
        inputs = sizes.width
        for stage in stages:
            middle = sizes.width * 2**stage
            first = _bottleneck(draw, (), inputs, middle)
            first["skip"] = _conv_and_norm(draw, (), 1, inputs, 4 * middle)
            rest = (sizes.blocks[stage] - 1,)
            params[f"first{stage}"] = first
            params[f"rest{stage}"] = _bottleneck(draw, rest, 4 * middle, middle)
            inputs = 4 * middle
        params["head"] = draw.dense(inputs, sizes.classes)
        images = draw.normal(sizes.batch, sizes.side, sizes.side, 3)
        return params, (images, draw.classes(sizes.classes, sizes.batch))

    def layer(x: Array, p: Params, stride: int = 1) -> Array:
        return _group_norm(_convolved(x, p["kernel"], stride), p, sizes.groups)

    def block(x: Array, p: Params, stride: int) -> Array:
        h = jax.nn.relu(layer(x, p["conv1"]))
        h = layer(jax.nn.relu(layer(h, p["conv2"], stride)), p["conv3"])
        return jax.nn.relu(h + (layer(x, p["skip"], stride) if "skip" in p else x))

    def loss_fn(params: Params, images: Array, labels: Array) -> Array:
        x = jax.nn.relu(layer(images, params["stem"], 2))
        window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")
        for stage in stages:
            x = block(x, params[f"first{stage}"], 2 if stage else 1)
            body = lambda x, p: (block(x, p, 1), None)  # noqa: E731
            x, _ = jax.lax.scan(body, x, params[f"rest{stage}"])
        logits = dense(x.mean((1, 2)), params["head"])
        loss = losses.softmax_cross_entropy_with_integer_labels
        return loss(logits, labels).mean()

    return Model(loss_fn, init)


def _bottleneck(
    draw: Draw, stack: tuple[int, ...], inputs: int, middle: int
) -> dict[str, Params]:
    return {
        "conv1": _conv_and_norm(draw, stack, 1, inputs, middle),
        "conv2": _conv_and_norm(draw, stack, 3, middle, middle),
        "conv3": _conv_and_norm(draw, stack, 1, middle, 4 * middle),
    }


def _conv_and_norm(
    draw: Draw, stack: tuple[int, ...], side: int, inputs: int, outputs: int
) -> Params:
    scale = (2 / (side * side * inputs)) ** 0.5
    kernel = draw.normal(*stack, side, side, inputs, outputs, scale=scale)
    return {"kernel": kernel} | _norm(*stack, outputs)


def _convolved(x: Array, kernel: Array, stride: int) -> Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=dimensions
    )


def _group_norm(x: Array, p: Params, groups: int) -> Array:
    grouped = x.reshape(*x.shape[:3], groups, -1)
    grouped = grouped - grouped.mean((1, 2, 4), keepdims=True)
    variance = jnp.square(grouped).mean((1, 2, 4), keepdims=True)
    x = (grouped * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
    return x * p["scale"] + p["shift"]


# ------------------------------------------------------------------------------ others


def autoencoder(
    batch: int = 4096,
    sizes: tuple[int, ...] = (784, 1000, 500, 250, 30, 250, 500, 1000, 784),
) -> Model:
    """The paper's shape, with tanh."""

    def init(key: Array) -> tuple[Params, tuple[Array, ...]]:
        draw = Draw(key)
        return [draw.dense(*pair) for pair in pairwise(sizes)], (
            draw.uniform(batch, sizes[0]),
        )

    def loss_fn(params: Params, images: Array) -> Array:
        logits = _through(params, images)
        return losses.sigmoid_binary_cross_entropy(logits, images).sum(-1).mean()

    return Model(loss_fn, init)


def pinn(batch: int = 4096, width: int = 128) -> Model:
    """Poisson's equation on the unit square; as many points on the wall as inside."""

    def init(key: Array) -> tuple[Params, tuple[Array, ...]]:
        draw, sizes = Draw(key), (2, width, width, width, 1)
        points = draw.uniform(batch, 2), draw.uniform(batch, 2).at[:, 0].set(0.0)
        return [draw.dense(*pair) for pair in pairwise(sizes)], points

    def loss_fn(params: Params, points: Array, wall: Array) -> Array:
        def second(direction: Array) -> Array:
            along = jnp.broadcast_to(direction, points.shape)
            u = partial(_through, params)
            slope = lambda x: jax.jvp(u, (x,), (along,))[1]  # noqa: E731
            return jax.jvp(slope, (points,), (along,))[1]

        laplacian = second(jnp.eye(2)[0]) + second(jnp.eye(2)[1])
        source = jnp.sin(jnp.pi * points).prod(-1, keepdims=True)
        inside = losses.squared_error(laplacian, source).sum(-1).mean()
        u = _through(params, wall)
        return inside + losses.squared_error(u, jnp.zeros_like(u)).sum(-1).mean()

    return Model(loss_fn, init)


def _through(params: Params, x: Array) -> Array:
    for p in params[:-1]:
        x = jnp.tanh(dense(x, p))
    return dense(x, params[-1])


def wavefunction(
    batch: int = 4096, layers: int = 4, width: int = 64, determinants: int = 8
) -> Model:
    """The experiments' neural wavefunction, of lithium; energies included."""
    system = SYSTEMS["Li"]
    shape = wavefunction_model.Shape(
        layers=layers, width=width, determinants=determinants
    )

    def init(key: Array) -> tuple[Params, tuple[Array, ...]]:
        params = wavefunction_model.init_params(system, shape, jnp.float32, key)
        return params, (Draw(key).normal(batch, system.electrons, 3),)

    def loss_fn(params: Params, electrons: Array) -> Array:
        return wavefunction_methods.surrogate(system, params, electrons)[0]

    return Model(loss_fn, init, "fisher_exact")


MODELS: dict[str, Callable[[], Model]] = {
    "GPT-2 124M": gpt2,
    "ResNet-50": resnet50,
    "autoencoder": autoencoder,
    "ViT-B/16": vit,
    "PINN": pinn,
    "wavefunction": wavefunction,
}
TINY: dict[str, Callable[[], Model]] = {
    "GPT-2 124M": partial(gpt2, Transformer(16, 2, 2, 8, 8, 40)),
    "ResNet-50": partial(resnet50, ResNet(4, (2,), 2, 8, 16, 5)),
    "autoencoder": partial(autoencoder, 16, (12, 8, 4, 8, 12)),
    "ViT-B/16": partial(vit, Transformer(16, 2, 2, 16, 5, 7, 12)),
    "PINN": partial(pinn, 16, 8),
    "wavefunction": partial(wavefunction, 8, 2, 8, 2),
}
