"""Estimators of the curvature for programs already written for the existing library.

Numbers called published are those of its release 0.0.8, run on its own.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from kfac_jax import blocks
from kfac_jax.compat import _native_blocks, curvature_estimator, utils
from tests.helpers import models

RNG = np.random.default_rng(0)  # the published numbers are for exactly these arrays
PARAMS = {
    "layer0": {
        "w": jnp.asarray(RNG.standard_normal((3, 4))),
        "b": jnp.asarray(RNG.standard_normal(4)),
    },
    "layer1": {"w": jnp.asarray(RNG.standard_normal((4, 2)))},
}
X, Y = (jnp.asarray(RNG.standard_normal((6, n))) for n in (3, 2))
KEY = jax.random.PRNGKey(0)
ARGS = (PARAMS, (X, Y))
V = jax.tree.map(jnp.ones_like, PARAMS)


def loss_fn(params, batch):
    x, y = batch
    z = jnp.tanh(models.dense(params["layer0"], x)) @ params["layer1"]["w"]
    kfac_jax.register_squared_error_loss(z, y)
    return jnp.square(z - y).sum(-1).mean()


def updated(estimator, powers=None, **options):
    """An estimator's state after one batch in the exact mode."""
    state = estimator.init(KEY, ARGS, powers, powers)
    return estimator.update_curvature_matrix_estimate(
        state,
        ema_old=0.0,
        ema_new=1.0,
        identity_weight=0.0,
        batch_size=6,
        rng=KEY,
        func_args=ARGS,
        estimation_mode="fisher_exact",
        **options,
    )


@functools.cache
def estimator_and_state():
    estimator = kfac_jax.BlockDiagonalCurvature(func=loss_fn)
    return estimator, updated(estimator, powers=-1)


def numpy_blocks(x=X):
    """`A ⊗ G` of both layers, with "w" before "b"."""
    h = np.tanh(models.dense(PARAMS["layer0"], x))
    x = np.concatenate([x, np.ones((6, 1))], axis=1)
    dh = (1 - h**2)[:, :, None] * np.asarray(PARAMS["layer1"]["w"]) * np.sqrt(2)
    first = x.T @ x / 6, np.einsum("nic,njc->ij", dh, dh) / 6
    return first, (h.T @ h / 6, 2 * np.eye(2))


BIAS_FIRST = np.r_[12:16, 0:12]
"""From "w", "b" to their order in the tree."""


# ------------------------------------------------------------------- dense blocks


def test_blocks_are_dense_kronecker_products():
    estimator, state = estimator_and_state()
    first, second = estimator.to_diagonal_block_dense_matrix(state)
    (a, g), other = numpy_blocks()
    expected = np.kron(a, g)[np.ix_(BIAS_FIRST, BIAS_FIRST)]
    np.testing.assert_allclose(first, expected, rtol=1e-10)
    np.testing.assert_allclose(second, np.kron(*other), rtol=1e-10, atol=1e-14)

    whole = estimator.approximation(state).to_dense()
    np.testing.assert_allclose(whole[:16, :16], first, rtol=1e-10)
    np.testing.assert_allclose(whole[16:, 16:], second, rtol=1e-10, atol=1e-14)


def test_blocks_without_a_matrix_are_the_identity():
    estimator = kfac_jax.BlockDiagonalCurvature(
        loss_fn,
        layer_tag_to_block_ctor={"dense": kfac_jax.curvature_blocks.ScaledIdentity},
    )
    found = estimator.to_diagonal_block_dense_matrix(updated(estimator))
    models.assert_trees_close(found, (jnp.eye(16), jnp.eye(8)))


def test_a_batch_that_is_not_finite_leaves_averages_and_their_weight():
    """Its weight alone would have made later batches count for less."""
    estimator, state = estimator_and_state()
    after = estimator.update_curvature_matrix_estimate(
        state, 0.5, 1.5, 0.0, 6, KEY, (PARAMS, (jnp.nan * X, Y)), "fisher_exact"
    )
    models.assert_trees_close(after, state)


