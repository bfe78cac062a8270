"""`OptaxPreconditioner` where its parts are called one by one, and with patterns.

Its numbers are compared in `test_published_estimators` and `test_estimators`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks, tag_graph_matcher
from kfac_jax.compat import utils
from tests.helpers import models

KEY = jax.random.PRNGKey(0)
PARAMS = {"a": models.array(0, 3, 4), "b": models.array(1, 4, 2)}
X, Y = models.array(2, 6, 3), models.array(3, 6, 2)
V = jax.tree.map(jnp.cos, PARAMS)


def losses_of_cases(params, batch):
    """No scalar, as an estimator's function may have it."""
    x, y = batch
    z = jnp.tanh(x @ params["a"]) @ params["b"]
    kfac_jax.register_squared_error_loss(z, y)
    return jnp.square(z - y).sum(-1)


def made(function=losses_of_cases, **options):
    options = {"damping": 0.1, "estimation_mode": "fisher_exact"} | options
    return kfac_jax.OptaxPreconditioner(function, **options)


def args(scale=1.0, part=slice(None)):
    return PARAMS, (scale * X[part], Y[part])


def curvature_of(state):
    return state.estimator_state.factors


# ------------------------------------------------------------------ one part by another


def test_an_update_is_its_two_parts():
    preconditioner = made(inverse_update_period=2)
    whole = parts = preconditioner.init(args(), KEY)
    for step in range(3):
        batch = args(1.0 + step)
        whole = preconditioner.maybe_update(whole, batch, KEY)
        parts = preconditioner.maybe_update_estimator_curvature(parts, batch, KEY)
        parts = preconditioner.maybe_update_inverse_cache(parts)
        models.assert_trees_close(parts, whole)
        due = step != 1
        assert preconditioner.should_update_inverse_cache(parts) == due
        assert preconditioner.should_sync_estimate_curvature(parts) == due
        assert preconditioner.should_update_estimator_curvature(parts)
        whole, parts = map(preconditioner.increment_count, (whole, parts))


def test_conditions_may_be_traced():
    preconditioner = made(curvature_ema=0.8)

    @jax.jit
    def gather(state, batch, decay, sync):
        return preconditioner.maybe_update_estimator_curvature(
            state, batch, KEY, decay, sync
        )

    start = preconditioner.init(args(), KEY)
    for decay in (False, True):
        state = gather(gather(start, args(), True, True), args(2.0), decay, False)
        assert state.estimator_state.weight == (1.8 if decay else 2.0)
        a = curvature_of(state)["a"]["input"]
        first, second = X.T @ X / 6, 4 * X.T @ X / 6
        old = 0.8 if decay else 1.0
        np.testing.assert_allclose(a, (old * first + second) / (old + 1), rtol=1e-10)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("traced", [False, True])
def test_devices_agree_once_they_sync(traced):
    """Two batches a step: apart after the first, the whole batch's after the second."""
    preconditioner = made(curvature_ema=0.8)

    def update(batch, sync):
        state = preconditioner.init((PARAMS, batch), KEY)
        apart = preconditioner.maybe_update_estimator_curvature(
            state, (PARAMS, batch), KEY, sync=jnp.array(False) if traced else False
        )
        twice = PARAMS, (2 * batch[0], batch[1])
        together = preconditioner.maybe_update_estimator_curvature(
            apart, twice, KEY, False, sync if traced else True
        )
        return apart, together, preconditioner.sync_estimator_state(apart)

    over = jax.pmap(
        update,
        preconditioner.pmap_axis_name,
        in_axes=(0, None),
        devices=jax.devices()[:3],
    )
    batch = X.reshape(3, 2, 3), Y.reshape(3, 2, 2)
    apart, together, synced = over(batch, True)
    expected = update((X, Y), True)
    first, second = (utils.get_first(curvature_of(x)) for x in (synced, together))
    models.assert_trees_close(first, curvature_of(expected[0]))
    models.assert_trees_close(second, curvature_of(expected[1]))
    different = curvature_of(apart)["a"]["input"]
    assert not np.allclose(different[0], different[1])


