"""Sums of two Kronecker products, against plans of each loss and dense algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import Kronecker, KroneckerSum
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

PARAMS = models.dense_params(0, 3, 4, 2)
INSIDE, EDGE, START = (models.array(i, n, 3) for i, n in ((1, 9), (2, 5), (3, 6)))
WEIGHT = 0.7
DAMPING = 0.2

make = functools.partial(
    kfac_jax.make_curvature, estimation_mode="ggn_exact", on_rest="ignore"
)


def register(z, weight=1.0):
    kfac_jax.register_squared_error_loss(z, jnp.ones_like(z), weight=weight)
    return weight * jnp.square(z - 1).sum(-1).mean()


def of_losses(*registered):
    """The loss of all parts, of which some are registered."""

    def loss_fn(params, *points):
        total = jnp.zeros(())
        for i, (x, weight) in enumerate(zip(points, (1.0, WEIGHT, 2.0), strict=False)):
            z = models.mlp(params, x)
            if i in registered:
                total += register(z, weight)
            else:
                total += weight * jnp.square(z - 1).sum(-1).mean()
        return total

    return loss_fn


def dense(curvature, *args, params=PARAMS):
    return np.asarray(curvature.at(params, *args).to_dense())


@functools.cache
def interior_and_boundary(limit=8192):
    return make(
        of_losses(0, 1),
        PARAMS,
        INSIDE,
        EDGE,
        blocks=KroneckerSum(max_factor_dim=limit),
    )


@pytest.mark.parametrize("limit", [8192, 3])
def test_it_is_the_sum_of_what_each_loss_has(limit):
    curvature = interior_and_boundary(limit)
    found = dense(curvature, INSIDE, EDGE)
    expected = sum(
        dense(
            make(
                of_losses(i),
                PARAMS,
                INSIDE,
                EDGE,
                blocks=Kronecker(max_factor_dim=limit),
            ),
            INSIDE,
            EDGE,
        )
        for i in (0, 1)
    )
    np.testing.assert_allclose(found, expected, atol=1e-10)
    title = "Sums of two Kronecker products:"
    notes = models.notes(curvature, title)
    assert set(notes.values()) == {"1 and 1 uses, by their losses"}


def test_it_is_nearer_to_the_curvature_than_one_product():
    """Points of the interior and the boundary differ in where they are."""
    edge = 4 + 0.1 * EDGE

    def outputs(p):
        points = (INSIDE, 1.0), (edge, WEIGHT)
        return [np.sqrt(w / len(x)) * models.mlp(p, x) for x, w in points]

    jacobians = [oracles.jacobian(lambda p, i=i: outputs(p)[i], PARAMS) for i in (0, 1)]
    flat = [2**0.5 * j.reshape(-1, j.shape[-1]) for j in jacobians]
    exact = sum(j.T @ j for j in flat)
    errors = {}
    for block in (KroneckerSum(), Kronecker()):
        curvature = make(of_losses(0, 1), PARAMS, INSIDE, edge, blocks=block)
        found = dense(curvature, INSIDE, edge)
        weights = [f"{name}/w" for name in PARAMS]
        parts = [oracles.block(found - exact, PARAMS, x) for x in weights]
        errors[type(block)] = sum(map(np.linalg.norm, parts))
    assert errors[KroneckerSum] < 0.7 * errors[Kronecker]


def damped(factors, damping, transposed=False):
    """The paper's factored damping of both products, λ/2 each, as a dense matrix."""
    prefix = "transposed_" if transposed else "second_"

    def side(name, like):
        for key, matrix in ((name, np.asarray), (name + "_diagonal", np.diag)):
            if key in like:
                return matrix(np.asarray(like[key]))
        raise KeyError(name)

    second = {
        n.removeprefix(prefix): x for n, x in factors.items() if n.startswith(prefix)
    }
    a, g = side("input", factors), side("output", factors)
    b, h = side("input", second), side("output", second)
    if transposed:
        b, h = h, b
    half = functools.partial(oracles.factored_damping, damping=damping / 2)
    return half(a, g, norm="trace") + half(b, h, norm="trace")


def operator_of(curvature, *args, params=PARAMS):
    factors = curvature.at(params, *args).factors
    return curvature.approximation(factors), factors


@pytest.mark.sampled(2)
@pytest.mark.parametrize("limit", [8192, 3])
def test_solutions_determinants_and_samples(limit):
    operator, factors = operator_of(interior_and_boundary(limit), INSIDE, EDGE)
    places = oracles.indices(PARAMS)
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    matrix = np.zeros((size, size))
    for name, own in factors.items():
        rows = np.vstack([places[f"{name}/w"], places[f"{name}/b"][None]]).reshape(-1)
        matrix[np.ix_(rows, rows)] = damped(own, DAMPING)
    v = oracles.random_like(PARAMS, 4)
    found = oracles.vector(operator.solve(v, DAMPING))
    np.testing.assert_allclose(
        found, np.linalg.solve(matrix, oracles.vector(v)), rtol=1e-8
    )
    logdet = np.linalg.slogdet(matrix)[1]
    found = operator.logdet(DAMPING, damping_mode="factored")
    np.testing.assert_allclose(found, logdet, rtol=1e-9)

    def draw(key):
        return jax.flatten_util.ravel_pytree(
            operator.sample(key, DAMPING, damping_mode="factored")
        )[0]

    draws = jax.vmap(draw)(jax.random.split(jax.random.key(0), 20_000))
    covariance = np.linalg.inv(matrix)
    np.testing.assert_allclose(
        np.cov(draws.T), covariance, atol=0.05 * np.abs(covariance).max()
    )
    diagonal = oracles.vector(operator.diagonal())
    np.testing.assert_allclose(diagonal, np.diag(operator.to_dense()), rtol=1e-9)