def test_batches_are_averaged_by_weight():
    """`(0.95 · old + 0.05 · new) / 1.0`, then with weights that do not add up to 1."""
    estimator, state = estimator_and_state()
    args = PARAMS, (2 * X, Y)
    step = jax.jit(estimator.update_curvature_matrix_estimate, static_argnums=(7,))
    second = step(state, 0.95, 0.05, 0.0, 6, KEY, args, "fisher_exact")
    third = step(second, 0.5, 1.5, 0.0, 6, KEY, ARGS, "fisher_exact")
    assert third.weight == 2.0
    weights = np.asarray([0.5 * 0.95 + 1.5, 0.5 * 0.05]) / 2
    (a, g), (a2, g2) = numpy_blocks()[0], numpy_blocks(2 * X)[0]
    expected = np.kron(
        weights[0] * a + weights[1] * a2, weights[0] * g + weights[1] * g2
    )
    found = estimator.to_diagonal_block_dense_matrix(third)[0]
    expected = expected[np.ix_(BIAS_FIRST, BIAS_FIRST)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    kept = step(third, 1.0, 0.0, 0.0, 6, KEY, args, "fisher_exact")
    models.assert_trees_close(kept, third)
    nothing = step(estimator.init(KEY, ARGS), 1.0, 0.0, 0.0, 6, KEY, args, None)
    assert not ravel_pytree(nothing.factors)[0].any()


# ---------------------------------------------------------------------- products

POWERS = [(-1, True), (-1, False), (1, True), (1, False), (-0.5, True)]


@pytest.mark.parametrize("power, exact", POWERS)
def test_powers_are_those_of_dense_matrices(power, exact):
    estimator, state = estimator_and_state()
    found = estimator.multiply_matpower(state, V, 0.1, power, exact, False, None)
    again = estimator.approximation(state).power(
        V, power, 0.1, "exact" if exact else "factored"
    )
    models.assert_trees_close(found, again)
    (a, g), _ = numpy_blocks()
    pi = np.sqrt(np.trace(a) / np.trace(g))
    damped = np.kron(a, g) + 0.1 * np.eye(16)
    if not exact:
        root = np.sqrt(0.1) * np.eye(4)
        damped = np.kron(a + pi * root, g + root / pi)
    w, u = np.linalg.eigh(damped)
    expected = (u * w**power) @ (u.T @ np.ones(16))
    layer = found["layer0"]
    np.testing.assert_allclose(layer["w"].reshape(-1), expected[:12], rtol=1e-8)
    np.testing.assert_allclose(layer["b"], expected[12:], rtol=1e-8)


@pytest.mark.parametrize("use_cached", [False, True])
def test_layers_with_one_output_are_damped_exactly(use_cached):
    def loss_fn(w, x):
        kfac_jax.register_squared_error_loss(x @ w)
        return jnp.square(x @ w).mean()

    args, v = (jnp.ones((3, 1)), X), jnp.ones((3, 1))
    estimator = kfac_jax.BlockDiagonalCurvature(loss_fn)
    state = estimator.update_curvature_matrix_estimate(
        estimator.init(KEY, args, None, -1), 0.0, 1.0, 0.0, 6, KEY, args, "ggn_exact"
    )
    state = estimator.update_cache(state, 0.1, None, -1, False)
    found = estimator.multiply_matpower(state, v, 0.1, -1, False, use_cached)
    expected = np.linalg.solve(X.T @ X / 3 + 0.1 * np.eye(3), v)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_cached_products_are_of_the_last_cache():
    estimator, state = estimator_and_state()
    cached = estimator.update_cache(state, 0.1, -1, [-1], True, None)
    later = estimator.update_curvature_matrix_estimate(
        cached, 0.0, 1.0, 0.0, 6, KEY, (PARAMS, (2 * X, Y)), "fisher_exact"
    )

    def multiply(state, weight, power, exact, use_cached):
        return estimator.multiply_matpower(state, V, weight, power, exact, use_cached)

    for power, exact in ((-1, False), (-1, True), (-0.5, True)):
        expected = multiply(state, 0.1, power, exact, False)
        models.assert_trees_close(multiply(later, 0.1, power, exact, True), expected)
        fresh = multiply(later, 0.1, power, exact, False)
        assert not np.allclose(fresh["layer1"]["w"], expected["layer1"]["w"])
    # without exact_power the damping is the cache's; with it, that which is given
    approximate = multiply(later, 0.5, -1, False, True)
    models.assert_trees_close(approximate, multiply(state, 0.1, -1, False, False))
    exact = multiply(later, 0.5, -1, True, True)
    models.assert_trees_close(exact, multiply(state, 0.5, -1, True, False))


def test_what_functions_return_does_not_matter():
    """Nor whether they take the gradient themselves."""

    def with_aux(params, batch):
        return loss_fn(params, batch), {"more": batch[0]}

    def nothing(params, batch):
        loss_fn(params, batch)

    expected = estimator_and_state()[1].factors
    for func in (with_aux, nothing, jax.value_and_grad(with_aux, has_aux=True)):
        estimator = kfac_jax.BlockDiagonalCurvature(func=func)
        models.assert_trees_close(updated(estimator).factors, expected)


def test_blocks_and_modes_are_the_plans():
    estimator = kfac_jax.BlockDiagonalCurvature(
        loss_fn,
        layer_tag_to_block_ctor={"dense": kfac_jax.curvature_blocks.DenseFull},
        auto_register_kwargs={
            "graph_patterns": kfac_jax.tag_graph_matcher.DEFAULT_GRAPH_PATTERNS
        },
        num_samples=2,
    )
    found = estimator.to_diagonal_block_dense_matrix(updated(estimator))
    plan = kfac_jax.make_curvature(
        loss_fn, *ARGS, blocks=blocks.Full(), estimation_mode="fisher_exact"
    )
    _, _, statistics = plan.value_grad_and_statistics(*ARGS)
    factors = plan.update_factors(plan.init_factors(PARAMS), statistics, step=1)
    dense = plan.approximation(factors).to_dense()
    models.assert_trees_close(found, (dense[:16, :16], dense[16:, 16:]))
    assert estimator.curvature.estimation_mode == "ggn_curvature_prop"
    assert estimator.curvature.num_samples == 2

    generic = kfac_jax.BlockDiagonalCurvature(
        loss_fn, auto_register_kwargs={"register_only_generic": True}
    )
    generic.init(KEY, ARGS)
    found = [(x.kind, x.block) for x in generic.curvature.layers]
    assert found == [("generic", blocks.Diagonal())] * 3
    with pytest.warns(UserWarning, match="has no patterns to skip"):
        precondition(damping=1.0, patterns_to_skip=["dense"])


def test_tags_without_a_block_have_their_default(monkeypatch):
    set_before = {"dense": blocks.Diagonal()}
    monkeypatch.setattr(_native_blocks, "_registered", set_before)
    estimator = estimate(layer_tag_to_block_ctor={"dense": None, "generic": None})
    estimator.init(KEY, ARGS)
    found = {type(layer.block) for layer in estimator.curvature.layers}
    assert found == {blocks.Kronecker}


@pytest.mark.parametrize("which", ["estimator", "preconditioner"])
def test_exact_modes_take_cases_for_independent_and_say_so(which):
    """Where examples change places, it is not followed which is which."""

    def lost(params, batch):
        x, y = batch
        return loss_fn(params, (x[::-1], y[::-1]))

    args, mode = (PARAMS, (X, Y)), "fisher_exact"
    if which == "estimator":
        made = kfac_jax.BlockDiagonalCurvature(lost, default_estimation_mode=mode)
    else:
        made = kfac_jax.OptaxPreconditioner(lost, damping=1.0, estimation_mode=mode)
        made = made.estimator
    with pytest.warns(UserWarning, match="an example that no other depends on") as w:
        state = made.init(KEY, args)
    assert [x.filename for x in w] == [__file__]
    state = made.update_curvature_matrix_estimate(state, 0.0, 1.0, 0.0, 6, KEY, args)
    models.assert_trees_close(state.factors, estimator_and_state()[1].factors)


# ------------------------------------------------------------------------ devices


@models.EIGHT_DEVICES
def test_devices_share_a_batch():
    estimator, expected = estimator_and_state()

    def update(params, batch):
        return estimator.update_curvature_matrix_estimate(
            estimator.init(KEY, (params, batch)),
            0.0,
            1.0,
            0.0,
            2,
            KEY,
            (params, batch),
            "fisher_exact",
            pmap_axis_name="i",
        )

    over = jax.pmap(update, "i", in_axes=(None, 0), devices=jax.devices()[:3])
    state = over(PARAMS, (X.reshape(3, 2, 3), Y.reshape(3, 2, 2)))
    models.assert_trees_close(utils.get_first(state).factors, expected.factors)


# ---------------------------------------------------------------- preconditioning

PRECONDITIONED = {  # options, and published entries of updates at counts 0 and 5
    "default": ({}, [0.20326181, 0.53530534], [0.1353364, 0.92902415]),
    "penalty": ({"l2_reg": 0.01}, [0.19283444, 0.52985224], [0.12918445, 0.90692104]),
    "bounded": (
        {"norm_constraint": 1e-3},
        [0.0019433, 0.00511784],
        [0.00121233, 0.00832213],
    ),
    "exact": (
        {"use_exact_inverses": True},
        [0.68139282, 0.62489787],
        [0.36772966, 1.66411034],
    ),
    "root": (
        {"use_exact_inverses": True, "use_sqrt_inv": True},
        [0.20020373, 1.67612575],
        [0.11796197, 2.1266799],
    ),
    "often": (
        {"inverse_update_period": 2},
        [0.20326181, 0.53530534],
        [0.13963475, 0.91032728],
    ),
}


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_updates_are_the_published_ones(name):
    options, *expected = PRECONDITIONED[name]
    preconditioner = kfac_jax.OptaxPreconditioner(
        loss_fn, damping=0.1, estimation_mode="fisher_exact", **options
    )
    transform = preconditioner.as_gradient_transform()
    state, gradient = preconditioner.init(ARGS, KEY), jax.grad(loss_fn)(*ARGS)
    update = jax.jit(lambda s, x: preconditioner.maybe_update(s, (PARAMS, (x, Y)), KEY))

    @jax.jit
    def transformed(state):
        updates, empty = transform.update(
            gradient, transform.init(PARAMS), PARAMS, precond_state=state
        )
        assert not jax.tree.leaves(empty)
        return updates["layer1"]["w"].reshape(-1)[:2]

    found = []
    for i in range(6):
        state = update(state, (1 + i) * X)
        if i in (0, 5):
            found.append(transformed(state))
        state = preconditioner.increment_count(state)
    assert state.count == 6
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_damping_may_follow_a_schedule_and_the_curvature_multiplies():
    preconditioner = kfac_jax.OptaxPreconditioner(
        loss_fn,
        damping_schedule=lambda count: 0.1 * (1.0 + count.astype(float)),
        estimation_mode="fisher_exact",
        inverse_update_period=1,
    )
    state = preconditioner.init(ARGS, KEY)
    state = preconditioner.increment_count(state)
    state = preconditioner.maybe_update(state, ARGS, KEY)
    assert preconditioner.get_identity_weight(state) == pytest.approx(0.2)
    multiply = preconditioner.as_gradient_transform(use_inverse=False)
    moved, _ = multiply.update(V, multiply.init(PARAMS), precond_state=state)
    estimator, after = estimator_and_state()
    expected = estimator.multiply_matpower(after, V, 0.2, 1, False, False)
    models.assert_trees_close(moved, expected)
    models.assert_trees_close(preconditioner.apply(moved, state), V)


@models.EIGHT_DEVICES
def test_preconditioners_average_over_their_axis():
    preconditioner = kfac_jax.OptaxPreconditioner(
        loss_fn, damping=0.1, estimation_mode="fisher_exact"
    )

    def update(batch):
        state = preconditioner.init((PARAMS, batch), KEY)
        return preconditioner.maybe_update(state, (PARAMS, batch), KEY)

    over = jax.pmap(update, preconditioner.pmap_axis_name, devices=jax.devices()[:3])
    state = utils.get_first(over((X.reshape(3, 2, 3), Y.reshape(3, 2, 2))))
    expected = preconditioner.apply(V, jax.jit(update)((X, Y)))
    models.assert_trees_close(preconditioner.apply(V, state), expected)


# ------------------------------------------------------------------------ refusals


def precondition(**options):
    return kfac_jax.OptaxPreconditioner(loss_fn, **options)


def estimate(**options):
    return kfac_jax.BlockDiagonalCurvature(loss_fn, **options)


def multiplied(weight=0.1, use_cached=False):
    estimator = estimate()
    state = estimator.init(KEY, ARGS)
    estimator.multiply_matpower(state, V, weight, -1, False, use_cached)


REFUSED = {
    "does not offer func_and_grad: expected None, got": (
        ValueError,
        lambda: estimate(func_and_grad=jax.value_and_grad(loss_fn)),
    ),
    "does not offer index_to_block_ctor: expected None, got {(2,): Full()}. Choose": (
        ValueError,
        lambda: estimate(index_to_block_ctor={(2,): blocks.Full()}),
    ),
    "does not offer params_index: expected 0, got 1. Wrap the function": (
        ValueError,
        lambda: estimate(params_index=1),
    ),
    "func_args must have the parameters first, and then the function's other": (
        ValueError,
        lambda: estimate().init(KEY, ()),
    ),
    "BlockDiagonalCurvature has its plan from init; call": (
        ValueError,
        lambda: estimate().curvature,
    ),
    "expects a sequence of tag_graph_matcher.GraphPattern; got": (
        TypeError,
        lambda: precondition(damping=1.0, auto_register_kwargs={"graph_patterns": {}}),
    ),
    "The state has no cache; expected init": (
        ValueError,
        lambda: multiplied(use_cached=True),
    ),
    "identity_weight must be a number or a scalar array; got [0.1, 0.2]": (
        TypeError,
        lambda: multiplied(weight=[0.1, 0.2]),
    ),
    "BlockDiagonalCurvature has no 'multiply_inverse' in kfac_jax; expected one of": (
        AttributeError,
        lambda: estimate().multiply_inverse,
    ),
    "no 'ExplicitExactCurvature' among its estimators; expected BlockDiagonal": (
        AttributeError,
        lambda: kfac_jax.ExplicitExactCurvature,
    ),
    "OptaxPreconditioner expects one of damping and damping_schedule": (
        ValueError,
        precondition,
    ),
    "does not offer curvature_update_period: expected 1, got 2. Use scale_by_kfac": (
        ValueError,
        lambda: precondition(damping=1.0, curvature_update_period=2),
    ),
    "OptaxPreconditioner has no 'sync_estimator_state' in kfac_jax; expected one of": (
        AttributeError,
        lambda: precondition(damping=1.0).sync_estimator_state,
    ),
    "of OptaxPreconditioner expects update(..., precond_state=state)": (
        ValueError,
        lambda: precondition(damping=1.0).as_gradient_transform().update(V, None),
    ),
    "state must be what init or maybe_update of the preconditioner returned": (
        TypeError,
        lambda: precondition(damping=1.0).increment_count(None),
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_refused(text):
    error, function = REFUSED[text]
    with pytest.raises(error, match=re.escape(text)):
        function()


def test_hooks_into_inner_modules_are_not_there():
    """Programs that replace parts of the existing library's tracer find none."""
    with pytest.raises(ImportError, match=r"kfac_jax\._src"):
        importlib.import_module("kfac_jax._src.tracer")


def test_names_are_those_of_the_package():
    for name in ("BlockDiagonalCurvature", "ImplicitExactCurvature"):
        assert getattr(kfac_jax, name) is getattr(curvature_estimator, name)
    for name in ("OptaxPreconditioner", "OptaxPreconditionState"):
        assert getattr(kfac_jax, name) is getattr(curvature_estimator, name)
    for name in ("set", "get"):
        name += "_default_tag_to_block_ctor"
        assert getattr(kfac_jax, name) is getattr(curvature_estimator, name)


def test_a_first_state_can_be_donated():
    preconditioner = kfac_jax.OptaxPreconditioner(loss_fn, damping=0.1)
    state = preconditioner.init(ARGS, KEY)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len({*places}) == len(places)
