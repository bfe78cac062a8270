"""What kinds of models are made of, and what an oracle needs to know of them."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax import losses
from tests.helpers import models

KEY = jax.random.key(0)
N = 4


class Term(NamedTuple):
    """A registered loss: its output `[n, ...]`, one case's value, and its data."""

    outputs: Callable[..., Array]
    per_case: Callable[..., Array]
    data: tuple[Any, ...] = ()


class Kind(NamedTuple):
    """A model with its loss, and what an oracle needs to know of it."""

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    terms: tuple[Term, ...]


def rows(z: Array) -> Array:
    return z.reshape(-1, z.shape[-1])


def log_loss(z: Array, label: Array) -> Array:
    return jax.nn.logsumexp(z) - z[label]


def classifier(apply: Callable[..., Array], params: Any, *args: Any) -> Kind:
    """A softmax at each position of the output."""
    params = double(params)
    shape = jax.eval_shape(apply, params, *args).shape
    labels = models.classes(1, shape[-1], *shape[:-1]).reshape(-1)
    outputs = lambda params, *args: rows(apply(params, *args))  # noqa: E731

    def loss_fn(params, *args):
        z = apply(params, *args)
        loss = losses.softmax_cross_entropy_with_integer_labels
        return loss(rows(z), labels).mean()

    return Kind(loss_fn, params, args, (Term(outputs, log_loss, (labels,)),))


def regression(apply: Callable[..., Array], params: Any, *args: Any) -> Kind:
    """A squared error, the sum over all of an example's outputs."""
    params = double(params)
    target = models.array(2, *jax.eval_shape(apply, params, *args).shape)

    def loss_fn(params, *args):
        error = losses.squared_error(apply(params, *args), target)
        return error.reshape(len(error), -1).sum(-1).mean()

    squared = lambda z, y: jnp.square(z - y).sum()  # noqa: E731
    return Kind(loss_fn, params, args, (Term(apply, squared, (target,)),))


def double(tree: Any) -> Any:
    """Random where a library starts with ones or zeros, which hide what is wrong."""
    leaves, treedef = jax.tree.flatten(tree)
    noise = [
        models.array(100 + i, *np.shape(x), scale=0.1) for i, x in enumerate(leaves)
    ]
    return treedef.unflatten(
        [np.asarray(x, float) + e for x, e in zip(leaves, noise, strict=True)]
    )


def maker(seed: int) -> Callable[..., Array]:
    """Weights of unit gain, each with a seed of its own."""
    seeds = itertools.count(100 * seed)

    def new(*shape: int) -> Array:
        fan_in = max(int(np.prod(shape[:-1])), 1)
        return models.array(next(seeds), *shape, scale=fan_in**-0.5)

    return new


def linear(new: Callable[..., Array], inputs: int, outputs: int) -> dict[str, Array]:
    return {"w": new(inputs, outputs), "b": 0.1 * new(outputs)}


def norm(features: int) -> dict[str, Array]:
    return {"g": jnp.ones(features), "b": jnp.zeros(features)}


def dense(p: dict[str, Array], x: Array) -> Array:
    return x @ p["w"] + p["b"]


def layer_norm(p: dict[str, Array], x: Array) -> Array:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["g"] + p["b"]


def conv(p: dict[str, Array], x: Array, stride: int = 1, groups: int = 1) -> Array:
    y = jax.lax.conv_general_dilated(
        x,
        p["w"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + p["b"]


def kernel(new: Callable[..., Array], size: int, inputs: int, outputs: int):
    return {"w": new(size, size, inputs, outputs), "b": 0.1 * new(outputs)}


def linen(module: nn.Module, *args: Any) -> tuple[Callable[..., Array], Any]:
    variables = module.init(KEY, *args)
    rest = {name: double(x) for name, x in variables.items() if name != "params"}

    def apply(params, *args):
        return module.apply({"params": params, **rest}, *args)

    return apply, variables["params"]


def haiku(function: Callable[..., Array], *args: Any):
    model = hk.without_apply_rng(hk.transform(function))
    return model.apply, model.init(KEY, *args)


def equinox(module: eqx.Module) -> tuple[Callable[..., Array], Any]:
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params
