"""Micro-batches by `multi_steps`, against one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax.blocks import Kronecker
from kfac_jax.losses import squared_error
from tests.helpers import models

PARAMS = models.dense_params(0, 4, 5, 2)
X, Y = models.array(1, 12, 4), models.array(2, 12, 2)
CUTS = {
    "equal": [slice(0, 4), slice(4, 8), slice(8, 12)],
    "unequal": [slice(0, 7), slice(7, 8), slice(8, 12)],
}


def loss_fn(params, x, y):
    return squared_error(models.mlp(params, x), y).sum(-1).mean()


def plan(**options):
    return kfac_jax.make_curvature(loss_fn, PARAMS, X, Y, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_micro_batches_make_the_update_of_the_whole_batch(cuts):
    curvature = plan(estimation_mode="fisher_exact")
    inner = kfac_jax.kfac(curvature, 0.1, 0.9, 0.2, norm_constraint=1e-2)
    tx = kfac_jax.multi_steps(curvature, inner, every=3)
    value, grads, statistics = curvature.value_grad_and_statistics(PARAMS, X, Y)
    expected, inner_state = inner.update(
        grads, inner.init(PARAMS), PARAMS, statistics=statistics, value=value
    )
    state = tx.init(PARAMS)
    for part in cuts:
        value, grads, statistics = curvature.value_grad_and_statistics(
            PARAMS, X[part], Y[part]
        )
        updates, state = jax.jit(tx.update)(
            grads, state, PARAMS, statistics=statistics, value=value
        )
        assert np.any(jax.tree.leaves(updates)[0]) == (part is cuts[-1])
    models.assert_trees_close(updates, expected, rtol=1e-6)
    models.assert_trees_close(state.inner, inner_state, rtol=1e-6)
    fresh = tx.init(PARAMS)._replace(inner=state.inner, cases=state.cases)
    assert int(state.cases) == len(X[cuts[-1]])
    jax.tree.map(np.testing.assert_array_equal, state, fresh)


def test_it_trains_in_a_step_with_the_defaults_and_in_a_chain():
    curvature = plan()
    chain = optax.chain(
        optax.add_decayed_weights(1e-4), kfac_jax.kfac(curvature, damping=1e-2)
    )
    for inner in (kfac_jax.kfac(curvature), chain):
        tx = kfac_jax.multi_steps(curvature, inner, every=2)
        step = jax.jit(kfac_jax.make_step(curvature, tx))
        params, state = PARAMS, tx.init(PARAMS)
        first = float(loss_fn(params, X, Y))
        for i in range(60):
            part = slice(0, 6) if i % 2 == 0 else slice(6, 12)
            params, state, _ = step(params, state, jax.random.key(i), X[part], Y[part])
        assert loss_fn(params, X, Y) < 0.1 * first
        assert kfac_jax.health(state).ok


def test_gradients_count_where_no_statistics_are_gathered():
    curvature = plan(estimation_mode="fisher_exact")
    inner = kfac_jax.scale_by_kfac(curvature)
    tx = kfac_jax.multi_steps(curvature, inner, every=2)
    state = tx.init(PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    zero = curvature.zero_statistics(PARAMS)
    _, state = tx.update(ones, state, PARAMS, statistics=zero)
    models.assert_trees_close(state.grads, ones)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gathers", [(1, 0), (0, 1), (0, 0), (1, 1)])
def test_micro_batches_without_statistics_count_like_those_with(gathers):
    """In the first batch, and in the next, whichever of two gathers statistics."""
    curvature = plan(estimation_mode="fisher_exact")
    tx = kfac_jax.multi_steps(curvature, kfac_jax.scale_by_kfac(curvature), every=3)
    state, zero = tx.init(PARAMS), curvature.zero_statistics(PARAMS)
    _, _, statistics = curvature.value_grad_and_statistics(PARAMS, X[:6], Y[:6])
    for _ in range(2):
        for i, yes in enumerate(gathers):
            grads = jax.tree.map(lambda w, i=i: jnp.full_like(w, i), PARAMS)
            own = statistics if yes else zero
            _, state = tx.update(grads, state, PARAMS, statistics=own)
        weight = float(state.weight)
        mean = jax.tree.map(lambda x, n=weight: x / n, state.grads)
        half = jax.tree.map(lambda w: jnp.full_like(w, 0.5), PARAMS)
        models.assert_trees_close(mean, half)
        _, state = tx.update(grads, state, PARAMS, statistics=zero)


@pytest.mark.slow
def test_gradients_of_half_precision_add_up_in_float32():
    """Many cases of bfloat16 gradients, whose sum has more digits than they."""
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    curvature = kfac_jax.make_curvature(
        loss_fn, params, X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)
    )
    tx = kfac_jax.multi_steps(curvature, kfac_jax.scale_by_kfac(curvature), every=9)
    state, zero = tx.init(params), curvature.zero_statistics(params)
    first = jax.tree.map(lambda w: jnp.full_like(w, 256), params)
    small = jax.tree.map(jnp.ones_like, params)
    for grads in (first, *[small] * 7):  # in bfloat16 256 + 1 is 256
        _, state = tx.update(grads, state, params, statistics=zero)
    for x in jax.tree.leaves(state.grads):
        assert x.dtype == jnp.float32 and (x == 263).all()


def test_what_does_not_fit():
    curvature = plan()
    tx = kfac_jax.kfac(curvature)
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        kfac_jax.multi_steps(curvature, None, every=2)
    with pytest.raises(ValueError, match=r"every \(k\)"):
        kfac_jax.multi_steps(curvature, tx, every=0)
    wrapped = kfac_jax.multi_steps(curvature, tx, every=2)
    with pytest.raises(TypeError, match="statistics"):
        wrapped.update(PARAMS, wrapped.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="statistics of the last micro-batch alone"):
        kfac_jax.make_step(curvature, optax.MultiSteps(tx, 2))
    transformation = optax.MultiSteps(tx, 2).gradient_transformation()
    with pytest.raises(ValueError, match="adds them up"):
        kfac_jax.make_step(curvature, transformation)
    products = kfac_jax.make_curvature(
        loss_fn, PARAMS, X[:1], Y[:1], blocks=Kronecker(gradient_products=True)
    )
    with pytest.raises(ValueError, match="multi_steps adds up gradients"):
        kfac_jax.multi_steps(products, kfac_jax.kfac(products, 0.1), every=2)
