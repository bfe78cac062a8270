"""Losses of which not all cases count, and returned losses with terms of their own."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import losses
from tests.helpers import models

N = 12
X = models.array(0, N, 4)
MASK = jnp.asarray([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0])
COUNTS = MASK != 0
PARAMS = {"hidden": models.array(1, 4, 3), "out": models.array(2, 3, 2)}


def outputs(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def normal(z, y, **options):
    return losses.normal_negative_log_likelihood(z, 0.3 * z, y, **options)


def logcosh(z, y, **options):
    return losses.convex(lambda z, y: jnp.log(jnp.cosh(z - y)).sum(), z, y, **options)


CASES = {
    "convex": (logcosh, models.array(8, N, 2)),
    "integer": (
        losses.softmax_cross_entropy_with_integer_labels,
        models.classes(3, 2, N),
    ),
    "soft": (losses.softmax_cross_entropy, jax.nn.softmax(models.array(4, N, 2))),
    "sigmoid": (
        losses.sigmoid_binary_cross_entropy,
        models.classes(5, 2, N, 2).astype(float),
    ),
    "squared": (losses.squared_error, models.array(6, N, 2)),
    "normal": (normal, models.array(7, N, 2)),
}


def _curvature(loss_fn, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = kfac_jax.make_curvature(
            loss_fn, PARAMS, *args, estimation_mode="fisher_exact"
        )
    _, grads, statistics = plan.value_grad_and_statistics(PARAMS, *args)
    factors = plan.update_factors(plan.init_factors(PARAMS), statistics, 1)
    return grads, plan.approximation(factors).to_dense(), plan.matvec, plan


@pytest.mark.sampled(6)
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_a_masked_mean_is_the_mean_of_the_cases_that_count(name, weight):
    """The value, the gradient and the factors are those of the other cases alone."""
    loss, targets = CASES[name]

    def masked(params, x, y, mask):
        values = loss(outputs(params, x), y, mask=mask, weight=weight)
        return weight * values.sum() / mask.sum()

    def alone(params, x, y):
        return weight * loss(outputs(params, x), y, weight=weight).sum() / len(x)

    z = outputs(PARAMS, X)
    bools, numbers = (loss(z, targets, mask=mask) for mask in (COUNTS, MASK))
    np.testing.assert_array_equal(bools, numbers)
    np.testing.assert_allclose(bools[COUNTS], loss(z, targets)[COUNTS], rtol=1e-12)
    grads, fisher, *_ = _curvature(masked, X, targets, MASK)
    few, expected, *_ = _curvature(alone, X[COUNTS], targets[COUNTS])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), grads, few)
    np.testing.assert_allclose(fisher, expected, rtol=1e-10, atol=1e-14)


def test_a_mask_of_positions():
    """What does not count has no part in value or exact products."""
    x = models.array(0, 4, 3, 4)
    y, mask = models.classes(1, 2, 4, 3), models.classes(2, 2, 4, 3).astype(float)

    def loss_fn(params, x, y, mask):
        values = losses.softmax_cross_entropy_with_integer_labels(
            outputs(params, x), y, mask=mask
        )
        return values.sum() / mask.sum()

    *_, plan = _curvature(loss_fn, x, y, mask)
    v = jax.tree.map(jnp.ones_like, PARAMS)
    found = plan.matvec(PARAMS, v, x, y, mask)
    moved = jnp.where(mask[..., None] != 0, x, 7.0)
    again = plan.matvec(PARAMS, v, moved, y, mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, again
    )


def test_no_case_that_counts_is_no_curvature():
    """An empty micro-batch leaves no NaN in the statistics."""
    loss, targets = CASES["squared"]

    def loss_fn(params, x, y, mask):
        values = loss(outputs(params, x), y, mask=mask)
        return values.sum() / jnp.maximum(mask.sum(), 1.0)

    *_, plan = _curvature(loss_fn, X, targets, MASK)
    none = jnp.zeros(N)
    _, _, statistics = plan.value_grad_and_statistics(PARAMS, X, targets, none)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(statistics))


@pytest.mark.parametrize("shape", [(), (N + 1,), (2,)])
def test_masks_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"mask must have the leading axes.*got shape"):
        losses.squared_error(jnp.ones((N, 2)), mask=jnp.ones(shape))


# ----------------------------------------------------------------------------- rests


def regularized(params, x, y, scale=0.01):
    value = losses.squared_error(outputs(params, x), y).sum(-1).mean()
    return value + scale * sum(jnp.abs(w).sum() for w in jax.tree.leaves(params))


ARGS = (X, CASES["squared"][1])


def test_a_rest_is_told_and_only_its_gradient_counts():
    with pytest.warns(
        UserWarning, match=r'mask=.*a term that is not.*on_rest="ignore"'
    ):
        plan = kfac_jax.make_curvature(regularized, PARAMS, *ARGS)
    value, grads, _ = plan.value_grad_and_statistics(
        PARAMS, *ARGS, rng=jax.random.key(0)
    )
    expected, slopes = jax.value_and_grad(regularized)(PARAMS, *ARGS)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), grads, slopes
    )


def test_a_rest_that_is_declared_is_not_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac_jax.make_curvature(regularized, PARAMS, *ARGS, on_rest="ignore")


def test_a_rest_may_be_an_error():
    with pytest.raises(ValueError, match="a term that is not registered"):
        kfac_jax.make_curvature(regularized, PARAMS, *ARGS, on_rest="error")


@pytest.mark.parametrize("factor", [N, 1 / N, 2, 0.5, 2 * N, 0.5 / N, N * 2 * 2, 1 / 2])
def test_a_factor_is_an_error(factor):
    """As of a sum in place of a mean, over cases or outputs, with or without a half."""

    def loss_fn(params, x, y):
        return factor * losses.squared_error(outputs(params, x), y).sum(-1).mean()

    with pytest.raises(ValueError, match=r"Average over cases.*weight="):
        kfac_jax.make_curvature(loss_fn, PARAMS, *ARGS)


def test_a_masked_mean_without_a_mask_is_told_of_it():
    """Advice of a weight would make the curvature that of all cases."""

    def loss_fn(params, x, y, mask):
        values = losses.squared_error(outputs(params, x), y).sum(-1)
        return (values * mask).sum() / mask.sum()

    with pytest.warns(UserWarning, match="pass `mask=` to the registered loss") as told:
        kfac_jax.make_curvature(loss_fn, PARAMS, *ARGS, MASK)
    assert "weight=" not in str(told[0].message)


@pytest.mark.parametrize("on_rest", ["warn", "error"])
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("own", [0.3, 0.5])
def test_a_constant_is_no_rest(own, kind, on_rest):
    """That of a normal distribution, whose logarithm libraries return as it is."""

    def loss_fn(params, x, y):
        z = outputs(params, x)
        kfac_jax.register_normal_predictive_distribution(z, y, variance=own)
        return -jax.scipy.stats.norm.logpdf(y, z, own**0.5).sum(-1).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac_jax.make_curvature(
            loss_fn, jax.tree.map(kind, PARAMS), *ARGS, on_rest=on_rest
        )


def test_a_constant_whose_loss_doubles_is_no_factor():
    """The ratio is 2 at these parameters, but the difference is the same elsewhere."""

    def plain(params, x, y):
        return losses.squared_error(outputs(params, x), y).sum(-1).mean()

    value = float(plain(PARAMS, *ARGS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac_jax.make_curvature(lambda *args: plain(*args) + value, PARAMS, *ARGS)


def test_a_rest_of_directions_is_no_constant():
    """It keeps its value where all weights are scaled."""

    def loss_fn(params, x, y):
        fit = losses.squared_error(outputs(params, x), y).sum(-1).mean()
        w = params["hidden"]
        return fit + 0.3 * w.sum() / jnp.linalg.norm(w)

    with pytest.warns(UserWarning, match="a term that is not registered"):
        kfac_jax.make_curvature(loss_fn, PARAMS, *ARGS)
