"""The average of the iterates against naive numpy, alone and behind K-FAC."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import average_iterates
from tests.helpers.models import traced_once

STEPS = 12
GRADIENTS = np.random.default_rng(0).normal(size=(STEPS, 3))


def averaged(state):
    return optax.tree_utils.tree_get(state, "averaged_params")


def trajectory(tx, params, gradients=GRADIENTS):
    """Parameters and averages after each step, jitted."""
    update = jax.jit(tx.update)
    state, rows = tx.init(params), []
    for gradient in gradients:
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        rows.append((np.asarray(params["w"]), np.asarray(averaged(state)["w"])))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def naive(initial, iterates, decay, start):
    """The paper's formula, one step after the other."""
    average, result = initial, []
    for k, theta in enumerate(iterates, 1):
        xi = decay
        if start is not None:
            xi = 0.0 if k < start else min(1 - 1 / (k - start + 1), decay)
        average = xi * average + (1 - xi) * theta
        result.append(average)
    return np.stack(result)


@pytest.mark.parametrize("start", [None, 1, 4, 100])
@pytest.mark.parametrize("decay", [0.99, 0.6, 0.0])
def test_the_papers_average_and_that_of_its_program(decay, start):
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    tx = optax.chain(optax.sgd(0.3), average_iterates(decay, start=start))
    iterates, averages = trajectory(tx, params)
    expected = naive(np.asarray(params["w"]), iterates, decay, start)
    np.testing.assert_allclose(averages, expected, rtol=1e-12)
    plain, _ = trajectory(optax.chain(optax.sgd(0.3), average_iterates()), params)
    np.testing.assert_array_equal(iterates, plain)  # updates pass through


def test_the_default_is_an_equal_average_of_the_first_hundred_iterates():
    gradients = np.random.default_rng(1).normal(size=(110, 3))
    params = {"w": jnp.zeros(3)}
    tx = optax.chain(optax.sgd(0.1), average_iterates())
    iterates, averages = trajectory(tx, params, gradients)
    np.testing.assert_allclose(averages[99], iterates[:100].mean(0), rtol=1e-10)
    assert np.abs(averages[109] - iterates[:110].mean(0)).max() > 1e-4


def test_before_the_start_the_average_is_the_iterate():
    tx = optax.chain(optax.sgd(0.3), average_iterates(start=5))
    iterates, averages = trajectory(tx, {"w": jnp.ones(3)})
    np.testing.assert_array_equal(iterates[:5], averages[:5])
    assert (iterates[5] != averages[5]).all()


def test_low_precision_parameters_have_a_wide_average():
    """In bfloat16 the small steps of the average would be lost."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = average_iterates(0.99, start=None)
    state = tx.init(params)
    assert averaged(state)["w"].dtype == jnp.float32
    for _ in range(50):
        updates = {"w": jnp.full(3, 2.0**-7, jnp.bfloat16)}
        passed, state = tx.update(updates, state, params)
        assert passed is updates
    expected = 1 + 2.0**-7 * (1 - 0.99**50)
    np.testing.assert_allclose(averaged(state)["w"], np.full(3, expected), rtol=1e-6)
    assert averaged(state)["w"][0].astype(jnp.bfloat16) == 1
    wide = average_iterates().init({"w": jnp.ones(3, jnp.float64)})
    assert averaged(wide)["w"].dtype == jnp.float64


def test_behind_kfac_a_refused_update_leaves_the_average_finite():
    def loss_fn(w, x, y):
        return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()

    rng = np.random.default_rng(2)
    w, x = jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(rng.normal(size=(8, 3)))
    y = jnp.zeros((8, 2))
    curvature = kfac_jax.make_curvature(
        loss_fn, w, x, y, estimation_mode="fisher_exact"
    )
    tx = optax.chain(kfac_jax.kfac(curvature, 0.1, 0.9, 1e-3), average_iterates(0.5))

    @jax.jit
    def step(w, state, x):
        _, grads, statistics = curvature.value_grad_and_statistics(w, x, y)
        updates, state = tx.update(grads, state, w, statistics=statistics)
        return optax.apply_updates(w, updates), state

    state, iterates = tx.init(w), []
    for k in range(6):
        w, state = step(w, state, x if k != 3 else x.at[0, 0].set(jnp.nan))
        iterates.append(np.asarray(w))
    assert int(state[0].info.skipped_updates) == 1
    np.testing.assert_array_equal(iterates[3], iterates[2])
    expected = naive(iterates[0], iterates, 0.5, 1)[-1]
    np.testing.assert_allclose(averaged(state), expected, rtol=1e-12)


def test_donated_vmapped_scanned_and_with_traced_settings():
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    tx = optax.chain(optax.sgd(0.3), average_iterates(0.6, start=4))
    _, expected = trajectory(tx, params)

    def run(decay, start):
        tx = optax.chain(optax.sgd(0.3), average_iterates(decay, start=start))

        def body(carry, gradient):
            params, state = carry
            updates, state = tx.update({"w": gradient}, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), averaged(state)["w"]

        return jax.lax.scan(body, (params, tx.init(params)), jnp.asarray(GRADIENTS))[1]

    decays, starts = jnp.asarray([0.6, 0.1]), jnp.asarray([4, 2])
    both = jax.jit(jax.vmap(run))(decays, starts)
    np.testing.assert_allclose(both[0], expected, rtol=1e-12)
    assert float(jnp.abs(both[1] - both[0]).max()) > 0.1

    @traced_once
    def step(params, state, gradient):
        updates, state = tx.update({"w": gradient}, state, params)
        return optax.apply_updates(params, updates), state

    step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
    for gradient in GRADIENTS:
        params, state = step(params, state, jnp.asarray(gradient))
    np.testing.assert_allclose(averaged(state)["w"], expected[-1], rtol=1e-12)
    assert step._cache_size() <= 1  # or 0, where JAX has forgotten it


def test_within_inject_hyperparams_and_masked():
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    tx = optax.chain(optax.sgd(0.3), average_iterates(0.6, start=4))
    _, expected = trajectory(tx, params)
    inject = optax.inject_hyperparams(average_iterates)
    injected = optax.chain(optax.sgd(0.3), inject(decay=0.6, start=4))
    np.testing.assert_allclose(trajectory(injected, params)[1], expected, rtol=1e-7)
    mask = {"w": True, "n": False}
    masked = optax.chain(optax.sgd(0.3), optax.masked(average_iterates(), mask))
    state = masked.init(params | {"n": jnp.zeros((), jnp.int32)})
    assert len(jax.tree.leaves(averaged(state))) == 1


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((1.0,), {}, ValueError, r"decay \(ξ\) must be in \[0\.0, 1\.0\); got 1\.0"),
        ((-0.1,), {}, ValueError, r"decay \(ξ\) must be in"),
        ((float("nan"),), {}, ValueError, r"decay \(ξ\) must be in"),
        (
            ("0.9",),
            {},
            TypeError,
            "decay must be a number or a schedule; got '0.9'",
        ),
        ((True,), {}, TypeError, "decay must be a number or a schedule; got True"),
        ((), {"start": 0}, ValueError, r"start \(k0\) counts steps from 1.*got 0"),
        ((), {"start": 2.5}, TypeError, r"start \(k0\) must be an integer; got 2\.5"),
    ],
)
def test_bad_settings(args, options, error, match):
    with pytest.raises(error, match=match):
        average_iterates(*args, **options)


def test_parameters_are_needed_and_are_real_numbers():
    tx = average_iterates()
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="averages the parameters: call"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="params of real floating point; got int"):
        tx.init({"w": params, "n": jnp.arange(2)})
