"""Programs whose loops run over weights that they computed themselves before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.hoisting import hoisted
from kfac_jax.losses import squared_error
from tests.helpers import models

L, N, D = 3, 5, 4
X = models.array(0, N, D)
W = models.array(1, L, D, D)


def rewritten(function, *args):
    """The program in which the first argument is a parameter, the second has cases."""
    closed = jax.make_jaxpr(function)(*args)
    flags = [i == 0 for i in range(len(args))], [i == 1 for i in range(len(args))]
    return hoisted(closed, args, *flags)


def scans(closed):
    jaxpr, _ = _compat.open_jaxpr(closed)
    return [e for e in jaxpr.eqns if e.primitive.name == "scan"]


def names(scan):
    return [e.primitive.name for e in scan.params["jaxpr"].eqns]


def masked(w, x):
    step = lambda h, w: (jnp.tanh(h @ (w * np.tri(D))), h.sum())  # noqa: E731
    return jax.lax.scan(step, x, w)


def by_number(w, x):
    return jax.lax.fori_loop(1, L, lambda i, h: jnp.tanh(h @ w[i]), x)


def backwards(w, x):
    def step(carry, own):
        i, h = carry
        return (2 + i, jnp.tanh(h @ w[i % L] @ jnp.exp(own))), jnp.sin(own)

    return jax.lax.scan(step, (1, x), w, reverse=True)[1]


@pytest.mark.parametrize("function", [masked, by_number, backwards])
def test_the_results_are_the_same(function):
    closed = rewritten(function, W, X)
    found = jax.core.eval_jaxpr(*_compat.open_jaxpr(closed), W, X)
    models.assert_trees_close(found, jax.tree.leaves(function(W, X)), rtol=1e-12)
    assert (
        rewritten(
            lambda *args: jax.core.eval_jaxpr(*_compat.open_jaxpr(closed), *args), W, X
        )
        is None
    )


def test_what_is_left_of_a_step():
    (scan,) = scans(rewritten(masked, W, X))
    assert "mul" not in names(scan) and "dot_general" in names(scan)
    (scan,) = scans(rewritten(by_number, W, X))
    assert "dynamic_slice" not in names(scan)


def test_strided_slices_leave_a_loop_for_layers():
    """Inside they are no views."""

    def apply(p, x):
        step = lambda h, w: (jnp.tanh(h @ w[::2]), None)  # noqa: E731
        return jax.lax.scan(step, x, p)[0]

    wide = jnp.concatenate([W, W], 1)
    (scan,) = scans(rewritten(apply, wide, X))
    assert "slice" not in names(scan)


def test_what_depends_on_cases_or_on_the_carry_stays():
    def of_data(w, x):
        step = lambda h, xs: (h + xs[1] @ (xs[0] @ xs[0]), None)  # noqa: E731
        return jax.lax.scan(step, x, (w, jnp.stack([x] * L)))[0]

    (scan,) = scans(rewritten(of_data, W, X))
    assert names(scan).count("dot_general") == 1

    def of_carry(w, x):
        step = lambda h, w: (h @ jnp.exp(h.T @ h + w), None)  # noqa: E731
        return jax.lax.scan(step, x, w)[0]

    assert rewritten(of_carry, W, X) is None


def test_views_and_copies_for_each_case_stay():
    """What discovery follows inside, and what takes much memory."""

    def views(w, x):
        step = lambda h, w: (jnp.tanh(h @ (0.5 * w.T.reshape(D, D)) * 2), None)  # noqa: E731
        return jax.lax.scan(step, x, w)[0]

    assert rewritten(views, W, X) is None

    def copies(w, x):
        wide = (64, *w.shape[1:])
        step = lambda h, w: (h @ jnp.exp(jnp.broadcast_to(w, wide)).sum(0), None)  # noqa: E731
        return jax.lax.scan(step, x, w)[0]

    assert rewritten(copies, W, X) is None


def test_equations_keep_their_lines():
    closed = rewritten(masked, W, X)
    jaxpr, _ = _compat.open_jaxpr(closed)
    (product,) = (e for e in jaxpr.eqns if e.primitive.name == "mul")
    assert "test_hoisting.py" in _compat.source_line(product)


def test_training_in_loops_is_training_of_layers_one_by_one():
    """Two parts of a stack that a scan runs over, beside a Python loop."""

    def looped(p, x):
        def step(h, w):
            first, second = jnp.split(w, 2, axis=1)
            return jnp.tanh(h @ first) * jax.nn.sigmoid(h @ second), None

        return jax.lax.scan(step, x, p)[0]

    def written_out(p, x):
        for w in p:
            x = jnp.tanh(x @ w[:, :D]) * jax.nn.sigmoid(x @ w[:, D:])
        return x

    results = []
    for apply in (looped, written_out):
        params = models.array(2, L, D, 2 * D)

        def loss_fn(p, x, apply=apply):
            return squared_error(apply(p, x) - 1).sum(-1).mean()

        plan = kfac_jax.make_curvature(
            loss_fn, params, X, estimation_mode="fisher_exact", on_unmatched="error"
        )
        tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1)
        step, state = jax.jit(kfac_jax.make_step(plan, tx)), tx.init(params)
        for i in range(5):
            params, state, _ = step(params, state, jax.random.key(i), X)
        results.append(params)
    np.testing.assert_allclose(*results, rtol=1e-7)
