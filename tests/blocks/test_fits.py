"""Kronecker products fitted to second moments of gradients, against dense oracles."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import Kronecker
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

N, SIZES = 40, (3, 4, 2)
PARAMS = models.dense_params(0, *SIZES)
X, Y = models.array(1, N, SIZES[0]), models.array(2, N, SIZES[-1])
FITS = ("frobenius", "kl")


def loss_fn(params, x, y):
    return squared_error(models.mlp(params, x), y).sum(-1).mean()


def plan(fit, **options):
    return kfac_jax.make_curvature(
        loss_fn,
        PARAMS,
        X,
        Y,
        estimation_mode="ggn_exact",
        blocks=Kronecker(fit=fit, **options),
    )


def iterated(curvature, *args, params=PARAMS, times=60):
    """Factors of one batch, whose weights are renewed again and again."""

    @jax.jit
    def again(factors):
        _, _, statistics = curvature.value_grad_and_statistics(
            params, *args, factors=factors
        )
        factors = curvature.update_factors(factors, statistics, 2, 0.0)
        blocks = {x.name: x.block for x in curvature.layers}
        return {name: blocks[name].refresh(own) for name, own in factors.items()}

    factors = curvature.init_factors(params)
    for _ in range(times):
        factors = again(factors)
    return factors


@functools.cache
def true_blocks():
    """For each layer M, exact, as `[i, o, i, o]`."""
    whole = oracles.ggn(
        lambda p: models.mlp(p, X), lambda z, y: jnp.square(z - y).sum(), PARAMS, Y
    )
    places = oracles.indices(PARAMS)
    result = {}
    for name in PARAMS:
        own = np.vstack([places[f"{name}/w"], places[f"{name}/b"][None]])
        rows = own.reshape(-1)
        result[name] = own, whole[np.ix_(rows, rows)].reshape(own.shape * 2)
    return result


def found_blocks(curvature, factors):
    dense = np.asarray(curvature.approximation(factors).to_dense())
    return {
        name: dense[np.ix_(own.reshape(-1), own.reshape(-1))].reshape(own.shape * 2)
        for name, (own, _) in true_blocks().items()
    }


def fitted_and_plain(fit):
    """The blocks of a fit that has converged, and the independent ones."""
    fitted, plain = plan(fit), plan("independent")
    return found_blocks(fitted, iterated(fitted, X, Y)), found_blocks(
        plain, iterated(plain, X, Y, times=1)
    )


def divergence(m, found):
    """`2 KL(N(0, M) ‖ N(0, found))`, up to what does not depend on `found`."""
    size = m.shape[0] * m.shape[1]
    f = found.reshape(size, size)
    return np.trace(np.linalg.solve(f, m.reshape(size, size))) + np.linalg.slogdet(f)[1]


def test_frobenius_is_the_nearest_product():
    found, before = fitted_and_plain("frobenius")
    better = False
    for name, (own, m) in true_blocks().items():
        i, o = own.shape
        u, s, v = np.linalg.svd(m.transpose(0, 2, 1, 3).reshape(i * i, o * o))
        nearest = s[0] * np.outer(u[:, 0], v[0]).reshape(i, i, o, o)
        nearest = nearest.transpose(0, 2, 1, 3)
        np.testing.assert_allclose(found[name], nearest, atol=1e-8 * np.abs(m).max())
        better |= np.linalg.norm(nearest - m) < 0.9 * np.linalg.norm(before[name] - m)
    assert better  # the sides are not independent here


def test_kl_has_the_least_divergence():
    found, before = fitted_and_plain("kl")
    better = False
    for name, (own, m) in true_blocks().items():
        i, o = own.shape
        p, q = np.eye(i), np.eye(o)
        for _ in range(200):
            a = np.einsum("iajb,ab->ij", m, q) / o
            g = np.einsum("iajb,ij->ab", m, np.linalg.inv(a)) / i
            p, q = np.linalg.inv(a), np.linalg.inv(g)
        best = np.einsum("ij,ab->iajb", np.linalg.inv(p), np.linalg.inv(q))
        # eigenvalues have a floor, of 1e-4 of their mean
        np.testing.assert_allclose(found[name], best, atol=1e-2 * np.abs(best).max())
        least = divergence(m, best)
        assert divergence(m, found[name]) < least + 1e-4
        better |= divergence(m, before[name]) > least + 0.05
    assert better


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fit", FITS)
def test_the_scale_is_the_best_for_any_weights(fit):
    """After one batch with weights that are not of it: `tr(M (P ⊗ Q))` is kept."""
    curvature = plan(fit)
    start = iterated(curvature, 0.3 + X, -Y, times=3)
    _, _, statistics = curvature.value_grad_and_statistics(PARAMS, X, Y, factors=start)
    factors = curvature.update_factors(start, statistics, 2, 0.0)
    found = found_blocks(curvature, factors)
    for name, (own, m) in true_blocks().items():
        p, q = (
            np.asarray(start[name][f"{side}_weight"]) for side in ("input", "output")
        )
        kept = [np.einsum("iajb,ij,ab->", x, p, q) for x in (m, found[name])]
        np.testing.assert_allclose(*kept, rtol=1e-9)
        assert own.shape == (len(p), len(q))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fit", FITS)
def test_sums_of_batches_are_those_of_one(fit):
    curvature = plan(fit)
    start = iterated(curvature, X, Y, times=2)

    def of(x, y):
        return curvature.value_grad_and_statistics(PARAMS, x, y, factors=start)[2]

    halves = jax.tree.map(jnp.add, of(X[:10], Y[:10]), of(X[10:], Y[10:]))
    both, one = (curvature.update_factors(start, s, 2) for s in (halves, of(X, Y)))
    models.assert_trees_close(both, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fit", FITS)
def test_at_and_over_take_their_weights_from_a_first_pass(fit):
    curvature = plan(fit)
    batches = [(X[:15], Y[:15]), (X[15:], Y[15:])]
    expected = curvature.approximation(iterated(curvature, X, Y, times=2)).to_dense()
    # `iterated` renews once more at the end; the product is that of two passes
    for found in (curvature.at(PARAMS, X, Y), curvature.over(PARAMS, batches)):
        np.testing.assert_allclose(
            found.to_dense(), expected, atol=1e-9 * np.abs(expected).max()
        )


IDS = jnp.array(np.random.default_rng(3).integers(0, 5, (12, 4)))
TABLE = {"table": models.array(4, 5, 3), "w": models.array(5, 3, 2)}
TARGETS = models.array(6, 12, 2)


def of_table(params, x, y):
    table = params["table"]
    rows = table[x] if x.dtype == int else x @ table
    z = jnp.tanh(jnp.tanh(rows).mean(1) @ params["w"])
    return squared_error(z, y).sum(-1).mean()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_integers_are_one_hot_rows(fit, sharing):
    found = []
    for x in (IDS, jax.nn.one_hot(IDS, 5)):
        curvature = kfac_jax.make_curvature(
            of_table,
            TABLE,
            x,
            TARGETS,
            estimation_mode="fisher_exact",
            blocks=Kronecker(fit=fit, weight_sharing=sharing, max_factor_dim=4),
        )
        kind = curvature.layers[0].kind
        assert kind == ("embedding" if x is IDS else "dense")
        factors = iterated(curvature, x, TARGETS, params=TABLE, times=3)
        found.append(curvature.approximation(factors).to_dense())
    np.testing.assert_allclose(*found, atol=1e-9 * np.abs(found[0]).max())


def test_layers_of_a_scan_are_fitted_each():
    stack = jnp.stack([models.array(i, 3, 3) for i in range(2)])

    def scanned(p, x, y):
        z = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0]
        return squared_error(z, y).sum(-1).mean()

    def unrolled(p, x, y):
        for w in p:
            x = jnp.tanh(x @ w)
        return squared_error(x, y).sum(-1).mean()

    y = models.array(8, N, 3)
    found = []
    for loss, params in ((scanned, stack), (unrolled, [*stack])):
        curvature = kfac_jax.make_curvature(
            loss,
            params,
            X,
            y,
            estimation_mode="ggn_exact",
            blocks=Kronecker(fit="kl"),
        )
        factors = iterated(curvature, X, y, params=params, times=3)
        found.append(curvature.approximation(factors).to_dense())
    np.testing.assert_allclose(*found, atol=1e-9 * np.abs(found[0]).max())


@pytest.mark.parametrize("fit", FITS)
def test_training_renews_weights_with_inverses(fit):
    curvature = plan(fit)
    tx = kfac_jax.kfac(curvature, inverse_every=3)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state = PARAMS, tx.init(PARAMS)
    losses, weights = [], []
    for i in range(8):
        params, state, value = step(params, state, jax.random.key(i), X, Y)
        losses.append(float(value))
        weights.append(np.asarray(state.factors["layer0"]["input_weight"]))
    assert losses[-1] < 0.8 * losses[0]
    changes = [not np.array_equal(*pair) for pair in itertools.pairwise(weights)]
    assert any(changes) and not all(changes)


def test_tied_tables_keep_the_independent_fit():
    def tied(p, ids, y):
        return squared_error(jnp.tanh(p[ids]) @ p.T, y).sum(-1).mean()

    curvature = kfac_jax.make_curvature(
        tied,
        TABLE["table"],
        IDS[:, 0],
        models.array(9, 12, 5),
        blocks=Kronecker(fit="kl"),
    )
    (layer,) = curvature.layers
    assert (layer.kind, layer.block.fit) == ("tied", "independent")
    assert "(kl)" not in str(curvature)
    assert "Kronecker (kl)" in str(plan("kl"))


def test_gradients_of_a_fitted_layer_are_not_products():
    curvature = kfac_jax.make_curvature(
        loss_fn, PARAMS, X, Y, blocks=Kronecker(fit="kl", gradient_products=True)
    )
    reasons = models.notes(curvature, "Gradients not kept as products:")
    assert set(reasons.values()) == {"its statistics are weighed by its factors"}


def test_unknown_fits_are_refused():
    with pytest.raises(ValueError, match="fit"):
        Kronecker(fit="best")
