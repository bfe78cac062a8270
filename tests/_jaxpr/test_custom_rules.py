"""Custom derivative rules: replaced where they are the body's derivative, else kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax._jaxpr.custom_rules import REASON
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

X = models.array(0, 6, 3)
PARAMS = {"v": models.array(1, 3, 4), "w": models.array(2, 4, 2)}


@jax.custom_vjp
def quantised(x, w):
    """Of which the body's derivative by `x` is zero."""
    return jnp.round(x * 16) / 16 @ w


def _forward(x, w):
    rounded = jnp.round(x * 16) / 16
    return rounded @ w, (rounded, w)


quantised.defvjp(_forward, lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_vjp
def honest(x, w):
    return x @ w


honest.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g)
)


@jax.custom_vjp
def fixed_point(x, w):
    """With a layer beside a loop that has no reverse mode."""
    injected = jnp.tanh(x) @ w

    def step(carry):
        return jnp.tanh(0.3 * carry[0] + injected), carry[1] + 1

    return jax.lax.while_loop(lambda c: c[1] < 60, step, (injected, 0))[0]


def _implicit(saved, g):
    x, w, z = saved

    def cell(z, x, w):
        return jnp.tanh(0.3 * z + jnp.tanh(x) @ w)

    _, by_z = jax.vjp(lambda z: cell(z, x, w), z)
    u = jax.lax.fori_loop(0, 60, lambda _, u: g + by_z(u)[0], g)
    return jax.vjp(lambda x, w: cell(z, x, w), x, w)[1](u)


fixed_point.defvjp(lambda x, w: (z := fixed_point(x, w), (x, w, z)), _implicit)


def loss_of(layer):
    def loss_fn(p, x):
        return squared_error(layer(jnp.tanh(x @ p["v"]), p["w"])).sum(-1).mean()

    return loss_fn


def factors_of(plan, params, *args):
    return models.statistics_to_factors(plan, params, *args)


@pytest.mark.parametrize("layer", [quantised, fixed_point])
def test_a_rule_of_its_own_is_kept(layer):
    """What lies before it has the curvature that its rule gives."""
    loss_fn = loss_of(layer)
    with pytest.warns(UserWarning, match=r"(?s)w: is in a function whose custom deriv"):
        plan = kfac_jax.make_curvature(
            loss_fn,
            PARAMS,
            X,
            estimation_mode="fisher_exact",
            blocks={"v": kfac_jax.blocks.Full()},
        )
    assert {x.name: x.kind for x in plan.layers} == {"v": "dense", "w": "unmatched"}
    step = jax.jit(plan.value_grad_and_statistics)
    _, grads, _ = step(PARAMS, X)
    models.assert_trees_close(grads, jax.grad(loss_fn)(PARAMS, X))
    found = plan.approximation(factors_of(plan, PARAMS, X)).to_dense()

    def jacobian(x):
        return jax.jacrev(lambda v: layer(jnp.tanh(x[None] @ v), PARAMS["w"])[0])(
            PARAMS["v"]
        ).reshape(2, -1)

    j = jax.vmap(jacobian)(X)
    expected = 2 * np.einsum("nap,naq->pq", j, j) / len(X)
    own = oracles.block(np.asarray(found), PARAMS, "v")
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)


def test_the_rule_is_the_reason_for_all_that_is_inside():
    """Also for what enters a loop there, which the rule may well differentiate."""

    @jax.custom_vjp
    def deq(x, w, a):
        injected = x @ w
        step = lambda _, z: jnp.tanh(z @ a + injected)  # noqa: E731
        return jax.lax.fori_loop(0, 40 + jnp.int32(0 * x[0, 0]), step, injected)

    def backward(saved, g):
        x, w, z = saved
        return g @ w.T, x.T @ g, z.T @ g

    deq.defvjp(lambda x, w, a: (z := deq(x, w, a), (x, w, z)), backward)

    def loss_fn(p, x):
        return squared_error(deq(x, p["w"], p["a"])).sum(-1).mean()

    params = {"w": models.array(1, 3, 2), "a": models.array(2, 2, 2, scale=0.1)}
    plan = kfac_jax.make_curvature(loss_fn, params, X, on_unmatched="ignore")
    assert {x.name: x.reason.split("\n")[0] for x in plan.layers} == dict.fromkeys(
        params, REASON
    )


def test_a_rule_that_is_the_bodys_derivative_is_replaced():
    plan = kfac_jax.make_curvature(loss_of(honest), PARAMS, X, on_unmatched="error")
    assert [layer.kind for layer in plan.layers] == ["dense", "dense"]


