"""EKFAC in an optimizer: where its basis comes from, and what becomes of moments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax.blocks import Eigen, Kronecker
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

DAMPING = 0.01
SIDES = {"input": 3, "output": 2}


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"][None])
    return squared_error(h @ params["z"], y).sum(-1).mean()


PARAMS = {
    "a": {"w": models.array(1, 4, 3), "b": models.array(2, 3)},
    "z": models.array(3, 3, 2),
}
X, Y = models.array(4, 9, 4), models.array(5, 9, 2)


def plan(block, loss_fn=loss_fn, args=(X, Y), params=PARAMS, **options):
    options = {"estimation_mode": "ggn_exact", "on_unmatched": "error"} | options
    return kfac_jax.make_curvature(loss_fn, params, *args, blocks=block, **options)


def first_factors(curvature, params=PARAMS, args=(X, Y)):
    return jax.jit(functools.partial(models.statistics_to_factors, curvature))(
        params, *args
    )


def blocks_of(a, g, exact):
    """The EKFAC approximation of an exact block."""
    u = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(g)[1])
    s = np.diag(u.T @ exact @ u)
    return (u * s) @ u.T, u, s


@functools.cache
def oracle():
    """For each layer the exact block in matrix order, A and G, of the first batch."""
    factors = first_factors(plan(Kronecker()))
    forward = lambda p: jnp.tanh(X @ p["a"]["w"] + p["a"]["b"][None]) @ p["z"]  # noqa: E731
    nll = lambda z, y: jnp.square(z - y).sum()  # noqa: E731
    exact = oracles.ggn(forward, nll, PARAMS, Y)
    places = oracles.indices(PARAMS)
    w = np.concatenate([places["a/w"], places["a/b"][None]]).reshape(-1)
    z = places["z"].reshape(-1)
    return {
        name: (place, exact[np.ix_(place, place)], f["input"], f["output"])
        for name, place in (("a", w), ("z", z))
        for f in (factors[name],)
    }


def test_the_first_step_is_the_papers_formula():
    """`U (Uᵀ g) / (s + λ)` in the eigenbasis of the batch's own factors."""
    curvature = plan(Eigen())
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING)
    state = tx.init(PARAMS)
    grads, statistics = curvature.value_grad_and_statistics(PARAMS, X, Y)[1:]
    updates, state = tx.update(grads, state, PARAMS, statistics=statistics)
    gradient = oracles.vector(grads)
    expected = np.zeros_like(gradient)
    for place, exact, a, g in oracle().values():
        _, u, s = blocks_of(a, g, exact)
        expected[place] = u @ ((u.T @ gradient[place]) / (s + DAMPING))
    np.testing.assert_allclose(oracles.vector(updates), expected, rtol=1e-8)


def test_it_is_closer_to_the_exact_block_than_kronecker():
    plans = [plan(block) for block in (Eigen(), Kronecker())]
    dense = [np.asarray(c.approximation(first_factors(c)).to_dense()) for c in plans]
    errors = {
        name: [np.linalg.norm(d[np.ix_(place, place)] - exact) for d in dense]
        for name, (place, exact, _, _) in oracle().items()
    }
    assert errors["a"][0] < 0.95 * errors["a"][1]
    assert max(errors["z"]) < 1e-12  # the last layer of squared errors: exact


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_moments_are_exact_with_shared_weights_and_long_sides(weight_sharing, limit):
    """TNT, too: its marginals, or their diagonals, are those of the exact block."""
    params, x = {"w": models.array(1, 3, 2)}, models.array(2, 7, 4, 3)
    fn = lambda p, x: squared_error(jnp.tanh(x @ p["w"]).sum(1)).sum(-1).mean()  # noqa: E731
    full, eigen, kronecker, tnt = (
        first_factors(plan(block, fn, (x,), params), params, (x,))["w"]
        for block in (
            kfac_jax.blocks.Full(),
            Eigen(max_factor_dim=limit, weight_sharing=weight_sharing),
            Kronecker(max_factor_dim=limit, weight_sharing=weight_sharing),
            kfac_jax.blocks.TNT(max_factor_dim=limit),
        )
    )
    exact = np.asarray(full["full"])
    for name, factor in kronecker.items():
        np.testing.assert_allclose(eigen[name], factor, rtol=1e-12)
    bases = [np.asarray(eigen.get(f"{s}_basis", np.eye(d))) for s, d in SIDES.items()]
    u = np.kron(*bases)
    s = np.diag(u.T @ exact @ u)
    np.testing.assert_allclose(eigen["moments"].reshape(-1), s, rtol=1e-10, atol=1e-14)
    each = exact.reshape(3, 2, 3, 2)
    marginals = np.einsum("iojo->ij", each), np.einsum("ioip->op", each)
    for (side, d), marginal in zip(SIDES.items(), marginals, strict=True):
        long = limit is not None and d > limit
        assert (f"{side}_basis" in eigen) != long
        found = tnt[f"{side}_diagonal"] if long else tnt[side]
        expected = np.diag(marginal) if long else marginal
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_moments_are_gathered_in_the_basis_that_is_passed():
    curvature = plan(Eigen())
    factors = first_factors(curvature)
    other = X[::-1] * 0.7 + 0.2
    compute = jax.jit(curvature.value_grad_and_statistics)
    statistics = compute(PARAMS, other, Y, factors=factors)[2]
    moved = curvature.update_factors(factors, statistics, 2, 0.95)
    exact = first_factors(plan(kfac_jax.blocks.Full()), args=(other, Y))
    for name, part in moved.items():
        u = np.kron(part["input_basis"], part["output_basis"])
        np.testing.assert_array_equal(part["input_basis"], factors[name]["input_basis"])
        s = np.diag(u.T @ np.asarray(exact[name]["full"]) @ u)
        expected = 0.5 * np.asarray(factors[name]["moments"]).reshape(-1) + 0.5 * s
        np.testing.assert_allclose(part["moments"].reshape(-1), expected, rtol=1e-9)


