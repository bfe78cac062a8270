"""Conjugate gradients on the exact curvature, beside dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels
from tests.helpers import models, oracles

N, DAMPING, L2 = 12, 0.03, 0.01
PARAMS = models.dense_params(0, 3, 4, 3)
X, LABELS = models.array(1, N, 3), models.classes(2, 3, N)


def loss_fn(params, x, labels):
    z = models.mlp(params, x)
    squares = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
    loss = softmax_cross_entropy_with_integer_labels(z, labels).mean()
    return loss + 0.5 * L2 * squares


CURVATURE = kfac_jax.make_curvature(
    loss_fn, PARAMS, X, LABELS, l2=L2, estimation_mode="fisher_exact"
)


def updated(rule, curvature=CURVATURE, damping=DAMPING, state=None, **options):
    """The first update, and the state after it."""
    tx = kfac_jax.kfac(curvature, rule, damping=damping, **options)
    value, grads, statistics = curvature.value_grad_and_statistics(PARAMS, X, LABELS)
    state = tx.init(PARAMS) if state is None else state
    arguments = {"statistics": statistics, "value": value, "args": (X, LABELS)}
    return jax.jit(tx.update)(grads, state, PARAMS, **arguments)


def dense():
    """∇h, `F + (λ+η) I`, and the inverse of the approximation."""
    gradient = ravel_pytree(jax.grad(loss_fn)(PARAMS, X, LABELS))[0]
    fisher = oracles.ggn(
        lambda p: models.mlp(p, X),
        lambda z, y: jax.nn.logsumexp(z) - z[y],
        PARAMS,
        LABELS,
    )
    operator = CURVATURE.at(PARAMS, X, LABELS)
    rows = jnp.eye(len(gradient))
    restore = ravel_pytree(PARAMS)[1]
    solve = lambda v: operator.solve(restore(v), damping=DAMPING + L2)  # noqa: E731
    inverse = jax.vmap(lambda v: ravel_pytree(solve(v))[0])(rows).T
    matrix = fisher + (DAMPING + L2) * np.eye(len(gradient))
    return np.asarray(gradient), matrix, np.asarray(inverse)


def conjugate_gradients(gradient, matrix, inverse, steps):
    delta, rest = np.zeros_like(gradient), -gradient
    solved = inverse @ rest
    search = solved
    for _ in range(steps):
        alpha = rest @ solved / (search @ matrix @ search)
        delta, before = delta + alpha * search, rest @ solved
        rest = rest - alpha * matrix @ search
        solved = inverse @ rest
        search = solved + rest @ solved / before * search
    return delta


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_update_is_that_of_conjugate_gradients(steps):
    delta, state = updated(kfac_jax.Refine(steps=steps))
    gradient, matrix, inverse = dense()
    wanted = conjugate_gradients(gradient, matrix, inverse, steps)
    found = ravel_pytree(delta)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-10)
    change = gradient @ wanted + 0.5 * wanted @ matrix @ wanted
    np.testing.assert_allclose(state.info.quadratic_change, change, rtol=1e-8)
    along = wanted @ matrix @ wanted / (wanted @ wanted) - DAMPING - L2
    np.testing.assert_allclose(state.curvature, along, rtol=1e-6)
    assert (state.info.learning_rate, state.info.momentum) == (1.0, 0.0)


@pytest.mark.slow
def test_many_iterations_solve_the_exact_damped_problem():
    """And what follows convergence changes nothing."""
    gradient, matrix, _ = dense()
    exact = np.linalg.solve(matrix, -gradient)
    for steps in (2 * len(gradient), 200):
        delta, _ = updated(kfac_jax.Refine(steps=steps))
        np.testing.assert_allclose(ravel_pytree(delta)[0], exact, rtol=1e-6, atol=1e-9)


def test_one_iteration_is_the_quadratic_model():
    delta, state = updated(kfac_jax.Refine(steps=1))
    expected, other = updated(kfac_jax.QuadraticModel(largest_momentum=0.0))
    models.assert_trees_close(delta, expected, rtol=1e-10)
    np.testing.assert_allclose(
        state.info.quadratic_change, other.info.quadratic_change, rtol=1e-10
    )


def test_the_longest_step_is_limited():
    """Of a state whose steps were short, in multiples of their mean length."""
    rule = kfac_jax.Refine(steps=3, longest=2.0)
    free, state = updated(rule)
    short = state._replace(length=state.length / 8, step=jnp.int32(50))
    again = {"factors": state.factors, "inverses": state.inverses}
    delta, after = updated(rule, state=short._replace(**again))
    assert 0 < after.info.step_scale < 0.5
    model = dict(zip(("gradient", "matrix"), dense()[:2], strict=True))
    v = np.asarray(ravel_pytree(delta)[0])
    length = np.sqrt(0.5 * v @ model["matrix"] @ v)
    assert length == pytest.approx(float(2 * short.length), rel=0.1)
    assert oracles.vector(delta) @ oracles.vector(free) > 0


def test_a_part_of_the_batch():
    rule = kfac_jax.Refine(steps=300, fraction=0.5)
    delta, _ = updated(rule)
    gradient, *_ = dense()
    half = N // 2
    fisher = oracles.ggn(
        lambda p: models.mlp(p, X[:half]),
        lambda z, y: jax.nn.logsumexp(z) - z[y],
        PARAMS,
        LABELS[:half],
    )
    matrix = fisher + (DAMPING + L2) * np.eye(len(gradient))
    exact = np.linalg.solve(matrix, -gradient)
    np.testing.assert_allclose(ravel_pytree(delta)[0], exact, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_devices_make_the_same_step(kind):
    rule, expected = kfac_jax.Refine(steps=3), updated(kfac_jax.Refine(steps=3))[0]
    tx = kfac_jax.kfac(
        CURVATURE, rule, damping=DAMPING, devices=kfac_jax.OverAxis("batch")
    )

    def step(state, params, x, labels):
        value, grads, statistics = CURVATURE.value_grad_and_statistics(
            params, x, labels
        )
        value = jax.lax.pmean(value, "batch")
        if kind == "pmap":
            grads = jax.lax.pmean(grads, "batch")
        else:  # JAX has summed them
            grads = jax.tree.map(lambda g: g / 4, grads)
        arguments = {"statistics": statistics, "value": value, "args": (x, labels)}
        return tx.update(grads, state, params, **arguments)[0]

    if kind == "shard_map":
        mapped = jax.shard_map(
            step,
            mesh=models.mesh(4, "batch"),
            in_specs=(P(), P(), P("batch"), P("batch")),
            out_specs=P(),
        )
        found = jax.jit(mapped)(tx.init(PARAMS), PARAMS, X, LABELS)
        models.assert_trees_close(found, expected, rtol=1e-7)
        return
    mapped = jax.pmap(step, "batch", in_axes=(None, None, 0, 0))
    split = lambda x: x.reshape(4, N // 4, *x.shape[1:])  # noqa: E731
    found = mapped(tx.init(PARAMS), PARAMS, split(X), split(LABELS))
    for i in range(4):
        mine = jax.tree.map(lambda x, i=i: x[i], found)
        models.assert_trees_close(mine, expected, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_makes_the_same_step(kind):
    rule, expected = kfac_jax.Refine(steps=3), updated(kfac_jax.Refine(steps=3))[0]
    mesh = jax.make_mesh((4,), ("batch",), (getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        devices = kfac_jax.OverMesh(mesh, axes=("batch",))
        tx = kfac_jax.kfac(CURVATURE, rule, damping=DAMPING, devices=devices)
        data = [jax.device_put(x, P("batch")) for x in (X, LABELS)]
        params = jax.device_put(PARAMS, P())

        def step(state, params, *data):
            value, grads, statistics = CURVATURE.value_grad_and_statistics(
                params, *data
            )
            arguments = {"statistics": statistics, "value": value, "args": data}
            return tx.update(grads, state, params, **arguments)[0]

        found = jax.jit(step)(tx.init(params), params, *data)
    models.assert_trees_close(jax.device_get(found), expected, rtol=1e-7)


@pytest.mark.slow
def test_it_needs_fewer_steps():
    """With the default damping, from k iterations on each batch."""
    losses = []
    for steps in (1, 8):
        tx = kfac_jax.kfac(CURVATURE, kfac_jax.Refine(steps=steps))
        step = jax.jit(kfac_jax.make_step(CURVATURE, tx))
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(15):
            params, state, _ = step(params, state, jax.random.key(i), X, LABELS)
        losses.append(float(loss_fn(params, X, LABELS)))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be an integer ≥ 1"),
        ({"fraction": 0.0}, "fraction"),
        ({"longest": 0.5}, "longest must be finite and at least 1"),
    ],
)
def test_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        kfac_jax.Refine(**options)


def test_momentum_and_constraints_are_refused():
    with pytest.raises(ValueError, match="Refine has no momentum"):
        kfac_jax.kfac(CURVATURE, kfac_jax.Refine(), 0.9)
    with pytest.raises(ValueError, match="expected None with Refine"):
        kfac_jax.kfac(CURVATURE, kfac_jax.Refine(), norm_constraint=1e-3)
