"""Optimizers in the loops, wrappers and modules that people report."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles
from tests.reliability.reported import (
    KEY,
    LABELS,
    NET,
    C,
    D,
    H,
    N,
    X,
    assert_exact,
    classified,
    cross_entropy,
    dense_of,
    regressed,
    square,
)

pytestmark = pytest.mark.usefixtures("any_rank")


# --------------------------------------------------------- optimizers in other wrappers


def plan_of_net(**options):
    options = {"estimation_mode": "fisher_exact"} | options
    loss_fn = classified(models.mlp)
    return kfac_jax.make_curvature(loss_fn, NET, X, LABELS, **options)


def steps(plan, tx, count=3):
    step, params, state = jax.jit(kfac_jax.make_step(plan, tx)), NET, tx.init(NET)
    for _ in range(count):
        params, state, _ = step(params, state, KEY, X, LABELS)
    return params


WRAPPERS = {
    "conditionally": lambda tx: optax.conditionally_transform(
        tx, lambda step: step < 9
    ),
    "plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=9)),
    "extra arguments": optax.with_extra_args_support,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_that_change_nothing(name, any_type):
    plan = plan_of_net()
    tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1)
    found = steps(plan, WRAPPERS[name](tx))
    models.assert_trees_close(found, steps(plan, tx), rtol=1e-6)


def test_lookahead_with_bound_keywords(any_type):
    """Before it synchronizes, its fast parameters are those of the optimizer alone."""
    plan = plan_of_net()
    inner = kfac_jax.kfac(plan)

    def bound(**keywords):
        def update(grads, state, params):
            return inner.update(grads, state, params, **keywords)

        return optax.lookahead(optax.GradientTransformation(inner.init, update), 9, 0.5)

    @jax.jit
    def step(params, state):
        value, grads, statistics = plan.value_grad_and_statistics(
            params.fast, X, LABELS
        )
        tx = bound(statistics=statistics, value=value, args=(X, LABELS))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = optax.LookaheadParams.init_synced(NET)
    state = bound().init(params)
    for _ in range(3):
        params, state = step(params, state)
    models.assert_trees_close(params.fast, steps(plan, inner), rtol=1e-7)


def test_flatten_around_what_comes_after():
    plan = plan_of_net()
    momentum = optax.sgd(0.1, momentum=0.9)
    flat, plain = (
        optax.chain(kfac_jax.scale_by_kfac(plan, 0.1), tx)
        for tx in (optax.flatten(momentum), momentum)
    )
    models.assert_trees_close(steps(plan, flat), steps(plan, plain))


def test_schedule_free(any_type):
    plan = plan_of_net()
    inner = kfac_jax.kfac(plan, 0.3, 0.0, 0.1)
    tx = optax.contrib.schedule_free(inner, 0.3, b1=0.9)
    found = steps(plan, tx, 20)
    loss_fn = classified(models.mlp)
    assert loss_fn(found, X, LABELS) < 0.8 * loss_fn(NET, X, LABELS)


def test_a_train_state():
    """As it is it hands no keyword on; a method of one's own does."""

    class Passing(TrainState):
        def apply_gradients(self, *, grads, **keywords):
            updates, state = self.tx.update(
                grads, self.opt_state, self.params, **keywords
            )
            params = optax.apply_updates(self.params, updates)
            return self.replace(step=self.step + 1, params=params, opt_state=state)

    net = nn.Sequential(
        [nn.Dense(H, param_dtype=float), jnp.tanh, nn.Dense(C, param_dtype=float)]
    )
    params = net.init(KEY, X)["params"]
    loss_fn = classified(lambda p, x: net.apply({"params": p}, x))
    plan = kfac_jax.make_curvature(loss_fn, params, X, LABELS)
    tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1)
    _, grads, statistics = plan.value_grad_and_statistics(params, X, LABELS, rng=KEY)
    keywords = {"grads": grads, "statistics": statistics}
    made = {"apply_fn": net.apply, "params": params, "tx": tx}
    with pytest.raises(ValueError, match=r"tx\.update\(.*statistics=statistics"):
        TrainState.create(**made).apply_gradients(**keywords)
    found = Passing.create(**made).apply_gradients(**keywords)
    updates, state = tx.update(grads, tx.init(params), params, statistics=statistics)
    models.assert_trees_equal(found.params, optax.apply_updates(params, updates))
    models.assert_trees_equal(found.opt_state, state)
    assert found.step == 1


