"""Influence functions against dense algebra, and against training without a case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from kfac_jax import influence
from kfac_jax.blocks import Eigen, Full, Identity, Kronecker
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels
from tests.helpers import models

N = 14
PARAMS = {"w": models.array(0, 3, 4), "o": models.array(1, 4, 3)}
X, LABELS = models.array(2, N, 3), jnp.arange(N) % 3
QUERIES = models.array(3, 4, 3), jnp.array([0, 2, 1, 1])
BATCHES = [(X[:6], LABELS[:6]), (X[6:12], LABELS[6:12]), (X[12:], LABELS[12:])]
DAMPING = 0.05


def losses(p, x, labels):
    z = jnp.tanh(x @ p["w"]) @ p["o"]
    return softmax_cross_entropy_with_integer_labels(z, labels)


def loss_fn(p, x, labels):
    return losses(p, x, labels).mean()


@functools.cache
def planned(block):
    curvature = kfac_jax.make_curvature(
        loss_fn, PARAMS, X, LABELS, estimation_mode="fisher_exact", blocks=block
    )
    return curvature, curvature.over(PARAMS, BATCHES)


def flat(tree):
    return jax.vmap(lambda x: ravel_pytree(x)[0])(tree)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("block", [Kronecker(), Eigen(), Full()], ids=repr)
def test_scores_are_those_of_dense_algebra(block):
    _, op = planned(block)
    compute = jax.jit(
        lambda: influence.queries(
            losses, PARAMS, *QUERIES, operator=op, damping=DAMPING
        )
    )
    found = influence.scores(compute(), losses, PARAMS, X, LABELS)
    dense = np.asarray(op.to_dense()) + DAMPING * np.eye(24)

    def each(x, labels):
        single = lambda x, y: jax.grad(loss_fn)(PARAMS, x[None], y[None])  # noqa: E731
        return np.asarray(flat(jax.vmap(single)(x, labels)))

    expected = each(*QUERIES) @ np.linalg.solve(dense, each(X, LABELS).T)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [5, 50])
def test_the_largest_scores_of_a_streamed_data_set(k):
    _, op = planned(Eigen())
    found = influence.queries(losses, PARAMS, *QUERIES, operator=op, damping=DAMPING)
    every = np.asarray(influence.scores(found, losses, PARAMS, X, LABELS))
    top = influence.top(found, losses, PARAMS, iter(BATCHES), k=k)
    order = np.argsort(-every, axis=1)[:, :k]
    np.testing.assert_array_equal(top.cases, order)
    np.testing.assert_allclose(
        top.scores, np.take_along_axis(every, order, 1), rtol=1e-9, atol=1e-12
    )


def test_refinement_goes_to_the_exact_curvature():
    curvature, op = planned(Kronecker())
    flat_params, restore = ravel_pytree(PARAMS)
    v = jnp.eye(len(flat_params))
    product = lambda v: ravel_pytree(  # noqa: E731
        curvature.matvec(PARAMS, restore(v), X, LABELS)
    )[0]
    exact = np.asarray(jax.vmap(product)(v)) + DAMPING * np.eye(len(v))
    gradients = flat(influence.gradients_of(losses, PARAMS, *QUERIES))
    expected = np.linalg.solve(exact, np.asarray(gradients).T).T
    found = influence.queries(losses, PARAMS, *QUERIES, operator=op, damping=DAMPING)

    def error(queries):
        return np.linalg.norm(np.asarray(flat(queries)) - expected)

    errors = [error(found)]
    for steps in (2, 6, 24):
        refined = influence.refined(
            found,
            losses,
            PARAMS,
            *QUERIES,
            curvature=curvature,
            batches=BATCHES,  # of which the last is smaller
            operator=op,
            damping=DAMPING,
            steps=steps,
        )
        errors.append(error(refined))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * np.linalg.norm(expected)


def test_layers_without_curvature_count_as_fixed():
    """Their own block is theirs alone: the others' scores are as of a smaller net."""
    parts = {}
    for name, block in (("none", None), ("identity", Identity())):
        curvature = kfac_jax.make_curvature(
            loss_fn,
            PARAMS,
            X,
            LABELS,
            estimation_mode="fisher_exact",
            blocks={"w": block, "o": Full()},
        )
        op = curvature.over(PARAMS, BATCHES)
        found = influence.queries(
            losses, PARAMS, *QUERIES, operator=op, damping=DAMPING
        )
        parts[name] = (
            found,
            influence.refined(
                found,
                losses,
                PARAMS,
                *QUERIES,
                curvature=curvature,
                batches=BATCHES,
                operator=op,
                damping=DAMPING,
                steps=3,
            ),
        )
    last = lambda o, x, labels: losses({"w": PARAMS["w"], "o": o}, x, labels)  # noqa: E731
    alone = kfac_jax.make_curvature(
        lambda o, x, labels: last(o, x, labels).mean(),
        PARAMS["o"],
        X,
        LABELS,
        estimation_mode="fisher_exact",
        blocks=Full(),
    )
    expected = influence.queries(
        last,
        PARAMS["o"],
        *QUERIES,
        operator=alone.over(PARAMS["o"], BATCHES),
        damping=DAMPING,
    )
    for both in parts.values():
        for found in both:  # a full block of all that is random is exact already
            np.testing.assert_array_equal(found["w"], 0.0)
            np.testing.assert_allclose(found["o"], expected, rtol=1e-7, atol=1e-9)


