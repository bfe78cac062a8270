"""Fashion-MNIST: 60,000 + 10,000 pictures of clothes in ten classes, 28x28 pixels.

They are downloaded (46 MB) as the source of the Debian package that holds them.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
from archives import DEBIAN, Archive

NAME, VERSION = "dataset-fashion-mnist", "0.0~git20200523.55506a9"
ARCHIVE = Archive(
    f"{DEBIAN}/d/{NAME}/{NAME}_{VERSION}.orig.tar.xz",
    "094d3928be84192f9bb88f33ff2cfeef692db8ff1da67763f52318fbda5a2fd4",
)
FOLDER = f"{NAME}-{VERSION}/data/fashion"
SIDE = 28
HEADERS = {"images-idx3": 16, "labels-idx1": 8}  # bytes before the contents


class Cases(NamedTuple):
    """Images and their classes."""

    images: np.ndarray  # [cases, 28, 28, 1] float32, pixels in [0, 1]
    labels: np.ndarray  # [cases] int32, from 0 to 9


def load(cache: Path | None = None) -> tuple[Cases, Cases]:
    """Loads the training and the test cases.

    Args:
        cache: the folder of downloads; see `Archive.read`.

    Returns:
        60,000 training and 10,000 test cases.

    Raises:
        DataError: the data cannot be downloaded.
    """
    return _read("train", cache), _read("t10k", cache)


def _read(part: str, cache: Path | None) -> Cases:
    names = [f"{FOLDER}/{part}-{kind}-ubyte.gz" for kind in HEADERS]
    images, labels = (
        np.frombuffer(gzip.decompress(packed), np.uint8, offset=header)
        for packed, header in zip(
            ARCHIVE.read(names, cache), HEADERS.values(), strict=True
        )
    )
    pixels = images.reshape(-1, SIDE, SIDE, 1).astype(np.float32) / 255.0
    return Cases(pixels, labels.astype(np.int32))
