"""`Optimizer` with parameters of any tree, and losses of any form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfac_jax
from tests.compat.optimizer_problem import (
    BATCH,
    EXACT,
    KEY,
    PARAMS,
    RATES,
    VALUE_AND_GRAD,
    cross_entropy,
    loss_fn,
    replicated,
    spread,
    train,
)
from tests.helpers import models


class Dense(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (
            lambda p: [[*p["layer0"].values()], [*p["layer1"].values()]],
            lambda q: {
                name: {"w": w, "b": b}
                for name, (w, b) in zip(("layer0", "layer1"), q, strict=True)
            },
        ),
        (
            lambda p: {name: Dense(**part) for name, part in p.items()},
            lambda q: {name: part._asdict() for name, part in q.items()},
        ),
        (
            lambda p: nnx.State(jax.tree.map(lambda x: nnx.Param(jnp.asarray(x)), p)),
            nnx.to_pure_dict,
        ),
        (
            lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), p),
            lambda q: q,
        ),
    ],
    ids=["lists", "named tuples", "nnx.State", "float32"],
)
def test_parameters_of_any_tree(wrap, unwrap):
    start = wrap(PARAMS)
    dtype = jax.tree.leaves(start)[0].dtype

    def function(params, batch):
        return loss_fn(unwrap(params), (batch[0].astype(dtype), batch[1]))

    optimizer = kfac_jax.Optimizer(jax.value_and_grad(function), **EXACT)
    params, state, stats = train(optimizer, start, [BATCH] * 2, **RATES)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert jax.tree.structure(state.velocities) == jax.tree.structure(start)
    assert [x.dtype for x in jax.tree.leaves(params)] == [
        x.dtype for x in jax.tree.leaves(start)
    ]
    assert stats[1]["loss"] < stats[0]["loss"]
    assert {layer.kind for layer in optimizer.curvature.layers} == {"dense"}


def wavefunction(params, x):
    """Log ψ of one walker, with the same weights for each of its two particles."""
    h = jnp.tanh(models.dense(params["layer0"], x.reshape(2, 3)))
    return (h.sum(0) @ params["layer1"]["w"]).sum() - 0.5 * jnp.square(x).sum()


def energy(axis):
    """As usual, the gradient is not that of the value, and the tag is in a rule."""
    many = jax.vmap(wavefunction, (None, 0))

    def mean(x):
        return jax.lax.pmean(x.mean(), axis) if axis else x.mean()

    def local(params, x):
        slope = jax.vmap(jax.grad(wavefunction, 1), (None, 0))(params, x)
        return 0.5 * jnp.square(slope).sum(-1) + jnp.square(x).sum(-1)

    @jax.custom_jvp
    def total(params, key, walkers):
        del key
        each = local(params, walkers)
        return mean(each), {"local": each}

    @total.defjvp
    def rule(primals, tangents):
        params, _, walkers = primals
        loss, aux = total(*primals)
        psi, slope = jax.jvp(many, (params, walkers), (tangents[0], tangents[2]))
        kfac_jax.register_normal_predictive_distribution(psi[:, None])
        gradient = jnp.dot(slope, aux["local"] - loss) / len(walkers)
        return (loss, aux), (gradient, jax.tree.map(jnp.zeros_like, aux))

    return total


@pytest.mark.parametrize("multi_device", [False, True])
def test_a_neural_wavefunction(multi_device):
    walkers = models.array(30, 16, 6)
    params = {
        "layer0": PARAMS["layer0"],
        "layer1": {"w": models.array(31, 5, 1)},
    }
    axis = "devices" if multi_device else None
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(energy(axis), argnums=0, has_aux=True),
        l2_reg=0.0,
        norm_constraint=1e-3,
        value_func_has_aux=True,
        value_func_has_rng=True,
        learning_rate_schedule=lambda t: 0.05 / (1 + t.astype(float) / 10000),
        curvature_ema=0.95,
        inverse_update_period=1,
        min_damping=1e-4,
        num_burnin_steps=0,
        register_only_generic=False,
        estimation_mode="fisher_exact",
        pmap_axis_name="devices",
        multi_device=multi_device,
    )
    devices = jax.local_device_count() if multi_device else 1
    keys, momentum, damping = KEY, jnp.zeros(()), jnp.asarray(1e-3)
    own = params
    if multi_device:
        keys = jax.random.split(KEY, devices)
        own, momentum, damping = replicated((own, momentum, damping), devices)
        walkers = spread(walkers, devices)
    own, _, stats = optimizer.step(
        params=own,
        state=optimizer.init(own, keys, walkers),
        rng=keys,
        batch=walkers,
        momentum=momentum,
        damping=damping,
    )
    kinds = {layer.name: layer.kind for layer in optimizer.curvature.layers}
    assert kinds == {"layer0": "dense", "layer1/w": "dense"}

    # the same by hand: F of the registered outputs, the gradient of the program
    x = walkers.reshape(-1, 6)
    _, grads = jax.value_and_grad(energy(None), has_aux=True)(params, KEY, x)
    curvature = optimizer.curvature
    factors = curvature.init_factors(params)

    def registered(params, x):
        psi = jax.vmap(wavefunction, (None, 0))(params, x)
        kfac_jax.register_normal_predictive_distribution(psi[:, None])
        return psi.sum()

    plain = kfac_jax.make_curvature(
        registered,
        params,
        x,
        estimation_mode="fisher_exact",
        blocks=kfac_jax.blocks.Kronecker(exact_scalars=True),
    )
    _, _, seen = plain.value_grad_and_statistics(params, x)
    operator = plain.approximation(plain.update_factors(factors, seen, 1))
    step = operator.solve(grads, damping=1e-3)
    length = optax.tree.vdot(step, grads) * 0.05**2
    scale = 0.05 * np.sqrt(min(1.0, 1e-3 / float(length)))
    expected = jax.tree.map(lambda p, s: p - scale * s, params, step)
    if multi_device:
        own = jax.tree.map(lambda x: x[-1], models.on_host(own))
    models.assert_trees_close(own, expected)
    np.testing.assert_allclose(
        np.ravel(stats["scaled_grad_norm_sq"])[0], length, rtol=1e-8
    )


def test_tags_that_are_thrown_away_do_no_harm():
    def function(params, batch):
        x, labels = batch
        w, b = params["layer0"]["w"], params["layer0"]["b"]
        y = models.dense(params["layer0"], x)
        kfac_jax.register_dense(y, x, w, b, variant="repeated_dense", note=[1])
        z = models.dense(params["layer1"], jnp.tanh(y))
        kfac_jax.register_softmax_cross_entropy_loss(z, labels)
        return cross_entropy(z, labels)

    tagged = kfac_jax.Optimizer(jax.value_and_grad(function), **EXACT)
    plain = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    models.assert_trees_close(
        train(tagged, PARAMS, [BATCH], **RATES)[0],
        train(plain, PARAMS, [BATCH], **RATES)[0],
    )
