"""What gathering statistics computes, and what it must not, in compiled programs."""

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax

SIZES = (24, 40, 32, 8)
BATCH = 64


def network(params, x):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def loss_fn(params, x, y):
    return kfac_jax.losses.squared_error(network(params, x), y).sum(-1).mean()


def weighted(params, x, y):
    """Cases are weighted by something dear that has no part in the statistics."""
    dear = jax.vmap(jax.hessian(lambda x: network(params, x).sum()))(x)
    weights = jax.lax.stop_gradient(jnp.tanh(dear.sum((1, 2))) + 2)
    errors = kfac_jax.losses.squared_error(network(params, x), y).sum(-1)
    slope = (weights * errors).mean()
    return errors.mean() + slope - jax.lax.stop_gradient(slope)


def problem():
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    params = [
        jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
        for key, shape in zip(keys[1:], pairwise(SIZES), strict=True)
    ]
    x = jax.random.normal(keys[0], (BATCH, SIZES[0]), jnp.float32)
    return params, x, jnp.zeros((BATCH, SIZES[-1]), jnp.float32)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def statistics_of(curvature):
    def function(params, *data):
        key = jax.random.key(0)
        return curvature.value_grad_and_statistics(params, *data, rng=key)

    return function


def products(program):
    return len(re.findall(r" dot\(", program.as_text()))


def test_sampled_gradients_of_weights_are_not_computed():
    """Beside the gradient: cotangents of the layers' inputs, and two moments each."""
    args = problem()
    curvature = kfac_jax.make_curvature(loss_fn, *args)
    gradient = compiled(jax.value_and_grad(loss_fn), *args)
    layers = len(SIZES) - 1
    expected = products(gradient) + (layers - 1) + 2 * layers
    assert products(compiled(statistics_of(curvature), *args)) == expected


@pytest.mark.slow
def test_a_pass_over_a_fraction_ends_at_what_is_registered():
    """It neither computes what the loss needs besides, nor changes the statistics."""
    args = problem()
    dear, plain = (
        kfac_jax.make_curvature(f, *args, statistics_fraction=0.5)
        for f in (weighted, loss_fn)
    )
    costs, found = [], []
    for curvature in (dear, plain):
        only = compiled(
            lambda *args, curvature=curvature: statistics_of(curvature)(*args)[2], *args
        )
        costs.append(only.cost_analysis()["flops"])
        found.append(only(*args))
    assert costs[0] < 1.1 * costs[1]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *found
    )
    grads = statistics_of(dear)(*args)[1]
    expected = jax.grad(weighted)(*args)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        grads,
        expected,
    )