@pytest.mark.parametrize("passed", [False, True])
def test_a_kronecker_product_stays_one_through_changes_of_basis(passed):
    """Of a linear net with one output F is `A ⊗ G`: and EKFAC's with a fresh basis."""
    params = {"w": models.array(1, 4, 1)}
    fn = lambda p, x, y: squared_error(x @ p["w"], y).sum(-1).mean()  # noqa: E731
    args = (X, Y[:, :1])
    curvature = plan(Eigen(), fn, args, params)
    reference = plan(Kronecker(), fn, args, params)
    txs = [
        kfac_jax.scale_by_kfac(c, damping=DAMPING, inverse_every=2)
        for c in (curvature, reference)
    ]

    @jax.jit
    def step(states, x):
        out = []
        for tx, c, state in zip(txs, (curvature, reference), states, strict=True):
            given = {"factors": state.factors} if passed else {}
            _, grads, statistics = c.value_grad_and_statistics(
                params, x, args[1], **given
            )
            out.append(tx.update(grads, state, params, statistics=statistics)[1])
        return out

    states = [tx.init(params) for tx in txs]
    for seed in range(6):
        states = step(states, models.array(seed, 9, 4))
        if seed == 4:  # the fifth step leaves the basis as it was
            continue
        found, expected = (
            c.approximation(s.factors).to_dense()
            for c, s in zip((curvature, reference), states, strict=True)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_stacked_layers_in_a_checkpointed_scan():
    params = {"w": models.array(1, 3, 4, 4), "z": models.array(2, 4, 2)}

    def by_scan(params, x, y):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        x = jax.lax.scan(body, x, params["w"])[0]
        return squared_error(x @ params["z"], y).sum(-1).mean()

    def unrolled(params, x, y):
        for w in params["w"]:
            x = jnp.tanh(x @ w)
        return squared_error(x @ params["z"], y).sum(-1).mean()

    each = {"w": list(params["w"]), "z": params["z"]}
    stacked = plan(Eigen(), by_scan, (X, Y), params)
    apart = plan(Eigen(), unrolled, (X, Y), each)
    a, b = first_factors(stacked, params), first_factors(apart, each)
    found = stacked.approximation(a).to_dense()
    expected = apart.approximation(b).to_dense()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


def test_training_with_every_rule_in_a_scan():
    """A whole run inside `scan`, the state's own basis passed, sampled mode."""
    curvature = plan(Eigen(), estimation_mode="fisher_gradients")
    tx = kfac_jax.kfac(
        curvature,
        kfac_jax.QuadraticModel(),
        None,
        kfac_jax.LevenbergMarquardt(1.0),
        inverse_every=5,
    )

    def step(carry, key):
        params, state = carry
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, X, Y, rng=key, factors=state.factors
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(X, Y)
        )
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), 60)
    (_, state), values = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (PARAMS, tx.init(PARAMS))
    )
    assert values[-1] < 0.5 * values[0]
    assert state.info.skipped_updates == 0
    for part in state.factors.values():
        u = np.asarray(part["input_basis"])
        np.testing.assert_allclose(u.T @ u, np.eye(len(u)), atol=1e-10)
        assert (np.asarray(part["moments"]) >= 0).all()


