"""The three autoencoders of Martens & Grosse 2015 (section 13): MNIST, CURVES, FACES.

The original CURVES are not to be had; `curves_like` draws their like, and losses on
them must not be compared with published ones. FACES must be given as a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import autoencoder_model
import jax
import jax.numpy as jnp
import mnist
import numpy as np
from archives import DataError
from autoencoder_model import L2, Params, encode_decode
from jax import Array
from jax.typing import ArrayLike

import kfac_jax

CURVES_CASES = (20_000, 10_000)  # training, test
FACES_PIXELS = 625
DRAWN_AT_ONCE = 1_000


class Images(NamedTuple):
    """Rows of pixels, float32."""

    train: np.ndarray  # [cases, pixels]
    test: np.ndarray  # [cases, pixels]


@dataclass(frozen=True)
class Task:
    """An autoencoder: its layers, its loss and the paper's metric."""

    sizes: tuple[int, ...]
    loss_fn: Callable[..., Array]  # params, images -> a scalar, the l2 penalty included
    reconstruct: Callable[[Params, ArrayLike], Array]

    def error(self, params: Params, images: ArrayLike) -> Array:
        """Squared error summed over pixels, averaged over cases."""
        difference = self.reconstruct(params, images) - images
        return jnp.mean(jnp.sum(difference**2, axis=-1))


def _mirrored(*encoder: int) -> tuple[int, ...]:
    """The decoder has the encoder's sizes in reverse.

    >>> _mirrored(4, 3, 2)
    (4, 3, 2, 3, 4)
    """
    return (*encoder, *encoder[-2::-1])


def _gaussian_loss(params: Params, images: ArrayLike) -> Array:
    """Squared error summed over pixels, averaged over cases, plus the l2 penalty."""
    outputs = encode_decode(params, images)
    per_pixel = kfac_jax.losses.squared_error(outputs, jnp.asarray(images))
    penalty = autoencoder_model.squared_length(params)
    return per_pixel.sum(axis=-1).mean() + 0.5 * L2 * penalty


TASKS = {
    "mnist": Task(
        autoencoder_model.SIZES,
        autoencoder_model.loss_fn,
        autoencoder_model.reconstruct,
    ),
    "curves": Task(
        _mirrored(784, 400, 200, 100, 50, 25, 6),
        autoencoder_model.loss_fn,
        autoencoder_model.reconstruct,
    ),
    "faces": Task(
        _mirrored(FACES_PIXELS, 2000, 1000, 500, 30), _gaussian_loss, encode_decode
    ),
}


def load(
    task: str, digits: str, faces: Path | None, cache: Path | None, seed: int
) -> Images:
    """The images of a task.

    Args:
        task: a key of `TASKS`.
        digits: for "mnist", which digits; see `mnist.load`.
        faces: for "faces", an .npz file with `train` and `test`, [cases, 625] each.
        cache: where downloads are kept.
        seed: of the curves.

    Returns:
        Training and test images.

    Raises:
        DataError: the data is missing or not what it should be.
    """
    if task == "mnist":
        return Images(*mnist.load(digits, cache))
    if task == "curves":
        return Images(*(curves_like(n, (seed, n)) for n in CURVES_CASES))
    wanted = f"an .npz file with `train` and `test` of shape [cases, {FACES_PIXELS}]"
    if faces is None:
        raise DataError(f"FACES is not to be had here: pass --faces FILE, {wanted}.")
    with np.load(faces) as arrays:
        found = {name: arrays[name].astype(np.float32) for name in arrays.files}
    shapes = {name: array.shape for name, array in found.items()}
    for name in ("train", "test"):
        if shapes.get(name, ())[1:] != (FACES_PIXELS,):
            raise DataError(f"{faces} must be {wanted}; got {shapes}.")
    return Images(found["train"], found["test"])


def curves_like(cases: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Quadratic Bezier curves between random points, `[cases, 784]` in [0, 1].

    Args:
        cases: how many.
        seed: of the points, `P ~ U(4.5, 22.5)` in each coordinate.

    Returns:
        28 x 28 pixels `max_t exp(-|p - C(t)|^2 / (2 * 0.7^2))`, over 48 points
        `C(t) = (1 - t)^2 P0 + 2 t (1 - t) P1 + t^2 P2`.
    """
    points = np.random.default_rng(seed).uniform(4.5, 22.5, (cases, 3, 2))
    portions = np.array_split(points, max(1, cases // DRAWN_AT_ONCE))
    return np.concatenate([np.asarray(_draw(part)) for part in portions])


@jax.jit
def _draw(points: ArrayLike) -> Array:
    t = jnp.linspace(0, 1, 48)
    weights = jnp.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    curves = jnp.einsum("tk,nkd->ntd", weights, jnp.asarray(points, jnp.float32))
    places = jnp.arange(28.0)
    squared = (curves[:, :, :, None] - places[None, None, None, :]) ** 2
    rows, columns = squared[:, :, 0], squared[:, :, 1]
    distance = rows[:, :, :, None] + columns[:, :, None, :]
    nearest = distance.min(axis=1).reshape(len(curves), -1)
    return jnp.exp(-nearest / (2 * 0.7**2))
