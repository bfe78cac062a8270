"""What data_parallel.py and multi_process.py share: options, the step and its loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import mnist
import numpy as np
from autoencoder_model import L2, SIZES, Params, loss_fn, reconstruction_error
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import kfac_jax

AXIS = "batch"

State = tuple[Params, kfac_jax.KFACState]
Local = Callable[[State, Array, Array], tuple[State, Array]]  # state, images, key
# state, the images that this process has of the batch, key -> state, loss
Step = Callable[[State, np.ndarray, Array], tuple[State, Array]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, and for how long."""

    batch_size: int = 512  # of all devices together
    iterations: int = 60
    # for quick trials: hidden layers are so many times narrower, the code not
    shrink: int = 1
    # what each device keeps of factors, inverses and velocity
    state: Literal["whole", "rows"] = "whole"

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: a number is below 1.
        """
        for name in ("batch_size", "iterations", "shrink"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1; got "
                    f"{getattr(self, name)}."
                )

    def check_division(self, parts: int, of: str) -> None:
        """Refuses a batch that devices or processes cannot divide.

        Raises:
            ValueError: it is no multiple of their number.
        """
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size must be a multiple of {of}, {parts}; got "
                f"{self.batch_size}."
            )

    @property
    def state_axes(self) -> tuple[str, ...]:
        """Along which axes the optimizer's state is cut into rows."""
        return (AXIS,) if self.state == "rows" else ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The autoencoder's widths; no hidden layer is narrower than the code.

        >>> Options(shrink=4).sizes
        (784, 250, 125, 62, 30, 62, 125, 250, 784)
        """
        code = min(SIZES)
        hidden = [max(code, size // self.shrink) for size in SIZES[1:-1]]
        return (SIZES[0], *hidden, SIZES[-1])


def local_step(
    params: Params, images: np.ndarray, devices: kfac_jax.OverAxis | kfac_jax.OverMesh
) -> tuple[Local, Callable[[Params], Any]]:
    """What every device does, and the optimizer's `init`.

    Args:
        params: for their shapes.
        images: a batch, for its shape.
        devices: as in `kfac`.

    Returns:
        The step, and parameters -> the optimizer's state.
    """
    curvature = kfac_jax.make_curvature(
        loss_fn, params, images, l2=L2, statistics_fraction=1 / 4
    )
    tx = kfac_jax.kfac(
        curvature,
        learning_rate=kfac_jax.QuadraticModel(largest_momentum=None, longest=None),
        damping=kfac_jax.LevenbergMarquardt(150.0),
        devices=devices,
    )
    whole = kfac_jax.make_step(curvature, tx, devices=devices)

    def step(state: State, images: Array, key: Array) -> tuple[State, Array]:
        params, inner, _ = whole(*state, key, images)
        return (params, inner), inner.info.loss

    return step, tx.init


def by_jit(
    params: Params, images: np.ndarray, devices: int, state_axes: tuple[str, ...]
) -> tuple[Step, State]:
    """One program over sharded arrays, whether one process has the devices or several.

    Args:
        params: the first ones, the same in all processes.
        images: a whole batch, for its shape.
        devices: how many of them there are in all processes.
        state_axes: along which axes the optimizer's state is cut into rows.

    Returns:
        The step and the first state.
    """
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    over = kfac_jax.OverMesh(mesh, state_axes=state_axes)
    step, init = local_step(params, images, over)
    compiled = jax.jit(step, donate_argnums=0)

    def whole(state: State, images: np.ndarray, key: Array) -> tuple[State, Array]:
        batch = jax.make_array_from_process_local_data(parts, images)
        return compiled(state, batch, key)

    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        kfac_jax.state_specs(over),
        is_leaf=lambda x: isinstance(x, P),
    )
    start = jax.jit(
        lambda params: (params, init(params)), out_shardings=(everywhere, places)
    )
    return whole, start(jax.tree.map(np.asarray, params))


def train(
    step: Step,
    state: State,
    batch: Callable[[int], np.ndarray],
    iterations: int,
    title: str,
    *,
    quiet: bool = False,
) -> State:
    """Runs the steps, with a progress bar unless quiet.

    Args:
        step: one step.
        state: the first.
        batch: iteration -> the images that this process has of its batch.
        iterations: how many steps.
        title: of the progress bar.
        quiet: whether to show none.

    Returns:
        The last state.
    """
    key = jax.random.key(0)
    with tqdm(range(iterations), desc=title, disable=quiet) as bar:
        for iteration in bar:
            key_now = jax.random.fold_in(key, iteration)
            state, loss = step(state, batch(iteration), key_now)
            bar.set_postfix(loss=f"{float(loss):.2f}")
    return state


def print_errors(params: Params, digits: mnist.Digits) -> None:
    """Prints the reconstruction errors of parameters that this process has whole."""
    params = jax.tree.map(np.asarray, params)  # and one device is enough
    error = jax.jit(reconstruction_error)
    for name, cases in (("training", digits.train), ("test", digits.test)):
        print(f"{name} reconstruction error {float(error(params, cases)):.4f}")
