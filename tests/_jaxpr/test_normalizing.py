"""Batch norm in training: its means are constants for the curvature, and only its.

The oracle is the exact Gauss-Newton matrix of the same network with a `stop_gradient`
at the means, by Jacobians of all outputs together.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

N, D, H = 6, 3, 4
X = models.array(0, N, D)
PARAMS = {
    "v": models.array(1, D, H),
    "s": 1 + 0.1 * models.array(2, H),
    "t": models.array(3, H),
    "u": models.array(4, H, H),
    "w": models.array(5, H, 2),
}


@pytest.fixture(autouse=True)
def promotion():
    """People write `h - h.mean(0)`."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


told = pytest.warns(UserWarning, match="Means over the batch")


def as_written(h, p, keep):
    mean, variance = keep(h.mean(0)), keep(h.var(0))
    return (h - mean) / jnp.sqrt(variance + 0.1) * p["s"] + p["t"]


def fused(h, p, keep):
    """The scale meets the variance first, as in flax and haiku."""
    mean = keep(h.mean(0, keepdims=True))
    variance = keep(jnp.square(h).mean(0, keepdims=True) - jnp.square(mean))
    factor = jax.lax.rsqrt(jnp.maximum(variance, 0) + 0.1) * p["s"]
    return (h - mean) * factor + p["t"]


def centred(h, p, keep):
    """By a sum, with the constant behind it and in front of it."""
    h = h - keep((1 / N) * h.sum(0))
    return (h - keep(h.sum(0) * (1 / N))) * p["s"] + p["t"]


def masked(h, p, keep):
    """Means over the cases that count."""
    counts = (jnp.arange(N) < 4).astype(h.dtype)[:, None]
    mean = keep((h * counts).sum(0) / counts.sum(0))
    return jnp.tanh(h - mean) * p["s"] + p["t"]


def over_devices(h, p, keep):
    """`lax.pmean` under `vmap`, as in equinox."""

    def one(h):
        mean = keep(jax.lax.pmean(h, "cases"))
        variance = keep(jax.lax.pmean(jnp.square(h - mean), "cases"))
        return (h - mean) * jax.lax.rsqrt(variance + 0.1) * p["s"] + p["t"]

    return jax.vmap(one, axis_name="cases")(h)


def in_a_checkpoint(h, p, keep):
    return jax.checkpoint(lambda h, p: as_written(h, p, keep))(h, p)


NORMS = (as_written, fused, centred, masked, over_devices, in_a_checkpoint)


def network(norm, keep=lambda x: x):
    """Layers before, between and after two norms with one scale and shift."""

    def apply(p, x):
        h = jnp.tanh(norm(x @ p["v"], p, keep))
        h = norm(h @ p["u"], {"s": jnp.ones(H), "t": 0.0}, keep)
        return jnp.tanh(h) @ p["w"]

    return apply


def loss_of(apply):
    return lambda p, x: squared_error(apply(p, x)).sum(-1).mean()


def gauss_newton(apply, params=PARAMS, x=X):
    flat, restore = jax.flatten_util.ravel_pytree(params)
    j = jax.jacobian(lambda v: apply(restore(v), x).reshape(-1))(flat)
    return 2 * np.einsum("ap,aq->pq", j, j) / len(x)


def blocks_of(matrix, plan, params=PARAMS):
    names = [[plan.tree.paths[i] for i in layer.leaves] for layer in plan.layers]
    return [oracles.block(matrix, params, *parts) for parts in names]


@pytest.mark.parametrize(
    "norm",
    [as_written, fused]
    + [pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[2:]],
)
def test_full_and_diagonal_are_exact_with_constant_means(norm):
    exact = gauss_newton(network(norm, jax.lax.stop_gradient))
    for block in (blocks.Full(), blocks.Diagonal()):
        with told:
            plan, factors = models.exact_factors(
                loss_of(network(norm)), PARAMS, X, blocks=block
            )
        assert all(layer.tagged for layer in plan.layers) and not plan.lost_examples
        found = np.asarray(plan.approximation(factors).to_dense())
        pairs = zip(blocks_of(found, plan), blocks_of(exact, plan), strict=True)
        for own, wanted in pairs:
            if block == blocks.Diagonal():
                wanted = np.diag(np.diag(wanted))
            np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("block", [blocks.Eigen(), blocks.TNT(), blocks.Kronecker()])
def test_every_block_has_the_layers_of_a_batch_norm(block):
    """One pull-back, whose trace is that of the exact matrix."""
    exact = gauss_newton(network(as_written, jax.lax.stop_gradient))
    with told:
        plan, factors = models.exact_factors(
            loss_of(network(as_written)), PARAMS, X, blocks=block
        )
    assert all(layer.tagged for layer in plan.layers) and not plan.lost_examples
    found = np.asarray(plan.approximation(factors).to_dense())
    if not isinstance(block, blocks.Kronecker):
        np.testing.assert_allclose(np.trace(found), np.trace(exact), rtol=1e-9)
    assert np.linalg.eigvalsh(found).min() > -1e-9


def test_gradients_and_exact_products_go_through_the_means():
    apply = network(fused)
    with told:
        plan = kfac_jax.make_curvature(loss_of(apply), PARAMS, X)
    value, grads, _ = plan.value_grad_and_statistics(PARAMS, X, rng=jax.random.key(0))
    expected = jax.value_and_grad(loss_of(apply))(PARAMS, X)
    jax.tree.map(np.testing.assert_allclose, (value, grads), expected)
    v = oracles.random_like(PARAMS, 7)
    product = oracles.vector(plan.matvec(PARAMS, v, X))
    expected = gauss_newton(apply) @ oracles.vector(v)
    np.testing.assert_allclose(product, expected, rtol=1e-9, atol=1e-12)


