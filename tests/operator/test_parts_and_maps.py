"""Parameters that are cut in parts, and Kronecker factors of computed weights."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.blocks import Kronecker
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

pytestmark = pytest.mark.usefixtures("any_rank")

N, D, H = 7, 4, 3
X = models.array(0, N, D)
PARAMS = {
    "qkv": models.array(1, D, 3 * H),
    "bias": models.array(2, 3 * H),
    "stack": models.array(3, 2, H, H),
    "shifts": models.array(4, 2, H),
    "o": models.array(5, H, 2),
}


def network(q, k, v, stack, o, x):
    h = jnp.tanh(x @ q[0] + q[1]) * jnp.tanh(x @ k[0] + k[1]) + x @ v[0] + v[1]
    for w, b in stack:
        h = jnp.tanh(h @ w + b)
    return h @ o


def cut(p, x):
    weights = jnp.split(p["qkv"], 3, axis=1)
    biases = jnp.split(p["bias"], 3)
    stack = [(p["stack"][i], p["shifts"][i]) for i in range(2)]
    return network(*zip(weights, biases, strict=True), stack, p["o"], x)


def apart(p, x):
    return network(p["q"], p["k"], p["v"], p["stack"], p["o"], x)


def separate(tree):
    """The parts of `tree` as parameters of their own."""
    pieces = zip(
        jnp.split(tree["qkv"], 3, axis=1), jnp.split(tree["bias"], 3), strict=True
    )
    stack = [*zip(tree["stack"], tree["shifts"], strict=True)]
    return dict(zip("qkv", pieces, strict=True)) | {"stack": stack, "o": tree["o"]}


def loss_of(apply):
    return lambda p, x: squared_error(apply(p, x)).sum(-1).mean()


def both(block):
    plans = [
        kfac_jax.make_curvature(
            loss_of(apply), p, X, blocks=block, estimation_mode="fisher_exact"
        )
        for apply, p in ((cut, PARAMS), (apart, separate(PARAMS)))
    ]
    trees = (PARAMS, separate(PARAMS))
    return plans, [jax.jit(x.at)(p, X) for x, p in zip(plans, trees, strict=True)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "block",
    [None]
    + [pytest.param(b, marks=pytest.mark.slow) for b in (blocks.Eigen(), blocks.TNT())],
)
def test_parts_are_layers_like_parameters_of_their_own(block):
    (mine, theirs), (own, other) = both(block)
    assert sorted(x.kind for x in mine.layers) == sorted(x.kind for x in theirs.layers)
    assert mine.layers[0].params == ("qkv[:,0:3]", "bias[0:3]")
    v = oracles.random_like(PARAMS, 6)

    @jax.jit
    def compute(op, v):
        vectors = [
            op.matvec(v),
            op.solve(v, damping=0.1),
            op.solve(v, damping=0.1, damping_mode="exact"),
            op.power(v, -0.5, damping=0.1),
            op.diagonal(),
        ]
        return vectors, [op.trace(), op.logdet(damping=0.1)]

    (found, mine_too), (expected, numbers) = (
        compute(own, v),
        compute(other, separate(v)),
    )
    models.assert_trees_close([*map(separate, found)], expected, rtol=1e-9)
    np.testing.assert_allclose(mine_too, numbers, rtol=1e-9)
    drawn = jax.jit(lambda op: op.sample(jax.random.key(0), damping=0.1))(own)
    assert np.isfinite(oracles.vector(drawn)).all()
    assert "qkv[:,3:6]" in str(mine) and mine.totals.covered == mine.totals.parameters


def test_a_weight_and_its_bias_may_be_parts_of_one_parameter():
    """Each is written where the other was written before."""
    table, x = models.array(7, D + 1, H), models.array(8, N, D)

    def joined(p, x):
        return jnp.tanh(x @ p["t"][:D] + p["t"][D]) @ p["o"]

    def separate_ones(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["o"]

    o = models.array(9, H, 2)
    params = {"t": table, "o": o}
    others = {"w": table[:D], "b": table[D], "o": o}
    plans = [
        kfac_jax.make_curvature(loss_of(f), p, x, estimation_mode="fisher_exact")
        for f, p in ((joined, params), (separate_ones, others))
    ]
    assert plans[0].layers[-1].params == (f"t[0:{D}]", f"t[{D}]")

    def apart(tree):
        return {"w": tree["t"][:D], "b": tree["t"][D], "o": tree["o"]}

    v = oracles.random_like(params, 6)
    mine, theirs = plans[0].at(params, x), plans[1].at(others, x)
    for function in (
        lambda op, v: op.matvec(v),
        lambda op, v: op.solve(v, damping=0.1),
        lambda op, v: op.power(v, -0.5, damping=0.1),
    ):
        models.assert_trees_close(
            apart(function(mine, v)), function(theirs, apart(v)), rtol=1e-9
        )
    models.assert_trees_close(apart(mine.diagonal()), theirs.diagonal(), rtol=1e-9)
    found = []
    for plan, p in zip(plans, (params, others), strict=True):
        tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1)
        step = jax.jit(kfac_jax.make_step(plan, tx))
        found.append(step(p, tx.init(p), jax.random.key(0), x)[0])
    models.assert_trees_close(apart(found[0]), found[1], rtol=1e-9)


def test_training_is_that_of_parameters_of_their_own():
    (mine, theirs), _ = both(None)
    params, others = PARAMS, separate(PARAMS)
    results = []
    for plan, p in ((mine, params), (theirs, others)):
        tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1)
        step, state = jax.jit(kfac_jax.make_step(plan, tx)), tx.init(p)
        for i in range(5):
            p, state, _ = step(p, state, jax.random.key(i), X)
        results.append(p)
    models.assert_trees_close(separate(results[0]), results[1], rtol=1e-7)


def test_full_blocks_are_those_of_whole_parameters():
    plan = kfac_jax.make_curvature(
        loss_of(cut), PARAMS, X, blocks=blocks.Full(), estimation_mode="fisher_exact"
    )
    assert [x.name for x in plan.layers] == sorted(PARAMS)


def twice(p, x):
    """A part that is used twice, in a scan."""
    first, second = p["w"][:, :D], p["w"][:, D:]

    def body(h, _):
        return jnp.tanh(h @ first), None

    return jax.lax.scan(body, x, length=3)[0] @ second


def split_in_a_scan(p, x):
    def body(h, _):
        first, second = jnp.split(p["w"], [D], axis=1)
        return jnp.tanh(h @ first) * jax.nn.sigmoid(h @ second @ second.T), None

    return jax.lax.scan(body, x, length=3)[0]


@pytest.mark.slow
@pytest.mark.parametrize("apply", [twice, split_in_a_scan])
def test_parts_that_are_used_several_times(apply):
    params = {"w": models.array(1, D, D + H)}
    matrix = {}
    for block in (Kronecker(), blocks.Diagonal(), blocks.Full()):
        plan = kfac_jax.make_curvature(
            loss_of(apply), params, X, blocks=block, estimation_mode="fisher_exact"
        )
        assert all(layer.tagged for layer in plan.layers)
        matrix[type(block)] = np.asarray(plan.at(params, X).to_dense())
        if isinstance(block, Kronecker):
            assert [x.name for x in plan.layers] == [f"w[:,0:{D}]", f"w[:,{D}:{D + H}]"]
    exact = np.diag(np.diag(matrix[blocks.Full]))
    np.testing.assert_allclose(matrix[blocks.Diagonal], exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: x @ p["w"][:, :2],  # the rest is not used
        lambda p, x: x @ p["w"][:, :3] @ p["w"][:3, :2],  # they overlap
        lambda p, x: (
            jnp.tanh(x @ p["w"]) @ p["w"][:, :2] + x @ p["w"][:, 2:]
        ),  # and all
        lambda p, x: x @ p["w"][:, 1::2] + x @ p["w"][:, ::2],  # they are no boxes
    ],
)
def test_what_does_not_divide_a_parameter_is_no_part(apply):
    params = {"w": models.array(1, D, D)}
    plan = kfac_jax.make_curvature(loss_of(apply), params, X, on_unmatched="error")
    assert [x.name for x in plan.layers] == ["w"]


# -------------------------------------------------------------------------------- maps

MASK = jnp.asarray(np.random.default_rng(0).random((D, H)) < 0.6, float)
FIXED = models.array(8, D, H)


def with_sides(a, g, d):
    """A Kronecker product for `D (A ⊗ G) D`, of the same trace."""
    dense = np.kron(a, g) * np.outer(d.ravel(), d.ravel())
    for_inputs = np.einsum("ik,ij,kj->ik", a, d, d)  # as if G were the identity
    for_outputs = np.einsum("jl,ii,ij,il->jl", g, a, d, d)
    product = np.kron(for_inputs, for_outputs)
    return product * np.trace(dense) / np.trace(product)


ENTRIES = {
    "mask": (lambda w: w * MASK, lambda w: MASK),
    "square": (lambda w: jnp.square(w), lambda w: 2 * w),
    "positive": (jax.nn.softplus, jax.nn.sigmoid),
}


@pytest.mark.parametrize("limit", [None, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENTRIES)
def test_factors_of_a_weight_that_is_computed_entry_by_entry(name, limit):
    function, derivative = ENTRIES[name]
    params = {"w": models.array(1, D, H)}
    apply = lambda p, x: x @ function(p["w"])  # noqa: E731
    plan = kfac_jax.make_curvature(
        loss_of(apply),
        params,
        X,
        blocks=Kronecker(max_factor_dim=limit),
        estimation_mode="fisher_exact",
    )
    (layer,) = plan.layers
    assert (layer.kind, type(layer.block)) == ("dense", Kronecker)
    a = np.asarray(X.T @ X / N)
    a = a if limit is None else np.diag(np.diag(a))
    expected = with_sides(a, 2 * np.eye(H), np.asarray(derivative(params["w"])))
    found = np.asarray(plan.at(params, X).to_dense())
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: jnp.roll(w, 1, axis=0),
        lambda w: w[::-1],
        lambda w: jnp.cumsum(w, axis=0),
        lambda w: jnp.ones_like(w) * w.mean(0),
        lambda w: w @ w.T @ w,
    ],
)
def test_maps_that_are_not_by_entry_keep_the_exact_diagonal(function):
    """Entries that come from others, though the shape is the same."""
    params = {"w": models.array(1, D, H)}
    apply = lambda p, x: jnp.tanh(x @ function(p["w"]))  # noqa: E731
    plan = kfac_jax.make_curvature(
        loss_of(apply), params, X, estimation_mode="fisher_exact"
    )
    (layer,) = plan.layers
    assert not isinstance(layer.block, Kronecker)
    flat, restore = jax.flatten_util.ravel_pytree(params)
    j = jax.jacobian(lambda v: apply(restore(v), X))(flat)
    exact = 2 * np.einsum("nop,nop->p", j, j) / N
    found = plan.at(params, X)
    np.testing.assert_allclose(found.trace(), exact.sum(), rtol=1e-9)


def test_factors_of_both_factors_of_a_product():
    """As LoRA merges them into a fixed weight."""
    params = {"a": models.array(1, D, 2), "b": models.array(2, 2, H)}
    apply = lambda p, x: x @ (FIXED + (p["a"] @ p["b"]) * 0.5)  # noqa: E731
    plan = kfac_jax.make_curvature(
        loss_of(apply), params, X, estimation_mode="fisher_exact"
    )
    assert [type(layer.block) for layer in plan.layers] == [Kronecker] * 2
    found = np.asarray(plan.at(params, X).to_dense())
    a, b, second = params["a"], params["b"], X.T @ X / N
    expected = {
        "a": np.kron(second, 2 * 0.25 * b @ b.T),
        "b": np.kron(a.T @ second @ a, 2 * 0.25 * np.eye(H)),
    }
    for name, wanted in expected.items():
        own = oracles.block(found, params, name)
        np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("map_of", [lambda w: w * jnp.ones((48, 48)), None])
def test_statistics_of_maps_and_parts_cost_no_more_than_others(map_of):
    """Not a moment of each example's gradient, which would be thirty times as much."""
    params = {"w": models.array(1, 48, 96 if map_of is None else 48)}
    x = models.array(2, 96, 48)

    def apply(p, x):
        if map_of is not None:
            return jnp.tanh(x @ map_of(p["w"]))
        first, second = jnp.split(p["w"], 2, axis=1)
        return jnp.tanh(x @ first) @ second

    plan = kfac_jax.make_curvature(loss_of(apply), params, x)

    def cost(function):
        compiled = jax.jit(function).lower(params, x).compile()
        return compiled.cost_analysis()["flops"]

    def with_statistics(p, x):
        return plan.value_grad_and_statistics(p, x, rng=jax.random.key(0))

    assert cost(with_statistics) < 5 * cost(jax.value_and_grad(loss_of(apply)))


def test_a_batch_of_positions_without_entries():
    """An associative scan concatenates them."""

    def apply(p, x):
        decay = jnp.exp(p["w"]) * jnp.ones((5, D))
        return jnp.concatenate([decay[:0] * x[:, :0], x * p["w"]], 1)

    def loss_fn(p, x):
        return squared_error(apply(p, x)).sum((1, 2)).mean()

    params, x = {"w": models.array(1, D)}, models.array(2, N, 5, D)
    plan = kfac_jax.make_curvature(loss_fn, params, x)
    _, _, statistics = plan.value_grad_and_statistics(params, x, rng=jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(statistics))
