"""Statistics, factors and exact products against dense oracles."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

SAMPLES = 4000
MC_TOLERANCE = 0.12  # of the largest entry, about 5 · √(2 / samples) with a margin

SAMPLED = ("fisher_gradients", "fisher_curvature_prop", "ggn_curvature_prop")
EXACT = ("fisher_exact", "ggn_exact")
BLOCKS = {
    "Kronecker": blocks.Kronecker(),
    "Diagonal": blocks.Diagonal(),
    "Full": blocks.Full(),
}
SEQUENCE = models.array(40, 4, 3, 3)


def _close(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-14}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected
    )


def _layer_blocks(matrix, params, layer):
    return oracles.block(np.asarray(matrix), params, f"{layer}/b", f"{layer}/w")


# ----------------------------------------------------------------- values and gradients

MODES = [*SAMPLED, *EXACT, "fisher_empirical"]


@pytest.mark.parametrize(
    ("mode", "has_aux"),
    [*((mode, False) for mode in MODES), ("fisher_gradients", True)],
)
def test_value_and_gradient_equal_jax(mode, has_aux):
    p = models.problem("softmax")

    def loss_fn(params, x, y):
        loss = p.loss_fn(params, x, y)
        aux = {"norm": jnp.linalg.norm(params["layer0"]["w"]), "count": 3}
        return (loss, aux) if has_aux else loss

    plan = kfac_jax.make_curvature(
        loss_fn, p.params, *p.args, estimation_mode=mode, has_aux=has_aux
    )
    expected = jax.value_and_grad(loss_fn, has_aux=has_aux)(p.params, *p.args)
    value, grads, statistics = jax.jit(plan.value_grad_and_statistics)(
        p.params, *p.args, rng=jax.random.key(0)
    )
    _close((value, grads), expected, rtol=1e-12, atol=1e-15)
    _close(plan.value_and_grad(p.params, *p.args), expected, rtol=1e-13, atol=1e-15)
    zeros = plan.zero_statistics(p.params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(zeros) == shapes(statistics)


def test_the_penalty_is_in_the_gradient_and_not_in_the_statistics():
    p = models.problem("squared")

    def loss_fn(params, x, y, l2):
        penalty = sum(jnp.vdot(a, a) for a in jax.tree.leaves(params))
        return p.loss_fn(params, x, y) + l2 / 2 * penalty

    plain, penalised = (
        kfac_jax.make_curvature(
            functools.partial(loss_fn, l2=l2),
            p.params,
            *p.args,
            l2=l2,
            estimation_mode="fisher_exact",
        )
        for l2 in (0.0, 0.1)
    )
    (_, g0, s0), (_, g1, s1) = (
        jax.jit(plan.value_grad_and_statistics)(p.params, *p.args)
        for plan in (plain, penalised)
    )
    _close(s1, s0)
    _close(g1, jax.tree.map(lambda g, w: g + 0.1 * w, g0, p.params))


# -------------------------------------------------------------- exact where it is exact


@pytest.mark.parametrize("family", ["squared", "normal"])
@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_exact_on_deep_linear_nets(bias, family):
    params = models.dense_params(0, 3, 4, 2, 3, bias=bias)
    p = models.problem(family, apply=models.linear, params=params)
    curvature, factors = models.exact_factors(p.loss_fn, params, *p.args)
    found = np.asarray(curvature.approximation(factors).to_dense())
    exact = oracles.ggn(p.outputs, p.per_case, params, p.y)
    for layer in params:
        names = [f"{layer}/{k}" for k in params[layer]]
        np.testing.assert_allclose(
            oracles.block(found, params, *names),
            oracles.block(exact, params, *names),
            rtol=1e-10,
            atol=1e-12,
        )
    outside = found.copy()
    for layer in params:
        rows = np.concatenate(
            [oracles.indices(params)[f"{layer}/{k}"].ravel() for k in params[layer]]
        )
        outside[np.ix_(rows, rows)] = 0
    assert not outside.any()


@pytest.mark.parametrize(
    ("apply", "family", "mode"),
    [
        ("mlp", "softmax", "fisher_exact"),
        ("rows", "softmax", "fisher_exact"),
        ("mixing", "softmax", "ggn_exact"),
        *(("mixing", family, "fisher_exact") for family in models.FAMILIES),
    ],
)
def test_full_and_diagonal_are_exact_on_nonlinear_nets(apply, family, mode):
    """`rows`: a position axis, registered as rows; `mixing`: they see each other."""
    network = models.mixing if apply == "mixing" else models.mlp
    x = None if apply == "mlp" else SEQUENCE
    p = models.problem(family, network, models.dense_params(0, 3, 2, 2), x)
    exact = oracles.ggn(
        p.outputs, p.per_case, p.params, p.y.reshape(-1, *p.y.shape[p.x.ndim - 1 :])
    )
    choice = {"layer0": blocks.Full(), "layer1": blocks.Diagonal()}
    curvature = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode=mode, blocks=choice
    )
    factors = jax.jit(lambda q, *a: models.statistics_to_factors(curvature, q, *a))(
        p.params, *p.args
    )
    found = curvature.approximation(factors).to_dense()
    np.testing.assert_allclose(
        _layer_blocks(found, p.params, "layer0"),
        _layer_blocks(exact, p.params, "layer0"),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        _layer_blocks(found, p.params, "layer1"),
        np.diag(np.diag(_layer_blocks(exact, p.params, "layer1"))),
        atol=1e-12,
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_input_factor_is_the_mean_over_rows_in_every_mode(mode):
    """Also where the positions that a case depends on differ (a causal sum)."""

    def causal(params, x):
        h = jnp.tanh(models.dense(params["layer0"], x))
        return models.dense(params["layer1"], jnp.cumsum(h, 1))

    p = models.problem("softmax", causal, models.dense_params(0, 3, 2, 3), SEQUENCE)
    plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args, estimation_mode=mode)
    factors = jax.jit(
        lambda *a: models.statistics_to_factors(plan, *a, rng=jax.random.key(0))
    )(p.params, *p.args)
    rows = np.asarray(SEQUENCE).reshape(-1, 3)
    a = np.hstack([rows, np.ones((len(rows), 1))])
    np.testing.assert_allclose(
        factors["layer0"]["input"], a.T @ a / len(a), rtol=1e-11, atol=1e-13
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_rows_count_whatever_the_random_cotangents_are(mode, classes):
    """With equal probabilities the columns of B add up to zero under equal signs."""
    params = models.dense_params(0, 3, 5, classes)
    params["layer1"] = jax.tree.map(jnp.zeros_like, params["layer1"])
    x, y = models.array(50, 64, 3), models.classes(7, classes, 64)

    def loss_fn(params, x, y, mask):
        z = models.mlp(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(z, y, mask)
        picked = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1)[:, 0]
        return -(mask * picked).mean()

    mask = jnp.asarray(np.arange(64) % 4 > 0).astype(x.dtype)
    plan = kfac_jax.make_curvature(
        loss_fn, params, x, y, mask, estimation_mode=mode, num_samples=3
    )
    compute = jax.jit(
        lambda key: models.statistics_to_factors(plan, params, x, y, mask, rng=key)
    )
    h = np.tanh(models.dense(params["layer0"], x))
    h = np.hstack([h, np.ones((64, 1))])[np.asarray(mask) > 0]
    for seed in range(3):
        found = compute(jax.random.key(seed))["layer1"]["input"]
        np.testing.assert_allclose(found, h.T @ h / len(h), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("mode", ["fisher_curvature_prop", "ggn_curvature_prop"])
def test_curvature_propagation_is_nearly_exact_where_the_root_is_diagonal(mode):
    """Squares of the random entries are uniform on [½, 1½], with the variance 1/12."""
    x, y, w = models.array(50, 64, 3), models.array(7, 64, 2), models.array(0, 3, 2)

    def loss_fn(w, x, y):
        return squared_error(x @ w, y).sum(-1).mean()

    plan = kfac_jax.make_curvature(loss_fn, w, x, y, estimation_mode=mode)
    draw = lambda key: models.statistics_to_factors(plan, w, x, y, rng=key)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 200)
    found = np.asarray(jax.jit(jax.vmap(draw))(keys)["params"]["output"])
    deviation = 2 / np.sqrt(12 * 64)  # F = 2 I, of 64 cases; off the diagonal 2 / √64
    squares = np.diagonal(found, axis1=1, axis2=2)
    np.testing.assert_allclose(squares.mean(0), 2, atol=5 * deviation / 200**0.5)
    np.testing.assert_allclose(squares.std(0), deviation, rtol=0.25)
    np.testing.assert_allclose(found[:, 0, 1].std(), 2 / 64**0.5, rtol=0.25)
    np.testing.assert_allclose(found[:, 0, 1].mean(), 0, atol=5 * 0.25 / 200**0.5)


# ------------------------------------------------------------------------ sampled modes


@functools.cache
def _sampling_problem():
    return models.problem("softmax", params=models.dense_params(0, 3, 2, 3))


@pytest.mark.parametrize(
    ("mode", "block"),
    [
        *(("fisher_gradients", block) for block in BLOCKS),
        ("fisher_curvature_prop", "Kronecker"),
        ("fisher_curvature_prop", "Full"),
        ("ggn_curvature_prop", "Full"),
    ],
)
def test_sampled_factors_converge_to_the_exact(block, mode):
    p = _sampling_problem()
    options = {"blocks": BLOCKS[block], "num_samples": SAMPLES}
    plan = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode=mode, **options
    )
    compute = jax.jit(
        lambda q, *a: models.statistics_to_factors(plan, q, *a, rng=jax.random.key(0))
    )
    found = compute(p.params, *p.args)
    _, expected = models.exact_factors(
        p.loss_fn, p.params, *p.args, blocks=BLOCKS[block]
    )
    for layer, factors in expected.items():
        for name, factor in factors.items():
            atol = MC_TOLERANCE * float(jnp.abs(factor).max())
            np.testing.assert_allclose(found[layer][name], factor, atol=atol, rtol=0)


def test_num_samples_count_as_that_many_batches():
    p = _sampling_problem()
    plan, several = (
        kfac_jax.make_curvature(p.loss_fn, p.params, *p.args, num_samples=n)
        for n in (1, 3)
    )
    key = jax.random.key(1)
    _, _, found = jax.jit(several.value_grad_and_statistics)(p.params, *p.args, rng=key)
    one = jax.jit(plan.value_grad_and_statistics)
    parts = [
        one(p.params, *p.args, rng=jax.random.fold_in(key, i))[2] for i in range(3)
    ]
    _close(found, jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts))
    assert found.weight == 3 * len(p.args[0])


def test_sampling_depends_on_the_key_alone():
    p = _sampling_problem()
    plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    step = jax.jit(
        lambda key: plan.value_grad_and_statistics(p.params, *p.args, rng=key)
    )
    first, again, other = (step(jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    _close(first[:2], other[:2], rtol=0)
    different = (
        first[2].layers["layer1"]["output"] != other[2].layers["layer1"]["output"]
    )
    assert different.any()
    with pytest.raises(ValueError, match="samples; pass a key"):
        plan.value_grad_and_statistics(p.params, *p.args)


@pytest.mark.parametrize("family", ["softmax", "squared", "log_cosh"])
def test_empirical_fisher_is_that_of_the_cases_gradients(family):
    p = models.problem(family, params=models.dense_params(0, 3, 2, 3))
    plan = kfac_jax.make_curvature(
        p.loss_fn,
        p.params,
        *p.args,
        estimation_mode="fisher_empirical",
        blocks=blocks.Full(),
    )
    factors = jax.jit(lambda q, *a: models.statistics_to_factors(plan, q, *a))(
        p.params, *p.args
    )
    found = plan.approximation(factors).to_dense()
    expected = oracles.empirical_fisher(p.outputs, p.per_case, p.params, p.y)
    for layer in p.params:
        np.testing.assert_allclose(
            _layer_blocks(found, p.params, layer),
            _layer_blocks(expected, p.params, layer),
            atol=1e-12,
        )


def test_empirical_fisher_needs_targets():
    def loss_fn(w, x):
        z = x @ w
        kfac_jax.register_squared_error_loss(z)
        return jnp.square(z).sum(-1).mean()

    w, x = models.array(0, 3, 2), models.array(1, 4, 3)
    plan = kfac_jax.make_curvature(loss_fn, w, x, estimation_mode="fisher_empirical")
    with pytest.raises(ValueError, match="needs the targets"):
        plan.value_grad_and_statistics(w, x)


# --------------------------------------------------------- batches, fractions, averages


@pytest.mark.parametrize("block", BLOCKS)
def test_statistics_of_micro_batches_add_up_to_the_batch(block):
    p = models.problem("softmax")
    plan = kfac_jax.make_curvature(
        p.loss_fn,
        p.params,
        *p.args,
        estimation_mode="fisher_exact",
        blocks=BLOCKS[block],
    )
    statistics = jax.jit(lambda *a: plan.value_grad_and_statistics(p.params, *a)[2])
    parts = [statistics(p.x[i : i + 2], p.y[i : i + 2]) for i in (0, 2, 4)]
    total = jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)
    zero = plan.init_factors(p.params)
    _close(
        plan.update_factors(zero, total, 1),
        plan.update_factors(zero, statistics(p.x, p.y), 1),
    )


@models.EIGHT_DEVICES
def test_statistics_of_devices_average_to_the_batch():
    p = models.problem("softmax", x=models.array(50, 16, 3))
    plan = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact"
    )

    def local(x, y):
        statistics = plan.value_grad_and_statistics(p.params, x, y)[2]
        return jax.lax.pmean(statistics, "batch")

    split = [a.reshape(8, 2, *a.shape[1:]) for a in p.args]
    found = models.on_host(jax.pmap(local, axis_name="batch")(*split))
    mean = jax.tree.map(lambda x: x[0], found)
    whole = jax.jit(lambda *a: plan.value_grad_and_statistics(p.params, *a)[2])(*p.args)
    zero = plan.init_factors(p.params)
    _close(plan.update_factors(zero, mean, 1), plan.update_factors(zero, whole, 1))


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 3), (1 / 3, 2), (0.01, 1)])
def test_a_fraction_of_the_batch_is_its_beginning(fraction, count):
    p = models.problem("softmax")
    part, whole = (
        kfac_jax.make_curvature(
            p.loss_fn,
            p.params,
            *p.args,
            estimation_mode="fisher_exact",
            statistics_fraction=f,
        )
        for f in (fraction, 1.0)
    )
    value, grads, found = jax.jit(part.value_grad_and_statistics)(p.params, *p.args)
    _close((value, grads), jax.value_and_grad(p.loss_fn)(p.params, *p.args))
    expected = jax.jit(whole.value_grad_and_statistics)(
        p.params, p.x[:count], p.y[:count]
    )[2]
    _close(found, expected)


def test_factors_are_the_papers_moving_average():
    """`new = ε · old + (1 - ε) · batch`, `ε = min(1 - 1/k, 0.95)` (section 5)."""
    p = models.problem("softmax")
    plan = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact"
    )
    zero = plan.init_factors(p.params)
    update = jax.jit(plan.update_factors)
    factors, naive = zero, jax.tree.map(np.asarray, zero)
    statistics = jax.jit(lambda x: plan.value_grad_and_statistics(p.params, x, p.y)[2])
    for k in range(1, 25):
        batch = statistics(p.x * (1 + k / 7))
        factors = update(factors, batch, k)
        epsilon = min(1 - 1 / k, 0.95)
        once = jax.tree.map(np.asarray, plan.update_factors(zero, batch, 1))
        naive = jax.tree.map(lambda o, n: epsilon * o + (1 - epsilon) * n, naive, once)  # noqa: B023
        _close(jax.tree.map(np.asarray, factors), naive, rtol=1e-12, atol=1e-14)
    for layer in factors.values():
        for factor in layer.values():
            np.testing.assert_allclose(factor, factor.T, rtol=1e-14, atol=1e-16)


def test_decay_and_step():
    p = models.problem("squared")
    plan = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact"
    )
    old = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.eye(len(x)), x.shape),
        plan.init_factors(p.params),
    )
    batch = jax.jit(plan.value_grad_and_statistics)(p.params, *p.args)[2]
    once = plan.update_factors(old, batch, 1)
    _close(once, plan.update_factors(plan.init_factors(p.params), batch, 1))
    half = plan.update_factors(old, batch, 100, decay=0.5)
    _close(half, jax.tree.map(lambda o, n: (o + n) / 2, old, once), rtol=1e-12)


def test_statistics_without_information_leave_factors_alone():
    p = models.problem("softmax")
    plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    factors = jax.tree.map(lambda x: x + 2.0, plan.init_factors(p.params))
    zeros = plan.zero_statistics(p.params)
    for step in (1, 7):
        jax.tree.map(
            np.testing.assert_array_equal,
            plan.update_factors(factors, zeros, step),
            factors,
        )


def test_statistics_that_are_not_finite_leave_their_layer_alone():
    p = models.problem("softmax")
    plan = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact"
    )
    good = jax.jit(plan.value_grad_and_statistics)(p.params, *p.args)[2]
    layers = dict(good.layers)
    layers["layer0"] = layers["layer0"] | {
        "input": layers["layer0"]["input"].at[0, 0].set(jnp.nan)
    }
    zero = plan.init_factors(p.params)
    found = plan.update_factors(zero, good._replace(layers=layers), 1)
    expected = plan.update_factors(zero, good, 1)
    _close(found["layer0"], zero["layer0"])
    _close(found["layer1"], expected["layer1"])


# ----------------------------------------------------------------- how the plan is made


def test_plans_are_hashable_and_equal():
    p = models.problem("softmax")
    make = functools.partial(kfac_jax.make_curvature, p.loss_fn)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (p.params, *p.args)
    )
    first, second, abstract = (
        make(p.params, *p.args),
        make(p.params, *p.args),
        make(*shapes),
    )
    assert first == second == abstract and len({first, second, abstract}) == 1
    for options in (
        {"blocks": blocks.Diagonal()},
        {"num_samples": 2},
        {"l2": 0.0, "estimation_mode": "ggn_exact"},
    ):
        assert make(p.params, *p.args, **options) != first


def test_a_plan_is_a_static_argument_and_does_not_recompile():
    p = models.problem("softmax")

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(plan, params, x, y):
        return plan.value_grad_and_statistics(params, x, y, rng=jax.random.key(0))[0]

    for _ in range(3):
        step(kfac_jax.make_curvature(p.loss_fn, p.params, *p.args), p.params, *p.args)


@pytest.mark.parametrize(
    "wrap", [jax.jit, lambda f: jax.jit(jax.jit(f)), jax.checkpoint]
)
def test_a_plan_made_inside_a_transformation(wrap):
    p = models.problem("softmax")

    @wrap
    def inside(params, x, y):
        plan = kfac_jax.make_curvature(
            p.loss_fn, params, x, y, estimation_mode="fisher_exact"
        )
        return models.statistics_to_factors(plan, params, x, y)

    _, expected = models.exact_factors(p.loss_fn, p.params, *p.args)
    _close(inside(p.params, *p.args), expected)


def test_a_plan_of_known_arrays_made_while_tracing():
    """Its loss is checked there and then."""
    p = models.problem("softmax")

    @jax.jit
    def inside(scale):
        plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
        with pytest.raises(ValueError, match="ratio returned/registered = 2"):
            kfac_jax.make_curvature(
                lambda *args: 2.0 * p.loss_fn(*args), p.params, *p.args
            )
        params = jax.tree.map(lambda w: scale * w, p.params)
        return plan.value_grad_and_statistics(params, *p.args, rng=jax.random.key(0))[0]

    _close(inside(1.0), p.loss_fn(p.params, *p.args))


def test_over_seeds_under_vmap():
    p = models.problem("softmax")
    plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    seeds = [p.params, jax.tree.map(lambda a: 2.0 * a, p.params)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *seeds)
    keys = jax.random.split(jax.random.key(0), 2)

    def step(params, key):
        return plan.value_grad_and_statistics(params, *p.args, rng=key)

    found = jax.jit(jax.vmap(step))(stacked, keys)
    for i, params in enumerate(seeds):
        _close(jax.tree.map(lambda x: x[i], found), jax.jit(step)(params, keys[i]))  # noqa: B023


def test_without_jit():
    p = models.problem("squared", params=models.dense_params(0, 3, 1))
    curvature, expected = models.exact_factors(p.loss_fn, p.params, *p.args)
    with jax.disable_jit():
        found = models.statistics_to_factors(curvature, p.params, *p.args)
    _close(found, expected)


def test_a_batch_that_changes_the_program_is_refused():
    def loss_fn(params, x):
        z = x @ params["v"] if x.shape[0] > 3 else x @ params["w"]
        return squared_error(z).sum(-1).mean()

    params = {"v": models.array(0, 3, 2), "w": models.array(1, 3, 2)}
    plan = kfac_jax.make_curvature(loss_fn, params, models.array(2, 4, 3))
    with pytest.raises(ValueError, match=r"layers \['v', 'w'\] changed"):
        plan.value_grad_and_statistics(
            params, models.array(2, 2, 3), rng=jax.random.key(0)
        )


def test_half_precision_parameters_have_single_precision_factors():
    p = models.problem("squared")
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p.params, *p.args))
    plan = kfac_jax.make_curvature(p.loss_fn, *narrow, estimation_mode="fisher_exact")
    value, grads, statistics = jax.jit(plan.value_grad_and_statistics)(*narrow)
    assert value.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(statistics))
    factors = plan.update_factors(plan.init_factors(narrow[0]), statistics, 1)
    rows = np.asarray(narrow[1].astype(jnp.float32))
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    # the products are accumulated in single precision, of inputs that are exact
    np.testing.assert_allclose(
        factors["layer0"]["input"], rows.T @ rows / len(rows), rtol=1e-6
    )


def test_frozen_layers_gather_nothing():
    p = models.problem("softmax")
    plan = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, blocks={"layer0": None}
    )
    _, grads, statistics = plan.value_grad_and_statistics(
        p.params, *p.args, rng=jax.random.key(0)
    )
    assert statistics.layers["layer0"] == {}
    assert plan.init_factors(p.params)["layer0"] == {}
    _close(grads, jax.grad(p.loss_fn)(p.params, *p.args))


# ----------------------------------------------------------------------- exact products


@pytest.mark.parametrize("family", models.FAMILIES)
def test_matvec_and_quadratic_form_equal_the_dense_matrix(family):
    p = models.problem(family, models.mixing, models.dense_params(0, 3, 2, 2), SEQUENCE)
    plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    targets = p.y.reshape(-1, *p.y.shape[2:])
    exact = oracles.ggn(p.outputs, p.per_case, p.params, targets)
    v, u = (oracles.random_like(p.params, seed) for seed in (0, 1))
    flat = np.stack([oracles.vector(v), oracles.vector(u)])
    for matrix in ("fisher", "ggn"):
        product = jax.jit(functools.partial(plan.matvec, matrix=matrix))(
            p.params, v, *p.args
        )
        np.testing.assert_allclose(
            oracles.vector(product), exact @ flat[0], rtol=1e-10, atol=1e-12
        )
    hessian = oracles.hessian(lambda q: p.loss_fn(q, *p.args), p.params)
    product = jax.jit(functools.partial(plan.matvec, matrix="hessian"))(
        p.params, v, *p.args
    )
    np.testing.assert_allclose(
        oracles.vector(product), hessian @ flat[0], rtol=1e-9, atol=1e-12
    )
    expected = flat @ exact @ flat.T
    stacked = jax.tree.map(lambda *a: jnp.stack(a), v, u)
    for vectors in ([v, u], (v, u), stacked):
        found = jax.jit(plan.quadratic_form)(p.params, vectors, *p.args)
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_products_with_auxiliary_output():
    p = models.problem("softmax", params=models.dense_params(0, 3, 2, 3))
    plan = kfac_jax.make_curvature(
        lambda *a: (p.loss_fn(*a), {"aux": 1}), p.params, *p.args, has_aux=True
    )
    plain = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    v = oracles.random_like(p.params, 0)

    @functools.partial(jax.jit, static_argnums=0)
    def products(plan):
        return (
            plan.matvec(p.params, v, *p.args),
            plan.matvec(p.params, v, *p.args, matrix="hessian"),
            plan.quadratic_form(p.params, [v], *p.args),
        )

    _close(products(plan), products(plain))


def test_products_through_scan_and_remat():
    stack = {"w": models.array(0, 2, 3, 3), "b": models.array(1, 2, 3)}

    def apply(params, x):
        layer = jax.checkpoint(
            lambda h, p: (
                jnp.tanh(h @ p["w"] + jnp.broadcast_to(p["b"], h.shape)),
                None,
            )
        )
        return jax.lax.scan(layer, x, params)[0]

    p = models.problem("softmax", apply, stack)
    plan = kfac_jax.make_curvature(p.loss_fn, stack, *p.args)
    exact = oracles.ggn(p.outputs, p.per_case, stack, p.y)
    v = oracles.random_like(stack, 2)
    flat = oracles.vector(v)
    product = jax.jit(plan.matvec)(stack, v, *p.args)
    np.testing.assert_allclose(oracles.vector(product), exact @ flat, rtol=1e-10)
    np.testing.assert_allclose(
        jax.jit(plan.quadratic_form)(stack, [v], *p.args),
        [[flat @ exact @ flat]],
        rtol=1e-10,
    )


def test_an_unknown_matrix_is_refused():
    p = models.problem("squared")
    plan = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
    with pytest.raises(ValueError, match='matrix must be "fisher", "ggn" or "hessian"'):
        plan.matvec(p.params, p.params, *p.args, matrix="gauss")


def test_unmatched_parameters_take_part_in_exact_products():
    def loss_fn(params, x):
        return (
            squared_error(x * jnp.broadcast_to(jnp.exp(params), x.shape)).sum(-1).mean()
        )

    params, x = models.array(0, 3), models.array(1, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = kfac_jax.make_curvature(loss_fn, params, x)
    exact = oracles.ggn(
        lambda q: x * jnp.broadcast_to(jnp.exp(q), x.shape),
        lambda z: (z**2).sum(),
        params,
    )
    v = models.array(2, 3)
    np.testing.assert_allclose(plan.matvec(params, v, x), exact @ v, rtol=1e-12)