class Recurrent(nn.Module):
    """With dropout and batch norm behind it."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=float))(x)[:, -1]
        x = nn.Dropout(0.2, deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=float)(x)
        return nn.Dense(1, param_dtype=float)(x)


def test_a_recurrent_network_with_batch_norm_and_dropout(any_type):
    net, x = Recurrent(), models.array(0, N, 3, 2)
    variables = net.init(KEY, x, False)
    params = variables["params"]
    state = jax.tree.map(lambda x: x.astype(float), variables["batch_stats"])
    params = jax.tree.map(lambda w: w + 0.1 * models.array(w.size, *w.shape), params)

    def outputs(params, x):
        return net.apply({"params": params, "batch_stats": state}, x, False)

    plan, _, found = dense_of(regressed(outputs), params, x, on_unmatched="error")
    exact = oracles.ggn(lambda p: outputs(p, x), square, params)
    assert_exact(plan, found, exact, blocks.Diagonal)

    def loss_fn(params, state, key, x):
        z, new = net.apply(
            {"params": params, "batch_stats": state},
            x,
            True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return squared_error(z).sum(-1).mean(), new["batch_stats"]

    args = params, state, KEY, x
    with pytest.warns(UserWarning, match="Means over the batch"):
        plan = kfac_jax.make_curvature(loss_fn, *args, has_aux=True)
    expected = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(*args)
    found = jax.jit(plan.value_grad_and_statistics)(*args, rng=KEY)[:2]
    assert all(layer.tagged for layer in plan.layers)
    models.assert_trees_close(found, expected)


class Spectral(eqx.Module):
    """Two norms with states of their own."""

    linear: eqx.nn.SpectralNorm
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(KEY, 3)
        inner = eqx.nn.Linear(D, H, key=keys[0])
        self.linear = eqx.nn.SpectralNorm(inner, weight_name="weight", key=keys[1])
        self.norm = eqx.nn.BatchNorm(H, axis_name="cases", mode="batch")
        self.out = eqx.nn.Linear(H, C, key=keys[2])

    def __call__(self, x, state):
        x, state = self.linear(x, state)
        x, state = self.norm(jnp.tanh(x), state)
        return self.out(x), state


def test_norms_of_equinox_with_states(user_settings):
    model, start = eqx.nn.make_with_state(Spectral)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, state, x, y):
        net = jax.vmap(
            eqx.combine(params, static), (0, None), (0, None), axis_name="cases"
        )
        z, state = net(x, state)
        return cross_entropy(z, y).mean(), state

    args = start, np.float32(X), np.int32(LABELS)
    with pytest.warns(UserWarning, match="Means over the batch"):
        plan = kfac_jax.make_curvature(loss_fn, params, *args, has_aux=True)
    assert all(layer.tagged for layer in plan.layers)
    tx = kfac_jax.kfac(plan, 0.05, 0.9, 1e-2)
    step, opt_state, state = (
        jax.jit(kfac_jax.make_step(plan, tx)),
        tx.init(params),
        start,
    )
    values = []
    for _ in range(10):
        params, opt_state, (value, state) = step(
            params, opt_state, KEY, state, *args[1:]
        )
        values.append(value)
    assert values[-1] < 0.8 * values[0]


class Block(nnx.Module):
    """A residual block."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(H, rngs=rngs)
        self.linear = nnx.Linear(H, H, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.linear(self.norm(x))))


