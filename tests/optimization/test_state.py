"""The optimizer's state survives a round trip and goes on bitwise as if without it."""

import functools
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import kfac_jax

STEPS = 3


def loss_fn(params, x, y):
    """Nested names, a layer that stays as it is, and one that nothing covers."""
    inner = params["encoder"]["inner"]
    h = jnp.tanh(x @ inner["kernel"] + inner["bias"][None])
    z = h @ params["decoder"][0] + jnp.sin(params["decoder"][1])[None]
    return kfac_jax.losses.squared_error(z, y).sum(-1).mean()


def make_params():
    rng = np.random.default_rng(0)
    shapes = {
        "encoder": {"inner": {"kernel": (3, 4), "bias": (4,)}},
        "decoder": [(4, 2), (2,)],
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_batch(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=(8, 2)))


@functools.cache
def transformation(kind):
    curvature = kfac_jax.make_curvature(
        loss_fn,
        make_params(),
        *make_batch(0),
        blocks={"decoder/0": None},
        on_unmatched="ignore",
    )
    if kind == "scale_by_kfac":
        tx = optax.chain(
            kfac_jax.scale_by_kfac(curvature, 0.2), optax.scale_by_learning_rate(0.1)
        )
    else:
        tx = kfac_jax.kfac(
            curvature,
            kfac_jax.QuadraticModel(),
            None,
            kfac_jax.LevenbergMarquardt(1.0, every=2),
        )

    traces = []

    @jax.jit
    def step(params, state, batch, key):
        traces.append(None)
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *batch, rng=key
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=batch
        )
        return optax.apply_updates(params, updates), state

    return tx, step, traces


def advance(kind, params, state, start):
    step = transformation(kind)[1]
    for i in range(start, start + STEPS):
        params, state = step(params, state, make_batch(i), jax.random.key(i))
    return params, state


@functools.cache
def halfway(kind):
    params = make_params()
    return advance(kind, params, transformation(kind)[0].init(params), 0)


@functools.cache
def uninterrupted(kind):
    return advance(kind, *halfway(kind), STEPS)


def through_pickle(tree, template, path):
    buffer = io.BytesIO(pickle.dumps(tree))
    return pickle.load(buffer)


def through_flax_bytes(tree, template, path):
    return serialization.from_bytes(template, serialization.to_bytes(tree))


def through_flax_state_dict(tree, template, path):
    return serialization.from_state_dict(template, serialization.to_state_dict(tree))


def through_orbax(tree, template, path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(checkpoint.utils.to_shape_dtype_struct, template)
        return checkpointer.restore(path / "checkpoint", shapes)


@pytest.mark.parametrize("kind", ["scale_by_kfac", "kfac"])
@pytest.mark.parametrize(
    "through",
    [through_pickle, through_flax_bytes, through_flax_state_dict, through_orbax],
)
def test_round_trip_goes_on_bitwise(kind, through, tmp_path):
    template = make_params(), transformation(kind)[0].init(make_params())
    restored = through(halfway(kind), template, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(halfway(kind))
    assert type(restored[1]) is type(halfway(kind)[1])
    jax.tree.map(np.testing.assert_array_equal, restored, halfway(kind))
    for a, b in zip(
        jax.tree.leaves(restored), jax.tree.leaves(halfway(kind)), strict=True
    ):
        assert a.dtype == b.dtype
    actual = advance(kind, *restored, STEPS)
    jax.tree.map(np.testing.assert_array_equal, actual, uninterrupted(kind))
    assert len(transformation(kind)[2]) == 1  # restoring does not trace again


def test_state_has_stable_names():
    _, state = halfway("kfac")
    fields = {"step", "factors", "inverses", "damping", "factored_damping"}
    fields |= {"velocity", "info"}
    assert fields <= set(state._fields)
    names = {"encoder/inner", "decoder/0", "decoder/1"}
    assert set(state.factors) == set(state.inverses) == names
    assert {k: v.shape for k, v in state.factors["encoder/inner"].items()} == {
        "input": (4, 4),
        "output": (4, 4),
    }
    assert state.factors["decoder/0"] == {}
    flat, _ = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in flat)


def test_scale_by_kfac_keeps_no_velocity():
    _, state = halfway("scale_by_kfac")
    assert state[0].velocity == ()
    assert isinstance(state[0], kfac_jax.KFACState)


def test_changing_the_state_by_hand_counts():
    """All that the transformation knows is in its state."""
    tx, step, _ = transformation("kfac")
    params, state = halfway("kfac")
    fresh = tx.init(params)
    key = jax.random.key(9)
    same, _ = step(params, state._replace(), make_batch(9), key)
    again, _ = step(params, state, make_batch(9), key)
    jax.tree.map(np.testing.assert_array_equal, same, again)
    other, _ = step(params, fresh, make_batch(9), key)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), same, other)
    assert any(jax.tree.leaves(moved))
