"""`Optimizer` with `multi_device=True`, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from tests.compat.optimizer_problem import (
    ADAPTIVE,
    BATCH,
    EXACT,
    KEY,
    PARAMS,
    RATES,
    VALUE_AND_GRAD,
    batches,
    loss_fn,
    replicated,
    spread,
    train,
)
from tests.helpers import models


@pytest.mark.sampled(2)
@pytest.mark.parametrize("momentum", ["number", "replicated", "adaptive"])
def test_devices_are_like_one(momentum):
    devices = jax.local_device_count()
    size = 2 * devices
    steps = batches(4, size)
    options = ADAPTIVE if momentum == "adaptive" else {"norm_constraint": 1e-2}
    rates = {} if momentum == "adaptive" else RATES | {"momentum": 0}

    def function(params, batch):
        return loss_fn(params, batch), {"mean": batch[0].mean()}

    function = jax.value_and_grad(function, has_aux=True)
    options = options | EXACT | {"value_func_has_aux": True}
    one = kfac_jax.Optimizer(function, **options)
    params, _, expected = train(one, PARAMS, steps, **rates)
    many = kfac_jax.Optimizer(
        function, multi_device=True, pmap_axis_name="devices", **options
    )
    if momentum == "replicated":
        rates = replicated(jax.tree.map(jnp.asarray, rates), devices)
    own, keys = replicated(PARAMS, devices), jax.random.split(KEY, devices)
    steps = [spread(batch, devices) for batch in steps]
    state = many.init(own, keys, steps[0])
    for batch, one_device in zip(steps, expected, strict=True):
        own, state, stats = many.step(own, state, keys, batch=batch, **rates)
        assert set(stats) == set(one_device)
        for name, value in stats.items():
            if value is None:
                assert one_device[name] is None
            else:
                x, y = jax.tree.leaves(value), jax.tree.leaves(one_device[name])
                want = np.broadcast_to(y[0], (devices,))
                np.testing.assert_allclose(x[0], want, rtol=1e-8, atol=1e-12)
    models.assert_trees_close(own, replicated(params, devices))
    assert state.step_counter.shape == state.damping.shape == (devices,)


def test_burn_in_on_devices():
    devices = jax.local_device_count()
    many = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        0.0,
        estimation_mode="fisher_exact",
        num_burnin_steps=1,
        multi_device=True,
    )
    steps = [spread(batch, devices) for batch in batches(2, 2 * devices)]
    own, keys = replicated(PARAMS, devices), jax.random.split(KEY, devices)
    state = many.init(own, keys, steps[0])
    _, state, _ = many.step(own, state, keys, iter(steps), **RATES)
    one = kfac_jax.Optimizer(
        VALUE_AND_GRAD, 0.0, estimation_mode="fisher_exact", num_burnin_steps=1
    )
    start = one.init(PARAMS, KEY, BATCH)
    iterator = iter(batches(2, 2 * devices))
    _, expected, _ = one.step(PARAMS, start, KEY, iterator, **RATES)
    models.assert_trees_close(
        state.estimator_state.factors,
        replicated(expected.estimator_state.factors, devices),
    )
