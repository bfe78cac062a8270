"""`Optimizer` with functions and arguments as programs have them, edges included."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from tests.compat.optimizer_problem import (
    BATCH,
    EXACT,
    KEY,
    LABELS,
    PARAMS,
    RATES,
    VALUE_AND_GRAD,
    X,
    cross_entropy,
    loss_fn,
)
from tests.helpers import models


def used(params, batch):
    z = models.mlp(params, batch[0])
    z = kfac_jax.register_categorical_predictive_distribution(z, batch[1])
    return cross_entropy(z, batch[1])


def one_step(function, params=PARAMS, batch=BATCH, rates=RATES, **options):
    optimizer = kfac_jax.Optimizer(function, **(EXACT | options))
    state = optimizer.init(params, KEY, batch)
    return optimizer.step(params, state, KEY, batch=batch, **rates)


def factors(result):
    return result[1].estimator_state.factors


# ----------------------------------------------------------- where a loss is registered


def in_a_loop(params, batch):
    def body(_, total):
        return total + loss_fn(params, batch)

    return jax.lax.fori_loop(0, 1, body, jnp.zeros(()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "loss_fn",
    [
        jax.jit(loss_fn),
        jax.checkpoint(loss_fn),
        jax.checkpoint(used),
        jax.jit(jax.checkpoint(loss_fn)),
        jax.checkpoint(jax.jit(used)),
        in_a_loop,
    ],
    ids=["jit", "checkpoint", "used", "jit of checkpoint", "of jit", "loop"],
)
def test_a_loss_counts_once_however_it_is_differentiated(loss_fn):
    """JAX drops what is not used, and recomputes under `checkpoint`."""
    found = factors(one_step(jax.value_and_grad(loss_fn)))
    models.assert_trees_close(found, factors(one_step(VALUE_AND_GRAD)))


def test_a_rule_under_jit_and_checkpoint():
    """The loss is registered in a derivative rule of a staged function."""

    @jax.custom_jvp
    def energy(params, x):
        return jnp.square(models.mlp(params, x)).mean()

    @energy.defjvp
    def rule(primals, tangents):
        z, slope = jax.jvp(models.mlp, primals, tangents)
        kfac_jax.register_normal_predictive_distribution(z)
        return energy(*primals), (slope * jnp.sin(z)).mean()

    plain, *staged = [
        one_step(jax.value_and_grad(f), batch=X)
        for f in (energy, jax.jit(energy), jax.checkpoint(energy))
    ]
    for other in staged:
        models.assert_trees_close(other[0], plain[0])
        models.assert_trees_close(factors(other), factors(plain))


# ---------------------------------------------------------------------- what it returns


def test_float32_in_a_float64_program():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    params, _, stats = one_step(
        VALUE_AND_GRAD,
        params,
        (X.astype(jnp.float32), LABELS),
        rates={"learning_rate": 0.1, "momentum": 0.0},
        use_adaptive_damping=True,
        initial_damping=1.0,
        damping_adaptation_interval=1,
    )
    assert params["layer0"]["w"].dtype == stats["loss"].dtype == jnp.float32
    assert 0.5 < stats["rho"] < 1.5


@models.EIGHT_DEVICES
def test_what_devices_return():
    """Auxiliary data are averaged, whatever their type; states are left alone."""
    devices = jax.local_device_count()

    def function(params, state, batch):
        own = batch[1][0]
        aux = {"int": own, "bool": own % 2 == 0, "key": jax.random.key(3)}
        new = {"count": state["count"] + 1, "own": own.astype(float)}
        return loss_fn(params, batch), (new, aux)

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(function, has_aux=True),
        value_func_has_aux=True,
        value_func_has_state=True,
        multi_device=True,
        **EXACT,
    )
    first = {"count": jnp.zeros((), jnp.int32), "own": jnp.zeros(())}
    spread = kfac_jax.utils.replicate_all_local_devices
    params, func_state = spread(PARAMS), spread(first)
    keys = jax.random.split(KEY, devices)
    labels = jnp.tile(jnp.arange(devices)[:, None] % 4, 2)
    batch = models.array(2, devices, 2, 3), labels
    state = optimizer.init(params, keys, batch, func_state)
    _, _, func_state, stats = optimizer.step(
        params, state, keys, batch=batch, func_state=func_state, **RATES
    )
    np.testing.assert_array_equal(func_state["count"], 1)
    np.testing.assert_array_equal(func_state["own"], labels[:, 0])
    mean = labels[:, 0].astype(float).mean()
    np.testing.assert_allclose(stats["aux"]["int"], np.full(devices, mean))
    np.testing.assert_allclose(stats["aux"]["bool"], np.full(devices, 0.5))


def test_losses_of_any_scale_with_and_without_staging():
    """Existing programs may return another loss than they register."""

    def double(params, batch):
        return 2 * loss_fn(params, batch)

    function = jax.value_and_grad(double)
    staged, plain = one_step(function), one_step(function, debug=True)
    models.assert_trees_close(plain[0], staged[0])


# ------------------------------------------------------------------------ wrong inputs


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (loss_fn, {}, r"\(loss, grads\)"),
        (VALUE_AND_GRAD, {"value_func_has_aux": True}, r"\(\(loss, aux\), grads\)"),
        (
            lambda *args: ((loss_fn(*args), 1), None),
            {},
            r"\(loss, grads\), with value_func_has_state=False.*got tuple",
        ),
        (
            lambda params, state, batch: ((loss_fn(params, batch), state), None),
            {"value_func_has_aux": True, "value_func_has_state": True},
            r"\(\(loss, \(state, aux\)\), grads\).*got NoneType",
        ),
    ],
)
def test_a_function_that_returns_something_else(function, options, expected):
    message = "value_and_grad_func is expected to return " + expected
    with pytest.raises(TypeError, match=message):
        one_step(function, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature_update_period": 0}, "curvature_update_period is expected to be"),
        ({"inverse_update_period": 2.5}, "inverse_update_period is expected to be"),
        ({"num_burnin_steps": -1}, "is expected to be an integer ≥ 0; got -1"),
        ({"curvature_ema": 1.5}, r"curvature_ema, .* is expected in \[0, 1\]; got 1.5"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        kfac_jax.Optimizer(VALUE_AND_GRAD, **(EXACT | options))


def test_a_state_of_something_else():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    with pytest.raises(TypeError, match="state must be what init, or the step before"):
        optimizer.step(PARAMS, PARAMS, KEY, batch=BATCH, **RATES)


def test_shapes_of_something_else():
    with pytest.raises(ValueError, match="step expects momentum as one number; got"):
        one_step(VALUE_AND_GRAD, rates=RATES | {"momentum": np.full(3, 0.9)})
    many = kfac_jax.Optimizer(VALUE_AND_GRAD, multi_device=True, **EXACT)
    message = r"local devices; got shape \(5,\) at \[0\]\['layer0'\]\['b'\]"
    with pytest.raises(ValueError, match=message):
        many.init(PARAMS, KEY, BATCH)
    with pytest.raises(ValueError, match="or one for each device; got shape"):
        many.step(
            PARAMS, None, KEY, batch=BATCH, **(RATES | {"momentum": np.full(3, 0.9)})
        )


def test_options_stay_as_they_are_and_other_attributes_may_be_set():
    class Own(kfac_jax.Optimizer):
        def __init__(self, *args, **kwargs):
            self.before = 1
            super().__init__(*args, **kwargs)
            self.after = 2

    optimizer = copy.deepcopy(Own(VALUE_AND_GRAD, **EXACT))
    assert optimizer.before == 1
    with pytest.raises(AttributeError, match="curvature_ema of an Optimizer cannot be"):
        optimizer.curvature_ema = 0.5
    state = optimizer.init(PARAMS, KEY, BATCH)
    params, _, _ = optimizer.step(PARAMS, state, KEY, batch=BATCH, **RATES)
    models.assert_trees_close(params, one_step(VALUE_AND_GRAD)[0])


@pytest.mark.parametrize("multi_device", [False, True])
def test_rates_of_any_kind_compile_once(multi_device):
    traces, devices = [], jax.local_device_count()

    def counted(params, batch):
        traces.append(None)
        return VALUE_AND_GRAD(params, batch)

    optimizer = kfac_jax.Optimizer(counted, multi_device=multi_device, **EXACT)
    params, batch, keys = PARAMS, BATCH, KEY
    if multi_device:
        params = kfac_jax.utils.replicate_all_local_devices(params)
        batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        keys = jax.random.split(KEY, devices)
    state = optimizer.init(params, keys, batch)
    found = []
    for rate in (1, 1.0, np.float32(1), jnp.float32(1), jnp.ones(()), np.ones(())):
        rates = {"learning_rate": rate, "momentum": rate, "damping": rate}
        params, state, _ = optimizer.step(params, state, keys, batch=batch, **rates)
        found.append(len(traces))
    assert found == found[:1] * len(found)
