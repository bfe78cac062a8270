"""Archives of data: fetched and checked by pooch, once, and read in Python."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pooch

DEBIAN = "https://deb.debian.org/debian/pool/main"
ATTEMPTS = 3


class DataError(RuntimeError):
    """The data could not be had; the message says what to do."""


class Archive(NamedTuple):
    """A packed tar file, and where it is."""

    url: str
    sha256: str

    def read(self, members: Sequence[str], cache: Path | None = None) -> list[bytes]:
        """The contents of some of its files.

        Args:
            members: their paths in the archive.
            cache: the folder that keeps the archive, by default pooch's for this
                library (`~/.cache/kfac_jax` on Linux). One that is there is taken if
                its checksum is right, else it is fetched.

        Returns:
            Their bytes, in that order.

        Raises:
            DataError: it cannot be downloaded, or is not what is expected.
        """
        with tarfile.open(self._fetched(cache)) as tar:
            files = [tar.extractfile(name) for name in members]
            # the checksum vouches for what is in it
            return [file.read() for file in files if file is not None]

    def _fetched(self, cache: Path | None) -> str:
        folder, name = cache or pooch.os_cache("kfac_jax"), Path(self.url).name
        shelf = pooch.create(
            folder,
            base_url="",
            registry={name: f"sha256:{self.sha256}"},
            urls={name: self.url},
            retry_if_failed=ATTEMPTS - 1,
        )
        fetch = pooch.HTTPDownloader(progressbar=True, timeout=60)
        try:
            return shelf.fetch(name, downloader=fetch)
        except (OSError, ValueError) as error:
            raise DataError(
                f"Could not download {self.url}: {error}. On a machine with access, "
                f"fetch that file, and put it into {folder}."
            ) from error
