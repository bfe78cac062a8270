"""Exact curvature for programs already written for the existing library.

Its numbers are compared in `test_published_estimators`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from kfac_jax import losses
from kfac_jax.compat.curvature_estimator import ExplicitExactCurvature
from tests.helpers import models

KEY = jax.random.PRNGKey(0)
PARAMS = {"b": models.array(0, 2), "w": models.array(1, 3, 2)}
X, Y = models.array(2, 6, 3), models.array(3, 6, 2)
ARGS = PARAMS, (X, Y)
V = jax.tree.map(jnp.cos, PARAMS)
R = models.array(4, 6, 2)


def outputs(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def func(params, batch):
    """Losses of the cases, a constant and a table."""
    z = outputs(params, batch[0])
    kfac_jax.register_squared_error_loss(z, batch[1])
    return jnp.square(z - batch[1]).sum(-1), 1, {"z": z}


def loss_fn(params, batch):
    return func(params, batch)[0].mean()


def plan():
    return kfac_jax.make_curvature(loss_fn, *ARGS)


def dense(matrix="fisher"):
    unravel = ravel_pytree(PARAMS)[1]

    def column(v):
        moved = plan().matvec(PARAMS, unravel(v), (X, Y), matrix=matrix)
        return ravel_pytree(moved)[0]

    return jax.vmap(column)(jnp.eye(8))


# --------------------------------------------------------------------- without a matrix


def implicit(function=func, **options):
    return kfac_jax.ImplicitExactCurvature(function, **options)


@pytest.mark.parametrize("matrix", ["fisher", "ggn", "hessian"])
def test_products_are_the_plans(matrix):
    product = jax.jit(getattr(implicit(), f"multiply_{matrix}"))
    expected = plan().matvec(PARAMS, V, (X, Y), matrix=matrix)
    models.assert_trees_close(product(ARGS, V), expected)


def test_factors_are_adjoint_and_give_the_fisher():
    """`⟨B r, v⟩ = ⟨r, Bᵀ v⟩` and `B Bᵀ v = F v`, for several losses of other kinds."""

    def several(params, x):
        z = outputs(params, x)
        losses.softmax_cross_entropy_with_integer_labels(z, jnp.arange(6) % 2)
        losses.convex(lambda z, y: jnp.log(jnp.cosh(z - y)).sum(), z, Y)
        losses.normal_negative_log_likelihood(z[:, :1], z[:, 1:], Y[:, :1])

    args, exact = (PARAMS, X), implicit(several)
    transposed = exact.multiply_fisher_factor_transpose(args, V)
    assert [x.shape for x in transposed] == [(6, 2), (6, 2), (6, 1, 2)]
    shapes = exact.get_loss_inner_vector_shapes_and_batch_size(args, "ggn")
    assert shapes == (tuple(x.shape for x in transposed), 6)
    r = tuple(models.array(i, *x.shape) for i, x in enumerate(transposed))
    forward = exact.multiply_fisher_factor(args, r)
    left = sum(map(jnp.vdot, jax.tree.leaves(forward), jax.tree.leaves(V)))
    right = sum(map(jnp.vdot, r, transposed))
    np.testing.assert_allclose(left, right, rtol=1e-12)
    fisher = exact.multiply_fisher(args, V)
    models.assert_trees_close(exact.multiply_fisher_factor(args, transposed), fisher)


def test_a_size_of_the_batch_divides():
    """It may be traced; by default the leading axis of what is registered is taken."""

    def weighted(params, x, count):
        z = outputs(params, x)
        kfac_jax.register_squared_error_loss(z, Y)
        return z

    exact = implicit(weighted, batch_size_extractor=lambda count: count.sum())
    args = PARAMS, X, jnp.array([1.0, 2.0])
    expected = jax.tree.map(lambda x: 2 * x, implicit().multiply_fisher(ARGS, V))
    models.assert_trees_close(jax.jit(exact.multiply_fisher)(args, V), expected)


def test_parameters_may_come_last():
    exact = implicit(lambda batch, params: func(params, batch), params_index=-1)
    expected = implicit().multiply_fisher(ARGS, V)
    models.assert_trees_close(exact.multiply_fisher(ARGS[::-1], V), expected)


# ------------------------------------------------------------------------ with a matrix


def explicit(function=func, mode="fisher_exact", args=ARGS, **options):
    estimator = ExplicitExactCurvature(function, **options)
    state = estimator.init(KEY, args, -1)
    return estimator, jax.jit(
        lambda state, args: estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 0.0, 6, KEY, args, mode
        )
    )(state, args)


def test_the_matrix_is_the_fisher():
    for mode in (None, "fisher_exact", "ggn_exact"):
        estimator, state = explicit(mode=mode)
        matrix = estimator.to_dense_matrix(state)
        np.testing.assert_allclose(matrix, dense(), atol=1e-12)
    assert (estimator.num_blocks, estimator.block_dims, estimator.dim) == (1, (8,), 8)
    np.testing.assert_allclose(
        estimator.eigenvalues(state, False), np.linalg.eigvalsh(matrix), atol=1e-12
    )
    with_gradient = ExplicitExactCurvature(
        func_and_grad=jax.value_and_grad(loss_fn), num_samples=2
    )
    state = with_gradient.update_curvature_matrix_estimate(
        with_gradient.init(KEY, ARGS), 0.95, 1.0, 0.0, 6, KEY, ARGS
    )
    np.testing.assert_allclose(state.matrix, matrix, atol=1e-12)


def test_cases_that_depend_on_each_other_do_no_harm():
    """Nothing is taken for independent: neither is there a doubt, nor a warning."""

    def normed(params, x, at):
        z = outputs(params, x + at[None])
        z = z - z.mean(0, keepdims=True)
        kfac_jax.register_squared_error_loss(z, Y)

    args = PARAMS, X, jnp.zeros(3)
    estimator, state = explicit(normed, args=args)
    moved = estimator.multiply(state, V, 0.0)
    models.assert_trees_close(implicit(normed).multiply_fisher(args, V), moved)


def test_powers_are_those_of_the_damped_matrix():
    estimator, state = explicit()
    v, damped = ravel_pytree(V)[0], dense() + 0.1 * np.eye(8)
    inverse = estimator.multiply_inverse(state, V, 0.1, True, False, None)
    expected = np.linalg.solve(damped, v)
    np.testing.assert_allclose(ravel_pytree(inverse)[0], expected, rtol=1e-9)
    product = estimator.multiply(state, V, 0.1, exact_power=True, use_cached=False)
    np.testing.assert_allclose(ravel_pytree(product)[0], damped @ v, rtol=1e-9)
    half = estimator.multiply_matpower(state, V, 0.1, -0.5)
    twice = estimator.multiply_matpower(state, half, 0.1, -0.5)
    models.assert_trees_close(twice, inverse)
    cached = estimator.update_cache(state, 0.1, -1, None, True, None)
    later = cached._replace(matrix=2 * cached.matrix)
    kept = estimator.multiply_matpower(later, V, 0.7, -0.5, use_cached=True)
    models.assert_trees_close(kept, half)
    assert not np.allclose(estimator.eigenvalues(later, False), cached.cache.w)
    np.testing.assert_array_equal(estimator.eigenvalues(later, True), cached.cache.w)


def test_a_batch_that_is_not_finite_leaves_the_matrix():
    estimator, state = explicit()
    after = estimator.update_curvature_matrix_estimate(
        state, 0.5, 1.5, 0.0, 6, KEY, (PARAMS, (jnp.nan * X, Y))
    )
    models.assert_trees_close(after, state)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("when", ["in the update", "after it"])
def test_devices_share_a_batch(when):
    estimator = ExplicitExactCurvature(func)

    def update(batch):
        name = "i" if when == "in the update" else None
        args = PARAMS, batch
        state = estimator.update_curvature_matrix_estimate(
            estimator.init(KEY, args), 0.0, 1.0, 0.0, 2, KEY, args, pmap_axis_name=name
        )
        return estimator.sync(state, "i").matrix

    over = jax.pmap(update, "i", devices=jax.devices()[:3])
    found = over((X.reshape(3, 2, 3), Y.reshape(3, 2, 2)))
    np.testing.assert_allclose(found[0], dense(), atol=1e-12)


# ----------------------------------------------------------------------------- refusals


def without_targets(params, batch):
    kfac_jax.register_squared_error_loss(outputs(params, batch[0]))


REFUSED = {
    "multiply_hessian needs the values of the losses: expected all registered": (
        ValueError,
        lambda: implicit(without_targets).multiply_hessian(ARGS, V),
    ),
    "loss_inner_vectors must be shaped like what was registered: expected [(6, 2)], "
    "got [(6, 2), (6, 2)].": (
        ValueError,
        lambda: implicit().multiply_fisher_factor(ARGS, (R, R)),
    ),
    "got [(2, 6)].": (
        ValueError,
        lambda: implicit().multiply_ggn_factor(ARGS, [R.T]),
    ),
    "loss_inner_vectors must be a list or tuple of 1 arrays, one for each loss": (
        TypeError,
        lambda: implicit().multiply_fisher_factor(ARGS, R),
    ),
    "what batch_size_extractor returns must be a number or a scalar array; got": (
        TypeError,
        lambda: implicit(batch_size_extractor=lambda x: x[0]).multiply_ggn(ARGS, V),
    ),
    'mode must be "fisher" or "ggn"; got': (
        ValueError,
        lambda: implicit().get_loss_inner_vector_shapes_and_batch_size(ARGS, "gnn"),
    ),
    "ImplicitExactCurvature has no 'multiply_jacobian' in kfac_jax; expected": (
        AttributeError,
        lambda: implicit().multiply_jacobian,
    ),
    "ExplicitExactCurvature expects one of func, a function that registers its": (
        ValueError,
        ExplicitExactCurvature,
    ),
    "ExplicitExactCurvature expects of the options of BlockDiagonalCurvature only": (
        TypeError,
        lambda: ExplicitExactCurvature(func, index_to_block_ctor={}),
    ),
    "layer_tag_to_block_ctor is expected to be None, since the matrix is held": (
        ValueError,
        lambda: ExplicitExactCurvature(
            func, layer_tag_to_block_ctor={"generic": kfac_jax.NaiveDiagonal}
        ),
    ),
    'default_estimation_mode is expected to be one of the exact modes, "fisher': (
        ValueError,
        lambda: ExplicitExactCurvature(
            func, default_estimation_mode="fisher_empirical"
        ),
    ),
    "estimation_mode is expected to be one of the exact modes": (
        ValueError,
        lambda: explicit(mode="fisher_gradients"),
    ),
    "ExplicitExactCurvature has its plan from init; call": (
        ValueError,
        lambda: ExplicitExactCurvature(func).curvature,
    ),
    "The state has no cache; expected init(..., exact_powers_to_cache=powers), with": (
        ValueError,
        lambda: ExplicitExactCurvature(func).update_cache(
            explicit()[1]._replace(cache=None), 0.1
        ),
    ),
    "state must be what init of the estimator returned; got None": (
        TypeError,
        lambda: explicit()[0].to_dense_matrix(None),
    ),
    "ExplicitExactCurvature has no 'finalize' in kfac_jax; expected one of": (
        AttributeError,
        lambda: ExplicitExactCurvature(func).finalize,
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_refused(text):
    error, function = REFUSED[text]
    with pytest.raises(error, match=re.escape(text)):
        function()
