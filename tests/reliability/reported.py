"""What the tests of reported programs share: a small net, oracles of its blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax import blocks, losses
from kfac_jax.losses import squared_error
from tests.helpers import models

N, D, H, C = 6, 4, 5, 3
X, LABELS = models.array(0, N, D), models.classes(1, C, N)
NET = models.dense_params(2, D, H, C)
KEY = jax.random.key(0)
cross_entropy = losses.softmax_cross_entropy_with_integer_labels


def log_loss(z, label):
    return jax.nn.logsumexp(z) - z[label]


def square(z):
    return jnp.square(z).sum()


def classified(apply):
    return lambda params, x, y: cross_entropy(apply(params, x), y).mean()


def regressed(apply):
    return lambda params, *args: squared_error(apply(params, *args)).sum(-1).mean()


def assert_exact(plan, found, exact, kind=object):
    """The blocks of this kind are those of the exact matrix."""
    layers = [layer for layer in plan.layers if isinstance(layer.block, kind)]
    assert layers
    for layer in layers:
        own = models.places(plan, layer)
        wanted = exact[np.ix_(own, own)]
        if isinstance(layer.block, blocks.Diagonal):
            wanted = np.diag(np.diag(wanted))
        assert wanted.any()
        mine = np.asarray(found)[np.ix_(own, own)]
        np.testing.assert_allclose(mine, wanted, rtol=1e-9, atol=1e-12)


def dense_of(loss_fn, params, *args, **options):
    """The plan in an exact mode, its factors, and its matrix."""
    plan, factors = models.exact_factors(loss_fn, params, *args, **options)
    return plan, factors, jax.jit(lambda f: plan.approximation(f).to_dense())(factors)
