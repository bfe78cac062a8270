"""The Levenberg-Marquardt rule for λ in the sample space."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

PARAMS = models.dense_params(0, 3, 8, 1)
X = models.array(1, 10, 3)
Y = 3 * jnp.sin(2 * X[:, :1])
RULE = kfac_jax.LevenbergMarquardt(0.3, every=2, factor=0.5)


def loss_fn(params, x, y):
    return squared_error(models.mlp(params, x), y).sum(-1).mean()


def plan():
    return kfac_jax.make_curvature(
        loss_fn,
        PARAMS,
        X,
        Y,
        structure=kfac_jax.SampleSpace(),
        estimation_mode="ggn_exact",
    )


@pytest.mark.parametrize("momentum", [0.0, kfac_jax.Spring(0.9)])
def test_the_ratio_is_that_of_the_exact_model(momentum):
    curvature = plan()
    tx = kfac_jax.natural_gradient(curvature, 0.7, RULE, momentum)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(6):
        before, old = params, state
        params, state, value = step(params, state, jax.random.key(i), X, Y)
        np.testing.assert_allclose(value, loss_fn(before, X, Y))
        if (i + 1) % RULE.every:
            assert state.damping == old.damping
            continue
        delta = oracles.vector(params) - oracles.vector(before)
        fisher = oracles.ggn(
            lambda p: models.mlp(p, X), lambda z, y: jnp.square(z - y).sum(), before, Y
        )
        g = oracles.vector(jax.grad(loss_fn)(before, X, Y))
        lam = float(old.damping)
        model = g @ delta + 0.5 * delta @ fisher @ delta + 0.5 * lam * delta @ delta
        rho = (loss_fn(params, X, Y) - value) / model
        np.testing.assert_allclose(state.rho, rho, rtol=1e-6)
        np.testing.assert_allclose(state.damping, RULE.update(lam, rho), rtol=1e-9)
    assert state.damping != RULE.initial


def test_it_needs_nothing_else_to_fit_exactly():
    curvature = plan()
    rule = kfac_jax.LevenbergMarquardt(1.0, every=1, factor=0.5)
    tx = kfac_jax.natural_gradient(curvature, kfac_jax.QuadraticModel(), rule)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(40):
        params, state, _ = step(params, state, jax.random.key(i), X, Y)
    assert loss_fn(params, X, Y) < 1e-6 * loss_fn(PARAMS, X, Y)
    assert state.damping < 0.01


def test_a_batch_that_is_not_finite_leaves_damping():
    """It is to blame, not the step."""
    curvature = plan()
    tx = kfac_jax.natural_gradient(
        curvature, 0.5, kfac_jax.LevenbergMarquardt(0.3, every=1, factor=0.5)
    )
    state = tx.init(PARAMS)
    value, grads, statistics = curvature.value_grad_and_statistics(PARAMS, X, Y)
    update = jax.jit(tx.update)
    bad = jax.tree.map(lambda x: x * jnp.nan, grads)
    options = {"statistics": statistics, "args": (X, Y)}
    zero, after = update(bad, state, PARAMS, value=value, **options)
    assert after.damping == 0.3 and after.skipped_updates == 1
    models.assert_trees_equal(zero, jax.tree.map(jnp.zeros_like, PARAMS))
    _, after = update(grads, state, PARAMS, value=jnp.nan, **options)
    assert after.damping == 0.3
    updates, _ = update(grads, state, PARAMS, value=value, **options)
    moved = optax.apply_updates(PARAMS, updates)
    assert loss_fn(moved, X, Y) < value


def test_a_loss_that_rises_raises_damping_though_the_model_foresaw_it():
    curvature = plan()
    rule = kfac_jax.LevenbergMarquardt(0.3, every=1, factor=0.5)
    tx = kfac_jax.natural_gradient(curvature, 50.0, rule)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state, value = step(PARAMS, tx.init(PARAMS), jax.random.key(0), X, Y)
    assert loss_fn(params, X, Y) > value
    assert state.damping == 0.6 and state.rho == -jnp.inf


def test_it_needs_the_loss():
    curvature = plan()
    tx = kfac_jax.natural_gradient(curvature, 0.5, RULE)
    _, grads, statistics = curvature.value_grad_and_statistics(PARAMS, X, Y)
    with pytest.raises(ValueError, match="evaluate the loss function"):
        tx.update(grads, tx.init(PARAMS), PARAMS, statistics=statistics, args=(X, Y))
