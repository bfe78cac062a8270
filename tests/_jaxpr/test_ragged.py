"""Experts by `ragged_dot` are independent layers, each of its own rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

ROWS, EXPERTS, I, O = 7, 3, 2, 4  # noqa: E741
EXPERT = np.asarray([2, 0, 2, 2, 0, 2, 0])  # none has the second
PARAMS = {
    "w": models.array(0, EXPERTS, I, O),
    "b": models.array(1, O),
    "o": models.array(2, O, 2),
}
X = models.array(3, ROWS, I)


def ragged(p, x, expert):
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS)
    y = jax.lax.ragged_dot(x[order], p["w"], sizes) + p["b"][None]
    return jnp.tanh(y)[jnp.argsort(order)] @ p["o"]


def masked(p, x, expert):
    """Every expert on every row, of which its own count."""
    each = jnp.einsum("eni,eio->eno", jnp.broadcast_to(x, (EXPERTS, *x.shape)), p["w"])
    own = (expert[None] == jnp.arange(EXPERTS)[:, None])[..., None]
    y = jnp.where(own, each, 0.0).sum(0) + p["b"][None]
    return jnp.tanh(y) @ p["o"]


def factors_of(apply):
    def loss_fn(p, x, expert):
        return squared_error(apply(p, x, expert)).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn, PARAMS, X, EXPERT, estimation_mode="fisher_exact"
    )
    layers = {layer.name: layer for layer in plan.layers}
    assert {name: x.kind for name, x in layers.items()} == {
        "w": "dense",
        "b": "shift",
        "o": "dense",
    }
    assert layers["w"].shape.lead == (EXPERTS,)
    compute = jax.jit(lambda p: models.statistics_to_factors(plan, p, X, EXPERT))
    return compute(PARAMS), jax.jit(jax.grad(loss_fn))(PARAMS, X, EXPERT)


@pytest.mark.filterwarnings("ignore:Which examples the registered")
def test_experts_have_the_factors_of_their_rows():
    found, gradient = factors_of(ragged)
    expected, same = factors_of(masked)
    models.assert_trees_close(gradient, same)
    for name in ("w", "o"):
        models.assert_trees_close(found[name], expected[name])
    assert not np.any(found["w"]["input"][1])


def test_other_ragged_products_are_reported():
    def loss_fn(w, x):
        y = jax.lax.ragged_dot(w, x, jnp.asarray([2, 1, 0]))
        return squared_error(y).sum(-1).mean()

    with pytest.warns(UserWarning, match="not the weights of `ragged_dot_general`"):
        kfac_jax.make_curvature(
            loss_fn, models.array(0, 3, 2), models.array(1, 3, 2, 4)
        )