@functools.cache
def bases_over_steps(warm_start):
    """A, its basis, and the moments after each step of one sequence of batches."""
    curvature = plan(Eigen(warm_start=warm_start))
    tx = kfac_jax.scale_by_kfac(curvature, damping=DAMPING, inverse_every=2)

    @jax.jit
    def step(state, x):
        _, grads, statistics = curvature.value_grad_and_statistics(
            PARAMS, x, Y, factors=state.factors
        )
        return tx.update(grads, state, PARAMS, statistics=statistics)[1]

    state, seen = tx.init(PARAMS), []
    for i in range(8):
        state = step(state, X + 0.05 * models.array(20 + i, *X.shape))
        seen.append(jax.tree.map(np.asarray, state.factors["a"]))
    return seen


def test_a_warm_start_turns_the_last_basis():
    warm, cold = bases_over_steps(True), bases_over_steps(False)
    np.testing.assert_array_equal(warm[0]["input_basis"], cold[0]["input_basis"])
    for i in (1, 2, 3, 5, 7):  # refreshed at steps 2 and 3, and every second
        a, last = warm[i]["input"], warm[i - 1]["input_basis"]
        np.testing.assert_allclose(a, cold[i]["input"], rtol=1e-12)
        q, r = np.linalg.qr(a @ last[:, ::-1])  # the largest eigenvalue first
        expected = (q * np.sign(np.diag(r)))[:, ::-1]
        np.testing.assert_allclose(warm[i]["input_basis"], expected, atol=1e-10)
    np.testing.assert_array_equal(warm[4]["input_basis"], warm[3]["input_basis"])


def test_a_warm_start_stays_near_the_eigenbasis():
    """By what it leaves off the diagonal, of factors that move slowly."""
    for factors in bases_over_steps(True)[1:]:
        for side in SIDES:
            u, a = factors[f"{side}_basis"], factors[side]
            np.testing.assert_allclose(u.T @ u, np.eye(len(u)), atol=1e-12)
            rotated = u.T @ a @ u
            off = rotated - np.diag(np.diag(rotated))
            assert np.linalg.norm(off) < 0.05 * np.linalg.norm(rotated)
        assert (factors["moments"] >= 0).all()


def test_options_that_do_not_fit():
    with pytest.raises(TypeError, match="warm_start must be a bool; got 2"):
        Eigen(warm_start=2)


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (
            Kronecker,
            "exact_scalars fit gradient_products max_factor_dim pi weight_sharing",
        ),
        (Eigen, "max_factor_dim warm_start weight_sharing"),
        (kfac_jax.blocks.TNT, "exact_scalars max_factor_dim pi"),
    ],
)
def test_blocks_have_the_options_that_apply_to_them_and_no_others(block, options):
    fields = dataclasses.fields(block)
    assert sorted(x.name for x in fields) == options.split()
    assert block.__mro__[1:] == kfac_jax.blocks.Block.__mro__


def test_factors_of_another_plan_are_refused():
    curvature = plan(Eigen())
    with pytest.raises(ValueError, match="factors must have an entry for each layer"):
        curvature.value_grad_and_statistics(PARAMS, X, Y, factors={"w": {}})
    factors = curvature.init_factors(PARAMS)
    factors["z"]["input_basis"] = jnp.eye(5)
    with pytest.raises(ValueError, match=r"factors must have the shapes .* layer 'z'"):
        curvature.value_grad_and_statistics(PARAMS, X, Y, factors=factors)


def test_statistics_that_are_not_finite_leave_basis_and_moments():
    curvature = plan(Eigen())
    factors = first_factors(curvature)
    bad = curvature.value_grad_and_statistics(
        PARAMS, X.at[0, 0].set(jnp.nan), Y, factors=factors
    )[2]
    moved = curvature.update_factors(factors, bad, 2)
    jax.tree.map(np.testing.assert_array_equal, moved, factors)


