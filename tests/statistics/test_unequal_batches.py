"""Statistics of micro-batches of different sizes add up to those of all their cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks, losses
from tests.helpers import models

N = 23
X, Y = models.array(0, N, 5), models.array(1, N, 2)
MASK = (models.array(2, N) > -0.5).astype(float)
PARAMS = {"hidden": models.array(3, 5, 4), "out": models.array(4, 4, 2)}
PARTS = (np.s_[:11], np.s_[11:22], np.s_[22:])


def outputs(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def plain(params, x, y, mask):
    return losses.squared_error(outputs(params, x), y).sum(-1).mean()


def hidden(params, x, y, mask):
    """A mean over all cases, of which some are zero."""
    z = outputs(params, x)
    kfac_jax.register_squared_error_loss(z, y, mask=mask)
    return (jnp.square(z - y).sum(-1) * mask).mean()


def counted(params, x, y, mask):
    """A mean over the cases that count."""
    values = losses.squared_error(outputs(params, x), y, mask=mask, weight=0.5)
    return 0.5 * values.sum() / mask.sum()


BLOCKS = {
    "Kronecker": blocks.Kronecker(),
    "diagonal side": blocks.Kronecker(max_factor_dim=4),
    "Diagonal": blocks.Diagonal(),
    "Full": blocks.Full(),
    "TNT": blocks.TNT(),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("loss_fn", [plain, hidden, counted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BLOCKS)
def test_sums_over_unequal_batches_are_those_of_all_cases(name, loss_fn):
    args = (X, Y, MASK)
    plan = kfac_jax.make_curvature(
        loss_fn, PARAMS, *args, blocks=BLOCKS[name], estimation_mode="fisher_exact"
    )

    def gather(part):
        batch = [x[part] for x in args]
        return plan.value_grad_and_statistics(PARAMS, *batch)[2]

    whole = gather(np.s_[:])
    parts = [gather(part) for part in PARTS]
    together = jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)
    zero = plan.init_factors(PARAMS)
    models.assert_trees_close(
        plan.update_factors(zero, together, 1), plan.update_factors(zero, whole, 1)
    )


def test_bases_of_different_batches():
    """Moments that lie in one basis add up as the others do."""
    plan = kfac_jax.make_curvature(
        plain, PARAMS, X, Y, MASK, blocks=blocks.Eigen(), estimation_mode="fisher_exact"
    )
    zero = plan.init_factors(PARAMS)
    *_, first = plan.value_grad_and_statistics(PARAMS, X, Y, MASK)
    factors = plan.update_factors(zero, first, 1)

    def gather(part):
        return plan.value_grad_and_statistics(
            PARAMS, X[part], Y[part], MASK[part], factors=factors
        )[2]

    together = jax.tree.map(lambda *x: sum(x[1:], x[0]), *map(gather, PARTS))
    models.assert_trees_close(
        plan.update_factors(factors, together, 2),
        plan.update_factors(factors, gather(np.s_[:]), 2),
    )


@pytest.mark.slow
def test_the_last_smaller_batch_counts_by_its_cases():
    """In an optimizer's averages; ε is 1 - 1/k here, so that these are plain means."""
    x, y = models.array(1, 23, 4), models.array(2, 23, 3)
    params = models.dense_params(0, 4, 5, 3)

    def loss_fn(params, x, y):
        z = models.mlp(params, x)
        return kfac_jax.losses.squared_error(z, y).sum(-1).mean()

    curvature = kfac_jax.make_curvature(
        loss_fn, params, x[:11], y[:11], estimation_mode="fisher_exact"
    )
    tx = kfac_jax.scale_by_kfac(curvature)
    update, state = jax.jit(tx.update), tx.init(params)
    for part in (slice(0, 11), slice(11, 22), slice(22, 23)):
        args = x[part], y[part]
        _, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        _, state = update(grads, state, params, statistics=statistics)
    expected = curvature.at(params, x, y).factors
    models.assert_trees_close(state.factors, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(state.cases, 23 / 3, rtol=1e-6)
