"""Directions of one optimizer with lengths of another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import graft
from kfac_jax.losses import squared_error
from tests.helpers import models


def _problem():
    params, x, y = models.dense_params(0, 4, 5, 2), models.array(1, 8, 4), jnp.ones(())

    def loss_fn(params, x, y):
        h = jnp.tanh(models.dense(params["layer0"], x))
        return squared_error(models.dense(params["layer1"], h) - y).sum(-1).mean()

    return loss_fn, params, (x, y)


def _both(curvature):
    return kfac_jax.scale_by_kfac(curvature), optax.scale_by_rms()


def test_leaves_point_as_one_and_are_as_long_as_the_other():
    """Over several steps, of which each transformation keeps its own state."""
    loss_fn, params, args = _problem()
    curvature = kfac_jax.make_curvature(loss_fn, params, *args)
    one, other = _both(curvature)
    tx = graft(one, other)
    state, of_one, of_other = tx.init(params), one.init(params), other.init(params)
    for seed in range(3):
        _, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=jax.random.key(seed)
        )
        extra = {"statistics": statistics}
        updates, state = tx.update(grads, state, params, **extra)
        points, of_one = one.update(grads, of_one, params, **extra)
        sized, of_other = other.update(grads, of_other, params)
        for update, point, size in zip(
            *map(jax.tree.leaves, (updates, points, sized)), strict=True
        ):
            length = np.linalg.norm(size)
            expected = length * point / np.linalg.norm(point)
            np.testing.assert_allclose(update, expected, rtol=1e-10)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))


def test_it_trains_by_make_step():
    """In a chain, compiled."""
    loss_fn, params, args = _problem()
    curvature = kfac_jax.make_curvature(loss_fn, params, *args)
    tx = optax.chain(
        graft(*_both(curvature)),
        optax.scale_by_learning_rate(0.03),
    )
    step = jax.jit(models.traced_once(kfac_jax.make_step(curvature, tx)))
    state, losses = tx.init(params), []
    for key in jax.random.split(jax.random.key(0), 60):
        params, state, loss = step(params, state, key, *args)
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]
    assert kfac_jax.health(state).ok


def test_no_direction_is_no_update():
    """Also where the length is not a number."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = graft(optax.set_to_zero(), optax.identity())
    grads = {"a": jnp.ones(3), "b": jnp.full(2, jnp.nan)}
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)


def test_precision_is_the_direction_s():
    tx = graft(optax.identity(), optax.sign_sgd(1.0))
    x = jnp.ones(3, jnp.bfloat16)
    updates, _ = tx.update(x, tx.init(x))
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("wrong", [None, 0.1, lambda grads: grads])
def test_what_is_no_transformation_is_refused(wrong):
    right = optax.identity()
    with pytest.raises(TypeError, match=r"^direction must be an optax transformation"):
        graft(wrong, right)
    with pytest.raises(TypeError, match=r"^magnitude must be an optax transformation"):
        graft(right, wrong)


def test_a_state_of_another_transformation_is_refused():
    tx = graft(optax.identity(), optax.identity())
    with pytest.raises(TypeError, match=r"^state must be the state of graft"):
        tx.update(jnp.ones(2), optax.EmptyState())
