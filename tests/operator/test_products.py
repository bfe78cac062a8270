"""Gradients preconditioned as products of inputs and output gradients (appendix C)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import Diagonal, Kronecker
from tests.helpers import models, oracles

SIZES = (9, 12, 7)
CASES = 4
PRODUCTS = Kronecker(gradient_products=True)
DAMPING = 1e-2


def problem(cases=CASES):
    params = models.dense_params(0, *SIZES)
    return models.problem(params=params, x=models.array(50, cases, SIZES[0]))


def plan(p, blocks=PRODUCTS, **options):
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, blocks=blocks, **options
    )


def rows(curvature):
    return {x.name: x.product_rows for x in curvature.groups}


def reasons(curvature):
    return models.notes(curvature, "Gradients not kept as products:")


OPTIMIZERS = {
    "fixed": {"learning_rate": 0.1, "momentum": 0.9, "damping": DAMPING},
    "adaptive": {
        "learning_rate": kfac_jax.QuadraticModel(),
        "momentum": None,
        "damping": kfac_jax.LevenbergMarquardt(1.0, every=2),
        "factored_damping": kfac_jax.SeparateDamping(every=4),
        "inverse_every": 2,
    },
}


def train(p, curvature, tx, steps=6, change=lambda grads: grads, edit=lambda s: s):
    """The parameters after some jitted steps; `change` comes before the optimizer."""

    @jax.jit
    def step(params, state, key):
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *p.args, rng=key
        )
        updates, state = tx.update(
            change(grads),
            state,
            params,
            statistics=edit(statistics),
            value=value,
            args=p.args,
        )
        return jax.tree.map(jnp.add, params, updates), state

    params, state = p.params, tx.init(p.params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params


@pytest.mark.parametrize(("name", "fraction"), [("fixed", 0.5), ("adaptive", 1.0)])
def test_products_give_the_same_steps(name, fraction):
    p = problem()
    options = {"statistics_fraction": fraction}
    ordinary, products = plan(p, Kronecker(), **options), plan(p, **options)
    assert all(rows(products).values())
    first, second = (
        train(p, curvature, kfac_jax.kfac(curvature, **OPTIMIZERS[name]))
        for curvature in (ordinary, products)
    )
    np.testing.assert_allclose(
        oracles.vector(second), oracles.vector(first), rtol=1e-10, atol=1e-12
    )


def test_both_sides_multiply_to_the_gradient():
    p = problem()
    curvature = plan(p)
    _, grads, statistics = jax.jit(
        functools.partial(curvature.value_grad_and_statistics, rng=jax.random.key(0))
    )(p.params, *p.args)
    exact = jax.grad(p.loss_fn)(p.params, *p.args)
    for layer in curvature.layers:
        x, dy = statistics.products[layer.name]
        assert x.shape == (CASES, layer.shape.inputs)
        w, b = exact[layer.name]["w"], exact[layer.name]["b"]
        np.testing.assert_allclose(x.T @ dy, np.vstack([w, b]), atol=1e-14)
    np.testing.assert_allclose(oracles.vector(grads), oracles.vector(exact), atol=1e-14)


def preconditioned(p, curvature, change=lambda grads: grads, edit=lambda s: s):
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)

    @jax.jit
    def compute(params):
        _, grads, statistics = curvature.value_grad_and_statistics(
            params, *p.args, rng=jax.random.key(0)
        )
        return tx.update(
            change(grads), tx.init(params), params, statistics=edit(statistics)
        )[0]

    return oracles.vector(compute(p.params))


def doubled(grads):
    return jax.tree.map(lambda g: 2 * g, grads)


def test_sides_are_what_is_multiplied():
    """Sides that are off by too little to be noticed are seen in the result."""
    p = problem()

    def nudge(statistics):
        products = {
            name: (x * (1 + 1e-10), dy) for name, (x, dy) in statistics.products.items()
        }
        return statistics._replace(products=products)

    exact, nudged = (preconditioned(p, plan(p), edit=f) for f in (lambda s: s, nudge))
    np.testing.assert_allclose((nudged - exact) * 1e10, exact, rtol=1e-3, atol=1e-4)


def only_last_row(grads):
    return grads | {
        "layer1": {
            "w": grads["layer1"]["w"].at[3, 4].add(1e-3),
            "b": grads["layer1"]["b"],
        }
    }


@pytest.mark.parametrize(
    "change", [doubled, only_last_row], ids=["scaled", "one entry"]
)
def test_other_gradients_than_the_products_are_recognised(change):
    p = problem()
    ordinary = preconditioned(p, plan(p, Kronecker()), change)
    np.testing.assert_allclose(
        preconditioned(p, plan(p), change), ordinary, rtol=1e-10, atol=1e-13
    )


@pytest.mark.slow
def test_sums_of_micro_batches_are_recognised():
    p = problem(cases=8)

    def step(curvature):
        halves = [
            curvature.value_grad_and_statistics(
                p.params, *(x[i : i + 4] for x in p.args), rng=jax.random.key(i)
            )
            for i in (0, 4)
        ]
        grads = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][1], halves[1][1])
        statistics = jax.tree.map(jnp.add, halves[0][2], halves[1][2])
        tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)
        updates, _ = tx.update(
            grads, tx.init(p.params), p.params, statistics=statistics
        )
        return oracles.vector(updates)

    half = models.Problem(p.loss_fn, p.params, p.x[:4], p.y[:4], p.outputs, p.per_case)
    np.testing.assert_allclose(
        step(plan(half)), step(plan(half, Kronecker())), rtol=1e-10, atol=1e-13
    )


def test_only_where_it_saves_work():
    """For a square layer below two thirds of its width."""
    width = 30

    def loss_fn(w, x, y):
        return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()

    def asked(cases):
        x = jnp.ones((cases, width))
        return kfac_jax.make_curvature(
            loss_fn, jnp.ones((width, width)), x, x * 0, blocks=PRODUCTS
        )

    assert rows(asked(19)) == {"params": 19}
    assert rows(asked(20)) == {"params": 0}
    assert "more multiply-adds with 20 cases" in reasons(asked(20))["params"]


def test_work_is_saved():
    """The sides take the place of the larger products in the compiled program."""
    width, cases = 64, 4
    params = {"layer0": {"w": models.array(0, width, width)}}
    p = models.problem("squared", params=params, x=models.array(1, cases, width))
    curvature = plan(p)
    _, _, statistics = curvature.value_grad_and_statistics(
        params, *p.args, rng=jax.random.key(0)
    )
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING, inverse_every=50)
    jaxpr = str(
        jax.make_jaxpr(lambda g, s: tx.update(g, tx.init(params), statistics=s))(
            params, statistics
        )
    )
    assert f"f64[{cases},{width}] = dot_general" in jaxpr


def penalised(p):
    def loss_fn(params, *args):
        return p.loss_fn(params, *args) + 0.05 * sum(
            jnp.vdot(x, x) for x in jax.tree.leaves(params)
        )

    return models.Problem(loss_fn, p.params, p.x, p.y, p.outputs, p.per_case)


def test_a_penalty_refuses_products():
    curvature = plan(penalised(problem()), l2=0.1)
    assert set(rows(curvature).values()) == {0}
    assert "the penalty (l2) adds to its gradient" in str(curvature)


def test_an_undeclared_penalty_is_recognised():
    """`make_curvature` cannot see it where it gets shapes only."""
    p = penalised(problem())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p.params)

    def made(block):
        return kfac_jax.make_curvature(p.loss_fn, shapes, *p.args, blocks=block)

    np.testing.assert_allclose(
        preconditioned(p, made(PRODUCTS)),
        preconditioned(p, made(Kronecker())),
        rtol=1e-10,
        atol=1e-13,
    )


def scanned(params, x):
    def body(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, params["w"])[0]


def twice(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"]


def looped(params, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, length=2)[0]


def coarse(params, x):
    return (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(x.dtype)


@jax.custom_jvp
def scaled(w, x):
    return x @ w


@scaled.defjvp
def _scaled_rule(primals, tangents):
    w, x = primals
    dw, dx = tangents
    return x @ w, dx @ w + x @ dw


def ruled(params, x):
    return scaled(params["w"], x)


REFUSALS = {
    "scan": (scanned, (2, 12, 12), "several independent layers"),
    "twice": (twice, (12, 12), "more than once"),
    "loop": (looped, (12, 12), "more than once"),
    "bfloat16": (coarse, (12, 12), "bfloat16, too coarse"),
    "custom rule": (ruled, (12, 12), "custom derivative rule"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_reported(name):
    apply, shape, reason = REFUSALS[name]
    params = {"w": models.array(0, *shape, scale=0.3)}
    p = models.problem("squared", apply, params, models.array(1, 3, 12))
    curvature = plan(p)
    assert reason in reasons(curvature)["w"]
    assert reason in str(curvature)
    train(p, curvature, kfac_jax.kfac(curvature, 0.1, 0.9, DAMPING), steps=2)


def test_linked_layers_are_refused():
    curvature = plan(problem(), structure=kfac_jax.BlockTridiagonal())
    assert set(reasons(curvature).values()) == {"it is linked to another layer"}


def test_layers_with_other_blocks_are_left_alone():
    p = problem()
    blocks = {"layer0": Diagonal(), "layer1": PRODUCTS}
    curvature = plan(p, blocks)
    assert rows(curvature) == {"layer0": 0, "layer1": CASES}
    assert "layer0" not in reasons(curvature)


def test_gradient_free_of_statistics():
    """Zero statistics have the structure of others, for `lax.cond`."""
    p = problem()
    curvature = plan(p)
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)

    def measured(params):
        return curvature.value_grad_and_statistics(
            params, *p.args, rng=jax.random.key(0)
        )

    def skipped(params):
        value, grads = curvature.value_and_grad(params, *p.args)
        return value, grads, curvature.zero_statistics(params)

    @jax.jit
    def step(state, flag):
        _, grads, statistics = jax.lax.cond(flag, measured, skipped, p.params)
        return tx.update(grads, state, p.params, statistics=statistics)

    first, state = step(tx.init(p.params), True)
    second, _ = step(state, False)
    np.testing.assert_allclose(
        oracles.vector(second), oracles.vector(first), rtol=1e-10, atol=1e-13
    )


def test_wrong_flag_and_foreign_products():
    with pytest.raises(TypeError, match="gradient_products must be a bool; got 1"):
        Kronecker(gradient_products=1)
    p = problem()
    curvature = plan(p)
    _, grads, statistics = curvature.value_grad_and_statistics(
        p.params, *p.args, rng=jax.random.key(0)
    )
    x, dy = statistics.products["layer0"]
    foreign = statistics._replace(
        products=statistics.products | {"layer0": (x[:, :-1], dy)}
    )
    tx = kfac_jax.scale_by_kfac(curvature)
    with pytest.raises(ValueError, match="must have rows of lengths"):
        tx.update(grads, tx.init(p.params), p.params, statistics=foreign)
