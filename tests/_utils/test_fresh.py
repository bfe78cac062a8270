"""Arrays to begin with: the same in and outside of programs, nothing compiled."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax._utils import fresh
from tests.helpers import models

EVENT = "/jax/core/compile/backend_compile_duration"

MAKERS = {
    "full": lambda: fresh.full((3, 5), 2.0, jnp.float32),
    "identities": lambda: fresh.identities((2, 3, 3), jnp.float64),
    "zeros_like": lambda: fresh.zeros_like(jnp.ones((4,), jnp.bfloat16)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_same_in_a_program(name):
    outside, inside = MAKERS[name](), jax.jit(MAKERS[name])()
    assert (outside.dtype, outside.shape) == (inside.dtype, inside.shape)
    np.testing.assert_array_equal(outside, inside)
    assert not outside.committed
    assert outside.weak_type == inside.weak_type


def problem():
    def loss_fn(params, x, y):
        h = jnp.tanh(x @ params["a"] + params["b"][None])
        return kfac_jax.losses.squared_error(h @ params["c"], y).sum(-1).mean()

    params = {"a": jnp.ones((13, 11)), "b": jnp.ones(11), "c": jnp.ones((11, 7))}
    return loss_fn, params, jnp.ones((17, 13)), jnp.ones((17, 7))


def test_init_compiles_nothing_for_a_shape():
    loss_fn, params, *data = problem()
    curvature = kfac_jax.make_curvature(loss_fn, params, *data)
    tx = kfac_jax.kfac(curvature, learning_rate=0.1, momentum=0.9, damping=1e-2)
    small = {name: x[:2] if x.ndim == 1 else x[:2, :2] for name, x in params.items()}
    other = kfac_jax.make_curvature(
        loss_fn, small, jnp.ones((17, 2)), jnp.ones((17, 2))
    )
    kfac_jax.kfac(other, learning_rate=0.1, momentum=0.9, damping=1e-2).init(small)
    compiled, listening = [], [True]

    def listen(event, *_, **__):  # stays registered: JAX 0.8 cannot take it away
        if listening and event == EVENT:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    state = tx.init(params)
    listening.clear()
    assert not compiled
    expected = jax.jit(tx.init)(params)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_state_can_be_donated():
    loss_fn, params, *data = problem()
    curvature = kfac_jax.make_curvature(loss_fn, params, *data)
    tx = kfac_jax.kfac(curvature, learning_rate=0.1, momentum=0.9, damping=1e-2)

    def step(state):
        _, grads, statistics = curvature.value_grad_and_statistics(
            params, *data, rng=jax.random.key(0)
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    jax.block_until_ready(jax.jit(step, donate_argnums=0)(state))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.factors))


def test_velocity_stays_where_the_parameters_are():
    device = jax.devices()[-1]
    x = jax.device_put(jnp.ones((4, 4)), device)
    assert fresh.zeros_like(x).devices() == {device}


@models.EIGHT_DEVICES
def test_follows_a_mesh():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.ones((8, 4)), sharding)
    assert fresh.zeros_like(x).sharding == sharding
    with jax.set_mesh(mesh):
        found = fresh.full((3,), 1.0, jnp.float32)
        assert found.sharding == jnp.ones((3,)).sharding
