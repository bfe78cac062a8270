"""Parameters that are added to each other, or to constants, before they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models

N, IN, OUT = 6, 3, 2
X, FIXED = models.array(0, N, IN), models.array(1, IN, OUT)
W, D = models.array(2, IN, OUT), models.array(3, IN, OUT)
B, C = models.array(4, OUT), models.array(5, OUT)


def delta(p, x):
    return jnp.tanh(x @ (p["w"] + p["d"]))


def difference(p, x):
    return jnp.tanh(x @ (p["w"] - p["d"]))


def from_pretrained(p, x):
    return jnp.tanh(x @ (FIXED + p["d"]))


def rounded(p, x):
    """A straight-through estimate: the rounded weight, with the weight's gradient."""
    w = p["w"]
    return jnp.tanh(x @ (w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w)))


def low_rank(p, x):
    return jnp.tanh(x @ (p["w"] + p["a"] @ p["b"]))


def with_bias(p, x):
    return jnp.tanh(x @ (p["w"] + p["d"]) + p["b"][None])


def biases(p, x):
    return jnp.tanh(x @ p["w"] + (p["b"] + p["c"])[None])


def transposed(p, x):
    return jnp.tanh(x @ (p["w"] + p["d"].T).reshape(IN, OUT))


def scanned(p, x):
    def step(h, w):
        return jnp.tanh(h @ (w + p["d"])), None

    return jax.lax.scan(step, x, p["w"])[0]


DENSE = {"dense"}
PROGRAMS = {  # the function, its parameters, and the kinds of the layers
    "delta": (delta, {"w": W, "d": D}, DENSE),
    "difference": (difference, {"w": W, "d": D}, DENSE),
    "from pretrained": (from_pretrained, {"d": D}, DENSE),
    "rounded": (rounded, {"w": W}, DENSE),
    "with bias": (with_bias, {"w": W, "d": D, "b": B}, DENSE),
    "biases": (biases, {"w": W, "b": B, "c": C}, {"dense", "shift"}),
    "transposed": (transposed, {"w": W, "d": models.array(3, OUT, IN)}, DENSE),
    "scanned": (
        scanned,
        {"w": models.array(6, 2, IN, IN), "d": models.array(7, IN, IN)},
        DENSE,
    ),
}


def loss_of(apply):
    return lambda p, x: squared_error(apply(p, x)).sum(-1).mean()


def plan_of(name, block, **options):
    apply, params, _ = PROGRAMS[name]
    return kfac_jax.make_curvature(
        loss_of(apply),
        params,
        X,
        estimation_mode="fisher_exact",
        blocks=block,
        **{"on_unmatched": "error"} | options,
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", [blocks.Full(), blocks.Diagonal()], ids=repr)
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_term_is_a_layer(name, block):
    """With the block of the sum, which is exact: the derivative by both is the same."""
    _, params, kinds = PROGRAMS[name]
    plan = plan_of(name, block)
    assert {layer.kind for layer in plan.layers} == kinds
    flat, restore = ravel_pytree(params)
    product = jax.jit(lambda v: plan.matvec(params, restore(v), X))
    exact = np.stack([ravel_pytree(product(v))[0] for v in jnp.eye(len(flat))])
    found = np.asarray(plan.at(params, X).to_dense())
    for layer in plan.layers:
        if layer.shape.stacked:
            continue  # whose slices are blocks of their own
        index = restore(jnp.arange(len(flat), dtype=float))
        own = np.concatenate([np.ravel(index[path]) for path in layer.params])
        mine, wanted = (
            x[np.ix_(own.astype(int), own.astype(int))] for x in (found, exact)
        )
        if isinstance(block, blocks.Diagonal):
            wanted = np.diag(np.diag(wanted))
        np.testing.assert_allclose(mine, wanted, atol=1e-12 * np.trace(wanted))


@pytest.mark.parametrize("name", ["delta", "from pretrained", "rounded"])
def test_the_factors_are_those_of_the_sum(name):
    """As of a plain weight in place of the sum, not of a shift with all its entries."""
    apply, params, _ = PROGRAMS[name]
    plan = plan_of(name, blocks.Kronecker())
    factors = models.statistics_to_factors(plan, params, X)
    w = jnp.linalg.lstsq(X, jnp.arctanh(apply(params, X)))[0]
    _, expected = models.exact_factors(
        loss_of(lambda p, x: jnp.tanh(x @ p["w"])), {"w": w}, X
    )
    for own in factors.values():
        models.assert_trees_close(own, expected["w"])


def test_a_weight_beside_a_product_of_parameters_keeps_its_factors():
    apply, params = low_rank, {"w": W, "a": models.array(8, IN, 1), "b": W[:1]}
    plan = kfac_jax.make_curvature(loss_of(apply), params, X, on_unmatched="ignore")
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"a": "dense", "b": "dense", "w": "dense"}
    names = {layer.name: type(layer.block).__name__ for layer in plan.layers}
    assert set(names.values()) == {"Kronecker"}
