"""The Laplace approximation against dense algebra, and exact Bayesian regression."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from kfac_jax.blocks import Diagonal, Eigen, Full, Identity, Kronecker, KroneckerSum
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


@pytest.mark.sampled(2)
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


@pytest.mark.sampled(2)
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
    """Of two classes with one logit at zero; without variances it is the softmax."""
    mean = jnp.stack([jnp.linspace(-3.0, 3.0, 7), jnp.zeros(7)], -1)
    covariance = jnp.broadcast_to(jnp.diag(jnp.array([4.0, 0.0])), (7, 2, 2))
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    logistic = 1 / (1 + np.exp(-(np.asarray(mean)[:, :1] + 2 * points)))
    expected = logistic @ weights / weights.sum()
    found = probit(mean, covariance)
    np.testing.assert_allclose(found[:, 0], expected, atol=0.02)
    plain = jax.nn.softmax(mean)
    assert np.abs(plain[:, 0] - expected).max() > 0.1
    np.testing.assert_allclose(probit(mean, 0 * covariance), plain)


def test_what_no_layer_covers_is_random_by_its_diagonal():
    """Unless the plan ignores it, or its block is the identity."""

    def loss(p, x, labels):
        """A scan over a parameter in a branch, which its exponential cannot leave."""

        def run():
            step = lambda _, g: (None, x @ jnp.exp(g))  # noqa: E731
            return jax.lax.scan(step, None, p["g"][None])[1][0]

        z = jnp.tanh(jax.lax.cond(x.sum() > -1e9, run, lambda: x)) @ p["w"]
        return softmax_cross_entropy_with_integer_labels(z, labels).mean()

    params = {"w": PARAMS["o"][:3], "g": 0.1 * models.array(8, 3, 3)}

    def posterior(**options):
        curvature = kfac_jax.make_curvature(
            loss, params, X, LABELS, estimation_mode="fisher_exact", **options
        )
        operator = curvature.over(params, [(X, LABELS)])
        return Laplace(mean=params, curvature=operator, cases=N)

    key = jax.random.key(0)
    with pytest.warns(UserWarning, match="no layer covers a diagonal block"):
        random = posterior()
    assert np.all(random.sample(key)["g"] != params["g"])
    v = jax.tree.map(jnp.ones_like, params)
    diagonal = N * random.curvature.diagonal()["g"] + 1.0
    np.testing.assert_allclose(random.covariance(v)["g"], 1 / diagonal)
    for options in (
        {"on_unmatched": "ignore"},
        {"on_unmatched": "ignore", "blocks": {"g": Identity()}},
    ):
        fixed = posterior(**options)
        assert list(fixed.sizes) == ["w"]
        np.testing.assert_array_equal(fixed.sample(key)["g"], params["g"])
        np.testing.assert_array_equal(fixed.covariance(v)["g"], 0.0)


@pytest.mark.parametrize("by_layer", [False, True])
def test_where_nothing_is_known_the_prior_stays(by_layer):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    posterior = dataclasses.replace(made("Kronecker, by layer"), mean=zeros)
    tuned = posterior.tuned(by_layer=by_layer).prior_precision
    expected = BY_LAYER if by_layer else 1.25
    models.assert_trees_close(tuned, expected)


@pytest.mark.parametrize("name", ["Kronecker", "last layer"])
def test_parameters_of_half_precision(name):
    """Their evidence, predictions and draws are near those of full precision."""
    posterior = made(name)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)

    def blocks(layer):
        return Kronecker() if name == "Kronecker" or layer.name == "o" else None

    curvature = kfac_jax.make_curvature(
        lambda p, x, y: loss_fn(jax.tree.map(lambda x: x.astype(float), p), x, y),
        half,
        X,
        LABELS,
        estimation_mode="fisher_exact",
        blocks=blocks,
    )
    operator = curvature.over(half, [(X, LABELS)])
    other = dataclasses.replace(posterior, mean=half, curvature=operator)
    narrow, wide = other.log_evidence(-3.2), posterior.log_evidence(-3.2)
    np.testing.assert_allclose(narrow, wide, rtol=0.05)

    def outputs(p, x):
        return apply(jax.tree.map(lambda x: x.astype(float), p), x)

    found, expected = other.predict(outputs, X)[1], posterior.predict(apply, X)[1]
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
    drawn = other.tuned(by_layer=name == "last layer").sample(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype(jnp.bfloat16)}


def test_bad_input():
    op = operator(Kronecker())
    batches = X, LABELS, X[:4], LABELS[:4]
    summed = kfac_jax.make_curvature(
        lambda p, x, y, u, v: loss_fn(p, x, y) + loss_fn(p, u, v),
        PARAMS,
        *batches,
        estimation_mode="fisher_exact",
        blocks=KroneckerSum(),
    ).at(PARAMS, *batches)
    made = {"mean": PARAMS, "curvature": op, "cases": N}
    for wrong, error, words in (
        ({"cases": 0}, ValueError, r"cases \(N\) must be positive; got 0"),
        ({"cases": "12"}, TypeError, r"cases \(N\) must be a number or a scalar"),
        ({"curvature": PARAMS}, TypeError, "curvature must be an operator, curvature"),
        (
            {"prior_precision": -1.0},
            ValueError,
            r"prior_precision \(δ\) must be positive; got -1.0. Without a prior",
        ),
        (
            {"prior_precision": {"w+b": 1.0, "o": 0.0}},
            ValueError,
            r"\(δ\) must be positive; got 0",
        ),
        (
            {"prior_precision": {"w": 1.0}},
            ValueError,
            r"have one for each layer with a block: expected \['o', 'w\+b'\], got",
        ),
        (
            {"prior_precision": jnp.ones(3)},
            TypeError,
            r"prior_precision \(δ\) must be a number or a scalar array; got float64",
        ),
        (
            {"curvature": summed},
            ValueError,
            r"needs blocks with eigenvectors in closed form: .* got TwoProducts for",
        ),
    ):
        posterior = Laplace(**made | wrong)
        for call in (
            lambda x: x.covariance(PARAMS),
            lambda x: x.log_evidence(0.0),
            lambda x: x.tuned(),
            lambda x: x.sample(jax.random.key(0)),
            lambda x: x.predict(apply, X),
        ):
            with pytest.raises(error, match=words):
                call(posterior)
    posterior = Laplace(**made)
    with pytest.raises(ValueError, match=r"predict must return outputs of each case, "):
        posterior.predict(lambda p, x: apply(p, x).sum(-1), X)
    with pytest.raises(TypeError, match=r"log_likelihood must be a number"):
        posterior.log_evidence(jnp.ones(2))
    with pytest.raises(TypeError, match="key must be a random key"):
        expected_softmax(0, jnp.ones(2), jnp.eye(2))
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
    with pytest.raises(ValueError, match=r"got Linked for .* Use blocks.Eigen\(\) "):
        Laplace(**made | {"curvature": linked}).covariance(PARAMS)


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
