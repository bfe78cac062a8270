"""Parameters that are repeated for each case before anything is computed from them.

The oracle is the exact Gauss-Newton matrix, by Jacobians of all outputs together.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models

N, T, D = 5, 4, 3
X = models.array(0, N, T, D)


def array(seed, *shape):
    return models.array(seed, *shape)


def decayed(p, x):
    return jnp.exp(jnp.broadcast_to(p["s"], x.shape)) * x


def decayed_one_axis(p, x):
    return jax.nn.softplus(jnp.broadcast_to(p["s"][None], (N, D)))[:, None] * x


def queries(p, x):
    """Copies meet another parameter before they meet the case."""
    made = jnp.broadcast_to(p["m"], (len(x), T, D)) @ p["w"]
    scores = jax.nn.softmax(jnp.einsum("nid,njd->nij", made, x))
    return jnp.einsum("nij,njd->nid", scores, x)


def queries_see_each_other(p, x):
    """Two values of copies meet, case by case, before they meet the case."""
    made = jnp.broadcast_to(p["m"], (len(x), T, D))
    scores = jax.nn.softmax(jnp.einsum("nid,njd->nij", made @ p["w"], made))
    seen = jnp.einsum("nij,njd->nid", scores, made)
    return jnp.einsum("nid,njd->nij", seen, x)


def associative(p, x):
    decay = jnp.exp(-jnp.exp(p["s"])) * jnp.ones((T, D))
    step = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    one = lambda u: jax.lax.associative_scan(step, (decay, u))[1]  # noqa: E731
    return jax.vmap(one)(x)


def normed_queries(p, x):
    """In a checkpoint, and with functions that have a rule of their own."""

    @jax.checkpoint
    def made(m):
        m = jax.nn.relu(jnp.broadcast_to(m, (len(x), T, D)) - 0.3)
        return m / (jnp.sum(m, -1, keepdims=True) + 1)

    return made(p["m"]) * x


def started(p, x):
    """The learned start of a recurrent network."""
    first = jnp.broadcast_to(p["h"], (len(x), D))

    def step(h, x):
        return jnp.tanh(x + h @ p["u"]), None

    return jax.lax.scan(step, first, x.swapaxes(0, 1))[0]


def started_under_vmap(p, x):
    def one(x):
        step = lambda h, x: (jnp.tanh(x + h @ p["u"]), None)  # noqa: E731
        return jax.lax.scan(step, jnp.tanh(p["h"]), x)[0]

    return jax.vmap(one)(x)


def token(p, x):
    first = jnp.broadcast_to(p["c"], (len(x), 1, D))
    return jnp.concatenate([first, x], 1)[:, 0] @ p["w"] + x[:, 0]


SLOPE = jnp.linspace(0.5, 2.0, N)[:, None]  # as many positions as cases


def positions(p, x):
    """Copies for each position, which a constant tells apart: they are no copies."""
    return jnp.exp(jnp.broadcast_to(p["s"], (N, D)) * SLOPE) * x[:, :1]


def positions_by_entry(p, x):
    return jnp.tanh(jnp.broadcast_to(p["s"], (N, D)) + array(10, N, D)) * x[:, :1]


def positions_joined(p, x):
    fixed = jnp.broadcast_to(p["s"], (N, D))
    both = jnp.concatenate([fixed, jnp.broadcast_to(SLOPE, (N, D))], 1)
    return jnp.exp(both)[:, :D] * jnp.sin(both[:, D:]) * x[:, :1]


def positions_multiplied(p, x):
    """One constant matrix for each position."""
    fixed = jnp.broadcast_to(p["s"], (N, D))
    return jnp.tanh(jnp.einsum("nd,nde->ne", fixed, array(11, N, D, D))) * x[:, :1]


@jax.jit
def positions_in_a_body(p, x):
    @jax.checkpoint
    def decay(s):
        return jnp.exp(jnp.broadcast_to(s, (N, D)) * jnp.arange(1.0, N + 1)[:, None])

    return decay(p["s"]) * x[:, :1]


CASES = {
    "positions": (positions, {"s": array(1, D)}),
    "positions, by entry": (positions_by_entry, {"s": array(1, D)}),
    "positions, joined": (positions_joined, {"s": array(1, D)}),
    "positions, multiplied": (positions_multiplied, {"s": array(1, D)}),
    "positions, in a body": (positions_in_a_body, {"s": array(1, D)}),
    "decayed": (decayed, {"s": array(1, D)}),
    "decayed, one axis": (decayed_one_axis, {"s": array(1, D)}),
    "queries": (queries, {"m": array(2, T, D), "w": array(3, D, D)}),
    "queries, own": (
        queries_see_each_other,
        {"m": array(2, T, D), "w": array(3, D, D)},
    ),
    "associative": (associative, {"s": array(4, D)}),
    "normed queries": (normed_queries, {"m": array(5, T, D)}),
    "started": (started, {"u": array(6, D, D), "h": array(7, D)}),
    "started under vmap": (started_under_vmap, {"u": array(6, D, D), "h": array(7, D)}),
    "token": (token, {"c": array(8, D), "w": array(9, D, D)}),
}


def loss_of(apply):
    def loss_fn(p, x):
        z = apply(p, x)
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    return loss_fn


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("decayed", "queries", "started", "positions")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_they_are_layers_and_their_blocks_exact(name):
    apply, params = CASES[name]
    flat, restore = jax.flatten_util.ravel_pytree(params)
    j = jax.jacobian(lambda v: apply(restore(v), X).reshape(-1))(flat)
    exact = 2 * np.einsum("ap,aq->pq", j, j) / N
    for block in (blocks.Full(), blocks.Diagonal()):
        plan = kfac_jax.make_curvature(
            loss_of(apply),
            params,
            X,
            blocks=block,
            estimation_mode="ggn_exact",
            on_unmatched="error",
        )
        found = np.asarray(plan.at(params, X).to_dense())
        for layer in plan.layers:
            own = models.places(plan, layer)
            mine, wanted = (x[np.ix_(own, own)] for x in (found, exact))
            if isinstance(block, blocks.Diagonal):
                wanted = np.diag(np.diag(wanted))
            np.testing.assert_allclose(mine, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["token", "started"])
def test_a_batch_of_a_single_case(name):
    apply, params = CASES[name]
    plan = kfac_jax.make_curvature(
        loss_of(apply), params, X, estimation_mode="ggn_exact", on_unmatched="error"
    )
    sums = plan.zero_statistics(params)
    for i in range(N):
        part = plan.value_grad_and_statistics(params, X[i : i + 1])[2]
        sums = jax.tree.map(jnp.add, sums, part)
    whole = plan.value_grad_and_statistics(params, X)[2]
    models.assert_trees_close(sums.layers, whole.layers, rtol=1e-9)


def test_noise_that_differs_from_case_to_case_computes_no_weight():
    def loss_fn(p, x):
        gate = jax.nn.sigmoid(jnp.broadcast_to(p["s"], x.shape) * x)
        return squared_error(gate.reshape(N, -1)).sum(-1).mean()

    plan = kfac_jax.make_curvature(loss_fn, {"s": array(1, D)}, X)
    (layer,) = plan.layers
    assert (layer.kind, layer.uses) == ("scale", 1)
