"""What is not finite, or nearly singular, never enters the state or the parameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax import linalg
from tests.helpers import models
from tests.helpers.models import assert_trees_equal

NAMES = ("first", "second")


def loss_fn(params, x, y):
    first, second = params["first"], params["second"]
    h = jnp.tanh(x @ first["w"] + first["b"][None])
    z = h @ second["w"] + second["b"][None]
    return kfac_jax.losses.squared_error(z, y).sum(-1).mean()


def make_params(dtype=float, sizes=(3, 4, 2)):
    rng = np.random.default_rng(0)
    return {
        name: {
            "w": jnp.asarray(rng.normal(size=shape), dtype),
            "b": jnp.asarray(rng.normal(size=shape[1]), dtype),
        }
        for name, shape in zip(NAMES, itertools.pairwise(sizes), strict=True)
    }


def make_batch(seed, dtype=float, sizes=(3, 4, 2)):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(8, sizes[0])), rng.normal(size=(8, sizes[-1]))
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


@functools.cache
def plan():
    return kfac_jax.make_curvature(
        loss_fn, make_params(), *make_batch(0), estimation_mode="fisher_exact"
    )


def make_transformation(kind, curvature=None, **options):
    curvature = curvature or plan()
    if kind == "adaptive":
        rule = kfac_jax.LevenbergMarquardt(1.0, every=2)
        return kfac_jax.kfac(
            curvature, kfac_jax.QuadraticModel(), None, rule, **options
        )
    if kind == "kfac":
        return kfac_jax.kfac(curvature, 0.1, 0.9, 0.2, norm_constraint=None, **options)
    return kfac_jax.scale_by_kfac(curvature, damping=0.2, **options)


def make_step(tx, curvature=None):
    curvature = curvature or plan()

    @jax.jit
    def step(params, state, *batch):
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *batch, rng=jax.random.key(0)
        )
        return tx.update(
            grads, state, params, statistics=statistics, value=value, args=batch
        )

    return step


@functools.cache
def stepper(kind):
    tx = make_transformation(kind)
    return tx, make_step(tx)


@functools.cache
def update():
    """The jitted update of `kfac`, for gradients and statistics made by hand."""
    tx = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    return tx, jax.jit(
        lambda grads, state, statistics: tx.update(grads, state, statistics=statistics)
    )


@functools.cache
def gathered():
    compute = jax.jit(plan().value_grad_and_statistics)
    return compute(make_params(), *make_batch(0))[1:]


def spoil(tree, value=jnp.nan):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)


def assert_zero(tree):
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(tree))


def assert_finite(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def curvature_state(state):
    return state.factors, state.inverses, state.velocity


# ------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("kind", ["scale_by_kfac", "kfac", "adaptive"])
def test_a_nan_batch_changes_nothing_and_is_counted(kind):
    tx, step = stepper(kind)
    params = make_params()
    updates, state = step(params, tx.init(params), *make_batch(0))
    if kind != "scale_by_kfac":
        params = optax.apply_updates(params, updates)
    x, y = make_batch(1)
    before = state
    for count in (1, 2):
        updates, state = step(params, state, x.at[0, 0].set(jnp.nan), y)
        assert_zero(updates)
        assert_trees_equal(state.factors, before.factors)
        assert_trees_equal(state.velocity, before.velocity)
        assert_trees_equal(state.inverses, before.inverses)
        assert int(state.info.skipped_updates) == count
        assert state.damping == before.damping  # the batch is to blame, not the step
    updates, state = step(params, state, x, y)
    assert_finite(updates)
    assert int(state.info.skipped_updates) == 2
    assert any(np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_nothing_that_is_not_finite_enters_the_state(which, bad):
    """Factors behind a saturated unit, which hides ∞ from the loss, may move."""
    tx, step = stepper("kfac")
    params, (x, y) = make_params(), make_batch(0)
    _, before = step(params, tx.init(params), x, y)
    x, y = (x.at[0, 0].set(bad), y) if which == "inputs" else (x, y.at[0, 0].set(bad))
    updates, state = step(params, before, x, y)
    assert_zero(updates)
    assert_finite(curvature_state(state))
    assert_trees_equal(state.velocity, before.velocity)
    if not np.isfinite(state.info.loss):
        assert_trees_equal(curvature_state(state), curvature_state(before))
        assert state.batches == before.batches
    assert int(state.info.skipped_updates) == 1


@pytest.mark.parametrize("kind", ["scale_by_kfac", "kfac"])
def test_a_bad_first_batch_is_as_if_it_had_not_been(kind):
    """The first good one replaces the zeros the factors start from."""
    tx, step = stepper(kind)
    params, (x, y) = make_params(), make_batch(0)
    expected, fresh = step(params, tx.init(params), x, y)
    state = tx.init(params)
    for _ in range(4):  # longer than the three steps that always invert
        updates, state = step(params, state, x * jnp.nan, y)
        assert_zero(updates)
    updates, state = step(params, state, x, y)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10)
    jax.tree.map(close, state.factors, fresh.factors)
    jax.tree.map(close, updates, expected)


def test_bad_statistics_of_one_layer_keep_that_layers_factors():
    tx, move = update()
    grads, statistics = gathered()
    _, state = move(grads, tx.init(make_params()), statistics)
    layers = {**statistics.layers, "first": spoil(statistics.layers["first"])}
    scaled = jax.tree.map(lambda s: 4.0 * s, layers["second"])
    layers["second"] = scaled
    updates, after = move(grads, state, statistics._replace(layers=layers))
    assert_trees_equal(after.factors["first"], state.factors["first"])
    np.testing.assert_allclose(
        after.factors["second"]["output"], 2.5 * state.factors["second"]["output"]
    )
    assert_finite((updates, curvature_state(after)))
    assert int(after.info.skipped_updates) == 1


def test_bad_gradients_leave_the_velocity():
    tx, move = update()
    grads, statistics = gathered()
    _, state = move(grads, tx.init(make_params()), statistics)
    bad = {**grads, "first": {**grads["first"], "b": spoil(grads["first"]["b"])}}
    updates, after = move(bad, state, statistics)
    assert_zero(updates)
    assert_trees_equal(after.velocity, state.velocity)
    assert_finite(curvature_state(after))
    assert int(after.info.skipped_updates) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("kind", ["scale_by_kfac", "kfac"])
def test_a_batch_with_a_bad_loss_is_not_used_at_all(kind, value):
    """The square of 1e200 overflows, as do those of gradients and statistics."""
    tx = make_transformation(kind)
    move = jax.jit(
        lambda grads, state, statistics, value: tx.update(
            grads, state, statistics=statistics, value=value
        )
    )
    grads, statistics = gathered()
    _, state = move(grads, tx.init(make_params()), statistics, 1.0)
    twice = statistics._replace(layers=jax.tree.map(lambda x: 2 * x, statistics.layers))
    updates, after = move(grads, state, twice, value)
    assert_zero(updates)
    assert_trees_equal(curvature_state(after), curvature_state(state))
    assert after.batches == state.batches
    assert (after.step, after.info.skipped_updates) == (2, 1)
    updates, _ = move(grads, after, twice, 1e100)
    assert any(np.any(x) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize(("dtype", "rate"), [(jnp.float64, 1e308), (jnp.float16, 1e5)])
def test_an_update_that_overflows_is_refused(dtype, rate):
    """Δ is finite, `α Δ` is not in the type of the parameters."""
    params = make_params(dtype)
    tx = kfac_jax.kfac(plan(), rate, 0.9, 1e-2, norm_constraint=None)
    _, statistics = gathered()
    grads = jax.tree.map(lambda p: jnp.full_like(p, 10.0), params)
    state = tx.init(params)
    for count in (1, 2):
        updates, state = jax.jit(tx.update)(grads, state, params, statistics=statistics)
        assert_zero(updates)
        assert_zero(state.velocity)
        assert int(state.info.skipped_updates) == count


def test_a_failed_inverse_keeps_the_last_good_one():
    """Not positive definite beyond the damping: Cholesky gives NaN."""
    tx, move = update()
    grads, statistics = gathered()
    _, state = move(grads, tx.init(make_params()), statistics)
    negative = jax.tree.map(lambda f: -100.0 * f, state.factors["first"])
    broken = state._replace(factors={**state.factors, "first": negative})
    updates, after = move(grads, broken, statistics)
    assert_trees_equal(after.inverses["first"], state.inverses["first"])
    moved = after.inverses["second"]["input"] - state.inverses["second"]["input"]
    assert_finite((updates, after.inverses))
    assert np.abs(moved).max() < 1e-10  # the same statistics: refreshed to the same
    assert int(after.info.skipped_updates) == 1


def test_damping_that_is_not_finite_keeps_the_last_good_inverses():
    params = make_params()
    tx = kfac_jax.kfac(plan(), 0.1, 0.9, lambda k: jnp.where(k == 1, jnp.nan, 0.2))
    move = jax.jit(
        lambda grads, state, statistics: tx.update(grads, state, statistics=statistics)
    )
    grads, statistics = gathered()
    _, state = move(grads, tx.init(params), statistics)
    updates, after = move(grads, state, statistics)
    assert_trees_equal(after.inverses, state.inverses)
    assert_finite(updates)
    assert int(after.info.skipped_updates) == 1


# --------------------------------------------------------------------------- degenerate


@pytest.mark.parametrize("kind", ["scale_by_kfac", "kfac", "adaptive"])
def test_nothing_to_learn_takes_no_step(kind):
    """Zero gradients and, where the inputs are zero too, zero factors."""
    tx, step = stepper(kind)
    params = jax.tree.map(jnp.zeros_like, make_params())
    state = tx.init(params)
    for _ in range(3):
        updates, state = step(params, state, jnp.zeros((8, 3)), jnp.zeros((8, 2)))
        assert_zero(updates)
    assert_finite((curvature_state(state), state.damping))
    assert int(state.info.skipped_updates) == 0


def test_a_layer_with_zero_statistics_falls_back_to_the_damped_gradient():
    tx, move = update()
    grads, statistics = gathered()
    layers = {**statistics.layers, "first": spoil(statistics.layers["first"], 0.0)}
    zero = statistics._replace(layers=layers)
    updates, state = move(grads, tx.init(make_params()), zero)
    assert_finite((updates, curvature_state(state)))
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -0.1 * g / 0.2, rtol=1e-10),
        updates["first"],
        grads["first"],
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("damping", [1e-3, 1e-8, 1e-30])
def test_rank_one_factors(dtype, damping):
    """One case repeated: every factor has rank one, and the gradient lies within it."""
    params, (x, y) = make_params(dtype), make_batch(0, dtype)
    x, y = jnp.broadcast_to(x[:1], x.shape), jnp.broadcast_to(y[:1], y.shape)
    curvature = kfac_jax.make_curvature(loss_fn, params, x, y)
    tx = kfac_jax.kfac(curvature, 1e-3, 0.0, damping, norm_constraint=None)
    state, step = tx.init(params), make_step(tx, curvature)
    for _ in range(4):
        updates, state = step(params, state, x, y)
        assert_finite((updates, curvature_state(state)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_by_one_factors(dtype):
    def scalar_loss(w, x, y):
        return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()

    w, x = jnp.full((1, 1), 3.0, dtype), jnp.full((8, 1), 2.0, dtype)
    y = jnp.zeros((8, 1), dtype)
    curvature = kfac_jax.make_curvature(
        scalar_loss, w, x, y, estimation_mode="fisher_exact"
    )
    assert curvature.layers[0].factor_shapes == {"input": (1, 1), "output": (1, 1)}
    # A = 4 and G = 2, so undamped K-FAC is Newton's method: w falls from 3 to 0
    for damping, expected in ((0.0, -3.0), (0.5, -3.0 * 8 / 12.5)):
        tx = kfac_jax.kfac(curvature, 1.0, 0.0, damping, norm_constraint=None)
        updates, state = make_step(tx, curvature)(w, tx.init(w), x, y)
        np.testing.assert_allclose(updates, [[expected]], rtol=1e-5)
    # and where all is zero, with and without damping
    for damping in (0.0, 0.5):
        tx = kfac_jax.kfac(curvature, 1.0, 0.0, damping, norm_constraint=None)
        updates, state = make_step(tx, curvature)(w, tx.init(w), 0 * x, y)
        assert_zero(updates)
        assert_finite(curvature_state(state))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-20, 1e-6])
def test_very_large_condition_number(dtype, damping):
    """Inputs of scales 1e-6 to 1e6 under no or tiny damping stay finite."""
    params, (x, y) = make_params(dtype), make_batch(0, dtype)
    x = x * jnp.asarray([1e6, 1.0, 1e-6], dtype)[None]
    curvature = kfac_jax.make_curvature(loss_fn, params, x, y)
    tx = kfac_jax.kfac(curvature, 1e-3, 0.9, damping, norm_constraint=None)
    state, step = tx.init(params), make_step(tx, curvature)
    for _ in range(4):
        updates, state = step(params, state, x, y)
        assert_finite((updates, curvature_state(state)))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_extreme_scales_in_float32(scale):
    """Second moments of such inputs leave the range of float32 only in part."""
    params, (x, y) = make_params(jnp.float32), make_batch(0, jnp.float32)
    x = x * jnp.asarray(scale, jnp.float32)
    curvature = kfac_jax.make_curvature(loss_fn, params, x, y)
    tx = kfac_jax.kfac(curvature, 1e-3, 0.9, 1e-3, norm_constraint=None)
    updates, state = make_step(tx, curvature)(params, tx.init(params), x, y)
    assert_finite((updates, curvature_state(state)))


def test_an_empty_parameter_is_no_obstacle():
    def loss(params, x, y):
        z = x @ params["w"] + params["none"].sum()
        return kfac_jax.losses.squared_error(z, y).sum(-1).mean()

    params = {"w": jnp.ones((3, 2)), "none": jnp.zeros((0,))}
    x, y = make_batch(0)
    curvature = kfac_jax.make_curvature(loss, params, x, y, on_unmatched="ignore")
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 0.2)
    updates, state = make_step(tx, curvature)(params, tx.init(params), x, y)
    assert updates["none"].shape == (0,)
    assert_finite((updates, curvature_state(state)))


def masked_plan():
    def masked_loss(params, x, y, mask):
        z = x @ params["w"]
        kfac_jax.register_softmax_cross_entropy_loss(z, y, mask)
        return (optax.softmax_cross_entropy_with_integer_labels(z, y) * mask).mean()

    params, x = {"w": jnp.ones((3, 2))}, make_batch(0)[0]
    batch = x, jnp.zeros(8, int), jnp.ones(8)
    curvature = kfac_jax.make_curvature(
        masked_loss, params, *batch, estimation_mode="fisher_exact"
    )
    return curvature, params, batch


def test_a_mask_that_hides_every_case_brings_no_statistics():
    curvature, params, (x, y, mask) = masked_plan()
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 0.2)
    step = make_step(tx, curvature)
    updates, state = step(params, tx.init(params), x, y, 0 * mask)
    assert_zero((updates, state.factors))
    assert (state.batches, state.info.skipped_updates) == (0, 1)
    _, state = step(params, state, x, y, mask)
    updates, after = step(params, state, x, y, 0 * mask)
    assert_trees_equal(after.factors, state.factors)
    assert (after.batches, after.info.skipped_updates) == (1, 2)
    assert np.any(updates["w"])  # by momentum


def test_micro_batches_of_which_a_mask_hides_one():
    """They are the whole batch: a hidden case is a case."""
    curvature, params, (x, y, mask) = masked_plan()
    gather = jax.jit(lambda *batch: curvature.value_grad_and_statistics(params, *batch))
    mask = mask.at[4:].set(0.0)
    whole = gather(x, y, mask)[2]
    parts = [gather(x[i], y[i], mask[i])[2] for i in (np.s_[:4], np.s_[4:])]
    assert (parts[0].cases, parts[1].cases) == (4, 0)
    both = jax.tree.map(jnp.add, *parts)
    zero = curvature.init_factors(params)
    models.assert_trees_close(
        curvature.update_factors(zero, both, 1),
        curvature.update_factors(zero, whole, 1),
    )
    assert_zero(curvature.update_factors(zero, parts[1], 1))


@models.EIGHT_DEVICES
def test_devices_of_which_a_mask_hides_one():
    curvature, params, (x, y, mask) = masked_plan()
    mask = mask.at[4:].set(0.0)

    def gather(params, *batch):
        return curvature.value_grad_and_statistics(params, *batch)[2]

    shared = jax.shard_map(
        gather,
        mesh=models.mesh(2, "batch"),
        in_specs=(P(), *[P("batch")] * 3),
        out_specs=P(),
    )
    found, whole = jax.jit(shared)(params, x, y, mask), gather(params, x, y, mask)
    assert found.cases == whole.cases == 4
    zero = curvature.init_factors(params)
    models.assert_trees_close(
        curvature.update_factors(zero, found, 1),
        curvature.update_factors(zero, whole, 1),
    )


# ----------------------------------------------------------------------- linear algebra


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5, 5)])
def test_inverse_agrees_with_numpy(shape):
    root = np.random.default_rng(0).normal(size=shape)
    x = root @ np.swapaxes(root, -1, -2) + np.eye(shape[-1])
    np.testing.assert_allclose(linalg.inverse(x), np.linalg.inv(x), rtol=1e-9)


def test_trace_pi_is_finite_for_extreme_factors():
    tiny, huge = jnp.float32(1e-38), jnp.float32(1e38)
    assert np.isfinite(linalg.trace_pi(huge, tiny))
    assert np.isfinite(linalg.trace_pi(tiny, huge))