def test_a_step_without_statistics_moves_nothing():
    curvature = plan(Eigen())
    factors = first_factors(curvature)
    nothing = curvature.zero_statistics(PARAMS)
    moved = curvature.update_factors(factors, nothing, 2)
    jax.tree.map(np.testing.assert_array_equal, moved, factors)


def test_micro_batches_in_one_basis_add_up():
    curvature = plan(Eigen())
    factors = first_factors(curvature)
    compute = jax.jit(
        lambda x, y: curvature.value_grad_and_statistics(PARAMS, x, y, factors=factors)
    )
    parts = [compute(X[i : i + 3], Y[i : i + 3])[2] for i in (0, 3, 6)]
    total = jax.tree.map(lambda *a: sum(a), *parts)
    whole = compute(X, Y)[2]
    found, expected = (curvature.update_factors(factors, s, 2) for s in (total, whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        found,
        expected,
    )


def test_micro_batches_in_different_bases_do_not_add_up():
    """Each has its own basis if it gets none; the mean of bases is no basis."""
    curvature = plan(Eigen())
    factors = first_factors(curvature)
    compute = lambda x, y: curvature.value_grad_and_statistics(PARAMS, x, y)[2]  # noqa: E731
    parts = [compute(X[i : i + 3], Y[i : i + 3]) for i in (0, 3, 6)]
    total = jax.tree.map(lambda *a: sum(a), *parts)
    with pytest.raises(ValueError, match="of 'a' were added up in different"):
        curvature.update_factors(factors, total, 2)
    kept = jax.jit(curvature.update_factors)(factors, total, 2)
    jax.tree.map(np.testing.assert_array_equal, kept, factors)
    tx = kfac_jax.scale_by_kfac(curvature, damping=0.1)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    update = jax.jit(lambda s: tx.update(grads, tx.init(PARAMS), PARAMS, statistics=s))
    assert int(update(total)[1].info.skipped_updates) == 1
    assert int(update(parts[0])[1].info.skipped_updates) == 0


def test_half_precision_data_are_rotated_in_single():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    args = X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)
    curvature = plan(Eigen(), args=args, params=half)
    factors = first_factors(curvature, half, args)
    for part in factors.values():
        assert {x.dtype for x in part.values()} == {jnp.dtype("float32")}
    exact = first_factors(
        plan(kfac_jax.blocks.Full(), args=args, params=half), half, args
    )
    for name, part in factors.items():
        u = np.kron(part["input_basis"], part["output_basis"]).astype(np.float64)
        s = np.diag(u.T @ np.asarray(exact[name]["full"], np.float64) @ u)
        np.testing.assert_allclose(part["moments"].reshape(-1), s, rtol=0.02, atol=0.01)


def test_the_report_says_what_is_held():
    curvature = plan(Eigen())
    state = kfac_jax.scale_by_kfac(curvature, damping=DAMPING).init(PARAMS)
    held = {
        name: sum(x.nbytes for x in jax.tree.leaves(getattr(state, name)))
        for name in ("factors", "inverses")
    }
    assert curvature.totals.factor_bytes == held["factors"]
    assert curvature.totals.inverse_bytes == held["inverses"]
    assert f"inverses {held['inverses']} B." in curvature.report()


def test_a_block_without_a_basis_refuses_and_may_be_given_one():
    params = models.dense_params(0, 4, 3)
    x, y = models.array(1, 12, 4), models.array(2, 12, 3)

    def loss_fn(params, x, y):
        z = jnp.tanh(models.mlp(params, x))
        return kfac_jax.losses.squared_error(z, y).sum(-1).mean()

    curvature = kfac_jax.make_curvature(
        loss_fn, params, x, y, blocks=Eigen(), estimation_mode="fisher_exact"
    )

    def gathered(factors):
        args = params, x, y
        found = curvature.value_grad_and_statistics(*args, factors=factors)
        return curvature.update_factors(factors, found[2], 1)

    factors = gathered(curvature.init_factors(params))
    with pytest.raises(ValueError, match="have factors but no basis yet"):
        curvature.approximation(factors)
    renewed = curvature.renew_factors(factors)
    fresh = curvature.init_factors(params)
    for name, part in renewed.items():
        for key in layer_bases(part):
            fresh[name][key] = part[key]
    found = curvature.approximation(gathered(fresh)).to_dense()
    np.testing.assert_allclose(found, curvature.at(params, x, y).to_dense(), atol=1e-10)


def layer_bases(part):
    return [name for name in part if name.endswith("_basis")]
