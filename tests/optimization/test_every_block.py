"""A whole step with each block on each kind of layer, with full and with long sides."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels
from tests.helpers import models

WORDS, WIDTH, CASES = 7, 4, 6
PARAMS = {
    "kernel": models.array(0, 2, 2, 1, 3, scale=0.5),
    "scale": 1.0 + models.array(1, 3, scale=0.1),
    "shift": models.array(2, 3, scale=0.1),
    "dense": {"w": models.array(3, 3, WIDTH), "b": models.array(4, WIDTH)},
    "table": models.array(5, WORDS, WIDTH),
    "tied": models.array(6, WORDS, WIDTH),
}
IMAGES = models.array(7, CASES, 3, 3, 1)
IDS, LABELS = models.classes(8, WORDS, CASES), models.classes(9, WORDS, CASES)


def loss_fn(params, images, ids, labels):
    x = jax.lax.conv_general_dilated(
        images,
        params["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jnp.tanh(x * params["scale"][None, None, None]).mean((1, 2))
    x = jnp.tanh(x + params["shift"][None])
    x = jnp.tanh(models.dense(params["dense"], x))
    x = x + params["table"][ids] + jnp.tanh(params["tied"][ids])
    logits = x @ params["tied"].T
    return softmax_cross_entropy_with_integer_labels(logits, labels).mean()


BLOCKS = [
    blocks.Kronecker(),
    blocks.Kronecker(weight_sharing="reduce"),
    blocks.Eigen(),
    blocks.TNT(),
    blocks.Diagonal(),
    blocks.Full(),
    blocks.Identity(),
    blocks.InputOnly(),
    blocks.Kronecker(fit="frobenius"),
    blocks.Kronecker(fit="kl", weight_sharing="reduce"),
    blocks.KroneckerSum(),
]


def _limited(block, limit):
    names = {field.name for field in dataclasses.fields(block)}
    if "max_factor_dim" not in names:
        return block if limit is None else pytest.skip("it has no sides")
    return dataclasses.replace(block, max_factor_dim=limit)


@pytest.mark.sampled(5)
@pytest.mark.filterwarnings("ignore:kfac_jax gives")  # tied, for most blocks
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_step_descends(block, limit):
    plan = kfac_jax.make_curvature(
        loss_fn, PARAMS, IMAGES, IDS, LABELS, blocks=_limited(block, limit)
    )
    tx = kfac_jax.scale_by_kfac(plan, damping=0.1, inverse_every=1)

    @jax.jit
    def step(state, key):
        _, grads, statistics = plan.value_grad_and_statistics(
            PARAMS, IMAGES, IDS, LABELS, rng=key
        )
        updates, state = tx.update(grads, state, PARAMS, statistics=statistics)
        return grads, updates, state

    grads, updates, state = step(tx.init(PARAMS), jax.random.key(0))
    assert state.info.skipped_updates == 0
    slopes = jax.tree.map(lambda g, u: float(jnp.vdot(g, u)), grads, updates)
    assert all(slope > 0 for slope in jax.tree.leaves(slopes)), slopes