def test_the_choice_is_the_plans_for_other_batches():
    """Operands that do not depend on parameters have no derivative to compare."""
    with pytest.warns(UserWarning, match="custom derivative rule"):
        plan = kfac_jax.make_curvature(loss_of(quantised), PARAMS, X)
    assert plan.kept_rules == (0,)
    key = jax.random.key(0)
    _, _, statistics = plan.value_grad_and_statistics(PARAMS, X[:2], rng=key)
    assert np.any(statistics.layers["v"]["output"])


def test_a_rule_may_index_a_constant():
    """Constants of a program are NumPy's, which a traced integer cannot index."""

    @jax.custom_vjp
    def own(x, table):
        return x * table.sum()

    def backward(saved, g):
        add = lambda i, total: total + g * saved[i]  # noqa: E731
        return jax.lax.fori_loop(0, 2, add, 0 * g), jnp.zeros_like(saved)

    own.defvjp(lambda x, table: (x * table.sum(), table), backward)

    def loss_fn(p, x):
        h = own(jnp.tanh(x @ p["v"]), jnp.asarray([1.0, 2.0]))
        return squared_error(h @ p["w"]).sum(-1).mean()

    plan = kfac_jax.make_curvature(loss_fn, PARAMS, X, on_unmatched="error")
    key = jax.random.key(0)
    _, grads, _ = jax.jit(plan.value_grad_and_statistics)(PARAMS, X, rng=key)
    models.assert_trees_close(grads, jax.grad(loss_fn)(PARAMS, X))


def test_a_rule_of_complex_numbers_alone_is_not_refused():
    """Nothing in it is of a real type, of which a precision could be told."""

    @jax.custom_jvp
    def product(w, x):
        return x @ w

    @product.defjvp
    def rule(primals, tangents):
        return jax.jvp(product.fun, primals, tangents)

    def loss_fn(p, x):
        z = product(jax.lax.complex(p["a"], p["b"]), jax.lax.complex(x, x))
        both = jnp.concatenate([z.real, z.imag], -1)
        return kfac_jax.losses.squared_error(both).sum(-1).mean()

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    plan = kfac_jax.make_curvature(
        loss_fn, params, jnp.ones((4, 3)), on_unmatched="error"
    )
    assert {layer.kind for layer in plan.layers} == {"dense"}


def by_number(w, x):
    return jax.lax.fori_loop(0, len(w), lambda i, h: jnp.tanh(h @ w[i]), x)


STACK = {"w": models.array(3, 3, 3, 3)}


def of_stack(factor, wrap):
    """A loop over `w[i]` in a function whose rule is its derivative, times a factor."""

    @jax.custom_vjp
    def loop(w, x):
        return by_number(w, x)

    def backward(saved, g):
        return jax.tree.map(lambda u: factor * u, jax.vjp(by_number, *saved)[1](g))

    loop.defvjp(lambda w, x: (by_number(w, x), (w, x)), backward)

    def loss_fn(p, x):
        return squared_error(wrap(loop)(p["w"], x)).sum(-1).mean()

    return loss_fn


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_loop_over_weights_by_number_in_an_agreeing_function_is_a_layer(wrap):
    loss_fn = of_stack(1.0, wrap)
    options = {"estimation_mode": "fisher_exact", "blocks": kfac_jax.blocks.Full()}
    plan = kfac_jax.make_curvature(loss_fn, STACK, X, on_unmatched="error", **options)
    assert [layer.kind for layer in plan.layers] == ["dense"]
    step = jax.jit(plan.value_grad_and_statistics)  # where the rule cannot be tried
    _, grads, _ = step(STACK, X)
    models.assert_trees_close(grads, jax.grad(loss_fn)(STACK, X))
    factors = factors_of(plan, STACK, X)
    expected = oracles.ggn(
        lambda p: by_number(p["w"], X), lambda z: (z**2).sum(), STACK
    )
    size = STACK["w"][0].size
    found = np.asarray(plan.approximation(factors).to_dense())
    for k in range(len(STACK["w"])):
        own = np.s_[k * size : (k + 1) * size]
        np.testing.assert_allclose(
            found[own, own], expected[own, own], rtol=1e-9, atol=1e-12
        )


def test_a_loop_over_weights_in_a_function_with_another_rule_is_reported():
    with pytest.warns(UserWarning, match="w: consumed by `dynamic_slice`"):
        plan = kfac_jax.make_curvature(of_stack(2.0, lambda f: f), STACK, X)
    assert plan.agreements == (False,)
    key = jax.random.key(0)
    _, grads, _ = jax.jit(plan.value_grad_and_statistics)(STACK, X, rng=key)
    models.assert_trees_close(grads, jax.grad(of_stack(2.0, lambda f: f))(STACK, X))
