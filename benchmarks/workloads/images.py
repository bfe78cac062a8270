"""Tasks on digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kfac_jax
from workloads import data
from workloads.task import Params, Task, apply, dense, rows, stack, through

PIXELS, CLASSES = 784, 10


def classifier(
    init: Callable[[Array], Params],
    logits: Callable[[Params, Array], Array],
    batch: int,
    steps: int,
) -> Task:
    """A task of telling digits apart; its error is the share of wrong answers."""
    images, labels, test_images, test_labels = map(jnp.asarray, data.digits())
    loss = kfac_jax.losses.softmax_cross_entropy_with_integer_labels

    def loss_fn(params: Params, x: Array, y: Array) -> Array:
        return loss(logits(params, x), y).mean()

    def evaluate(params: Params, x: Array, y: Array) -> tuple[Array, Array]:
        z = logits(params, x)
        chosen = jnp.take_along_axis(z, y[:, None], 1)[:, 0]
        loss = (jax.nn.logsumexp(z, -1) - chosen).mean()
        return loss, (z.argmax(-1) != y).mean()

    return Task(
        loss_fn=loss_fn,
        init=init,
        batch=rows(batch),
        train=(images, labels),
        held_out=(test_images, test_labels),
        evaluate=evaluate,
        steps=steps,
    )


def mlp(batch: int, steps: int) -> Task:
    """784-128-128-10, rectified."""

    def init(key: Array) -> Params:
        return stack(key, PIXELS, 128, 128, CLASSES, scale=2**0.5)

    def logits(params: Params, x: Array) -> Array:
        for layer in params[:-1]:
            x = jax.nn.relu(apply(layer, x))
        return apply(params[-1], x)

    return classifier(init, logits, batch, steps)


def _kernel(key: Array, inputs: int, outputs: int, size: int = 3) -> Params:
    scale = (2 / (size * size * inputs)) ** 0.5
    w = scale * jax.random.normal(key, (size, size, inputs, outputs))
    return {"w": w, "b": jnp.zeros(outputs)}


def _convolved(layer: Params, x: Array, stride: int = 1) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, layer["w"], (stride, stride), "SAME", dimension_numbers=numbers
    )
    return y + layer["b"]


def _norm(width: int) -> Params:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def _normalized(layer: Params, x: Array, axes: tuple[int, ...]) -> Array:
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def convnet() -> Task:
    """Two strided convolutions and a hidden layer."""

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 4)
        return {
            "first": _kernel(keys[0], 1, 16),
            "second": _kernel(keys[1], 16, 32),
            "hidden": dense(keys[2], 7 * 7 * 32, 64, 2**0.5),
            "output": dense(keys[3], 64, CLASSES),
        }

    def logits(params: Params, x: Array) -> Array:
        x = x.reshape(-1, 28, 28, 1)
        x = jax.nn.relu(_convolved(params["first"], x, 2))
        x = jax.nn.relu(_convolved(params["second"], x, 2))
        x = jax.nn.relu(apply(params["hidden"], x.reshape(len(x), -1)))
        return apply(params["output"], x)

    return classifier(init, logits, 64, 200)


def batch_norm() -> Task:
    """The convolutions with the batch's own norm, as in training."""

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 3)
        return {
            "first": _kernel(keys[0], 1, 16) | _norm(16),
            "second": _kernel(keys[1], 16, 32) | _norm(32),
            "output": dense(keys[2], 32, CLASSES),
        }

    def logits(params: Params, x: Array) -> Array:
        x = x.reshape(-1, 28, 28, 1)
        for name in ("first", "second"):
            layer = params[name]
            x = _normalized(layer, _convolved(layer, x, 2), (0, 1, 2))
            x = jax.nn.relu(x * layer["scale"] + layer["shift"])
        return apply(params["output"], x.mean((1, 2)))

    return classifier(init, logits, 128, 200)


def resnet() -> Task:
    """Two residual blocks of group norms behind a strided stem."""

    def block(key: Array, width: int) -> Params:
        keys = jax.random.split(key)
        return {
            "first": _kernel(keys[0], width, width) | _norm(width),
            "second": _kernel(keys[1], width, width) | _norm(width),
        }

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 5)
        return {
            "stem": _kernel(keys[0], 1, 16),
            "blocks": [block(keys[1], 16), block(keys[2], 32)],
            "widen": _kernel(keys[3], 16, 32, 1),
            "output": dense(keys[4], 32, CLASSES),
        }

    def grouped(layer: Params, x: Array) -> Array:
        parts = x.reshape(*x.shape[:3], 4, -1)
        x = _normalized(layer, parts, (1, 2, 4)).reshape(x.shape)
        return x * layer["scale"] + layer["shift"]

    def residual(layers: Params, x: Array) -> Array:
        h = jax.nn.relu(grouped(layers["first"], _convolved(layers["first"], x)))
        return jax.nn.relu(
            x + grouped(layers["second"], _convolved(layers["second"], h))
        )

    def logits(params: Params, x: Array) -> Array:
        x = _convolved(params["stem"], x.reshape(-1, 28, 28, 1), 2)
        x = residual(params["blocks"][0], x)
        x = residual(params["blocks"][1], _convolved(params["widen"], x, 2))
        return apply(params["output"], x.mean((1, 2)))

    return classifier(init, logits, 64, 150)