def test_the_report_and_one_warning_name_the_lines():
    with pytest.warns(UserWarning, match=r"batch norm.*test_normalizing.py") as caught:
        plan = kfac_jax.make_curvature(loss_of(network(as_written)), PARAMS, X)
    assert len(caught) == 1
    assert "constants for the curvature" in str(plan)


@pytest.mark.parametrize(
    "checkpoint", [jax.checkpoint, pytest.param(lambda f: f, marks=pytest.mark.slow)]
)
def test_a_scan_over_layers_with_norms(checkpoint):
    """The carry has its axis of examples again after each norm."""
    stacked = {
        "w": models.array(1, 3, D, D),
        "s": 1 + 0.1 * models.array(2, 3, D),
        "t": models.array(3, 3, D),
    }

    def apply(p, x, keep=lambda x: x):
        def body(h, q):
            return jnp.tanh(as_written(h @ q["w"], q, keep)), None

        return jax.lax.scan(checkpoint(body), x, p)[0]

    with told:
        plan, factors = models.exact_factors(
            loss_of(apply), stacked, X, blocks=blocks.Full()
        )
    assert all(layer.tagged for layer in plan.layers)
    found = np.asarray(plan.approximation(factors).to_dense())
    exact = gauss_newton(lambda p, x: apply(p, x, jax.lax.stop_gradient), stacked)
    place = np.asarray(oracles.indices(stacked)["w"]).reshape(3, D * D)
    for i in place:  # one block for each step
        own, wanted = found[np.ix_(i, i)], exact[np.ix_(i, i)]
        np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- what is no norm


def added(p, x):
    h = x @ p["v"]
    return jnp.tanh(h + h.mean(0)) @ p["w"]


def gated(p, x):
    h = x @ p["v"]
    return jnp.tanh(h * jax.nn.sigmoid(h.mean(0))) @ p["w"]


def softmax(p, x):
    return jax.nn.softmax(x @ p["v"], axis=0) @ p["w"]


def both(p, x):
    """A norm's mean that a layer has for its input, too."""
    h = x @ p["v"]
    mean = h.mean(0)
    return jnp.tanh(h - mean) @ p["w"] + mean @ p["u"] @ p["w"]


def in_the_loss(p, x):
    h = jnp.tanh(x @ p["v"])
    return (h - h.mean(0)).mean(0, keepdims=True) @ p["w"]


@pytest.mark.filterwarnings("ignore:Which examples", "ignore:kfac_jax gives")
@pytest.mark.parametrize("apply", [added, gated, softmax, both, in_the_loss])
def test_other_means_lose_the_axis_and_are_no_constants(apply):
    params = {name: PARAMS[name] for name in ("v", "u", "w")}
    if apply is not both:
        del params["u"]
    plan = kfac_jax.make_curvature(loss_of(apply), params, X, blocks=blocks.Full())
    first = next(layer for layer in plan.layers if layer.name == "v")
    assert first.kind == "unmatched" and "could not be followed" in first.reason
    assert "constants for the curvature" not in str(plan)


# --------------------------------------------------------------------------- libraries


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2, 2))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            return nn.Dense(2)(x.mean((1, 2)))

    net = Net()
    start = net.init(jax.random.key(0), IMAGES)
    params, state = start["params"], start["batch_stats"]
    variables = lambda p: {"params": p, "batch_stats": state}  # noqa: E731
    apply = lambda p, x: net.apply(variables(p), x, mutable=["batch_stats"])  # noqa: E731
    return params, apply


def haiku():
    def net(x):
        x = hk.Conv2D(4, 2)(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=True))
        return hk.Linear(2)(x.mean((1, 2)))

    transformed = hk.transform_with_state(net)
    params, state = transformed.init(jax.random.key(0), IMAGES)
    return params, lambda p, x: transformed.apply(p, state, None, x)


def equinox():
    keys = jax.random.split(jax.random.key(0))
    norm = eqx.nn.BatchNorm(4, axis_name="cases", mode="batch")
    layers = eqx.nn.Conv2d(2, 4, 2, key=keys[0]), norm, eqx.nn.Linear(4, 2, key=keys[1])
    state = eqx.nn.State(layers)
    params, static = eqx.partition(eqx.nn.delete_init_state(layers), eqx.is_array)

    def apply(params, x):
        conv, norm, linear = eqx.combine(params, static)

        def one(x, state):
            h, state = norm(conv(jnp.moveaxis(x, -1, 0)), state)
            return linear(jax.nn.relu(h).mean((1, 2))), state

        mapped = jax.vmap(one, (0, None), (0, None), axis_name="cases")
        return mapped(x, state)

    return params, apply


IMAGES = models.array(9, N, 4, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("build", [linen, haiku, equinox])
def test_batch_norms_of_libraries_are_covered_by_every_block(build):
    params, apply = build()

    def loss_fn(p, x):
        z, state = apply(p, x)
        return squared_error(z).sum(-1).mean(), state

    for block in (None, blocks.Full(), blocks.Eigen(), blocks.TNT()):
        with told:
            plan = kfac_jax.make_curvature(
                loss_fn, params, IMAGES, has_aux=True, blocks=block
            )
        assert all(layer.tagged for layer in plan.layers), str(plan)
