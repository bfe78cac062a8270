"""The block-tridiagonal structure against dense matrices.

The oracle writes the inverse of a covariance with the dependencies of a tree from the
inverses of pairs and of single layers, which is not how the library computes it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from kfac_jax.operator.linked import Linked
from tests.helpers import models, oracles

TRIDIAGONAL = kfac_jax.BlockTridiagonal()
DAMPING = 1e-2


def links(curvature):
    """The parent of each linked layer, by name."""
    return {
        name: parent or None
        for group in curvature.groups
        if isinstance(group, Linked)
        for name, parent in zip(group.names, group.parents, strict=True)
    }


def reasons(curvature):
    return models.notes(curvature, "Without such a link:")


def places(curvature):
    """Where each layer's matrix is in the raveled parameters, row by row."""
    tree = curvature.tree
    ends = np.cumsum([0, *(int(np.prod(s)) for s in tree.shapes)])
    leaves = [
        np.arange(a, b).reshape(s)
        for a, b, s in zip(ends, ends[1:], tree.shapes, strict=False)
    ]
    return {
        x.name: np.asarray(x.to_matrix([leaves[i] for i in x.leaves])).ravel()
        for x in curvature.layers
    }


def dense_inverse(curvature, factors, damping=0.0):
    """`Σ_pairs F_pair⁻¹ - Σ_layers (links - 1) F_layer⁻¹`, of a forest."""
    f = {name: jax.tree.map(np.asarray, part) for name, part in factors.items()}
    own = {
        name: oracles.factored_damping(part["input"], part["output"], damping)
        for name, part in f.items()
    }
    edges = {child: parent for child, parent in links(curvature).items() if parent}
    where = places(curvature)
    count = dict.fromkeys(f, 0)
    size = sum(map(len, where.values()))
    result = np.zeros((size, size))
    for child, parent in edges.items():
        cross = np.kron(f[child]["parent_input"], f[child]["parent_output"])
        pair = np.block([[own[child], cross], [cross.T, own[parent]]])
        at = np.concatenate([where[child], where[parent]])
        result[np.ix_(at, at)] += np.linalg.inv(pair)
        count[child] += 1
        count[parent] += 1
    for name, n in count.items():
        result[np.ix_(where[name], where[name])] += (1 - n) * np.linalg.inv(own[name])
    return result


