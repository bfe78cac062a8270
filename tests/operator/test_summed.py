"""Weights that are used several times, under blocks of whole gradients.

The oracle is the exact Fisher, by products that know nothing of layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from kfac_jax.plan import summing
from tests.helpers import models

N, D, WORDS = 5, 3, 4
X = models.array(0, N, D)
SEQUENCES = models.array(1, N, 2, D)
IDS = models.classes(2, WORDS, N, 2)
IMAGES = models.array(3, N, 4, 4, 2)
WEIGHT = {"w": models.array(4, D, D), "b": models.array(5, D)}


def twice(p, x):
    return models.dense(p, jnp.tanh(models.dense(p, x)))


def scan(p, x):
    def step(h, _):
        return jnp.tanh(models.dense(p, h) + x), None

    return jax.lax.scan(step, jnp.zeros_like(x), length=3)[0]


def scan_over_positions(p, x):
    def step(h, x):
        return jnp.tanh(models.dense(p, h) + x), None

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))[0]


def autoencoder(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"][None]


def language_model(p, ids):
    return jnp.tanh(p["table"][ids]).mean(1) @ p["table"].T


def table_twice(p, ids):
    return jnp.tanh(p["table"][ids[:, 0]] - 2 * p["table"][ids[:, 1]])


def branches(p, x):
    h = jax.lax.cond(
        x.sum() > 0,
        lambda: jnp.tanh(models.dense(p, x)),
        lambda: jnp.sin(models.dense(p, 2 * x)),
    )
    return models.dense(p, h)


def slope(p, x):
    """The derivative of a network by its input, for each example."""

    def one(x):
        return jnp.tanh(models.dense(p, jnp.tanh(models.dense(p, x)))).sum()

    return jax.vmap(jax.grad(one))(x)


def kernel_twice(p, x):
    def convolve(x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return jnp.tanh(convolve(jnp.tanh(convolve(x)))).sum((1, 2))


def stacked(p, x):
    """Each step's layer, twice."""

    def step(h, p):
        return jnp.tanh(models.dense(p, jnp.tanh(models.dense(p, h)))), None

    return jax.lax.scan(step, x, p)[0]


def scale_twice(p, x):
    return p["scale"][None] * jnp.tanh(p["scale"][None] * x) + jnp.sin(
        p["shift"][None] + jnp.tanh(x + p["shift"][None])
    )


TABLE = {"table": models.array(6, WORDS, D)}
PAIR = {"w": models.array(7, 2, D, D), "b": models.array(8, 2, D)}
FAMILIES = {  # the program, its parameters, the data, and the kinds of its layers
    "twice": (twice, WEIGHT, X, {"dense"}),
    "scan": (scan, WEIGHT, X, {"dense"}),
    "scan over positions": (scan_over_positions, WEIGHT, SEQUENCES, {"dense"}),
    "autoencoder": (autoencoder, WEIGHT, X, {"tied", "shift"}),
    "language model": (language_model, TABLE, IDS, {"tied"}),
    "table": (table_twice, TABLE, IDS, {"embedding"}),
    "branches": (branches, WEIGHT, X, {"dense"}),
    "slope": (slope, WEIGHT, X, {"tied", "shift"}),
    "kernel": (kernel_twice, {"kernel": models.array(9, 3, 3, 2, 2)}, IMAGES, {"conv"}),
    "stacked": (stacked, PAIR, X, {"dense"}),
    "scale": (
        scale_twice,
        {"scale": models.array(10, D), "shift": models.array(11, D)},
        X,
        {"scale", "shift"},
    ),
}
BLOCKS = [blocks.Full(), blocks.Diagonal(), blocks.TNT(), blocks.Eigen()]


def loss_of(apply):
    return lambda p, x: squared_error(apply(p, x)).sum(-1).mean()


def plan_of(name, block, mode="fisher_exact"):
    apply, params, x, _ = FAMILIES[name]
    return kfac_jax.make_curvature(
        loss_of(apply),
        params,
        x,
        blocks=block,
        estimation_mode=mode,
        on_unmatched="error",
    )


@functools.cache
def exact(name):
    """The exact Fisher of all parameters."""
    _, params, x, _ = FAMILIES[name]
    plan = plan_of(name, None)
    flat, restore = jax.flatten_util.ravel_pytree(params)
    product = jax.jit(lambda v: plan.matvec(params, restore(v), x))
    columns = [product(v) for v in jnp.eye(len(flat))]
    return np.stack([jax.flatten_util.ravel_pytree(c)[0] for c in columns])


