"""Loss functions with effects: what they print, call back and check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, io_callback

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models

N, D = 5, 3
X, W = models.array(0, N, D), models.array(1, 2, D, D)
SEEN: list = []


def seen(*arrays):
    SEEN.extend(np.asarray(x) for x in arrays)


def printed(w, x):
    h = jnp.tanh(x @ w[0])
    jax.debug.print("of cases {h} and of all {m} {t}", h=h, m=h.mean(), t=h.T)
    jax.debug.callback(seen, w, x)
    return h @ w[1]


def printed_constants(w, x):
    code = jnp.ones((1, D)) @ w[0]
    jax.debug.print("{code}, {w}, {one}", code=code, w=w.sum(), one=jnp.ones(3))
    return jax.vmap(lambda x: x * code[0])(x) @ w[1]


def called_back(w, x):
    h = jnp.tanh(x @ w[0])
    io_callback(seen, None, jax.lax.stop_gradient(h), ordered=True)
    return h @ w[1]


def in_loops(w, x):
    def step(h, w):
        jax.debug.callback(seen, h, w)
        return jax.checkpoint(shown)(h, w), None

    def shown(h, w):
        jax.debug.print("{h}", h=h)
        return jnp.tanh(h @ jnp.tril(w))

    return jax.lax.scan(step, x, w)[0]


def under_vmap(w, x):
    def one(x):
        h = jnp.tanh(x @ w[0])
        jax.debug.print("{h}", h=h)
        with jax.named_scope("head"):
            return h @ w[1]

    return jax.vmap(one)(x)


def checked(w, x):
    def network(w, x):
        h = jnp.tanh(x @ w[0])
        checkify.check(jnp.all(jnp.isfinite(h)), "not finite")
        return h @ w[1]

    return checkify.checkify(network)(w, x)[1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "apply", [printed, printed_constants, called_back, in_loops, under_vmap, checked]
)
@pytest.mark.parametrize("mode", ["ggn_exact", "fisher_gradients"])
def test_effects_change_nothing(apply, mode):
    def loss_fn(w, x):
        return squared_error(apply(w, x)).sum(-1).mean()

    SEEN.clear()
    plan = kfac_jax.make_curvature(
        loss_fn,
        W,
        X,
        blocks=blocks.Full(),
        estimation_mode=mode,
        on_unmatched="error",
    )
    value, grads, statistics = jax.jit(plan.value_grad_and_statistics)(
        W, X, rng=jax.random.key(0)
    )
    jax.effects_barrier()
    assert bool(SEEN) == (apply in (printed, called_back, in_loops))
    expected = jax.value_and_grad(loss_fn)(W, X)
    models.assert_trees_close((value, grads), expected, rtol=1e-12)
    if mode == "ggn_exact":
        factors = plan.update_factors(plan.init_factors(W), statistics, 1)
        found = plan.approximation(factors).to_dense()
        j = jax.jacobian(lambda w: apply(w, X).reshape(-1))(W).reshape(-1, W.size)
        exact = 2 * j.T @ j / N
        for layer in plan.layers:
            own = models.places(plan, layer)
            mine, wanted = (np.asarray(x)[np.ix_(own, own)] for x in (found, exact))
            np.testing.assert_allclose(mine, wanted, atol=1e-12)
