"""The Laplace approximation against dense algebra, and exact Bayesian regression."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from kfac_jax.blocks import Diagonal, Eigen, Full, Kronecker
from kfac_jax.laplace import Laplace, expected_softmax, probit
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels
from tests.helpers import models

N = 12
PARAMS = {
    "w": models.array(0, 3, 4),
    "b": models.array(1, 4),
    "o": models.array(2, 4, 3),
}
X, LABELS = models.array(3, N, 3), jnp.arange(N) % 3
PRIOR = 0.7
BY_LAYER = {"w+b": 0.5, "o": 2.0}
# of 20,000 draws, whose covariance has a relative error of 1 / √10,000 per entry
DRAWS, DRAWS_TOLERANCE = 20_000, 0.05


def apply(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["o"]


def loss_fn(p, x, labels):
    return softmax_cross_entropy_with_integer_labels(apply(p, x), labels).mean()


@functools.cache
def operator(block):
    curvature = kfac_jax.make_curvature(
        loss_fn, PARAMS, X, LABELS, estimation_mode="fisher_exact", blocks=block
    )
    return curvature.over(PARAMS, [(X[:5], LABELS[:5]), (X[5:], LABELS[5:])])


LAST = (("o", Kronecker()), ("w", None))
CASES = {
    "Kronecker": (Kronecker(), PRIOR),
    "Kronecker, by layer": (Kronecker(), BY_LAYER),
    "Eigen": (Eigen(), BY_LAYER),
    "Full": (Full(), PRIOR),
    "Diagonal": (Diagonal(), PRIOR),
    "last layer": (LAST, {"o": 2.0}),
}


def made(name):
    block, prior = CASES[name]
    # a mapping cannot be a key of the cache
    op = operator(block) if not isinstance(block, tuple) else last_layer()
    return Laplace(mean=PARAMS, curvature=op, cases=N, prior_precision=prior)


@functools.cache
def last_layer():
    curvature = kfac_jax.make_curvature(
        loss_fn,
        PARAMS,
        X,
        LABELS,
        estimation_mode="fisher_exact",
        blocks=lambda layer: Kronecker() if layer.name == "o" else None,
    )
    return curvature.over(PARAMS, [(X, LABELS)])


def dense(posterior):
    """The covariance, the precision's logarithmic determinant, δ of each parameter."""
    prior = posterior.prior_precision
    by_leaf = {
        k: (prior if not isinstance(prior, dict) else prior.get(name))
        for k, name in (("w", "w+b"), ("b", "w+b"), ("o", "o"))
    }
    delta = ravel_pytree(
        {k: jnp.full(x.shape, by_leaf[k] or 0.0) for k, x in PARAMS.items()}
    )[0]
    random = np.asarray(delta) > 0
    precision = N * np.asarray(posterior.curvature.to_dense()) + np.diag(delta)
    precision = precision[np.ix_(random, random)]
    covariance = np.zeros((len(random), len(random)))
    covariance[np.ix_(random, random)] = np.linalg.inv(precision)
    return covariance, np.linalg.slogdet(precision)[1], np.asarray(delta)


@pytest.mark.parametrize("name", CASES)
def test_covariance_and_evidence_are_those_of_dense_algebra(name):
    posterior = made(name)
    covariance, logdet, delta = dense(posterior)
    flat, restore = ravel_pytree(PARAMS)
    found = jax.vmap(lambda v: ravel_pytree(posterior.covariance(restore(v)))[0])(
        jnp.eye(len(flat))
    )
    np.testing.assert_allclose(found, covariance, rtol=1e-8, atol=1e-12)
    random = delta > 0
    expected = -3.2 + 0.5 * (
        np.log(delta[random]).sum() - (delta * np.square(flat)).sum() - logdet
    )
    np.testing.assert_allclose(posterior.log_evidence(-3.2), expected, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_the_jacobian(name):
    posterior = made(name)
    covariance, *_ = dense(posterior)
    flat, restore = ravel_pytree(PARAMS)
    x = models.array(7, 5, 3)
    predict = jax.jit(lambda posterior, x: posterior.predict(apply, x, batch_size=2))
    mean, found = predict(posterior, x)
    jacobian = jax.jacobian(lambda v: apply(restore(v), x))(flat)
    expected = np.einsum("nip,pq,njq->nij", jacobian, covariance, jacobian)
    np.testing.assert_allclose(mean, apply(PARAMS, x), rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["Kronecker, by layer", "last layer"])
def test_draws_have_the_covariance(name):
    posterior = made(name)
    covariance, *_ = dense(posterior)
    draw = jax.jit(jax.vmap(lambda key: ravel_pytree(posterior.sample(key))[0]))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), DRAWS)))
    flat = np.asarray(ravel_pytree(PARAMS)[0])
    found = (draws - flat).T @ (draws - flat) / DRAWS
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.abs(found - covariance).max() <= DRAWS_TOLERANCE * scale.max()
    fixed = np.diag(covariance) == 0
    np.testing.assert_array_equal(draws[:, fixed], np.tile(flat[fixed], (DRAWS, 1)))
    assert fixed.any() == (name == "last layer")


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("name", ["Kronecker", "last layer"])
def test_the_tuned_prior_has_the_largest_evidence(name, by_layer):
    posterior = made(name).tuned(by_layer=by_layer)
    assert isinstance(posterior.prior_precision, dict) == by_layer

    def evidence(logs):
        prior = jax.tree.map(jnp.exp, logs)
        return dataclasses.replace(posterior, prior_precision=prior).log_evidence(0.0)

    logs = jax.tree.map(jnp.log, posterior.prior_precision)
    slopes = jax.tree.leaves(jax.grad(evidence)(logs))
    np.testing.assert_allclose(slopes, 0.0, atol=1e-8)
    for change in (-0.3, 0.3):
        other = jax.tree.map(lambda x, change=change: x + change, logs)
        assert evidence(other) < evidence(logs)


