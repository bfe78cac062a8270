"""The steps that are taken on devices, in several ways, and those on one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

import kfac_jax
from tests.helpers import models

CASES = 16
STEPS = 4
AXIS = kfac_jax.OverAxis("batch")
STRUCTURES = {
    "diagonal": None,
    "tridiagonal": kfac_jax.BlockTridiagonal(),
}
RULES = {
    "fixed": {
        "learning_rate": 0.1,
        "momentum": 0.9,
        "damping": 0.01,
        "norm_constraint": None,
    },
    "adaptive": {
        "learning_rate": kfac_jax.QuadraticModel(fraction=1.0),
        "momentum": None,
        "damping": kfac_jax.LevenbergMarquardt(1.0, every=2),
        "factored_damping": kfac_jax.SeparateDamping(every=2),
    },
}


@functools.cache
def problem():
    return models.problem(
        "softmax",
        params=models.dense_params(0, 3, 8, 16, 4),
        x=models.array(50, CASES, 3),
    )


@functools.cache
def plan(structure):
    p = problem()
    options = (
        {} if STRUCTURES[structure] is None else {"structure": STRUCTURES[structure]}
    )
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact", **options
    )


def make_step(curvature, rules, distribution, average=None):
    tx = kfac_jax.kfac(curvature, inverse_every=2, devices=distribution, **RULES[rules])

    def step(params, state, *args):
        value, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        if average is mean_of_all:
            grads = average(grads)
        elif average is not None:
            grads = jax.tree.map(average, grads)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return jax.tree.map(jnp.add, params, updates), state

    return tx, step


def mean(x):
    return jax.lax.pmean(x, "batch")


def mean_of_all(grads):
    """All gradients in one collective, as programs with many layers should."""
    flat, unravel = ravel_pytree(grads)
    return unravel(mean(flat))


def part(x):
    """For gradients that JAX has summed over the devices."""
    return x / jax.lax.axis_size("batch")


def over_shard_map(step, devices, **options):
    batch = P("batch")
    return jax.jit(
        jax.shard_map(
            step,
            mesh=models.mesh(devices, "batch"),
            in_specs=(P(), P(), batch, batch),
            out_specs=P(),
            **options,
        )
    )


def over_pmap(step, devices):
    mapped = jax.pmap(
        step, "batch", in_axes=(None, None, 0, 0), devices=jax.devices()[:devices]
    )

    def split(params, state, *args):
        args = [x.reshape(devices, -1, *x.shape[1:]) for x in args]
        everywhere = models.on_host(mapped(params, state, *args))
        for leaf in jax.tree.leaves(everywhere):
            for each in leaf:
                np.testing.assert_array_equal(each, leaf[0])
        return jax.tree.map(lambda x: x[0], everywhere)

    return split


def trajectory(step, tx):
    p = problem()
    params, state = p.params, tx.init(p.params)
    for _ in range(STEPS):
        params, state = step(params, state, *p.args)
    return params, state._replace(inverses=None)  # of which bases are not unique


@functools.cache
def on_one_device(structure, rules):
    tx, step = make_step(plan(structure), rules, None)
    return trajectory(jax.jit(step), tx)


def split_last(x, axis, devices):
    return P(*[None] * (x.ndim - 1), axis) if x.shape[-1] % devices == 0 else P()
