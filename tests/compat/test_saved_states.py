"""States of existing programs that another version of JAX wrote go on.

`tests/data/compat_states.pickle` was written under JAX 0.8.0 by this file as a program:

    python -m tests.compat.test_saved_states tests/data/compat_states.pickle

Write it anew only if the layout of such states changes, and say so in CHANGELOG.md.
"""

import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from tests.helpers import models

FILE = pathlib.Path(__file__).parents[1] / "data" / "compat_states.pickle"
BEFORE, AFTER = 3, 5  # steps until it was written, and in all
KEY = jax.random.PRNGKey(0)


def problem():
    """Parameters and a batch in single precision."""
    rng = np.random.default_rng(0)
    params = [
        {"w": rng.normal(size=(3, 4)), "b": np.zeros(4)},
        {"w": rng.normal(size=(4, 2)), "b": np.zeros(2)},
    ]
    batch = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    return jax.tree.map(lambda x: jnp.asarray(x, "float32"), (params, batch))


def loss_fn(params, batch):
    x, y = batch
    z = models.dense(params[1], jnp.tanh(models.dense(params[0], x)))
    kfac_jax.register_squared_error_loss(z, y)
    return jnp.square(z - y).sum(-1).mean()


def optimized(steps, at=None):
    """Parameters and state after some steps of the optimizer."""
    params, batch = problem()
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn),
        l2_reg=0.0,
        estimation_mode="fisher_exact",
        use_adaptive_damping=True,
        initial_damping=0.5,
        damping_adaptation_interval=2,
        inverse_update_period=3,
    )
    state = None
    if at is not None:
        params, state = at
    if state is None:
        state = optimizer.init(params, KEY, batch)
    for _ in range(steps):
        params, state, _ = optimizer.step(
            params, state, KEY, batch=batch, learning_rate=0.1, momentum=0.5
        )
    return params, state


def preconditioned(steps, at=None):
    """Parameters and state after some steps of the preconditioner for optax."""
    params, batch = problem()
    preconditioner = kfac_jax.OptaxPreconditioner(
        loss_fn, damping=0.5, estimation_mode="ggn_exact", inverse_update_period=3
    )
    state = preconditioner.init((params, batch), KEY)
    if at is not None:
        params, state = at

    @jax.jit
    def step(params, state):
        state = preconditioner.maybe_update(state, (params, batch), KEY)
        moved = preconditioner.apply(jax.grad(loss_fn)(params, batch), state)
        params = jax.tree.map(lambda p, x: p - 0.1 * x, params, moved)
        return params, preconditioner.increment_count(state)

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


ROUTES = {"optimizer": optimized, "preconditioner": preconditioned}


@pytest.mark.parametrize("route", ROUTES)
def test_a_state_that_another_jax_wrote_goes_on(route):
    train = ROUTES[route]
    saved = pickle.loads(FILE.read_bytes())[route]
    with jax.enable_x64(False):
        fresh = jax.device_get(train(AFTER))
        found = jax.device_get(train(AFTER - BEFORE, saved))
        here = jax.device_get(train(BEFORE))
    assert_alike(saved, here)
    assert_alike(found, fresh)


def assert_alike(found, expected):
    pairs = zip(
        jax.tree.leaves_with_path(found),
        jax.tree.leaves_with_path(expected),
        strict=True,
    )
    for (path, x), (other, y) in pairs:
        assert path == other
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_allclose(x, y, rtol=5e-3, atol=1e-4, err_msg=str(path))


if __name__ == "__main__":
    saved = {name: jax.device_get(train(BEFORE)) for name, train in ROUTES.items()}
    saved["jax"] = jax.__version__
    pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(saved))
