"""States that devices keep rows of: the way there and back, for every kind of layer."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax.losses import squared_error

CASES = 8
AXIS = kfac_jax.OverAxis("data", state_axes="data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A kind of layer, and how it is to be approximated."""

    apply: Callable[[Any, jax.Array], jax.Array]
    shapes: dict[str, tuple[int, ...]]
    x: jax.Array
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def relu_net(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return jnp.tanh(h @ p["v"]) @ p["u"]


def scales(p, x):
    z = x * p["scale"][None] + p["shift"][None]
    return z @ p["w"] + p["c"][None, None]


def tied(p, tokens):
    h = jnp.tanh(p["table"][tokens] @ p["w"])
    return h @ p["table"].T


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def convolved(p, images):
    dimensions = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        images, p["k"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return jnp.tanh(h).reshape(len(h), -1) @ p["w"]


NET = {"w": (3, 7), "b": (7,), "v": (7, 5), "u": (5, 2)}
X, TOKENS = models.array(0, CASES, 3), models.classes(1, 11, CASES)
dense = functools.partial(Model, apply=relu_net, shapes=NET, x=X)
MODELS = {
    "dense": dense(),
    "dense, tridiagonal": dense(options={"structure": kfac_jax.BlockTridiagonal()}),
    "diagonal": dense(options={"blocks": kfac_jax.blocks.Diagonal()}),
    "full": dense(options={"blocks": kfac_jax.blocks.Full()}),
    "tnt": dense(options={"blocks": kfac_jax.blocks.TNT()}),
    "identity": dense(options={"blocks": kfac_jax.blocks.Identity()}),
    "one layer left as it is": dense(options={"blocks": {"v": None}}),
    "scales, and a scalar": Model(
        apply=scales,
        shapes={"scale": (3,), "shift": (3,), "w": (3, 2), "c": ()},
        x=X,
        options={"on_unmatched": "ignore"},
    ),
    "generic": Model(
        apply=lambda p, x: x @ kfac_jax.register_generic(jnp.sin(p["w"])),
        shapes={"w": (3, 4)},
        x=X,
        options={"on_unmatched": "ignore"},
    ),
    "tied": Model(apply=tied, shapes={"table": (11, 4), "w": (4, 4)}, x=TOKENS),
    "embedding with diagonal factors": Model(
        apply=lambda p, x: jnp.tanh(p["table"][x]) @ p["w"],
        shapes={"table": (11, 4), "w": (4, 3)},
        x=TOKENS,
        options={"blocks": kfac_jax.blocks.Kronecker(max_factor_dim=8)},
    ),
    "scanned": Model(apply=scanned, shapes={"w": (5, 3, 3)}, x=X),
    "scanned as often as wide": Model(apply=scanned, shapes={"w": (3, 3, 3)}, x=X),
    "convolution": Model(
        apply=convolved,
        shapes={"k": (3, 3, 2, 5), "w": (80, 3)},
        x=models.array(2, CASES, 4, 4, 2),
    ),
}


@functools.cache
def setup(name):
    """The plan, parameters and arguments."""
    model = MODELS[name]
    params = {
        key: models.array(i, *shape, scale=0.5)
        for i, (key, shape) in enumerate(model.shapes.items())
    }
    out = jax.eval_shape(model.apply, params, model.x).shape

    def loss_fn(params, x, y):
        return squared_error(model.apply(params, x), y).sum(-1).mean()

    args = model.x, models.array(9, *out)
    curvature = kfac_jax.make_curvature(
        loss_fn, params, *args, estimation_mode="fisher_empirical", **model.options
    )
    return curvature, params, args


def kfac(curvature, distribution=None):
    return kfac_jax.kfac(
        curvature, 0.1, 0.9, 0.1, inverse_every=2, distribution=distribution
    )


def step_of(curvature, tx, average=lambda x: x):
    def step(params, state, *args):
        _, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        grads = jax.tree.map(average, grads)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def on_one_device(name):
    """After two steps, and after three."""
    curvature, params, args = setup(name)
    tx = kfac(curvature)
    step, found = jax.jit(step_of(curvature, tx)), [(params, tx.init(params))]
    for _ in range(3):
        found.append(step(*found[-1], *args))
    return found[2:]


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def assert_close(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        found,
        expected,
    )


@models.EIGHT_DEVICES
@pytest.mark.parametrize("name", MODELS)
def test_a_state_that_is_spread_goes_on_as_the_whole_one(name):
    curvature, _, args = setup(name)
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    (params, state), after = on_one_device(name)
    spread = kfac_jax.spread_state(curvature, state, over)
    assert_same(kfac_jax.whole_state(curvature, spread, over), state)
    assert_same(kfac_jax.whole_state(curvature, spread), state)
    tx = kfac(curvature, over)
    like = tx.init(params)
    assert jax.tree.structure(spread) == jax.tree.structure(like)
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(like), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    params, spread = jax.jit(step_of(curvature, tx))(params, spread, *args)
    assert_close((params, kfac_jax.whole_state(curvature, spread, over)), after)
