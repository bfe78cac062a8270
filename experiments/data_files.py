"""What the examples' data has in common: a cache, downloads and checks of every byte.

Loaders look in the cache, then at a path the user gives, then download.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ATTEMPTS = 3  # a connection that is cut is made again twice
DELETE = "Delete it and run again."


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
        raise DataError(f"{where} is damaged ({error}). {DELETE}") from error


def default_cache() -> Path:
    """The folder that keeps downloads: $XDG_CACHE_HOME/kfac_jax, else ~/.cache/..."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kfac_jax"


def check(raw: bytes, size: int, sha256: str, where: str, advice: str = DELETE) -> None:
    """Compares size and checksum.

    Raises:
        DataError: they differ.
    """
    if len(raw) != size:
        raise DataError(
            f"{where} has {len(raw):,} bytes, expected {size:,}: it is cut short or "
            f"another file. {advice}"
        )
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise DataError(
            f"{where} has sha256 {found}, expected {sha256}: it is damaged or another "
            f"file. {advice}"
        )


def download(url: str, target: Path, size: int, sha256: str, advice: str) -> None:
    """Fetches a file with a progress bar; only a checked one reaches `target`.

    Where the connection is cut, it goes on from there. Until it is whole and checked
    the file is in a folder of its own, so that neither a killed program nor another
    that fetches the same leaves a part of it at `target`.

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
    with tempfile.TemporaryDirectory(prefix="part-", dir=target.parent) as folder:
        partial = Path(folder) / target.name
        partial.touch()
        problem = _fetch(url, partial, size)
        if problem is not None:
            raise DataError(
                f"Could not download {url}: {problem}. {advice}"
            ) from problem
        check(partial.read_bytes(), size, sha256, f"The file at {url}", advice)
        partial.replace(target)


def _fetch(url: str, target: Path, size: int) -> Exception | None:
    """Fetches a file, in several parts if need be; returns why it did not."""
    problem: Exception | None = None
    with tqdm(total=size, unit="B", unit_scale=True, desc=target.stem) as bar:
        for _ in range(ATTEMPTS):
            try:
                _fetch_on(url, target, bar)
                problem = None
            except urllib.error.HTTPError as error:  # an answer, and always the same
                error.close()
                return error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            if problem is None and target.stat().st_size >= size:
                break
    return problem


def _fetch_on(url: str, target: Path, bar: tqdm) -> None:
    """Fetches what is missing, or all of it where the server cannot give parts."""
    start = target.stat().st_size
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        goes_on = response.status == http.client.PARTIAL_CONTENT
        bar.update((start if goes_on else 0) - bar.n)
        with target.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