def gru() -> Task:
    """A gated recurrent unit that reads an image row by row, in a scan."""
    width = 64

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 5)
        return {
            "gates": dense(keys[0], 28 + width, 2 * width),
            "new": dense(keys[1], 28 + width, width),
            "output": dense(keys[2], width, CLASSES),
        }

    def logits(params: Params, x: Array) -> Array:
        def step(h: Array, row: Array) -> tuple[Array, None]:
            gates = apply(params["gates"], jnp.concatenate([row, h], -1))
            reset, update = jnp.split(jax.nn.sigmoid(gates), 2, -1)
            seen = jnp.concatenate([row, reset * h], -1)
            new = jnp.tanh(apply(params["new"], seen))
            return update * h + (1 - update) * new, None

        start = jnp.zeros((len(x), width))
        last, _ = jax.lax.scan(step, start, x.reshape(-1, 28, 28).swapaxes(0, 1))
        return apply(params["output"], last)

    return classifier(init, logits, 128, 200)


def autoencoder(batch: int, steps: int) -> Task:
    """The paper's, 784-1000-500-250-30-250-500-1000-784, started sparsely."""
    import autoencoder_model as model

    images, _, test_images, _ = map(jnp.asarray, data.digits())

    def evaluate(params: Params, x: Array) -> tuple[Array, Array]:
        logits = model.encode_decode(params, x)
        loss = (jax.nn.softplus(logits) - x * logits).sum(-1).mean()
        return loss, model.reconstruction_error(params, x)

    weights = kfac_jax.initializers.sparse_normal(incoming=15)

    def init(key: Array) -> Params:
        sizes = model.SIZES
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"w": weights(k, (i, o), jnp.float32), "b": jnp.zeros(o)}
            for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def loss_fn(params: Params, x: Array) -> Array:
        logits = model.encode_decode(params, x)
        return kfac_jax.losses.sigmoid_binary_cross_entropy(logits, x).sum(-1).mean()

    return Task(
        loss_fn=loss_fn,
        init=init,
        batch=rows(batch),
        train=(images,),
        held_out=(test_images,),
        evaluate=evaluate,
        steps=steps,
        evaluated=1000,
    )


def vae() -> Task:
    """A variational autoencoder 784-256-16-256-784.

    Only the reconstruction has a distribution of its own; the divergence of the code
    from its prior is registered as that of a convex loss over the encoder's outputs.
    """
    images, _, test_images, _ = map(jnp.asarray, data.digits())
    code = 16

    def init(key: Array) -> Params:
        first, second = jax.random.split(key)
        return {
            "encoder": stack(first, PIXELS, 256, 2 * code),
            "decoder": stack(second, code, 256, PIXELS),
        }

    def divergence(z: Array) -> Array:
        mean, log_variance = z[:code], z[code:]
        return 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum()

    def parts(params: Params, x: Array, noise: Array) -> tuple[Array, Array]:
        z = through(params["encoder"], x)
        seen = z[:, :code] + jnp.exp(0.5 * z[:, code:]) * noise
        return z, through(params["decoder"], seen)

    def loss_fn(params: Params, x: Array, noise: Array) -> Array:
        z, logits = parts(params, x, noise)
        loss = kfac_jax.losses.sigmoid_binary_cross_entropy(logits, x).sum(-1).mean()
        return loss + kfac_jax.losses.convex(divergence, z).mean()

    def batch(key: Array, arrays: Any) -> Any:
        first, second = jax.random.split(key)
        (x,) = rows(128)(first, arrays[:1])
        return x, jax.random.normal(second, (128, code))

    def evaluate(params: Params, x: Array, noise: Array) -> tuple[Array, Array]:
        z, logits = parts(params, x, noise)
        error = (jax.nn.softplus(logits) - x * logits).sum(-1).mean()
        return error + jax.vmap(divergence)(z).mean(), error

    def noise(x: Array) -> Array:
        return jax.random.normal(jax.random.key(7), (len(x), code))

    return Task(
        loss_fn=loss_fn,
        init=init,
        batch=batch,
        train=(images, noise(images)),
        held_out=(test_images, noise(test_images)),
        evaluate=evaluate,
        steps=300,
    )