class Stack(nnx.Module):
    """Two residual blocks made by `vmap`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)
        self.out = nnx.Linear(H, C, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, block):
            return block(x)

        return self.out(through(x, self.blocks))


def test_an_nnx_stack_with_dropout(user_settings):
    """Random streams go in and come out as auxiliary data."""
    graph, params, rest = nnx.split(Stack(nnx.Rngs(0)), nnx.Param, ...)
    x = jnp.asarray(np.asarray(models.array(1, N, H)), jnp.float32)

    def loss_fn(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        loss = squared_error(model(x)).sum(-1).mean()
        return loss, nnx.split(model, nnx.Param, ...)[2]

    args = params, rest, x
    plan = kfac_jax.make_curvature(loss_fn, *args, has_aux=True, on_unmatched="error")
    (_, aux), grads, _ = jax.jit(plan.value_grad_and_statistics)(*args, rng=KEY)
    expected, after = jax.jit(jax.grad(loss_fn, has_aux=True))(*args)
    models.assert_trees_close(grads, expected, rtol=1e-5, atol=1e-6)
    drawn, expected, start = (
        [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]
        for state in (aux, after, rest)
    )
    models.assert_trees_equal(drawn, expected)
    assert any((x != y).any() for x, y in zip(drawn, start, strict=True))
    model = nnx.merge(graph, params, rest)
    optimizer = nnx.Optimizer(model, kfac_jax.kfac(plan), wrt=nnx.Param)
    with pytest.raises(ValueError, match="Expected the keyword statistics, got none"):
        optimizer.update(model, grads)


class Mixed(eqx.Module):
    """Arrays, a function and a rate among the leaves."""

    linear: eqx.nn.Linear
    activation: object
    dropout: eqx.nn.Dropout

    def __call__(self, x, key):
        return self.activation(self.dropout(self.linear(x), key=key))


def test_leaves_of_an_equinox_module():
    model = Mixed(eqx.nn.Linear(D, C, key=KEY), jax.nn.relu, eqx.nn.Dropout(0.3))

    def loss_fn(params, x, y, key):
        net = eqx.combine(params, static)
        z = jax.vmap(net)(x, jax.random.split(key, len(x)))
        return cross_entropy(z, y).mean()

    args = X, LABELS, KEY
    with pytest.raises(TypeError, match="at 'activation'"):
        kfac_jax.make_curvature(lambda m, x: m(x), model, X)
    kinds = {}
    for spec in (eqx.is_inexact_array, eqx.is_inexact_array_like):
        params, static = eqx.partition(model, spec)
        plan = kfac_jax.make_curvature(loss_fn, params, *args)
        kinds |= {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"linear": "dense", "dropout/p": "unused"}


OPTIMIZERS = {
    "adaptive": lambda function: kfac_jax.Optimizer(
        function,
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        num_burnin_steps=0,
    ),
    "given": lambda function: kfac_jax.Optimizer(function, l2_reg=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_the_optimizer_can_be_donated(name):
    function = jax.value_and_grad(lambda p, batch: classified(models.mlp)(p, *batch))
    state = OPTIMIZERS[name](function).init(NET, KEY, (X, LABELS))
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


# ------------------------------------------------------------------------------- runs


def test_a_sweep_over_seeds_rates_and_dampings():
    plan = plan_of_net(estimation_mode="fisher_gradients")

    def run(seed, rate, damping):
        params = oracles.random_like(NET, 0)
        params = jax.tree.map(lambda w: jnp.cos(seed.astype(float) + w), params)
        tx = kfac_jax.kfac(plan, rate, 0.9, damping, inverse_every=2)
        step = kfac_jax.make_step(plan, tx)

        def body(carry, key):
            params, state, value = step(*carry, key, X, LABELS)
            return (params, state), value

        keys = jax.random.split(jax.random.key(seed), 4)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[1]

    sweep = jnp.arange(2), jnp.asarray([0.1, 0.2]), jnp.asarray([0.01, 0.1])
    together = jax.jit(jax.vmap(run))(*sweep)
    alone = jax.jit(run)
    for i, found in enumerate(together):
        np.testing.assert_allclose(found, alone(*(x[i] for x in sweep)), rtol=1e-9)


def residual(params, x):
    def block(h, p):
        u = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
        u = jax.nn.relu((u * p["g"] + p["s"]) @ p["w"] + p["b"])
        return h + u, None

    h = models.dense(params["in"], x)
    return models.dense(params["out"], jax.lax.scan(block, h, params["blocks"])[0])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rates", [(), (0.1, 0.9, 1e-2)], ids=["default", "given"])
def test_a_residual_stack_trains(rates, user_settings):
    """From three starts, without a rise on the way."""
    depth, width = 4, 8
    x = np.float32(models.array(0, 32, D))
    y = jnp.argmax(x[:, :C] ** 2, -1)

    def start(seed):
        ends = models.dense_params(seed, D, width), models.dense_params(seed, width, C)
        ones = {"g": jnp.ones((depth, width)), "s": jnp.zeros((depth, width))}
        w = models.array(seed, depth, width, width, scale=width**-0.5)
        stack = ones | {"w": w, "b": jnp.zeros((depth, width))}
        ends = {"in": ends[0]["layer0"], "out": ends[1]["layer0"]}
        return jax.tree.map(lambda x: jnp.float32(x), ends | {"blocks": stack})

    starts = jax.tree.map(lambda *x: jnp.stack(x), *map(start, range(3)))
    plan = kfac_jax.make_curvature(classified(residual), start(0), x, y)
    tx = kfac_jax.kfac(plan, *rates)
    step = kfac_jax.make_step(plan, tx)

    @jax.jit
    @jax.vmap
    def train(params):
        def body(carry, key):
            params, state, value = step(*carry, key, x, y)
            return (params, state), value

        keys = jax.random.split(KEY, 60)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[1]

    found = np.asarray(train(starts))
    assert np.isfinite(found).all()
    assert (found.max(1) < 1.2 * found[:, 0]).all()
    assert (found[:, -1] < 0.1 * found[:, 0]).all()
