"""Fashion-MNIST: 60,000 + 10,000 pictures of clothes in ten classes, 28x28 pixels.

Looked for in a local cache, then at a path the user gives, then fetched as the Debian
package `dataset-fashion-mnist` (30.9 MB). Whatever the source, the bytes are checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import debian
import numpy as np
from data_files import IdxFile, default_cache, read_idx_folder, unpack_gzip

PACKAGE = debian.Package(
    name="dataset-fashion-mnist",
    pool="d/dataset-fashion-mnist/"
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    size=30_900_652,
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
FOLDER = "usr/share/datasets/fashion-mnist"  # in the package

FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


class Cases(NamedTuple):
    """Images and their classes."""

    images: np.ndarray  # [cases, 28, 28, 1] float32, pixels in [0, 1]
    labels: np.ndarray  # [cases] int32, from 0 to 9


def load(path: Path | None = None, cache: Path | None = None) -> tuple[Cases, Cases]:
    """Loads the training and the test cases.

    Args:
        path: a folder with the four idx files (plain or .gz), or the .deb package.
        cache: the folder that keeps the download; by default
            `$XDG_CACHE_HOME/kfac_jax`, else `~/.cache/kfac_jax`.

    Returns:
        60,000 training and 10,000 test cases.

    Raises:
        DataError: the data is missing, damaged or cannot be downloaded.
    """
    what = "Fashion-MNIST (60,000 + 10,000 images)"
    return debian.load(PACKAGE, path, cache or default_cache(), what, _read)


def _read(found: Path) -> tuple[Cases, Cases]:
    if found.is_dir():
        arrays = read_idx_folder(found, FILES)
    else:
        packed = debian.read(found, [f"{FOLDER}/{file.name}.gz" for file in FILES])
        arrays = [
            file.decode(
                unpack_gzip(raw, f"{found}:{file.name}"), f"{found}:{file.name}"
            )
            for file, raw in zip(FILES, packed, strict=True)
        ]
    return _cases(*arrays[:2]), _cases(*arrays[2:])


def _cases(images: np.ndarray, labels: np.ndarray) -> Cases:
    pixels = images[..., None].astype(np.float32) / 255.0
    return Cases(pixels, labels.astype(np.int32))
