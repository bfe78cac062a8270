"""The models that benchmarks share: a loss function, its parameters, a batch of data.

Data are random, as they decide nothing about cost. Models of the experiments come
from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before JAX, whose threads they are

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import autoencoder_model
import classifier
import jax
import jax.numpy as jnp
import numpy as np
import published_names
import transformer
import wavefunction_methods
import wavefunction_model
from jax import Array
from wavefunction_systems import SYSTEMS

import kfac_jax

published_names.add()

Params = Any


class Model(NamedTuple):
    """What is trained, and on what."""

    loss_fn: Callable[..., Any]  # (params, *args) -> loss
    params: Params
    args: tuple[Array, ...]
    l2: float = 0.0
    estimation_mode: str = "fisher_gradients"


def autoencoder(batch: int) -> Model:
    """The paper's MNIST autoencoder."""
    images = _uniform(0, batch, 784)
    params = autoencoder_model.init_params(0)
    return Model(autoencoder_model.loss_fn, params, (images,), autoencoder_model.L2)


def convnet(batch: int) -> Model:
    """The experiments' convolutional net for Fashion-MNIST, in flax nnx."""
    args = _uniform(0, batch, 28, 28, 1), _classes(1, 10, batch)
    return Model(classifier.loss_fn, classifier.init_params(0), args)


def resnet(batch: int) -> Model:
    """A ResNet-20 for images of CIFAR's shape, with group norms, in plain JAX."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    params: dict[str, Any] = {
        "stem": _normal(0, 3, 3, 3, widths[0], scale=0.2),
        "blocks": [
            {
                "conv1": _normal(i, 3, 3, n, m, scale=(2 / (9 * n)) ** 0.5),
                "norm1": _scale_and_shift(m),
                "conv2": _normal(i + 20, 3, 3, m, m, scale=(2 / (9 * m)) ** 0.5),
                "norm2": _scale_and_shift(m),
            }
            | ({} if n == m else {"skip": _normal(i + 40, 1, 1, n, m, scale=n**-0.5)})
            for i, (n, m) in enumerate(pairwise(widths), 1)
        ],
        "output": {"w": _normal(60, 64, 10, scale=0.1), "b": jnp.zeros(10)},
    }
    args = _uniform(0, batch, 32, 32, 3), _classes(1, 10, batch)
    return Model(_resnet_loss, params, args)


def _resnet_loss(params: Params, images: Array, labels: Array) -> Array:
    x = _convolved(images, params["stem"])
    for block in params["blocks"]:
        stride = 2 if "skip" in block else 1
        h = _normalized(_convolved(x, block["conv1"], stride), block["norm1"])
        h = _normalized(_convolved(jax.nn.relu(h), block["conv2"]), block["norm2"])
        x = _convolved(x, block["skip"], stride) if "skip" in block else x
        x = jax.nn.relu(x + h)
    logits = x.mean((1, 2)) @ params["output"]["w"] + params["output"]["b"]
    loss = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
    return loss(logits, labels).mean()


def _convolved(x: Array, kernel: Array, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _normalized(x: Array, params: dict[str, Array], groups: int = 8) -> Array:
    grouped = x.reshape(*x.shape[:3], groups, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)
    x = ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
    return x * params["scale"] + params["shift"]


def language_model(batch: int) -> Model:
    """The experiments' character transformer, four layers, 256 wide, on 128 characters.

    Its layers are written out, as not everything that is compared here can see into a
    loop.
    """
    shape = transformer.Shape(vocabulary=80, width=256, hidden=1024)
    args = _classes(0, 80, batch, shape.context), _classes(1, 80, batch, shape.context)
    loss_fn = partial(transformer.loss_fn, heads=shape.heads)
    params = transformer.init_params(shape, 0)
    params["layers"] = [
        jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(shape.layers)
    ]
    return Model(loss_fn, params, args)


def wavefunction(batch: int) -> Model:
    """The experiments' neural wavefunction, of lithium; energies included."""
    system = SYSTEMS["Li"]
    shape = wavefunction_model.Shape(layers=2, width=24, determinants=4)
    params = wavefunction_model.init_params(
        system, shape, jnp.float32, jax.random.key(0)
    )

    def loss_fn(params: Params, electrons: Array) -> Array:
        return wavefunction_methods.surrogate(system, params, electrons)[0]

    electrons = _normal(0, batch, system.electrons, 3)
    return Model(loss_fn, params, (electrons,), estimation_mode="fisher_exact")


def pinn(batch: int) -> Model:
    """Poisson's equation on the unit square, by an MLP and forward mode."""
    sizes = (2, 64, 64, 64, 1)
    params = [
        {"w": _normal(i, n, m, scale=n**-0.5), "b": jnp.zeros(m)}
        for i, (n, m) in enumerate(pairwise(sizes))
    ]
    return Model(_poisson_loss, params, (_uniform(0, batch, 2), _uniform(1, batch, 2)))


def _poisson_loss(params: Params, points: Array, wall: Array) -> Array:
    def u(x: Array) -> Array:
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    def second(direction: Array) -> Array:
        along = jnp.broadcast_to(direction, points.shape)
        slope = lambda x: jax.jvp(u, (x,), (along,))[1]  # noqa: E731
        return jax.jvp(slope, (points,), (along,))[1]

    laplacian = second(jnp.eye(2)[0]) + second(jnp.eye(2)[1])
    source = jnp.sin(jnp.pi * points).prod(-1, keepdims=True)
    squared_error = kfac_jax.losses.squared_error
    inside = squared_error(laplacian, source).sum(-1).mean()
    return inside + squared_error(u(wall), jnp.zeros((len(wall), 1))).sum(-1).mean()


def _scale_and_shift(width: int) -> dict[str, Array]:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def _uniform(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def _classes(seed: int, count: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, count, shape), jnp.int32)


MODELS: dict[str, Callable[[], Model]] = {
    "autoencoder, batch 512": partial(autoencoder, 512),
    "autoencoder, batch 4096": partial(autoencoder, 4096),
    "convnet, batch 128": partial(convnet, 128),
    "ResNet-20, batch 64": partial(resnet, 64),
    "transformer, 8 x 128 tokens": partial(language_model, 8),
    "wavefunction, batch 1024": partial(wavefunction, 1024),
    "PINN, batch 512": partial(pinn, 512),
}
"""By name, with the batch that results are for."""


def plan(model: Model, **options: Any) -> kfac_jax.Curvature:
    """The model's plan, made from shapes."""
    shapes = jax.eval_shape(lambda *x: x, model.params, *model.args)
    return kfac_jax.make_curvature(
        model.loss_fn,
        *shapes,
        l2=model.l2,
        estimation_mode=model.estimation_mode,
        **options,
    )
