"""The natural gradient in the sample space on 1 = 8 devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels, squared_error
from tests.helpers import models

DEVICES = 8
PARAMS = {
    "w": models.array(0, 3, 5),
    "b": models.array(1, 5),
    "r": models.array(2, 5, 5, scale=0.3),
    "o": models.array(3, 5, 2),
    "s": jnp.asarray(0.3),
}
X, EDGE = models.array(4, 16, 3), models.array(5, 8, 3)
Y, LABELS = models.array(6, 16, 2), jnp.arange(8) % 2


def network(p, x):
    """With a dense layer, one that is used twice, and a scale."""
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    h = jnp.tanh(jnp.tanh(h @ p["r"]) @ p["r"])
    return (jnp.exp(p["s"]) * h) @ p["o"]


def one_loss(p, x, y):
    return squared_error(network(p, x), y).sum(-1).mean()


def two_losses(p, x, y, edge, labels):
    """On batches of different lengths."""
    z = network(p, edge)
    other = softmax_cross_entropy_with_integer_labels(z, labels).mean()
    return one_loss(p, x, y) + other


def unmatched(p, x, y):
    """With a parameter whose gradients are taken case by case."""
    z = network(p, x)
    return squared_error(z * jnp.sort(p["b"])[:2].sum(), y).sum(-1).mean()


RULE = kfac_jax.LevenbergMarquardt(1.0, every=1, factor=0.5)
CASES = {
    "plain": (one_loss, {}, {}),
    "two losses": (two_losses, {}, {}),
    "centered, SPRING": (one_loss, {"centered": True}, {"momentum": kfac_jax.Spring()}),
    "a rule": (
        one_loss,
        {},
        {"learning_rate": kfac_jax.QuadraticModel(), "damping": RULE},
    ),
    "targets": (one_loss, {"mode": "fisher_empirical"}, {"damping": 0.1}),
    "case by case": (unmatched, {}, {}),
}


def made(name):
    loss_fn, options, own = CASES[name]
    args = (X, Y, EDGE, LABELS) if loss_fn is two_losses else (X, Y)
    curvature = kfac_jax.make_curvature(
        loss_fn,
        PARAMS,
        *args,
        structure=kfac_jax.SampleSpace(centered=options.get("centered", False)),
        estimation_mode=options.get("mode", "ggn_exact"),
    )
    make = functools.partial(
        kfac_jax.natural_gradient,
        curvature,
        **{"learning_rate": 0.1, "damping": 1e-3, "norm_constraint": 0.1} | own,
    )
    return curvature, make, args


def run(step, state, args, params=PARAMS):
    for key in jax.random.split(jax.random.key(0), 3):
        params, state, _ = step(params, state, key, *args)
    return params, state


@functools.cache
def alone(name):
    curvature, make, args = made(name)
    tx = make()
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    return run(step, tx.init(PARAMS), args)


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def close(found, expected):
    models.assert_trees_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_shard_map(name, checked):
    curvature, make, args = made(name)
    over = kfac_jax.OverAxis("data")
    tx = make(devices=over)
    local = kfac_jax.make_step(curvature, tx, devices=over)

    def step(params, state, key, *args):
        params, state, value = local(params, state, key, *args)
        return params, state, jax.lax.pmean(value, "data")

    batch = tuple(P("data") for _ in args)
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P(), P(), *batch),
        out_specs=P(),
        check_vma=checked,
    )
    close(run(jax.jit(mapped), tx.init(PARAMS), args), alone(name))


@pytest.mark.parametrize("name", ["plain", "two losses"])
def test_pmap(name):
    curvature, make, args = made(name)
    over = kfac_jax.OverAxis("data")
    tx = make(devices=over)
    local = kfac_jax.make_step(curvature, tx, devices=over)
    axes = (None, None, None, *(0 for _ in args))
    step = jax.pmap(local, "data", in_axes=axes, out_axes=None)
    cut = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in args]
    close(run(step, tx.init(PARAMS), cut), alone(name))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", ["plain", "two losses", "centered, SPRING"])
def test_jit_over_a_mesh(name, named):
    curvature, make, args = made(name)
    mesh = mesh_of(AxisType.Auto)
    tx = make(devices=kfac_jax.OverMesh(mesh)) if named else make()
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    args = jax.device_put(args, NamedSharding(mesh, P("data")))
    start = jax.device_put((PARAMS, tx.init(PARAMS)), NamedSharding(mesh, P()))
    close(run(step, start[1], args, start[0]), alone(name))


def test_a_mesh_with_explicit_axes():
    curvature, make, args = made("plain")
    mesh = mesh_of(AxisType.Explicit)
    tx = make(devices=kfac_jax.OverMesh(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(kfac_jax.make_step(curvature, tx))
        args = jax.device_put(args, NamedSharding(mesh, P("data")))
        start = jax.device_put((PARAMS, tx.init(PARAMS)), NamedSharding(mesh, P()))
        close(run(step, start[1], args, start[0]), alone("plain"))
        found = jax.jit(curvature.gram)(start[0], *args)
    close(found, curvature.gram(PARAMS, X, Y))


def test_samples_differ_between_devices():
    """As many rows as cases and samples on all devices, and their own keys."""
    sampled = kfac_jax.make_curvature(
        one_loss,
        PARAMS,
        X,
        Y,
        structure=kfac_jax.SampleSpace(),
        num_samples=2,
    )
    over = kfac_jax.OverAxis("data")

    def cotangents(key, x, y):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        _, _, statistics = sampled.value_grad_and_statistics(PARAMS, x, y, rng=key)
        return statistics.layers["sample space"]["cotangents 000"]

    mapped = jax.shard_map(
        cotangents,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(None, "data"),
    )
    found = jax.jit(mapped)(jax.random.key(0), X, Y)
    assert found.shape == (2, 16, 2)
    assert len({float(x) for x in found.ravel()}) == found.size
    tx = kfac_jax.natural_gradient(sampled, 1.0, damping=20.0, devices=over)
    local = kfac_jax.make_step(sampled, tx, devices=over)
    step = jax.shard_map(
        lambda *args: local(*args)[:2],
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    key = jax.random.key(1)
    params, state = jax.jit(step)(PARAMS, tx.init(PARAMS), key, X, Y)
    assert int(state.skipped_updates) == 0
    assert float(one_loss(params, X, Y)) < float(one_loss(PARAMS, X, Y))