def operator(name, block):
    _, params, x, _ = FAMILIES[name]
    plan = plan_of(name, block)
    factors = jax.jit(functools.partial(models.statistics_to_factors, plan))(params, x)
    return plan, plan.approximation(factors)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", BLOCKS, ids=repr)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_block_is_that_of_examples_gradients(name, block):
    """Full is exact, Diagonal has its diagonal, the others its trace."""
    plan, found = operator(name, block)
    title = "Examples' gradients, summed over uses:"
    assert {*models.notes(plan, title)} == {
        layer.name for layer in plan.layers if layer.uses > 1 or layer.kind == "dense"
    }
    assert {layer.kind for layer in plan.layers} == FAMILIES[name][3]
    matrix, fisher = np.asarray(found.to_dense()), exact(name)
    for layer in plan.layers:
        own = models.places(plan, layer)
        mine, wanted = (x[np.ix_(own, own)] for x in (matrix, fisher))
        np.testing.assert_allclose(np.trace(mine), np.trace(wanted), rtol=1e-10)
        assert np.linalg.eigvalsh(mine).min() > -1e-10 * np.trace(mine)
        if isinstance(block, blocks.Diagonal):
            wanted = np.diag(np.diag(wanted))
        elif not isinstance(block, blocks.Full) or layer.shape.stacked:
            continue
        np.testing.assert_allclose(mine, wanted, atol=1e-10 * np.trace(wanted))


def test_full_blocks_of_stacked_layers_are_each_exact():
    plan, found = operator("stacked", blocks.Full())
    (layer,) = plan.layers
    v = {"w": models.array(1, 2, D, D), "b": models.array(2, 2, D)}
    product = found.matvec(v)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: jnp.zeros_like(x).at[i].set(x[i]), v)
        wanted = plan.matvec(PAIR, one, X)
        models.assert_trees_close(
            jax.tree.map(lambda x, i=i: x[i], product),
            jax.tree.map(lambda x, i=i: x[i], wanted),
        )
    assert layer.shape.stacked == (2,)


@pytest.mark.parametrize("name", ["twice", "language model", "stacked"])
def test_eigen_finds_a_basis_and_solves(name):
    _, found = operator(name, blocks.Eigen())
    v = jax.tree.map(jnp.ones_like, FAMILIES[name][1])
    solved = found.solve(v, damping=0.1)
    matrix = found.to_dense()
    flat, restore = jax.flatten_util.ravel_pytree(v)
    wanted = jnp.linalg.solve(matrix + 0.1 * jnp.eye(len(flat)), flat)
    models.assert_trees_close(solved, restore(wanted))


@pytest.mark.parametrize("mode", ["fisher_gradients", "fisher_empirical"])
def test_gradients_of_one_pull_back(mode):
    """The empirical Fisher is that of the loss's own gradients, case by case."""
    apply, params, x, _ = FAMILIES["twice"]
    targets = models.array(12, N, D)

    def loss_fn(p, x, y):
        return squared_error(apply(p, x), y).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn, params, x, targets, blocks=blocks.Full(), estimation_mode=mode
    )
    factors = models.statistics_to_factors(
        plan, params, x, targets, rng=jax.random.key(0)
    )
    found = plan.approximation(factors).to_dense()
    if mode == "fisher_gradients":
        assert jnp.linalg.matrix_rank(found) <= N
        return
    each = [
        jax.flatten_util.ravel_pytree(
            jax.grad(loss_fn)(params, x[i : i + 1], targets[i : i + 1])
        )[0]
        for i in range(N)
    ]
    np.testing.assert_allclose(
        found, sum(jnp.outer(g, g) for g in each) / N, atol=1e-12
    )


def test_gradients_that_take_too_much_memory_are_refused(monkeypatch):
    monkeypatch.setattr(summing, "LARGEST", N * D * (D + 1) - 1)
    apply, params, x, _ = FAMILIES["twice"]
    with pytest.warns(UserWarning, match=r"gradients of 5 examples are 60 numbers"):
        kfac_jax.make_curvature(loss_of(apply), params, x, blocks=blocks.Full())


@models.EIGHT_DEVICES
def test_devices_of_a_shard_map_are_told_apart():
    """A probe for each example would be summed over the devices' examples."""
    apply, params, x, _ = FAMILIES["twice"]
    mesh = models.mesh(2, "batch")
    spec = jax.sharding.PartitionSpec
    shared = jax.shard_map(
        apply, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec("batch")
    )
    with pytest.warns(UserWarning, match="several times inside of a shard_map"):
        kfac_jax.make_curvature(loss_of(shared), params, x[:4], blocks=blocks.Full())
