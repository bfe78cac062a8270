"""Exact products for programs already written for the existing library.

Its numbers are compared in `test_published_estimators`.
"""

import re

import jax
import jax.numpy as jnp
import pytest

import kfac_jax
from kfac_jax import losses
from tests.helpers import models

KEY = jax.random.PRNGKey(0)
PARAMS = {"b": models.array(0, 2), "w": models.array(1, 3, 2)}
X, Y = models.array(2, 6, 3), models.array(3, 6, 2)
ARGS = PARAMS, (X, Y)
V = jax.tree.map(jnp.cos, PARAMS)


def outputs(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def func(params, batch):
    """Losses of the cases, a constant and a table."""
    z = outputs(params, batch[0])
    kfac_jax.register_squared_error_loss(z, batch[1])
    return jnp.square(z - batch[1]).sum(-1), 1, {"z": z}


def loss_fn(params, batch):
    return func(params, batch)[0].mean()


def implicit(function=func, **options):
    return kfac_jax.ImplicitExactCurvature(function, **options)


@pytest.mark.parametrize("matrix", ["fisher", "ggn"])
def test_products_are_the_plans(matrix):
    product = jax.jit(getattr(implicit(), f"multiply_{matrix}"))
    plan = kfac_jax.make_curvature(loss_fn, *ARGS)
    expected = plan.matvec(PARAMS, V, (X, Y), matrix=matrix)
    models.assert_trees_close(product(ARGS, V), expected)


def test_several_losses_of_other_kinds_add_up():
    def first(params, x):
        z = outputs(params, x)
        losses.softmax_cross_entropy_with_integer_labels(z, jnp.arange(6) % 2)

    def second(params, x):
        z = outputs(params, x)
        losses.normal_negative_log_likelihood(z[:, :1], z[:, 1:], Y[:, :1])

    def both(params, x):
        first(params, x)
        second(params, x)

    args = PARAMS, X
    parts = [implicit(f).multiply_fisher(args, V) for f in (first, second)]
    found = implicit(both).multiply_fisher(args, V)
    models.assert_trees_close(found, jax.tree.map(jnp.add, *parts))


REFUSED = {
    "does not offer params_index: expected 0, got -1. Wrap": (
        ValueError,
        lambda: implicit(params_index=-1),
    ),
    "does not offer batch_size_extractor: expected None, got <function": (
        ValueError,
        lambda: implicit(batch_size_extractor=lambda batch: 6),
    ),
    "ImplicitExactCurvature has no 'multiply_hessian' in kfac_jax; expected": (
        AttributeError,
        lambda: implicit().multiply_hessian,
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_refused(text):
    error, function = REFUSED[text]
    with pytest.raises(error, match=re.escape(text)):
        function()