def columns(function, like):
    """The matrix of a linear function of vectors like the parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)

    def column(e):
        return jax.flatten_util.ravel_pytree(function(unravel(e)))[0]

    return np.asarray(jax.jit(jax.vmap(column, out_axes=1))(jnp.eye(len(flat))))


def residual(params, x):
    """A branch, and a sum of two paths."""
    h = models.dense(params["layer0"], x)
    inner = jnp.tanh(models.dense(params["layer1"], jnp.tanh(h)))
    h = h + models.dense(params["layer2"], inner)
    return models.dense(params["layer3"], h)


RESIDUAL = models.dense_params(3, 3, 3, 3, 3, 2)
CASES = models.array(50, 40, 3)
NETS = {
    "chain": (models.mlp, models.dense_params(0, 3, 4, 5, 2)),
    "no bias": (models.mlp, models.dense_params(1, 3, 2, 3, bias=False)),
    "residual": (residual, RESIDUAL),
}


@functools.cache
def problem(name):
    apply, params = NETS[name]
    p = models.problem("squared", apply, params, CASES)
    curvature, factors = models.exact_factors(
        p.loss_fn, p.params, *p.args, structure=TRIDIAGONAL
    )
    return p, curvature, factors


# --------------------------------------------------------------------------- the links


def test_a_chain_is_linked_in_the_order_of_the_program():
    # named so that the order of the parameters is another one
    params = dict(zip("cab", models.dense_params(0, 3, 4, 5, 2).values(), strict=True))

    def apply(p, x):
        h = jnp.tanh(models.dense(p["c"], x))
        return models.dense(p["b"], jax.checkpoint(jnp.tanh)(models.dense(p["a"], h)))

    p = models.problem("squared", apply, params, CASES)
    curvature = kfac_jax.make_curvature(
        p.loss_fn, params, *p.args, structure=TRIDIAGONAL
    )
    assert links(curvature) == {"c": "a", "a": "b", "b": None}
    assert reasons(curvature) == {"b": "no such layer uses its output"}
    assert "c → a" in str(curvature)


def test_branches_link_to_the_first_layer_that_uses_them():
    _, curvature, _ = problem("residual")
    found = {"layer0": "layer1", "layer1": "layer2", "layer2": "layer3", "layer3": None}
    assert links(curvature) == found


def test_a_tree_with_two_branches():
    def apply(p, x):
        first = jnp.tanh(models.dense(p["layer0"], x))
        second = jnp.tanh(models.dense(p["layer1"], x))
        return models.dense(p["layer2"], first * second)

    params = models.dense_params(0, 3, 3, 3, 2)
    p = models.problem("squared", apply, params, CASES)
    curvature, factors = models.exact_factors(
        p.loss_fn, params, *p.args, structure=TRIDIAGONAL
    )
    assert links(curvature) == {"layer0": "layer2", "layer1": "layer2", "layer2": None}
    op = curvature.approximation(factors)
    expected = dense_inverse(curvature, factors, DAMPING)
    found = columns(lambda v: op.solve(v, DAMPING), params)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def _twice(p, x):
    h = jnp.tanh(models.dense(p["layer0"], x))
    return models.dense(p["layer1"], jnp.tanh(models.dense(p["layer1"], h)))


def _in_scan(p, x):
    h = jnp.tanh(models.dense(p["layer0"], x))
    return jax.lax.scan(
        lambda h, _: (jnp.tanh(models.dense(p["layer1"], h)), None), h, length=2
    )[0]


def _in_cond(p, x):
    h = jnp.tanh(models.dense(p["layer0"], x))
    return jax.lax.cond(
        x.sum() > 100, jnp.tanh, lambda h: models.dense(p["layer1"], h), h
    )


def _other_positions(p, x):
    h = jnp.tanh(models.dense(p["layer0"], x))
    return models.dense(p["layer1"], h.mean(1, keepdims=True))


def _lost_examples(p, x):
    h = jnp.tanh(models.dense(p["layer0"], jnp.sort(x, axis=0)))
    return models.dense(p["layer1"], h)


def _chain(p, x):
    return models.dense(p["layer1"], jnp.tanh(models.dense(p["layer0"], x)))


def _joined(p, x):
    both = jnp.concatenate([p["layer0"]["w"], p["layer1"]["w"]], 1)
    return jnp.tanh(x @ both)


ONES = jnp.ones(3)


def _constant_input(p, x):
    def one(x):
        return models.dense(p["layer1"], jnp.tanh(models.dense(p["layer0"], ONES)))

    return jax.vmap(one)(x)


def _scale(p, x):
    return models.dense(p["layer0"], x) * p["layer1"]["b"][None]


NARROW = {"layer0": blocks.Kronecker(max_factor_dim=2)}
REDUCE = {"layer0": blocks.Kronecker(weight_sharing="reduce")}
REASONS = [  # which layer has no parent and why, the net, the blocks
    ("layer1", "it is used more than once", _twice, None),
    ("layer1", "it is used more than once", _in_scan, None),
    ("layer1", "it is inside a loop or conditional", _in_cond, None),
    ("layer0", "has other positions in each example", _other_positions, None),
    ("layer0", "its examples are not known to be those", _lost_examples, None),
    ("layer1", "its block is ", _chain, {"layer1": blocks.Diagonal()}),
    ("layer0", "its block is ", _chain, {"layer0": blocks.Eigen()}),
    ("layer0", "a side of its block is diagonal", _chain, NARROW),
    ("layer0", "has another weight_sharing", _chain, REDUCE),
    ("layer1/b", "its kind is ", _scale, None),
    ("layer1/w", "only a part of it is used here", _joined, None),
    ("layer0", "its input is the same for all cases", _constant_input, None),
]


@pytest.mark.parametrize(("name", "reason", "apply", "chosen"), REASONS)
def test_links_that_are_refused_are_reported(name, reason, apply, chosen):
    params = models.dense_params(0, 3, 3, 3)
    x = CASES.reshape(20, 2, 3) if apply is _other_positions else CASES
    p = models.problem("squared", apply, params, x)
    curvature = kfac_jax.make_curvature(
        p.loss_fn, params, *p.args, structure=TRIDIAGONAL, blocks=chosen
    )
    assert reason in reasons(curvature)[name]
    assert f"{name}: {reasons(curvature)[name]}" in str(curvature)
    assert links(curvature).get(name) is None
    if chosen:  # such plans work
        key = jax.random.key(0)
        factors = models.statistics_to_factors(curvature, params, *p.args, rng=key)
        op = curvature.approximation(factors)
        solved = jax.jit(lambda v: op.solve(v, DAMPING))(params)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(solved))


def test_independent_experts_are_not_linked():
    params = {"a": models.array(0, 2, 3, 3), "b": models.array(1, 3, 2)}

    def apply(p, x):
        h = jnp.einsum("bei,eio->beo", jnp.stack([x, -x], 1), p["a"])
        return jnp.tanh(h).sum(1) @ p["b"]

    p = models.problem("squared", apply, params, CASES)
    curvature = kfac_jax.make_curvature(
        p.loss_fn, params, *p.args, structure=TRIDIAGONAL
    )
    assert "several independent layers" in reasons(curvature)["a"]


def test_nothing_is_linked_in_the_block_diagonal_structure():
    p = models.problem("squared", *NETS["chain"], CASES)
    curvature = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    assert links(curvature) == reasons(curvature) == {}
    assert "link" not in str(curvature)


# ----------------------------------------------------------------- factors of the links


def test_cross_factors_are_second_moments_of_both_layers():
    p, _, factors = problem("chain")

    def inner(params, offsets):
        x, inputs = p.x, []
        for i, offset in enumerate(offsets):
            inputs.append(jnp.concatenate([x, jnp.ones((len(x), 1))], 1))
            x = models.dense(params[f"layer{i}"], x) + offset
            x = jnp.tanh(x) if i < 2 else x
        return x, inputs

    zeros = [jnp.zeros((len(p.x), n)) for n in (4, 5, 2)]
    _, inputs = inner(p.params, zeros)
    n, g = len(p.x), []
    jacobians = jax.jacobian(lambda offsets: inner(p.params, offsets)[0])(zeros)
    for jacobian in jacobians:
        own = np.einsum("nznd->nzd", jacobian)  # ∂z / ∂s of each case
        g.append(
            np.sqrt(2) * own.reshape(-1, own.shape[-1])
        )  # F of ½-less squares: 2 I
    for i in range(2):
        found = factors[f"layer{i}"]
        across = inputs[i].T @ inputs[i + 1] / n
        np.testing.assert_allclose(found["parent_input"], across, rtol=1e-10)
        across = g[i].T @ g[i + 1] / n
        np.testing.assert_allclose(
            found["parent_output"], across, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("mode", ["fisher_gradients", "fisher_curvature_prop"])
def test_sampled_cross_factors_have_the_exact_ones_as_their_mean(mode):
    p, _, exact = problem("chain")
    curvature = kfac_jax.make_curvature(
        p.loss_fn,
        p.params,
        *p.args,
        structure=TRIDIAGONAL,
        estimation_mode=mode,
        num_samples=400,
    )
    compute = jax.jit(
        lambda k: models.statistics_to_factors(curvature, p.params, *p.args, rng=k)
    )
    found = compute(jax.random.key(0))
    for name in ("layer0", "layer1"):
        scale = np.abs(exact[name]["parent_output"]).max()
        for part in ("parent_input", "parent_output"):
            np.testing.assert_allclose(
                found[name][part], exact[name][part], atol=0.1 * scale, rtol=1e-9
            )


def test_sequences_pair_their_positions():
    params = models.dense_params(0, 3, 4, 2)
    p = models.problem("squared", models.mlp, params, models.array(51, 8, 5, 3))
    flat = models.problem("squared", models.mlp, params, p.x.reshape(40, 3))
    found = [
        models.exact_factors(q.loss_fn, params, *q.args, structure=TRIDIAGONAL)[1]
        for q in (p, flat)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), *found
    )


def convolutional(params, x):
    h = jax.lax.conv_general_dilated(
        x, params["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(h)
    h = jax.lax.conv_general_dilated(
        h, params["b"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(h).mean((1, 2)) @ params["c"]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolutions(sharing):
    params = {
        "a": models.array(0, 2, 2, 2, 2),
        "b": models.array(1, 2, 2, 2, 3),
        "c": models.array(2, 3, 2),
    }
    p = models.problem("squared", convolutional, params, models.array(5, 30, 3, 3, 2))
    loss_fn, y = p.loss_fn, models.array(6, 30, 2)

    def whole(params, x, y):
        return squared_error(convolutional(params, x), y).sum(-1).mean()

    del loss_fn
    curvature, factors = models.exact_factors(
        whole, params, p.x, y, structure=TRIDIAGONAL, weight_sharing=sharing
    )
    # the positions of a and b pair one by one; only means pair with c
    parents = (
        {"a": "b", "b": "c", "c": None}
        if sharing == "reduce"
        else {"a": "b", "b": None}
    )
    assert links(curvature) == parents
    op = curvature.approximation(factors)
    found = columns(lambda v: op.solve(v, DAMPING), params)
    expected = dense_inverse(curvature, factors, DAMPING)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


def test_rows_that_do_not_count_keep_both_layers_together_semidefinite():
    """With dead units many rows of the first layer have no gradient."""
    params = models.dense_params(7, 3, 2, 3)
    params["layer0"]["b"] = params["layer0"]["b"] - 0.5

    def apply(p, x):
        return models.mlp(p, x, jax.nn.relu)

    p = models.problem("squared", apply, params, CASES)
    factors = models.exact_factors(p.loss_fn, params, *p.args, structure=TRIDIAGONAL)[1]
    hidden = models.dense(params["layer0"], CASES) > 0
    active = np.asarray(hidden.any(1))
    assert 0 < active.sum() < 40
    x = np.concatenate([CASES, np.ones((40, 1))], 1)
    h = np.concatenate(
        [np.maximum(models.dense(params["layer0"], CASES), 0), np.ones((40, 1))], 1
    )
    expected = (x * active[:, None]).T @ h / np.sqrt(active.sum() * 40)
    found = factors["layer0"]["parent_input"]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    a = np.block(
        [
            [factors["layer0"]["input"], found],
            [found.T, factors["layer1"]["input"]],
        ]
    )
    assert np.linalg.eigvalsh(a).min() > -1e-12


# ------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("name", NETS)
def test_the_operator_is_the_dense_matrix(name):
    _, curvature, factors = problem(name)
    op = curvature.approximation(factors)
    dense = np.asarray(jax.jit(lambda: op.to_dense())())
    np.testing.assert_allclose(dense, dense.T, rtol=1e-9, atol=1e-12)
    # it agrees with the Kronecker products of each layer and of each linked pair
    where = places(curvature)
    for child, parent in links(curvature).items():
        own = np.kron(factors[child]["input"], factors[child]["output"])
        at = where[child]
        np.testing.assert_allclose(dense[np.ix_(at, at)], own, rtol=1e-9, atol=1e-12)
        if parent is not None:
            cross = np.kron(
                factors[child]["parent_input"], factors[child]["parent_output"]
            )
            found = dense[np.ix_(at, where[parent])]
            np.testing.assert_allclose(found, cross, rtol=1e-9, atol=1e-12)
    if name == "chain":  # where nothing is singular
        inverse = dense_inverse(curvature, factors)
        np.testing.assert_allclose(
            inverse @ dense, np.eye(len(dense)), rtol=0, atol=1e-6
        )
        first, last = where["layer0"], where["layer2"]
        assert np.abs(inverse[np.ix_(first, last)]).max() < 1e-9
        assert np.abs(dense[np.ix_(first, last)]).max() > 1e-3


@pytest.mark.parametrize("name", NETS)
def test_solve_and_logdet_with_factored_damping(name):
    p, curvature, factors = problem(name)
    op = curvature.approximation(factors)
    expected = dense_inverse(curvature, factors, DAMPING)
    found = columns(lambda v: op.solve(v, DAMPING), p.params)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)
    logdet = jax.jit(lambda: op.logdet(DAMPING, damping_mode="factored"))()
    np.testing.assert_allclose(logdet, -np.linalg.slogdet(expected)[1], rtol=1e-9)
    assert np.linalg.eigvalsh(expected).min() > 0


def test_without_damping_solve_inverts_matvec():
    p, curvature, factors = problem("chain")
    op = curvature.approximation(factors)
    v = oracles.random_like(p.params, 3)
    for mode in ("factored", "exact"):
        back = jax.jit(lambda v, mode=mode: op.solve(op.matvec(v), 0.0, mode))(v)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), back, v
        )
    dense, logdet, trace, diagonal = jax.jit(
        lambda: (op.to_dense(), op.logdet(), op.trace(), op.diagonal())
    )()
    np.testing.assert_allclose(logdet, np.linalg.slogdet(dense)[1], rtol=1e-9)
    np.testing.assert_allclose(trace, np.trace(dense), rtol=1e-10)
    np.testing.assert_allclose(
        oracles.vector(diagonal), np.diag(dense), rtol=1e-9, atol=1e-12
    )


def test_samples_have_the_inverse_as_their_covariance():
    _, curvature, factors = problem("no bias")
    op = curvature.approximation(factors)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.jit(jax.vmap(lambda k: op.sample(k, 0.1, damping_mode="factored")))
    samples = np.concatenate(
        [np.reshape(x, (count, -1)) for x in jax.tree.leaves(draw(keys))], 1
    )
    expected = dense_inverse(curvature, factors, 0.1)
    error = samples.T @ samples / count - expected
    deviation = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) * 2 / count)
    assert np.abs(error / deviation).max() < 4.5


def test_what_it_cannot_do_is_refused():
    p, curvature, factors = problem("chain")
    op = curvature.approximation(factors)
    message = "only factored damping"
    with pytest.raises(ValueError, match=message):
        op.solve(p.params, 1e-3, damping_mode="exact")
    with pytest.raises(ValueError, match=message):
        op.logdet(1e-3, "exact")
    with pytest.raises(ValueError, match=message):
        op.sample(jax.random.key(0), 1e-3, "exact")
    with pytest.raises(ValueError, match="power needs a plan with"):
        op.power(p.params, -0.5, 1e-3)
    with pytest.raises(ValueError, match="BlockDiagonal"):
        kfac_jax.make_curvature(p.loss_fn, p.params, *p.args, structure="tridiagonal")


def test_float32_stays_positive_definite_where_layers_determine_each_other():
    """In a linear net the inputs of a layer are a function of those of the one below.

    So are the gradients of outputs, the other way; γ is 1e-5.
    """
    params = models.dense_params(2, 6, 6, 6, 6)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    x = models.array(3, 200, 6).astype(jnp.float32)
    y = models.array(4, 200, 6).astype(jnp.float32)

    def loss_fn(params, x, y):
        for i in range(3):
            x = models.dense(params[f"layer{i}"], x)
        return squared_error(x, y).sum(-1).mean()

    curvature, factors = models.exact_factors(
        loss_fn, params, x, y, structure=TRIDIAGONAL
    )
    assert factors["layer0"]["input"].dtype == jnp.float32
    op = curvature.approximation(factors)
    inverse = columns(lambda v: op.solve(v, 1e-10), params).astype(np.float64)
    inverse = (inverse + inverse.T) / 2
    assert np.isfinite(inverse).all()
    assert np.linalg.eigvalsh(inverse).min() > -1e-6 * np.abs(inverse).max()
    directions = np.random.default_rng(0).normal(size=(200, len(inverse)))
    assert (np.einsum("ni,ij,nj->n", directions, inverse, directions) > 0).all()


# --------------------------------------------------------------------- the optimizer


def _train(p, curvature, tx, steps):
    @jax.jit
    def step(carry, key):
        params, state = carry
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *p.args, rng=key
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=p.args
        )
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), (value, updates, grads)

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(step, (p.params, tx.init(p.params)), keys)


def test_updates_are_the_operators():
    p, curvature, factors = problem("residual")
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)
    _, (_, updates, grads) = _train(p, curvature, tx, 1)
    op = curvature.approximation(factors)
    solve = jax.jit(lambda v: op.solve(v, DAMPING))
    expected = solve(jax.tree.map(lambda x: x[0], grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-9, atol=1e-12),
        updates,
        expected,
    )


def test_it_trains_with_the_adaptive_rules():
    p = models.problem("squared", *NETS["chain"], CASES)
    curvature = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, structure=TRIDIAGONAL, num_samples=2
    )
    tx = kfac_jax.kfac(
        curvature,
        kfac_jax.QuadraticModel(),
        None,
        kfac_jax.LevenbergMarquardt(initial=1.0),
        inverse_every=3,
    )
    (_, state), (values, _, _) = _train(p, curvature, tx, 30)
    assert values[-1] < 0.7 * values[0]
    assert state.info.skipped_updates == 0
    assert state.info.inverse_refreshes == 12  # 3 first, and every third of 30


def test_one_bad_layer_holds_all_that_are_linked_to_it():
    p, curvature, _ = problem("chain")
    before = curvature.init_factors(p.params)

    @jax.jit
    def spoil(params):
        statistics = curvature.value_grad_and_statistics(params, *p.args)[2]
        bad = dict(statistics.layers["layer2"])
        bad["output"] = bad["output"] * jnp.nan
        spoiled = statistics._replace(layers=statistics.layers | {"layer2": bad})
        return curvature.update_factors(before, spoiled, 1)

    after = spoil(p.params)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_mask_that_hides_a_layer():
    p, curvature, factors = problem("chain")
    grads = jax.grad(p.loss_fn)(p.params, *p.args)
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)
    masked = {**grads, "layer2": optax.MaskedNode()}

    @jax.jit
    def update(params):
        statistics = curvature.value_grad_and_statistics(params, *p.args)[2]
        return tx.update(masked, tx.init(params), params, statistics=statistics)[0]

    updates = update(p.params)
    zeros = {**grads, "layer2": jax.tree.map(jnp.zeros_like, grads["layer2"])}
    solve = curvature.approximation(factors).solve
    expected = jax.jit(lambda v: solve(v, DAMPING))(zeros)
    for name in ("layer0", "layer1"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
            updates[name],
            expected[name],
        )


def test_many_seeds_at_once():
    p, curvature, _ = problem("chain")
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)

    def update(scale):
        params = jax.tree.map(lambda x: scale * x, p.params)
        _, grads, statistics = curvature.value_grad_and_statistics(params, *p.args)
        return tx.update(grads, tx.init(params), params, statistics=statistics)[0]

    scales = jnp.asarray([0.5, 1.0])
    together = jax.jit(jax.vmap(update))(scales)
    for i, scale in enumerate(scales):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(
                a[i], b, rtol=1e-8, atol=1e-11
            ),
            together,
            jax.jit(update)(scale),
        )
