"""Runs of several devices that stop and go on: there, or on another number of them."""

import functools
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import serialization
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from tests.helpers import models

CASES = 16
STEPS = 6
FIXED = {"learning_rate": 0.1, "momentum": 0.9, "damping": 0.01}
ADAPTIVE = {
    "learning_rate": kfac_jax.QuadraticModel(),
    "momentum": None,
    "damping": kfac_jax.LevenbergMarquardt(1.0, every=2),
}
RUNS = {
    "every second step": FIXED | {"inverse_every": kfac_jax.RefreshSchedule(2)},
    "in turn": FIXED | {"inverse_every": kfac_jax.RefreshSchedule(4, shares=2)},
    "stale": FIXED | {"inverse_every": kfac_jax.RefreshSchedule(2, stale=True)},
    "adaptive": ADAPTIVE
    | {"inverse_every": 2, "factored_damping": kfac_jax.SeparateDamping(every=2)},
    "adaptive, in turn": ADAPTIVE
    | {"inverse_every": kfac_jax.RefreshSchedule(4, shares=2)},
    "adaptive, stale": ADAPTIVE
    | {"inverse_every": kfac_jax.RefreshSchedule(2, stale=True)},
}
"""Options of `kfac`."""


@functools.cache
def problem():
    return models.problem(
        params=models.dense_params(0, 3, 7, 5, 4), x=models.array(50, CASES, 3)
    )


@functools.cache
def plan():
    p = problem()
    return kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)


@functools.cache
def over(devices, by_rows=True):
    """None for one device without a mesh."""
    if devices is None:
        return None
    axes = "data" if by_rows else ()
    return kfac_jax.OverMesh(models.mesh(devices, "data"), state_axes=axes)


def kfac(run, distribution):
    return kfac_jax.kfac(plan(), **RUNS[run], devices=distribution)


@functools.cache
def start(run, distribution):
    """Parameters and state, where the distribution has them."""
    params = problem().params
    if distribution is None:
        return params, kfac(run, None).init(params)
    whole = params, kfac(run, None).init(params)
    return kfac_jax.spread_state(plan(), whole, distribution)


