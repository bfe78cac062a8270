"""Weights that are used transposed too: tied embeddings, tied autoencoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import TNT, Diagonal, Eigen, Full, Identity, Kronecker
from kfac_jax.blocks._tied import join, nearest_product
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels, squared_error
from tests.helpers import models

V, D, B, T = 7, 4, 6, 3
IDS = jnp.asarray(np.arange(B * T).reshape(B, T) * 5 % V)
TABLE = {"table": models.array(0, V, D), "mix": models.array(1, D, D)}
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def language_model(table, head, mix, ids):
    h = jnp.tanh(table[ids] @ mix)
    logits = (h @ head).reshape(-1, V)
    return softmax_cross_entropy_with_integer_labels(logits, ids.reshape(-1)).mean()


def tied_loss(params, ids):
    return language_model(params["table"], params["table"].T, params["mix"], ids)


def untied_loss(params, ids):
    return language_model(params["table"], params["head"], params["mix"], ids)


def factors_of(plan, params, *args):
    statistics = plan.value_grad_and_statistics(params, *args)[2]
    return plan.update_factors(plan.init_factors(params), statistics, step=1)


def psd(seed, *shape, rank=None):
    half = np.random.default_rng(seed).standard_normal((*shape, rank or shape[-1]))
    return half @ np.swapaxes(half, -1, -2)


def as_matrix(factors, name):
    if name in factors:
        return np.asarray(factors[name])
    return np.diag(np.asarray(factors[name + "_diagonal"]))


def best_rank_one(terms):
    """The nearest Kronecker product of `Σ P ⊗ Q`, by an SVD of the rearranged sum."""
    rearranged = sum(np.outer(p.ravel(), q.ravel()) for p, q in terms)
    u, s, v = np.linalg.svd(rearranged)
    return s[0] * np.kron(
        u[:, 0].reshape(terms[0][0].shape), v[0].reshape(terms[0][1].shape)
    )


FIRST = {  # factors on the side of the 5 rows, of the 3 columns
    "full": {"input": psd(0, 5), "output": psd(1, 3)},
    "one-hot": {"input_diagonal": np.arange(5.0), "output": psd(1, 3)},
    "diagonals": {"input_diagonal": np.arange(5.0), "output_diagonal": np.ones(3)},
}
SECOND = {
    "full": {"input": psd(2, 3), "output": psd(3, 5)},
    "low rank": {"input": psd(2, 3, rank=1), "output": psd(3, 5, rank=1)},
    "one diagonal": {"input": psd(2, 3), "output_diagonal": np.arange(5.0)[::-1]},
    "diagonals": {"input_diagonal": np.arange(3.0), "output_diagonal": np.ones(5)},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_the_block_is_the_nearest_kronecker_product(first, second, scale):
    one = FIRST[first]
    two = {name: scale * x for name, x in SECOND[second].items()}
    found = nearest_product(jax.tree.map(jnp.asarray, join(one, two)))
    terms = [
        (as_matrix(one, "input"), as_matrix(one, "output")),
        (as_matrix(two, "output"), as_matrix(two, "input")),
    ]
    product = np.kron(as_matrix(found, "input"), as_matrix(found, "output"))
    close(product, best_rank_one(terms), rtol=1e-7, atol=1e-9 * scale**2)
    for name in ("input", "output"):
        assert np.linalg.eigvalsh(as_matrix(found, name)).min() > -1e-12


def test_each_independent_layer_has_a_product_of_its_own():
    first = {"input": psd(0, 2, 5), "output": psd(1, 2, 3)}
    second = {"input": psd(2, 2, 3), "output": psd(3, 2, 5)}
    together = nearest_product(jax.tree.map(jnp.asarray, join(first, second)))
    for i in range(2):
        one = {name: jnp.asarray(x[i]) for name, x in join(first, second).items()}
        for name, x in nearest_product(one).items():
            close(together[name][i], x)


@pytest.mark.parametrize("missing", ["first", "second", "both"])
def test_a_term_that_is_zero_leaves_the_other(missing):
    first, second = FIRST["full"], SECOND["full"]
    if missing != "second":
        first = jax.tree.map(np.zeros_like, first)
    if missing != "first":
        second = jax.tree.map(np.zeros_like, second)
    found = nearest_product(jax.tree.map(jnp.asarray, join(first, second)))
    product = np.kron(found["input"], found["output"])
    close(
        product,
        np.kron(first["input"], first["output"])
        + np.kron(second["output"], second["input"]),
    )


def test_tiny_factors_do_not_underflow():
    factors = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), join(FIRST["full"], SECOND["full"])
    )
    tiny = {
        name: x * 1e-25 if name.endswith("output") else x for name, x in factors.items()
    }
    expected, found = nearest_product(factors), nearest_product(tiny)
    ratio = np.asarray(found["input"] * jnp.float32(1e25) / expected["input"])
    other = np.asarray(found["output"] / expected["output"])
    product = np.kron(ratio, other)
    np.testing.assert_allclose(product, np.ones_like(product), rtol=1e-4)


@pytest.mark.parametrize("mode", ["ggn_exact", "fisher_exact"])
def test_factors_are_those_of_the_untied_model(mode):
    tied = kfac_jax.make_curvature(tied_loss, TABLE, IDS, estimation_mode=mode)
    untied_params = TABLE | {"head": TABLE["table"].T}
    untied = kfac_jax.make_curvature(
        untied_loss, untied_params, IDS, estimation_mode=mode
    )
    kinds = {layer.name: (layer.kind, layer.uses) for layer in tied.layers}
    assert kinds == {"table": ("tied", 2), "mix": ("dense", 1)}
    ours = factors_of(tied, TABLE, IDS)["table"]
    theirs = factors_of(untied, untied_params, IDS)
    expected = join(theirs["table"], theirs["head"])
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        close(ours[name], x)


def test_the_operator_is_the_nearest_product():
    plan = kfac_jax.make_curvature(tied_loss, TABLE, IDS, estimation_mode="ggn_exact")
    factors = factors_of(plan, TABLE, IDS)
    own = factors["table"]
    expected = best_rank_one(
        [
            (as_matrix(own, "input"), as_matrix(own, "output")),
            (as_matrix(own, "transposed_output"), as_matrix(own, "transposed_input")),
        ]
    )
    operator = plan.approximation(factors)
    dense = np.asarray(operator.to_dense())[D * D :, D * D :]  # "mix" comes first
    close(dense, expected, rtol=1e-7, atol=1e-10)
    vector = {"table": models.array(5, V, D), "mix": models.array(6, D, D)}
    damped = dense + 0.1 * np.eye(V * D)
    solved = operator.solve(vector, damping=0.1, damping_mode="exact")["table"]
    close(damped @ solved.ravel(), vector["table"].ravel(), rtol=1e-7)
    close(operator.diagonal()["table"].ravel(), np.diag(dense))


def autoencoder(params, x):
    h = jnp.tanh(x @ params["w"] + params["b"][None])
    y = h @ params["w"].T + params["c"][None]
    return squared_error(y, x).sum(-1).mean()


def scanned(params, x):
    def body(h, w):
        return jnp.tanh(h @ w) @ w.T, None

    h, _ = jax.lax.scan(jax.checkpoint(body), x, params["w"])
    return squared_error(h, x).sum(-1).mean()


def several_times(params, x):
    h = x
    for _ in range(2):
        h = jnp.tanh(h @ params["w"]) @ params["w"].T
    return squared_error(h, x).sum(-1).mean()


MODELS = {  # loss, params, uses of "w"
    "autoencoder": (
        autoencoder,
        {"w": models.array(0, 5, 3), "b": jnp.ones(3), "c": jnp.ones(5)},
        2,
    ),
    "scanned": (scanned, {"w": models.array(0, 2, 5, 3)}, 2),
    "several times": (several_times, {"w": models.array(0, 5, 3)}, 4),
    "jit": (jax.jit(several_times), {"w": models.array(0, 5, 3)}, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_tied_weights_are_covered_and_train(name):
    loss_fn, params, uses = MODELS[name]
    x = models.array(1, 8, 5)
    plan = kfac_jax.make_curvature(loss_fn, params, x, on_unmatched="error")
    kinds = {layer.name: (layer.kind, layer.uses) for layer in plan.layers}
    assert kinds["w"] == ("tied", uses)
    tx = kfac_jax.kfac(plan, learning_rate=0.05, momentum=0.9, damping=1e-2)

    @jax.jit
    def step(params, state, key):
        value, grads, statistics = plan.value_grad_and_statistics(params, x, rng=key)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return jax.tree.map(jnp.add, params, updates), state, value

    state = tx.init(params)
    losses = []
    for i in range(20):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.info.skipped_updates) == 0


def test_a_stacked_weight_has_the_factors_of_its_layers():
    params, x = MODELS["scanned"][1], models.array(1, 8, 5)
    plan = kfac_jax.make_curvature(scanned, params, x, estimation_mode="ggn_exact")
    together = factors_of(plan, params, x)["w"]

    def unrolled(params, x):
        h = x
        for w in params:
            h = jnp.tanh(h @ w) @ w.T
        return squared_error(h, x).sum(-1).mean()

    layers = list(params["w"])
    apart_plan = kfac_jax.make_curvature(
        unrolled, layers, x, estimation_mode="ggn_exact"
    )
    apart = factors_of(apart_plan, layers, x)
    for i in range(2):
        for name, factor in apart[str(i)].items():
            close(together[name][i], factor)


def test_a_long_side_keeps_its_diagonal():
    plan = kfac_jax.make_curvature(
        tied_loss, TABLE, IDS, blocks=Kronecker(max_factor_dim=5)
    )
    (layer,) = [layer for layer in plan.layers if layer.kind == "tied"]
    assert layer.factor_shapes == {
        "input_diagonal": (V,),
        "output": (D, D),
        "transposed_input": (D, D),
        "transposed_output_diagonal": (V,),
    }
    (group,) = [x for x in plan.groups if x.layers == (layer,)]
    assert group.inversion_cost == D**3


@pytest.mark.parametrize("block", [Diagonal(), Full(), Eigen(), TNT()], ids=repr)
def test_other_blocks_sum_the_gradients_of_both_uses(block):
    plan = kfac_jax.make_curvature(
        tied_loss,
        TABLE,
        IDS,
        blocks={"table": block},
        estimation_mode="fisher_exact",
        on_unmatched="error",
    )
    assert plan.layers[-1].kind == "tied"


def test_no_curvature_is_possible_too():
    plan = kfac_jax.make_curvature(tied_loss, TABLE, IDS, blocks={"tied": Identity()})
    assert plan.layers[-1].factor_shapes == {}


def test_reduce_refuses_tied_weights():
    with pytest.warns(UserWarning, match="used several times for each example"):
        kfac_jax.make_curvature(tied_loss, TABLE, IDS, weight_sharing="reduce")
