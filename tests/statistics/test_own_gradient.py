"""Statistics beside a gradient that the loss function computes itself."""

import jax
import jax.numpy as jnp
import pytest

import kfac_jax
from kfac_jax import blocks
from tests.helpers import models

P = models.problem("softmax", params=models.dense_params(0, 3, 5, 4))
KEY = jax.random.key(0)


def own(params, *args):
    """The loss with its gradient as auxiliary data."""
    return jax.value_and_grad(P.loss_fn)(params, *args)


def plans(**options):
    """Of the loss function, and of its value and gradient."""
    plain = kfac_jax.make_curvature(P.loss_fn, P.params, *P.args, **options)
    mine = kfac_jax.make_curvature(own, P.params, *P.args, has_aux=True, **options)
    assert [str(x) for x in plain.layers] == [str(x) for x in mine.layers]
    return plain, mine


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {"estimation_mode": "fisher_gradients"},
        {"estimation_mode": "fisher_exact"},
        {"estimation_mode": "fisher_empirical"},
        {"statistics_fraction": 0.5},
        {"blocks": blocks.Eigen()},
    ],
    ids=str,
)
def test_statistics_are_those_of_the_loss_function(options):
    plain, mine = plans(**options)
    value, grads, statistics = plain.value_grad_and_statistics(
        P.params, *P.args, rng=KEY
    )
    (loss, gradient), found = mine.value_and_statistics(P.params, *P.args, rng=KEY)
    models.assert_trees_close(
        (loss, gradient, found._replace(products={})),
        (value, grads, statistics._replace(products={})),
    )


def test_the_rest_shares_the_forward_pass_and_is_not_differentiated():
    plain, mine = plans()

    def flops(function):
        jitted = jax.jit(lambda params, *args: function(params, *args, rng=KEY))
        return jitted.lower(P.params, *P.args).compile().cost_analysis()["flops"]

    both = flops(plain.value_grad_and_statistics)
    assert flops(mine.value_and_statistics) <= 1.02 * both


def test_a_loss_that_is_registered_in_a_derivative_rule():
    """What is registered is met where the gradient is computed, in the rule."""

    @jax.custom_jvp
    def surrogate(params, x):
        return jnp.square(x).mean()

    @surrogate.defjvp
    def rule(primals, tangents):
        z, slope = jax.jvp(models.mlp, primals, tangents)
        kfac_jax.register_normal_predictive_distribution(z)
        return surrogate(*primals), (slope * jnp.sin(z)).mean()

    def loss_fn(params, x):
        return jax.value_and_grad(surrogate)(params, x)

    def plain(params, x):
        z = models.mlp(params, x)
        return jnp.square(kfac_jax.register_normal_predictive_distribution(z)).mean()

    x = P.args[0]
    options = {"estimation_mode": "fisher_exact"}
    mine = kfac_jax.make_curvature(loss_fn, P.params, x, has_aux=True, **options)
    (loss, gradient), found = mine.value_and_statistics(P.params, x)
    models.assert_trees_close(loss, jnp.square(x).mean())
    expected = jax.grad(
        lambda p: (models.mlp(p, x) * jnp.sin(models.mlp(P.params, x))).mean()
    )(P.params)
    models.assert_trees_close(gradient, expected)
    other = kfac_jax.make_curvature(plain, P.params, x, **options)
    _, _, statistics = other.value_grad_and_statistics(P.params, x)
    models.assert_trees_close(found.layers, statistics.layers)


def test_there_is_no_gradient_to_keep_as_a_product():
    x, y = P.args
    wide = models.dense_params(0, 40, 40, 4)
    args = models.array(5, 2, 40), y[:2]
    plan = kfac_jax.make_curvature(
        own,
        wide,
        *args,
        has_aux=True,
        blocks=blocks.Kronecker(gradient_products=True),
    )
    with pytest.raises(ValueError, match="no gradient to keep as a product"):
        plan.value_and_statistics(wide, *args, rng=KEY)
    with pytest.raises(ValueError, match="samples; pass a key"):
        plans()[1].value_and_statistics(P.params, x, y)