def test_scores_are_what_is_lost_without_a_case():
    """Of linear regression, which is trained again without each case."""
    n, delta = 60, 0.1
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n, 3)))
    y = x @ jnp.ones((3, 1)) + 0.3 * jnp.asarray(rng.normal(size=(n, 1)))

    def regression(w, x, y):
        return kfac_jax.losses.squared_error(x @ w, y).sum(-1)

    def fit(keep):
        xk = x * keep[:, None]
        return jnp.linalg.solve(
            2 * xk.T @ xk / n + delta * jnp.eye(3), 2 * xk.T @ y / n
        )

    w = fit(jnp.ones(n))
    curvature = kfac_jax.make_curvature(
        lambda w, x, y: regression(w, x, y).mean(),
        w,
        x,
        y,
        blocks=Full(),
        estimation_mode="fisher_exact",
    )
    op = curvature.over(w, [(x, y)])
    query = x[:5] + 0.5, y[:5]
    found = influence.queries(regression, w, *query, operator=op, damping=delta)
    scores = np.asarray(influence.scores(found, regression, w, x, y)) / n
    without = jax.vmap(lambda i: fit(jnp.ones(n).at[i].set(0.0)))(jnp.arange(n))
    actual = (
        jax.vmap(lambda v: regression(v, *query))(without) - regression(w, *query)[None]
    )
    for own, expected in zip(scores, np.asarray(actual).T, strict=True):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(own, expected, atol=0.1 * largest)


def test_bad_input():
    curvature, op = planned(Kronecker())
    found = influence.queries(losses, PARAMS, *QUERIES, operator=op, damping=DAMPING)
    right = {"batches": BATCHES, "damping": DAMPING, "steps": 2}
    for wrong, error, words in (
        ({"batches": []}, ValueError, "refined needs at least one batch, a tuple of"),
        ({"batches": [X]}, TypeError, "each batch must be a list or tuple"),
        ({"damping": "0.1"}, TypeError, r"damping \(λ\) must be a number"),
        ({"steps": 0}, ValueError, "steps must be an integer ≥ 1"),
    ):
        given = {"curvature": curvature, "operator": op} | right | wrong
        with pytest.raises(error, match=words):
            influence.refined(found, losses, PARAMS, *QUERIES, **given)
    with pytest.raises(ValueError, match="top needs at least one batch of training"):
        influence.top(found, losses, PARAMS, [])
    with pytest.raises(TypeError, match="each batch must be a list or tuple"):
        influence.top(found, losses, PARAMS, [X])
    with pytest.raises(ValueError, match=r"expected one axis, .* got shape \(\) for"):
        influence.scores(found, loss_fn, PARAMS, X, LABELS)
    with pytest.raises(ValueError, match="losses must return the loss of each case"):
        influence.gradients_of(lambda p, x, y: losses(p, x, LABELS), PARAMS, X, X[:3])
    with pytest.raises(ValueError, match="k must"):
        influence.top(found, losses, PARAMS, BATCHES, k=0)
