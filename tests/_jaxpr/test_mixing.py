"""Layers whose rows a later equation mixes have no examples.

The oracle is the exact Gauss-Newton matrix, by Jacobians of all outputs together.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

N, D, H = 5, 3, 4
X = models.array(0, N, D)
PARAMS = {"v": models.array(1, D, H), "w": models.array(2, H, 2)}


def plain(p, x):
    return jnp.tanh(x @ p["v"]) @ p["w"]


def contrastive(p, x):
    left, right = jnp.tanh(x @ p["v"]) @ p["w"], jnp.sin(x[:, ::-1] @ p["v"])
    return left @ (right @ p["w"]).T


def messages(p, x):
    h = jnp.tanh(x @ p["v"])
    sent = h[jnp.asarray([0, 1, 2, 3, 4, 0])]
    return jax.ops.segment_sum(sent, jnp.asarray([1, 2, 3, 4, 0, 2]), N) @ p["w"]


def rolled(p, x):
    return jnp.roll(jnp.tanh(x @ p["v"]), 1, axis=0) @ p["w"]


def pooled(p, x):
    h = jnp.tanh(x @ p["v"])
    return (h + jax.nn.softmax(h, axis=0)) @ p["w"]


def in_a_scan(p, x):
    """Each step takes the mean of the step before."""

    def step(h, _):
        return jnp.tanh(h + h.mean(0, keepdims=True)), None

    return jax.lax.scan(step, x @ p["v"], length=2)[0] @ p["w"]


def in_branches(p, x):
    h = x @ p["v"]
    return (
        jax.lax.cond(x[0, 0] > 0, lambda h: h - h.sum(0, keepdims=True), jnp.sin, h)
        @ p["w"]
    )


def in_a_checkpoint(p, x):
    return jax.checkpoint(lambda h: jnp.sort(h, axis=0))(x @ p["v"]) @ p["w"]


def carried(p, x):
    """A loop over the examples that adds them up."""

    def step(total, row):
        total = jnp.tanh(total + row)
        return total, total

    return jax.lax.scan(step, jnp.zeros(H), x @ p["v"])[1] @ p["w"]


def one_by_one(p, x):
    """A loop over the examples that keeps them apart."""
    return jax.lax.map(jnp.tanh, x @ p["v"]) @ p["w"]


def stopped(p, x):
    """Statistics without a gradient mix nothing."""
    h = x @ p["v"]
    mean = jax.lax.stop_gradient(jnp.tanh(h).mean(0))
    return jnp.tanh(h) * mean[None] @ p["w"]


def attention(p, x):
    """Within an example."""
    h = jnp.tanh(x[:, :, None] * p["v"][None])
    scores = jax.nn.softmax(jnp.einsum("nti,nsi->nts", h, h))
    return jnp.einsum("nts,nsi->nti", scores, h).mean(1) @ p["w"]


MIXED = (
    contrastive,
    messages,
    rolled,
    pooled,
    in_a_scan,
    in_branches,
    in_a_checkpoint,
    carried,
)


def centred(p, x):
    """Data that other cases are in, of which no gradient is taken."""
    scale = jnp.sqrt(x.var(0))[None]
    return plain(p, (x - x.mean(0)[None]) / scale)


APART = (plain, one_by_one, attention, centred)


def loss_of(apply):
    return lambda p, x: squared_error(apply(p, x)).sum(-1).mean()


def found_and_exact(apply, **options):
    plan, factors = models.exact_factors(loss_of(apply), PARAMS, X, **options)
    flat, restore = jax.flatten_util.ravel_pytree(PARAMS)
    j = jax.jacobian(lambda v: apply(restore(v), X).reshape(-1))(flat)
    exact = 2 * np.einsum("ap,aq->pq", j, j) / N
    return plan, np.asarray(plan.approximation(factors).to_dense()), exact


def note(layer):
    return f"{layer.name}: {layer.kind} {layer.reason}"


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:Which examples", "ignore:kfac_jax gives")
@pytest.mark.parametrize("apply", MIXED)
def test_full_is_exact_or_refused_where_examples_are_mixed(apply):
    plan, found, exact = found_and_exact(apply, blocks=blocks.Full())
    first = next(layer for layer in plan.layers if layer.name == "v")
    assert first.kind == "unmatched" and "could not be followed since" in first.reason
    for layer in plan.layers:
        if layer.tagged:
            own = oracles.block(found, PARAMS, layer.name)
            wanted = oracles.block(exact, PARAMS, layer.name)
            np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)
        else:
            assert layer.kind == "unmatched", note(layer)


@pytest.mark.filterwarnings("ignore:Which examples", "ignore:kfac_jax gives")
@pytest.mark.parametrize("apply", [messages, pooled])
def test_exact_modes_pull_back_each_mixed_case_by_itself(apply):
    """Gradients of different cases at one row do not add up before they are squared."""
    plan, factors = models.exact_factors(loss_of(apply), PARAMS, X)
    assert plan.lost_examples
    rows = PARAMS | {"v": jnp.eye(H)}  # with which the layer's output is the input
    j = jax.jacobian(lambda h: apply(rows, h))(X @ PARAMS["v"])
    expected = 2 * np.einsum("ncmi,ncmj->ij", j, j) / N
    np.testing.assert_allclose(factors["v"]["output"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("apply", APART)
def test_full_is_exact_where_examples_stay_apart(apply):
    plan, found, exact = found_and_exact(apply, blocks=blocks.Full())
    assert all(layer.tagged for layer in plan.layers)
    for layer in plan.layers:
        own = oracles.block(found, PARAMS, layer.name)
        wanted = oracles.block(exact, PARAMS, layer.name)
        np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)


def test_what_has_no_gradient_mixes_nothing():
    plan = kfac_jax.make_curvature(loss_of(stopped), PARAMS, X, blocks=blocks.Full())
    assert all(layer.tagged for layer in plan.layers)