def make_step(run, distribution, wrap=lambda step: step):
    """A step in a jit of its own; its results lie as its arguments."""
    tx = kfac(run, distribution)

    def step(params, state, number):
        args = jax.tree.map(lambda x: jnp.roll(x, number, 0), problem().args)
        key = jax.random.fold_in(jax.random.key(0), number)
        if distribution is not None:
            parts = NamedSharding(distribution.mesh, P("data"))
            args = jax.lax.with_sharding_constraint(args, parts)
        value, grads, statistics = plan().value_grad_and_statistics(
            params, *args, rng=key
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state

    if distribution is None:
        return jax.jit(wrap(step))
    lies = jax.tree.map(lambda x: x.sharding, start(run, distribution))
    return jax.jit(wrap(step), out_shardings=lies)


@functools.cache
def shared_step(run, distribution):
    return make_step(run, distribution)


@functools.cache
def uninterrupted(run, distribution):
    """Parameters and state before each step, and at the end."""
    found = [start(run, distribution)]
    for number in range(STEPS):
        found.append(shared_step(run, distribution)(*found[-1], number))
    return found


def go_on(run, distribution, at, number, step=None):
    step = step or shared_step(run, distribution)
    for i in range(number, STEPS):
        at = step(*at, i)
    return at


def whole(at, distribution):
    """Parameters and state as one device has them."""
    if distribution is None:
        return at
    return kfac_jax.whole_state(plan(), at, distribution)


def put(at, like):
    """What was read, where the run that is to go on has it."""
    return jax.device_put(at, jax.tree.map(lambda x: x.sharding, like))


# ------------------------------------------------------------ killed at any step

PLACES = [
    *[(run, None) for run in RUNS],
    ("in turn", 8),
    pytest.param("adaptive", 8, marks=pytest.mark.slow),
    pytest.param("stale", 8, marks=pytest.mark.slow),
    pytest.param("every second step", 8, marks=pytest.mark.slow),
]


@pytest.mark.sampled(4)
@models.EIGHT_DEVICES
@pytest.mark.parametrize(("run", "devices"), PLACES)
def test_a_run_that_is_killed_at_any_step_goes_on_bitwise(run, devices):
    """In a jit of the program that resumes, as a new process has it."""
    expected = uninterrupted(run, over(devices))
    resumed = make_step(run, over(devices), models.traced_once)
    for number in range(STEPS):
        saved = pickle.dumps(expected[number])
        at = put(pickle.loads(saved), expected[0])
        found = go_on(run, over(devices), at, number, resumed)
        models.assert_trees_equal(found, expected[-1])
    assert resumed._cache_size() <= 1  # or 0, where JAX has forgotten it


# ------------------------------------------------------------------- orbax, same mesh


def save(path, tree):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, like):
    """Into shapes, types and shardings as `like` has them."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.tree.map(described, like))


def described(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("by_rows", [True, False])
def test_orbax_restores_a_state_in_parts_on_the_same_mesh(by_rows, tmp_path):
    run, here = "in turn", over(8, by_rows)
    expected = uninterrupted(run, here)
    rows = expected[3][1].factors["layer1"]["input"]
    assert rows.sharding.is_fully_replicated is not by_rows
    save(tmp_path / "3", expected[3])
    restored = restore(tmp_path / "3", start(run, here))
    models.assert_trees_equal(restored, expected[3])
    for x, y in zip(
        jax.tree.leaves(restored), jax.tree.leaves(expected[3]), strict=True
    ):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    models.assert_trees_equal(go_on(run, here, restored, 3), expected[-1])


# ------------------------------------------------------------ another number of devices

MOVES = [
    ("in turn", 8, 2, True),
    ("in turn", 2, 8, True),
    ("in turn", 8, None, True),
    ("in turn", None, 8, True),
    ("in turn", 8, 2, False),
    ("in turn", None, 8, False),
    pytest.param("in turn", 2, None, False, marks=pytest.mark.slow),
    *[
        pytest.param("adaptive", *devices, True, marks=pytest.mark.slow)
        for devices in [(8, 2), (2, 8), (8, None), (None, 8)]
    ],
]
"""Of which run, from, onto, and whether the devices keep parts."""
moves = pytest.mark.parametrize(("run", "old", "new", "by_rows"), MOVES)


def carried_on(run, old, new, whole_one):
    """From a whole state at step 3, against the run on the old devices."""
    at = whole_one
    if new is None:
        at = jax.device_put(at, jax.devices()[0])
    else:
        at = kfac_jax.spread_state(plan(), at, new)
    found = whole(go_on(run, new, at, 3), new)
    models.assert_trees_close(
        found, whole(uninterrupted(run, old)[-1], old), atol=1e-11
    )


@pytest.mark.sampled(2)
@models.EIGHT_DEVICES
@moves
def test_a_whole_state_goes_on_on_other_devices(run, old, new, by_rows, tmp_path):
    """It is made whole when it is saved: nothing about devices is in the file."""
    old, new = over(old, by_rows), over(new, by_rows)
    save(tmp_path / "3", whole(uninterrupted(run, old)[3], old))
    restored = restore(tmp_path / "3", start(run, None))
    carried_on(run, old, new, restored)


def shapes_of(run, devices):
    """Those of the state in so many parts, without so many devices."""
    axis = kfac_jax.OverAxis("data", state_axes="data")
    init = jax.shard_map(
        kfac(run, axis).init,
        mesh=AbstractMesh((devices,), ("data",)),
        in_specs=P(),
        out_specs=kfac_jax.state_specs(axis),
    )
    return jax.eval_shape(lambda params: (params, init(params)), problem().params)


@models.EIGHT_DEVICES
@pytest.mark.parametrize(
    ("old", "new"),
    [(8, 2), (8, None), pytest.param(2, 8, marks=pytest.mark.slow)],
)
def test_a_state_in_parts_goes_on_on_other_devices(old, new, tmp_path):
    """Restored with the shapes that it was saved with, into the host's memory."""
    run, count, old, new = "in turn", old, over(old), over(new)
    save(tmp_path / "3", uninterrupted(run, old)[3])
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host),
        shapes_of(run, count),
    )
    restored = restore(tmp_path / "3", like)
    carried_on(run, old, new, kfac_jax.whole_state(plan(), restored))


@models.EIGHT_DEVICES
@pytest.mark.parametrize("devices", [2, 8])
def test_orbax_restores_parts_onto_any_sharding(devices, tmp_path):
    """Such as the same on all devices of a smaller mesh, or of the same."""
    run = "in turn"
    save(tmp_path / "3", uninterrupted(run, over(8))[3])
    everywhere = NamedSharding(over(devices).mesh, P())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        shapes_of(run, 8),
    )
    restored = restore(tmp_path / "3", like)
    carried_on(run, over(8), over(devices), kfac_jax.whole_state(plan(), restored))


# ------------------------------------------------------------------------- other files


def through_pickle(tree):
    return pickle.loads(pickle.dumps(tree))


def through_flax(tree):
    like = jax.tree.map(jnp.zeros_like, tree)
    return serialization.from_bytes(like, serialization.to_bytes(tree))


@models.EIGHT_DEVICES
@pytest.mark.parametrize("through", [through_pickle, through_flax])
@pytest.mark.parametrize("kind", ["whole", "in parts"])
def test_files_of_other_libraries(through, kind):
    run, here = "in turn", over(8)
    expected = uninterrupted(run, here)
    at = expected[3] if kind == "in parts" else whole(expected[3], here)
    restored = through(at)
    models.assert_trees_equal(restored, at)
    if kind == "in parts":
        restored = put(restored, expected[0])
    else:
        restored = kfac_jax.spread_state(plan(), restored, here)
    models.assert_trees_equal(go_on(run, here, restored, 3), expected[-1])


@models.EIGHT_DEVICES
def test_what_devices_had_of_padding_does_not_matter():
    """A state that was whole in between is bitwise the one that was not."""
    at = uninterrupted("in turn", over(8))[3]
    again = kfac_jax.spread_state(plan(), whole(at, over(8)), over(8))
    models.assert_trees_equal(again, at)
