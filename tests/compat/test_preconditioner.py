"""`OptaxPreconditioner` in a shard_map, with patterns, and parameters in lists.

Its numbers are compared in `test_published_estimators` and `test_estimators`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks, tag_graph_matcher
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
        return curvature_of(preconditioner.maybe_update(state, arguments, KEY))

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
