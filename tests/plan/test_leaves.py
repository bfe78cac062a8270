"""Leaves of the parameters which no layer covers because no loss depends on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

L2, DAMPING = 0.2, 0.1
X, Y = models.array(0, 5, 3), models.array(1, 5, 2)
NET = models.dense_params(2, 3, 4, 2)
PARAMS = {"net": NET, "rest": {"unused": models.array(4, 2, 3), "empty": jnp.ones(0)}}
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-12)


def used_loss(net, x, y):
    return squared_error(models.mlp(net, x), y).sum(-1).mean()


def loss_fn(params, x, y):
    return used_loss(params["net"], x, y)


def decayed_loss(params, x, y):
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params)]
    return loss_fn(params, x, y) + L2 / 2 * sum(squares)


def make(loss, params, **options):
    options = {"estimation_mode": "ggn_exact", "on_unmatched": "error"} | options
    return kfac_jax.make_curvature(loss, params, X, Y, **options)


KINDS = {
    "scale_by_kfac": kfac_jax.scale_by_kfac,
    "kfac": kfac_jax.kfac,
    "adaptive": lambda plan: kfac_jax.kfac(
        plan,
        kfac_jax.QuadraticModel(),
        momentum=None,
        damping=kfac_jax.LevenbergMarquardt(1.0),
    ),
}


def trained(plan, make_tx, params, steps=3):
    tx = make_tx(plan)

    @fast_jit
    def step(params, state):
        value, grads, statistics = plan.value_grad_and_statistics(params, X, Y)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(X, Y)
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parameters_stay_and_change_nothing_for_the_others(kind):
    found = trained(make(loss_fn, PARAMS), KINDS[kind], PARAMS)
    expected = trained(make(used_loss, NET), KINDS[kind], NET)
    jax.tree.map(close, found, {"net": expected, "rest": PARAMS["rest"]})


def test_the_block_of_unused_parameters_is_the_identity():
    plan = make(loss_fn, PARAMS)
    layers = [layer for layer in plan.layers if "rest" in layer.name]
    assert [layer.kind for layer in layers] == ["unused"] * 2

    @fast_jit
    def compute(params):
        factors = models.statistics_to_factors(plan, params, X, Y)
        operator = plan.approximation(factors)
        exact = plan.matvec(params, params, X, Y)
        return operator.matvec(params), operator.solve(params, DAMPING), exact

    rest = PARAMS["rest"]
    product, solved, exact = (result["rest"] for result in compute(PARAMS))
    jax.tree.map(close, product, rest)
    jax.tree.map(close, solved, jax.tree.map(lambda v: v / (1 + DAMPING), rest))
    jax.tree.map(close, exact, jax.tree.map(jnp.zeros_like, rest))


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_shrinks_unused_parameters(kind):
    plan = make(decayed_loss, PARAMS, l2=L2)
    before, after = PARAMS["rest"], trained(plan, KINDS[kind], PARAMS)["rest"]
    sign = -1 if kind == "scale_by_kfac" else 1  # which leaves the sign to others
    ratio = np.asarray(after["unused"] / before["unused"])
    close(ratio, ratio[0, 0])
    assert np.all(sign * (1 - ratio) > 0)


@pytest.mark.parametrize(
    ("leaf", "got"),
    [
        (jax.random.key(0), "key<fry>"),
        (jax.random.PRNGKey(0), "uint32"),
        (3, "3"),
        (True, "True"),
        ("relu", "'relu'"),
        (np.ones(2, np.int8), "int8"),
    ],
)
def test_leaves_that_have_no_derivative_are_named(leaf, got):
    params = PARAMS | {"rest": {"leaf": leaf}}
    with pytest.raises(
        TypeError, match=f"arrays of real.*; got {got}.* at 'rest/leaf'"
    ):
        make(loss_fn, params)


def test_none_is_no_leaf():
    plan = make(loss_fn, PARAMS | {"rest": None})
    assert [layer.kind for layer in plan.layers] == ["dense", "dense"]


VECTORS = {  # what is asked with a vector of another type
    "solve": lambda plan, tx, vector: plan.approximation(plan.init_factors(NET)).solve(
        vector, DAMPING
    ),
    "matvec": lambda plan, tx, vector: plan.matvec(NET, vector, X, Y),
    "value_and_grad": lambda plan, tx, vector: plan.value_and_grad(vector, X, Y),
    "statistics": lambda plan, tx, vector: plan.value_grad_and_statistics(vector, X, Y),
    "update": lambda plan, tx, vector: tx.update(
        vector, tx.init(NET), NET, statistics=plan.zero_statistics(NET)
    ),
}


@pytest.mark.parametrize("dtype", ["int32", "complex128"])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_that_are_not_real_are_named(name, dtype):
    plan = make(used_loss, NET)
    first, *rest = jax.tree.leaves(NET)
    tree = jax.tree.structure(NET)
    vector = jax.tree.unflatten(tree, [first.astype(dtype), *rest])
    with pytest.raises(TypeError, match="real floating-point numbers, like") as error:
        VECTORS[name](plan, kfac_jax.kfac(plan, 0.1, 0.9, damping=0.1), vector)
    assert f"got {dtype}[" in str(error.value)
    assert "at 'layer0/b'" in str(error.value)


def test_python_numbers_are_parameters_too():
    params = {"scale": 2.0, "w": models.array(3, 3, 2)}
    plan = make(lambda p, x, y: used_loss_of(p["scale"] * (x @ p["w"]), y), params)
    operator = plan.approximation(models.statistics_to_factors(plan, params, X, Y))
    solved = operator.solve(params, DAMPING)
    arrays = jax.tree.map(jnp.asarray, params)
    jax.tree.map(close, solved, operator.solve(arrays, DAMPING))


def used_loss_of(z, y):
    return squared_error(z, y).sum(-1).mean()
