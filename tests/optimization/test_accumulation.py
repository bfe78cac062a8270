"""Steps that accumulate gradients and statistics over micro-batches, against one batch.

The sums are a `lax.scan`'s carry, as in a program whose batch does not fit at once.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from tests.devices.device_problem import (
    AXIS,
    STRUCTURES,
    make_step,
    mean,
    over_pmap,
    over_shard_map,
    part,
    plan,
    problem,
)
from tests.helpers import models

STEPS, MICRO = 2, 2


def micro_batches(args):
    """`[n, ...]` to `[k, n / k, ...]`, every k-th example: each stays where it is."""
    return jax.tree.map(
        lambda x: x.reshape(-1, MICRO, *x.shape[1:]).swapaxes(0, 1), args
    )


def accumulated(curvature, params, *args):
    """Mean gradients and summed statistics."""

    def add(total, args):
        _, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        return jax.tree.map(jnp.add, total, (grads, statistics)), None

    zero = jax.tree.map(jnp.zeros_like, params), curvature.zero_statistics(params)
    (grads, statistics), _ = jax.lax.scan(add, zero, micro_batches(args))
    return jax.tree.map(lambda g: g / MICRO, grads), statistics


def micro_step(curvature, distribution, average=None, both=False):
    tx = kfac_jax.kfac(
        curvature,
        0.1,
        0.9,
        0.01,
        norm_constraint=None,  # "auto" needs the value
        inverse_every=2,
        devices=distribution,
    )

    def step(params, state, *args):
        grads, statistics = accumulated(curvature, params, *args)
        if average is not None:
            grads = jax.tree.map(average, grads)
        if both:
            statistics = jax.tree.map(average, statistics)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return jax.tree.map(jnp.add, params, updates), state

    return tx, step


def trajectory(tx, step, params, args):
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, *args)
    return params, state.factors, state.velocity


@functools.cache
def of_one_batch(structure):
    tx, step = make_step(plan(structure), "fixed", None)
    p = problem()
    return trajectory(tx, jax.jit(step), p.params, p.args)


def check(found, structure):
    models.assert_trees_close(found, of_one_batch(structure))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_micro_batches_on_one_device(structure):
    tx, step = micro_step(plan(structure), None)
    p = problem()
    check(trajectory(tx, jax.jit(step), p.params, p.args), structure)


MOSTLY_LINKED = [  # linked layers have statistics of all kinds
    pytest.param("diagonal", marks=pytest.mark.slow),
    "tridiagonal",
]
unchecked = functools.partial(over_shard_map, check_vma=False)
ROUTES = {  # how devices run the step, the distribution, how gradients are averaged,
    # whether the program does that with statistics too
    "pmap": (over_pmap, None, mean, True),
    "pmap, shared": (over_pmap, AXIS, mean, False),
    "shard_map": (over_shard_map, None, part, False),
    "shard_map, shared": (over_shard_map, AXIS, part, False),
    "shard_map, unchecked": (unchecked, None, mean, True),
    "shard_map, unchecked, shared": (unchecked, AXIS, mean, False),
}


FAST = ("pmap, shared", "shard_map")


@models.EIGHT_DEVICES
@pytest.mark.parametrize("structure", MOSTLY_LINKED)
@pytest.mark.parametrize(
    "route",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in ROUTES
    ],
)
def test_micro_batches_on_each_device(route, structure):
    distribute, distribution, average, both = ROUTES[route]
    tx, step = micro_step(plan(structure), distribution, average, both)
    p = problem()
    check(trajectory(tx, distribute(step, 8), p.params, p.args), structure)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("structure", MOSTLY_LINKED)
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_micro_batches_of_sharded_arrays(kind, shared, structure):
    p = problem()
    of_one_batch(structure)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(p.params, NamedSharding(mesh, P()))
    args = jax.device_put(p.args, NamedSharding(mesh, P("data")))
    distribution = kfac_jax.OverMesh(mesh) if shared else None
    tx, step = micro_step(plan(structure), distribution)
    with jax.set_mesh(mesh):
        check(trajectory(tx, jax.jit(step), params, args), structure)