def test_steps_solve_with_it():
    curvature = interior_and_boundary()
    tx = kfac_jax.scale_by_kfac(curvature, DAMPING)
    _, grads, statistics = curvature.value_grad_and_statistics(PARAMS, INSIDE, EDGE)
    updates, state = jax.jit(tx.update)(
        grads, tx.init(PARAMS), PARAMS, statistics=statistics
    )
    operator = curvature.approximation(state.factors)
    expected = operator.solve(grads, DAMPING)
    models.assert_trees_close(updates, expected, rtol=1e-8, atol=1e-12)
    assert state.info.skipped_updates == 0


def test_before_statistics_steps_follow_the_gradient():
    curvature = interior_and_boundary()
    tx = kfac_jax.scale_by_kfac(curvature, DAMPING)
    updates, _ = tx.update(
        PARAMS,
        tx.init(PARAMS),
        PARAMS,
        statistics=curvature.zero_statistics(PARAMS),
    )
    models.assert_trees_close(updates, PARAMS, rtol=1e-12)


TABLE = models.array(5, 4, 3)
IDS = jnp.asarray(np.random.default_rng(6).integers(0, 4, 10))
LABELS = models.array(7, 10, 4)


def tied(table, ids, y):
    return squared_error(jnp.tanh(table[ids]) @ table.T, y).sum(-1).mean()


@pytest.mark.parametrize("limit", [8192, 3])
def test_a_tied_table_has_a_product_for_each_direction(limit):
    block = KroneckerSum(max_factor_dim=limit)
    curvature = make(tied, TABLE, IDS, LABELS, blocks=block)
    operator, factors = operator_of(curvature, IDS, LABELS, params=TABLE)
    ((_, own),) = factors.items()
    v = models.array(8, 4, 3)
    expected = np.linalg.solve(damped(own, DAMPING, True), v.reshape(-1))
    found = operator.solve(v, DAMPING).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    undamped = np.asarray(damped(own, 0.0, True))
    np.testing.assert_allclose(operator.to_dense(), undamped, atol=1e-12)
    notes = models.notes(curvature, "Sums of two Kronecker products:")
    assert [*notes.values()] == ["1 and 1 uses, as it is and transposed"]


def test_more_losses_than_two_share_the_second_product():
    args = INSIDE, EDGE, START
    curvature = make(of_losses(0, 1, 2), PARAMS, *args, blocks=KroneckerSum())
    notes = models.notes(curvature, "Sums of two Kronecker products:")
    assert set(notes.values()) == {"1 and 2 uses, by their losses"}
    found = dense(curvature, *args)
    others = make(of_losses(1, 2), PARAMS, *args, blocks=Kronecker())
    first = make(of_losses(0), PARAMS, *args, blocks=Kronecker())
    expected = dense(first, *args) + dense(others, *args)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.slow
def test_layers_of_a_scan_have_a_sum_each():
    stack = jnp.stack([models.array(i, 3, 3) for i in range(2)])

    def scanned(p, x, edge):
        body = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return register(jax.lax.scan(body, x, p)[0]) + register(
            jax.lax.scan(body, edge, p)[0], WEIGHT
        )

    def unrolled(p, x, edge):
        for w in p:
            x, edge = jnp.tanh(x @ w), jnp.tanh(edge @ w)
        return register(x) + register(edge, WEIGHT)

    found = []
    for loss, params in ((scanned, stack), (unrolled, [*stack])):
        curvature = make(loss, params, INSIDE, EDGE, blocks=KroneckerSum())
        operator, _ = operator_of(curvature, INSIDE, EDGE, params=params)
        v = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        found.append(oracles.vector(operator.solve(v, DAMPING)))
    np.testing.assert_allclose(*found, rtol=1e-8)


def test_a_single_loss_has_a_single_product():
    curvature = make(of_losses(0), PARAMS, INSIDE, blocks=KroneckerSum())
    assert {type(x.block) for x in curvature.layers} == {Kronecker}


def test_a_computed_weight_has_what_kronecker_has():
    mask = jnp.asarray([[1.0, 0.0, 1.0]] * 4)

    def loss_fn(w, x):
        return squared_error(x @ (w * mask)).sum(-1).mean()

    w, x = models.array(0, 4, 3), models.array(1, 6, 4)
    plans = [
        make(loss_fn, w, x, blocks=block) for block in (Kronecker(), KroneckerSum())
    ]
    assert plans[0].layers == plans[1].layers


def test_exact_damping_and_powers_are_refused():
    operator, _ = operator_of(interior_and_boundary(), INSIDE, EDGE)
    with pytest.raises(ValueError, match="A sum of two Kronecker products has no"):
        operator.solve(PARAMS, 0.1, damping_mode="exact")
    with pytest.raises(ValueError, match="A sum of two Kronecker products has no"):
        operator.power(PARAMS, -0.5, 0.1)
