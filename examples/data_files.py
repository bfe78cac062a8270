"""What the examples' data has in common: a cache, downloads and checks of every byte.

Loaders look in the cache, then at a path the user gives, then download.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm


class DataError(RuntimeError):
    """The data could not be had; the message says what to do."""


class IdxFile(NamedTuple):
    """A file of bytes in the idx format: name, shape, and checksum when unpacked."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    def decode(self, raw: bytes, where: str) -> np.ndarray:
        """The array in the file's bytes, uint8.

        Args:
            raw: the unpacked file.
            where: it was found, for messages.

        Raises:
            DataError: it is damaged or another file.
        """
        header = 4 + 4 * len(self.shape)  # magic number, then each side's length
        check(raw, header + math.prod(self.shape), self.sha256, where)
        return np.frombuffer(raw, np.uint8, offset=header).reshape(self.shape)


def read_idx_folder(folder: Path, files: Sequence[IdxFile]) -> list[np.ndarray]:
    """The arrays of a folder's idx files, plain or .gz.

    Raises:
        DataError: one is missing or damaged.
    """
    return [_read_idx(folder, file) for file in files]


def _read_idx(folder: Path, file: IdxFile) -> np.ndarray:
    plain, packed = folder / file.name, folder / f"{file.name}.gz"
    if plain.exists():
        return file.decode(plain.read_bytes(), str(plain))
    if packed.exists():
        return file.decode(unpack_gzip(packed.read_bytes(), str(packed)), str(packed))
    raise DataError(
        f"Neither {plain} nor {packed} exists. Give a folder that holds the idx files, "
        "or the packed file they come in, or no path to download it."
    )


def unpack_gzip(packed: bytes, where: str) -> bytes:
    """The contents of a .gz file.

    Raises:
        DataError: it is damaged.
    """
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        message = f"{where} is damaged ({error}). Delete it and run again."
        raise DataError(message) from error


def default_cache() -> Path:
    """The folder that keeps downloads: $XDG_CACHE_HOME/kfac_jax, else ~/.cache/..."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kfac_jax"


def check(raw: bytes, size: int, sha256: str, where: str) -> None:
    """Compares size and checksum.

    Raises:
        DataError: they differ.
    """
    if len(raw) != size:
        raise DataError(
            f"{where} has {len(raw):,} bytes, expected {size:,}: it is cut short or "
            "another file. Delete it and run again."
        )
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise DataError(
            f"{where} has sha256 {found}, expected {sha256}: it is damaged or another "
            "file. Delete it and run again."
        )


def download(url: str, target: Path, size: int, sha256: str, advice: str) -> None:
    """Fetches a file with a progress bar; only a checked one reaches `target`.

    Args:
        url: where it is.
        target: where to keep it.
        size: bytes expected.
        sha256: checksum expected.
        advice: what the user can do if this fails.

    Raises:
        DataError: it cannot be had, or is not the file expected.
    """
    print(f"Data: downloading {size / 1e6:.1f} MB from {url} to {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    try:
        _fetch(url, partial, size)
        check(partial.read_bytes(), size, sha256, f"The file at {url}")
        partial.replace(target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DataError(f"Could not download {url}: {error}. {advice}") from error
    finally:
        partial.unlink(missing_ok=True)


def _fetch(url: str, target: Path, size: int) -> None:
    with (
        urllib.request.urlopen(url, timeout=60) as response,
        target.open("wb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=target.stem) as bar,
    ):
        while chunk := response.read(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))
