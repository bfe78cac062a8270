"""Line searches of optax after the optimizers, in a chain."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

PARAMS = models.dense_params(0, 2, 16, 16, 1)
INSIDE = models.array(1, 24, 2)
WALL = models.array(2, 8, 2)
SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(
        12, decrease_factor=0.4
    ),
    "zoom": lambda: optax.scale_by_zoom_linesearch(12),
}


def laplacian(params, x):
    network = lambda x: models.mlp(params, x[None])[0, 0]  # noqa: E731
    return jnp.trace(jax.hessian(network)(x))


def loss_fn(params, inside, wall):
    residual = jax.vmap(laplacian, (None, 0))(params, inside)[:, None]
    source = jnp.sin(3 * inside).prod(-1, keepdims=True)
    edge = models.mlp(params, wall)
    return (
        squared_error(10 * residual, 10 * source).sum(-1).mean()
        + squared_error(edge, jnp.zeros_like(edge)).sum(-1).mean()
    )


def to32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def run32(curvature, tx, steps):
    params, inside, wall = to32((PARAMS, INSIDE, WALL))
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    state, values = tx.init(params), []
    for i in range(steps):
        params, state, value = step(params, state, jax.random.key(i), inside, wall)
        values.append(float(value))
    return values


@pytest.mark.sampled(2)
@pytest.mark.parametrize("search", SEARCHES)
def test_a_natural_gradient_never_rises(search, user_settings):
    """With a λ so small that a plain step of rate one overshoots."""
    curvature = kfac_jax.make_curvature(
        loss_fn,
        *to32((PARAMS, INSIDE, WALL)),
        structure=kfac_jax.SampleSpace(),
        estimation_mode="ggn_exact",
    )
    alone = kfac_jax.natural_gradient(curvature, 1.0, damping=1e-6)
    plain = run32(curvature, alone, 3)
    assert max(plain[1:]) > 2 * plain[0]
    found = run32(curvature, optax.chain(alone, SEARCHES[search]()), 8)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(found))
    assert found[-1] < 0.1 * found[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("search", SEARCHES)
def test_kfac_with_a_line_search(search, user_settings):
    curvature = kfac_jax.make_curvature(loss_fn, *to32((PARAMS, INSIDE, WALL)))
    tx = optax.chain(
        kfac_jax.kfac(curvature, 1.0, 0.0, 1e-3, norm_constraint=None),
        SEARCHES[search](),
    )
    found = run32(curvature, tx, 8)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(found))
    assert found[-1] < 0.5 * found[0]


@pytest.mark.slow
def test_the_loss_is_that_of_all_devices_and_without_auxiliary_data():
    seen = {}

    def with_aux(params, x):
        z = models.mlp(params, x)
        return squared_error(z, jnp.ones_like(z)).sum(-1).mean(), {"mean": z.mean()}

    def spy():
        def update(updates, state, params, *, value, grad, value_fn, **others):
            there = value_fn(params, None, others["args"])
            seen["shapes"] = jnp.shape(value), jnp.shape(there)
            return updates, (value, there, grad)

        init = lambda params: (jnp.zeros(()), jnp.zeros(()), params)  # noqa: E731
        return optax.GradientTransformationExtraArgs(init, update)

    curvature = kfac_jax.make_curvature(with_aux, PARAMS, INSIDE, has_aux=True)
    over = kfac_jax.OverAxis("batch")
    own = kfac_jax.kfac(curvature, 0.1, 0.0, 0.1, devices=over)
    tx = optax.chain(own, spy())
    step = kfac_jax.make_step(curvature, tx, devices=over)
    halves = INSIDE.reshape(2, 12, 2)
    mapped = jax.vmap(step, (None, None, None, 0), axis_name="batch")
    _, state, value = mapped(PARAMS, tx.init(PARAMS), jax.random.key(0), halves)
    assert seen["shapes"] == ((), ())
    expected = jax.value_and_grad(with_aux, has_aux=True)(PARAMS, INSIDE)
    for found in state[1][:2]:
        np.testing.assert_allclose(found, expected[0][0], rtol=1e-9)
    first = jax.tree.map(lambda x: x[0], state[1][2])
    models.assert_trees_close(first, expected[1], rtol=1e-7, atol=1e-10)
    assert value[0].shape == (2,)
