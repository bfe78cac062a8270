"""Exact products through control flow, and functions without one mode of AD."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

# half the time to compile: the compiler's own optimizations are not what is tested
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
X = models.array(0, 4, 2)
NET = models.dense_params(3, 2, 3, 1)
V, U = (oracles.random_like(NET, seed) for seed in (0, 1))


def loss_of(apply):
    def loss_fn(params, x):
        return squared_error(jnp.sin(apply(params, x))).sum(-1).mean()

    return loss_fn


def plan_of(apply, **options):
    """A plan that needs no key, made from shapes: nothing is computed for it."""
    shapes = jax.eval_shape(lambda: (NET, X))
    options = {"estimation_mode": "ggn_exact"} | options
    return kfac_jax.make_curvature(loss_of(apply), *shapes, **options)


@functools.cache
def exact():
    outputs = lambda params: jnp.sin(models.mlp(params, X))  # noqa: E731
    return oracles.ggn(outputs, lambda z: (z**2).sum(), NET)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [n for n in models.WRAPPERS if n != "custom_vjp"])
def test_exact_products_through(name):
    plan = plan_of(models.WRAPPERS[name](lambda p, x: models.mlp(p, x)))

    @fast_jit
    def products(params):
        product = plan.matvec(params, V, X)
        return product, plan.quadratic_form(params, [V, U], X)

    product, form = products(NET)
    flat = np.stack([oracles.vector(V), oracles.vector(U)])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    close(oracles.vector(product), exact() @ flat[0])
    close(form, flat @ exact() @ flat.T)


def test_exact_products_of_losses_registered_in_a_scan():
    """The network is evaluated outside of it, too, for a value that is not used."""

    def loss_fn(params, x):
        def step(total, x):
            loss = squared_error(jnp.sin(models.mlp(params, x))).sum(-1).mean()
            return total + loss, loss

        return jax.lax.scan(step, 0.0, x)[0], models.mlp(params, x[0])

    parts = jnp.stack([X, X / 2])
    plan = kfac_jax.make_curvature(
        loss_fn, *jax.eval_shape(lambda: (NET, parts)), has_aux=True
    )
    outputs = lambda params: jnp.sin(models.mlp(params, X / 2))  # noqa: E731
    matrix = exact() + oracles.ggn(outputs, lambda z: (z**2).sum(), NET)
    product, form = fast_jit(
        lambda params, x: (
            plan.matvec(params, V, x),
            plan.quadratic_form(params, [V], x),
        )
    )(NET, parts)
    flat = oracles.vector(V)
    np.testing.assert_allclose(oracles.vector(product), matrix @ flat, rtol=1e-10)
    np.testing.assert_allclose(form, [[flat @ matrix @ flat]], rtol=1e-10)


# ----------------------------------------------------------- functions of one mode only


@models.custom_vjp
def ruled(h):
    return jnp.tanh(h)


def activated(params, x):
    return models.mlp(params, x, lambda h: ruled(h))


def scanned(params, x):
    step = lambda h, _: (ruled(h), None)  # noqa: E731
    return jax.lax.scan(step, models.mlp(params, x), length=2)[0]


def place(function, call):
    """The file and line where a function calls another."""
    lines, first = inspect.getsourcelines(function)
    (at,) = (i for i, line in enumerate(lines) if call in line)
    return f"{inspect.getsourcefile(function)}:{first + at}:"


def step(plan, learning_rate):
    """The update of one step of the optimizer."""
    tx = kfac_jax.kfac(plan, learning_rate, 0.9, 1e-3)

    @fast_jit
    def run(params, x):
        value, grads, statistics = plan.value_grad_and_statistics(params, x)
        given = {"statistics": statistics, "value": value, "args": (x,)}
        return tx.update(grads, tx.init(params), params, **given)[0]

    return run(NET, X)


PRODUCTS = {
    "matvec": lambda plan: plan.matvec(NET, V, X),
    "matvec under jit": lambda plan: jax.jit(plan.matvec)(NET, V, X),
    "quadratic_form": lambda plan: plan.quadratic_form(NET, [V], X),
    "quadratic model": lambda plan: step(plan, kfac_jax.QuadraticModel()),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("apply", [activated, scanned])
def test_a_custom_vjp_in_exact_products_is_named(apply, product):
    with pytest.raises(ValueError, match="no forward mode; exact products") as caught:
        PRODUCTS[product](plan_of(apply))
    assert place(apply, "ruled(") in str(caught.value)
    assert "Write it as jax.custom_jvp" in str(caught.value)


def test_the_remedy_for_a_custom_vjp_works():
    plan = plan_of(activated)
    expected = step(plan_of(models.mlp), 0.1)
    np.testing.assert_allclose(
        oracles.vector(step(plan, 0.1)), oracles.vector(expected), rtol=1e-10
    )


def by_hand(h):
    """Its second derivative goes through a `custom_vjp`, too."""

    @jax.custom_vjp
    def function(h):
        return jnp.tanh(h)

    function.defvjp(lambda h: (function(h), h), lambda h, g: (g * (1 - ruled(h) ** 2),))
    return function(h)


def test_hessians_need_forward_mode_of_the_rules_only():
    def hessian(activation):
        apply = lambda p, x: models.mlp(p, x, activation)  # noqa: E731
        return jax.jit(functools.partial(plan_of(apply).matvec, matrix="hessian"))

    found, expected = (hessian(f)(NET, V, X) for f in (ruled, jnp.tanh))
    np.testing.assert_allclose(
        oracles.vector(found), oracles.vector(expected), rtol=1e-10
    )
    with pytest.raises(ValueError, match="no forward mode; exact products"):
        hessian(by_hand)(NET, V, X)


def test_what_the_output_does_not_depend_on_needs_no_forward_mode():
    """A `custom_vjp` on data only, of what has no gradient, and in a penalty."""

    def apply(params, x):
        return models.mlp(params, x) * ruled(x[:, :1] * jax.lax.stop_gradient(2.0))

    def loss_fn(params, x):
        z = apply(params, x)
        frozen = ruled(jax.lax.stop_gradient(z))
        penalty = ruled(jnp.vdot(params["layer0"]["w"], params["layer0"]["w"]))
        return squared_error(z + frozen).sum(-1).mean() + 0.0 * penalty

    plan = kfac_jax.make_curvature(loss_fn, *jax.eval_shape(lambda: (NET, X)))
    frozen = jnp.tanh(apply(NET, X))
    exact = oracles.ggn(lambda p: apply(p, X) + frozen, lambda z: (z**2).sum(), NET)
    flat = oracles.vector(V)
    found = plan.quadratic_form(NET, [V], X)  # without jit, which drops the penalty
    np.testing.assert_allclose(found, [[flat @ exact @ flat]], rtol=1e-10)
    product = oracles.vector(fast_jit(plan.matvec)(NET, V, X))
    np.testing.assert_allclose(product, exact @ flat, rtol=1e-10, atol=1e-12)


def looped(params, x):
    return jax.lax.while_loop(lambda h: h.sum() > 9.0, jnp.tanh, models.mlp(params, x))


def test_a_while_between_layer_and_loss_is_named():
    plan = plan_of(looped)
    for use in (
        lambda: plan.value_grad_and_statistics(NET, X),
        lambda: jax.jit(plan.value_grad_and_statistics)(NET, X),
        lambda: plan.matvec(NET, V, X),
    ):
        with pytest.raises(ValueError, match="through a `while` loop at"):
            use()
    with pytest.raises(ValueError, match="use scan, or fori_loop with fixed") as caught:
        plan.value_grad_and_statistics(NET, X)
    assert place(looped, "while_loop(") in str(caught.value)
    jax.jit(plan.quadratic_form)(NET, [V], X)  # forward mode only


WHILES = {
    "to a bound": lambda x: jax.lax.while_loop(
        lambda x: jnp.abs(x).sum() > 1.0, lambda x: x / 2, x
    ),
    "of a count": lambda x: jax.lax.fori_loop(
        0, jnp.argmax(x) + 2, lambda _, x: x / 2, x
    ),
}


@pytest.mark.parametrize("name", WHILES)
def test_loops_that_parameters_do_not_enter_go_on_working(name):
    prepare = WHILES[name]
    plan = plan_of(lambda p, x: models.mlp(p, prepare(x)), on_unmatched="error")

    @functools.partial(fast_jit, static_argnums=0)
    def compute(plan, x):
        form = plan.quadratic_form(NET, [V], x)
        return plan.value_grad_and_statistics(NET, x), plan.matvec(NET, V, x), form

    found, expected = compute(plan, X), compute(plan_of(models.mlp), prepare(X))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
    jax.tree.map(close, found, expected)
