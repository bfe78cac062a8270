"""Data that the loss function closes over are cases, as if they were arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

N = 9
X, Y = models.array(0, N, 5), models.array(1, N, 4)
V = models.array(2, 5, 4)
SQUARE = models.array(3, N, N)  # as long as the batch, but no data
PARAMS = {"g": 1 + 0.3 * models.array(4, 4), "h": models.array(5, 5), "w": V / 2}

NETWORKS = {
    "computed weight": lambda p, x: jnp.tanh(x @ (V * p["g"][None])),
    "basis": lambda p, x: (x @ (V @ p["g"]))[:, None] * jnp.ones((1, 4)),
    "scale": lambda p, x: jnp.tanh(x * p["h"][None]) @ V,
    "scale of a layer": lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) * p["g"][None]),
    "a constant as long": lambda p, x: (
        jnp.tanh(jnp.tanh(jnp.tile(x @ p["w"], 3)[:, :N]) @ SQUARE)[:, :4]
        * p["g"][None]
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("targets", ["closed over", "given"])
@pytest.mark.parametrize("name", NETWORKS)
def test_curvature_is_that_of_data_as_arguments(name, targets):
    network = NETWORKS[name]

    def loss_fn(p, x, y):
        return squared_error(network(p, x), y).sum(-1).mean()

    if targets == "given":
        loss, args = (lambda p, y: loss_fn(p, X, y)), (Y,)
    else:
        loss, args = (lambda p: loss_fn(p, X, Y)), ()
    found, expected = (
        kfac_jax.make_curvature(f, PARAMS, *data, estimation_mode="ggn_exact")
        for f, data in ((loss, args), (loss_fn, (X, Y)))
    )
    kinds = [(x.kind, x.block, x.rows) for x in found.layers]
    assert kinds == [(x.kind, x.block, x.rows) for x in expected.layers]
    dense = (
        plan.at(PARAMS, *data).to_dense()
        for plan, data in ((found, args), (expected, (X, Y)))
    )
    np.testing.assert_allclose(*dense, atol=1e-10)


def test_several_arrays_of_one_transfer_keep_their_own_examples():
    def loss_fn(p, x):
        def one(row):
            first, second = jax.device_put((row @ p["w"], jnp.zeros(4)))
            return jnp.tanh(first + second)

        return squared_error(jax.vmap(one)(x)).sum(-1).mean()

    curvature = kfac_jax.make_curvature(
        loss_fn, {"w": PARAMS["w"]}, X, estimation_mode="ggn_exact"
    )
    assert not curvature.lost_examples