@models.EIGHT_DEVICES
def test_devices_agree_in_a_shard_map():
    preconditioner = made(pmap_axis_name="i")
    mesh = jax.make_mesh(
        (3,),
        ("i",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:3],
    )

    def update(x, y):
        arguments = PARAMS, (x, y)
        state = preconditioner.init(arguments, KEY)
        state = preconditioner.maybe_update_estimator_curvature(state, arguments, KEY)
        return curvature_of(state)

    split = jax.sharding.PartitionSpec("i")
    over = jax.shard_map(
        update, mesh=mesh, in_specs=split, out_specs=jax.sharding.PartitionSpec()
    )
    models.assert_trees_close(jax.jit(over)(X, Y), update(X, Y))


# -------------------------------------------------------------- patterns and parameters


def attention_like(x, params):
    """`[in, heads, of each]`, used as a matrix."""
    (w,) = params
    return x @ w.reshape(w.shape[0], -1)


def kept(equations, **_):
    return {"meta": None, "equations": equations}


PATTERN = tag_graph_matcher.GraphPattern(
    name="heads",
    tag_primitive=kfac_jax.layers_and_loss_tags.layer_tag,
    compute_func=attention_like,
    parameters_extractor_func=kept,
    example_args=[np.zeros((5, 3)), [np.zeros((3, 2, 2))]],
)


def shaped(move, back):
    """A function whose first weight is kept in another shape."""

    def function(params, batch):
        return losses_of_cases({**params, "a": back(params["a"])}, batch)

    return function, lambda tree: {**tree, "a": move(tree["a"])}


RESHAPED = {
    "an axis of heads": shaped(
        lambda w: w.reshape(3, 2, 2), lambda w: w.reshape(3, -1)
    ),
    "heads in front": shaped(
        lambda w: w.reshape(3, 2, 2).transpose(1, 0, 2),
        lambda w: w.transpose(1, 0, 2).reshape(3, 4),
    ),
    "transposed": shaped(lambda w: w.T, lambda w: w.T),
    "a vector": shaped(lambda w: w.reshape(-1), lambda w: w.reshape(3, 4)),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_weights_of_any_shape_have_the_updates_of_matrices(name):
    """With a pattern of the program's own for them, or without: it is not needed."""
    function, move = RESHAPED[name]
    patterns = (PATTERN, *tag_graph_matcher.DEFAULT_GRAPH_PATTERNS)
    plain = made()
    expected = plain.apply(V, plain.maybe_update(plain.init(args(), KEY), args(), KEY))
    for kwargs in ({}, {"auto_register_kwargs": {"graph_patterns": patterns}}):
        preconditioner = made(function, **kwargs)
        of_function = move(PARAMS), (X, Y)
        state = preconditioner.init(of_function, KEY)
        state = preconditioner.maybe_update(state, of_function, KEY)
        models.assert_trees_close(preconditioner.apply(move(V), state), move(expected))
        (first, _) = preconditioner.estimator.curvature.layers
        assert (first.kind, type(first.block)) == ("dense", blocks.Kronecker)


def test_parameters_in_lists():
    def function(params, batch):
        [[a], (b,)] = params
        return losses_of_cases({"a": a, "b": b}, batch)

    def move(tree):
        return [[tree["a"]], (tree["b"],)]

    def update(function, params, v):
        preconditioner = made(function, layer_tag_to_block_ctor={"generic": None})
        arguments = params, (X, Y)
        state = preconditioner.maybe_update(
            preconditioner.init(arguments, KEY), arguments, KEY
        )
        return preconditioner.apply(v, state)

    found = update(function, move(PARAMS), move(V))
    models.assert_trees_close(found, move(update(losses_of_cases, PARAMS, V)))


# ----------------------------------------------------------------------------- refusals


def gathered(**options):
    preconditioner = made()
    state = preconditioner.init(args(), KEY)
    preconditioner.maybe_update_estimator_curvature(state, args(), KEY, **options)


REFUSED = {
    "decay_old_ema must be an array of real numbers; got None.": (
        TypeError,
        lambda: gathered(decay_old_ema=None),
    ),
    "must be one bool, or an array of one; got": (
        ValueError,
        lambda: gathered(sync=jnp.array([True, False])),
    ),
    "state must be what init or maybe_update of the preconditioner returned": (
        TypeError,
        lambda: made().maybe_update_inverse_cache(None),
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_refused(text):
    error, function = REFUSED[text]
    with pytest.raises(error, match=re.escape(text)):
        function()