def test_of_linear_regression_the_evidence_is_exact():
    """The marginal likelihood of a normal distribution of all targets."""
    noise, delta = 0.2, 0.9
    x, y = models.array(4, 9, 3), models.array(5, 9, 1)

    def regression(w, x, y):
        kfac_jax.register_normal_predictive_distribution(x @ w, y, variance=noise)
        return (jnp.square(x @ w - y) / (2 * noise)).sum(-1).mean()

    precision = x.T @ x / noise + delta * jnp.eye(3)
    w = jnp.linalg.solve(precision, x.T @ y / noise)  # the posterior's mean
    curvature = kfac_jax.make_curvature(
        regression, w, x, y, estimation_mode="fisher_exact"
    )
    posterior = Laplace(
        mean=w, curvature=curvature.at(w, x, y), cases=9, prior_precision=delta
    )
    log_likelihood = -9 * regression(w, x, y) - 4.5 * jnp.log(2 * jnp.pi * noise)
    marginal = x @ x.T / delta + noise * jnp.eye(9)
    expected = jax.scipy.stats.multivariate_normal.logpdf(
        y[:, 0], jnp.zeros(9), marginal
    )
    np.testing.assert_allclose(posterior.log_evidence(log_likelihood), expected)
    _, covariance = posterior.predict(lambda w, x: x @ w, x)
    exact = x @ jnp.linalg.inv(precision) @ x.T
    np.testing.assert_allclose(covariance[:, 0, 0], jnp.diagonal(exact), rtol=1e-9)


def test_probabilities_of_normal_logits():
    mean = models.array(6, 4, 3)
    roots = models.array(7, 4, 3, 3)
    covariance = roots @ roots.swapaxes(-1, -2)
    found = expected_softmax(jax.random.key(0), mean, covariance, 20_000)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(20_000, 4, 3))
    logits = np.asarray(mean) + np.einsum("nij,snj->sni", roots, noise)
    expected = np.asarray(jax.nn.softmax(logits)).mean(0)
    np.testing.assert_allclose(found, expected, atol=0.02)
    np.testing.assert_allclose(found.sum(-1), 1.0)


def test_the_probit_approximation_is_near_the_mean_of_a_logistic_function():
    """Of two classes, where it is MacKay's; without variances it is the softmax."""
    mean = jnp.stack([jnp.linspace(-3.0, 3.0, 7), jnp.zeros(7)], -1)
    covariance = jnp.broadcast_to(jnp.diag(jnp.array([2.0, 2.0])), (7, 2, 2))
    expected = expected_softmax(jax.random.key(0), mean, covariance, 50_000)
    np.testing.assert_allclose(probit(mean, covariance), expected, atol=0.05)
    plain = jax.nn.softmax(mean)
    assert np.abs(plain - expected).max() > 0.1
    np.testing.assert_allclose(probit(mean, 0 * covariance), plain)


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected \['o', 'w\+b'\], got \['w'\]"):
        Laplace(
            mean=PARAMS,
            curvature=operator(Kronecker()),
            cases=N,
            prior_precision={"w": 1.0},
        )
    op = operator(Kronecker())
    for wrong, words in (
        ({"cases": 0}, r"cases \(N\) must be positive; got 0"),
        ({"prior_precision": -1.0}, r"prior_precision \(δ\) must be positive"),
        ({"prior_precision": {"w+b": 1.0, "o": 0.0}}, r"\(δ\) must be positive; got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Laplace(**{"mean": PARAMS, "curvature": op, "cases": N} | wrong)
    with pytest.raises(ValueError, match="samples must"):
        expected_softmax(jax.random.key(0), jnp.ones(2), jnp.eye(2), 0)
    with pytest.raises(ValueError, match=r"one for each layer with a block: expected"):
        op.solve(PARAMS, {"w+b": 1.0})
    with pytest.raises(ValueError, match=r"must be at least 0; got -1"):
        op.logdet({"w+b": 1.0, "o": -1.0})
    linked = kfac_jax.make_curvature(
        loss_fn,
        PARAMS,
        X,
        LABELS,
        estimation_mode="fisher_exact",
        structure=kfac_jax.BlockTridiagonal(),
    ).at(PARAMS, X, LABELS)
    with pytest.raises(ValueError, match="Linked layers are damped together: expected"):
        linked.solve(PARAMS, {"w+b": 1.0, "o": 1.0})
    with pytest.raises(ValueError, match="no eigenvalues in closed form: expected a"):
        linked.eigenvalues()


@pytest.mark.parametrize("mode", ["exact", "factored"])
def test_dampings_by_layer_are_those_of_each_layer(mode):
    op = operator(Kronecker())
    v = jax.tree.map(jnp.ones_like, PARAMS)
    by_layer = {"w+b": 0.3, "o": 2.0}
    for call in (
        lambda damping: op.solve(v, damping, mode),
        lambda damping: op.power(v, -0.5, damping, mode),
        lambda damping: op.sample(jax.random.key(0), damping, mode),
    ):
        found, first, second = map(call, (by_layer, 0.3, 2.0))
        models.assert_trees_close(found, first | {"o": second["o"]})
    parts = [op.logdet(x, mode) for x in (0.3, 2.0)]
    mixed = op.logdet(by_layer, mode), op.logdet({"w+b": 2.0, "o": 0.3}, mode)
    np.testing.assert_allclose(sum(mixed), sum(parts))
    total = sum(jnp.log(e + 0.3).sum() for e in op.eigenvalues().values())
    np.testing.assert_allclose(op.logdet(0.3, "exact"), total)
