"""Weights used at several positions: both settings, exact where theory says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks, losses
from tests.helpers import models, oracles

B, S, I, H, O = 5, 4, 3, 4, 2  # noqa: E741
PARAMS = models.dense_params(0, I, H, O)
X = models.array(1, B, S, I)


def _convolution(params, x):
    """A linear convolution over positions, then a dense layer."""
    kernel = params["kernel"]
    y = jax.lax.conv_general_dilated(
        x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    y = y + jnp.broadcast_to(params["bias"], y.shape)
    return y @ params["head"]


NETS = {
    "dense": (models.linear, PARAMS, [["layer0/b", "layer0/w"]]),
    "convolution": (
        _convolution,
        {
            "kernel": models.array(2, 2, I, H),
            "bias": models.array(3, H),
            "head": models.array(4, H, O),
        },
        [["bias", "kernel"], ["head"]],
    ),
}
SETTINGS = {
    # the loss takes positions, or their mean, as its cases
    "expand": lambda z: z.reshape(-1, O),
    "reduce": lambda z: z.mean(1),
}


def _problem(net, setting):
    apply, params, groups = NETS[net]

    def outputs(params):
        return SETTINGS[setting](apply(params, X))

    targets = jnp.zeros_like(outputs(params))

    def loss_fn(params, x):
        z = SETTINGS[setting](apply(params, x))
        return losses.squared_error(z, targets).sum(-1).mean()

    nll = lambda z, y: losses.squared_error(z, y).sum()  # noqa: E731
    exact = oracles.ggn(outputs, nll, params, targets)
    return loss_fn, params, groups, exact


def _dense(loss_fn, params, **options):
    plan = kfac_jax.make_curvature(
        loss_fn, params, X, estimation_mode="ggn_exact", **options
    )
    _, _, statistics = jax.jit(plan.value_grad_and_statistics)(params, X)
    factors = plan.update_factors(plan.init_factors(params), statistics, step=1)
    return plan, np.asarray(plan.approximation(factors).to_dense())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("net", NETS)
def test_each_setting_is_exact_on_its_deep_linear_nets(net, setting):
    loss_fn, params, groups, exact = _problem(net, setting)
    other = next(name for name in SETTINGS if name != setting)
    _, right = _dense(loss_fn, params, weight_sharing=setting)
    _, wrong = _dense(loss_fn, params, weight_sharing=other)
    for names in groups:
        expected = oracles.block(exact, params, *names)
        close = dict(rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            oracles.block(right, params, *names), expected, **close
        )
        assert not np.allclose(
            oracles.block(wrong, params, *names), expected, rtol=0.01
        )


def test_positions_without_a_gradient_do_not_count_in_the_mean():
    mask = jnp.asarray(np.random.default_rng(5).integers(0, 2, (B, S))).at[:, 0].set(1)
    weights = mask / mask.sum(1, keepdims=True)

    def outputs(params):
        return jnp.einsum("bs,bso->bo", weights, models.linear(params, X))

    def loss_fn(params, x):
        z = jnp.einsum("bs,bso->bo", weights, models.linear(params, x))
        return losses.squared_error(z, jnp.zeros_like(z)).sum(-1).mean()

    nll = lambda z: losses.squared_error(z, jnp.zeros_like(z)).sum()  # noqa: E731
    exact = oracles.ggn(outputs, nll, PARAMS)
    _, found = _dense(loss_fn, PARAMS, weight_sharing="reduce")
    for layer in PARAMS:
        names = [f"{layer}/b", f"{layer}/w"]
        np.testing.assert_allclose(
            oracles.block(found, PARAMS, *names),
            oracles.block(exact, PARAMS, *names),
            rtol=1e-10,
            atol=1e-12,
        )


def test_a_rule_chooses_the_setting_layer_by_layer():
    loss_fn, params, _, _ = _problem("dense", "reduce")
    reduce = blocks.Kronecker(weight_sharing="reduce")
    plan, _ = _dense(loss_fn, params, blocks={"layer1": reduce})
    assert [layer.block for layer in plan.layers] == [blocks.Kronecker(), reduce]


def test_embeddings_count_how_often_an_index_occurs():
    ids = jnp.asarray([[0, 0, 1], [2, 1, 2]])
    table = models.array(6, 4, O)

    def loss_fn(table, ids):
        z = table[ids].mean(1)
        return losses.squared_error(z, jnp.zeros_like(z)).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn, table, ids, estimation_mode="ggn_exact", weight_sharing="reduce"
    )
    _, _, statistics = plan.value_grad_and_statistics(table, ids)
    factors = plan.update_factors(plan.init_factors(table), statistics, step=1)
    (layer,) = plan.layers
    one_hot = np.eye(4)[np.asarray(ids)].mean(1)
    np.testing.assert_allclose(
        factors[layer.name]["input_diagonal"], (one_hot**2).mean(0), rtol=1e-12
    )


def test_several_uses_cannot_be_reduced():
    def loss_fn(w, x):
        z = jnp.tanh(x @ w) @ w
        return losses.squared_error(z, jnp.zeros_like(z)).sum(-1).mean()

    with pytest.warns(UserWarning, match="used several times for each example"):
        kfac_jax.make_curvature(
            loss_fn, models.array(0, 3, 3), X[:, 0], weight_sharing="reduce"
        )


KRONECKER = blocks.Kronecker()


@pytest.mark.parametrize(
    "given",
    [
        KRONECKER,
        blocks.Diagonal(),
        {"dense": KRONECKER},
        {"layer0": KRONECKER, "layer1": None},
        lambda layer: KRONECKER,
    ],
)
def test_a_setting_that_no_block_would_use(given):
    loss_fn, params, _, _ = _problem("dense", "reduce")
    message = (
        "none is left that uses it: expected a layer without a block of its own, got "
        r"weight_sharing='reduce' and from blocks \w+\(.* Give it to a block, "
    )
    with pytest.raises(ValueError, match=message):
        _dense(loss_fn, params, weight_sharing="reduce", blocks=given)


@pytest.mark.parametrize(
    "given",
    [
        blocks.Kronecker(weight_sharing="reduce"),
        {"layer0": KRONECKER},
        {"embedding|layer0": None},
        lambda layer: layer.block,
    ],
)
def test_a_setting_that_a_block_uses(given):
    loss_fn, params, _, _ = _problem("dense", "reduce")
    plan, _ = _dense(loss_fn, params, weight_sharing="reduce", blocks=given)
    assert plan.layers[-1].block == blocks.Kronecker(weight_sharing="reduce")


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="weight_sharing must be"):
        blocks.Kronecker(weight_sharing="mean")
