"""Jane Austen's six novels as one text of four million characters.

Looked for in a local cache, then at a path the user gives, then fetched as the Debian
package `r-cran-janeaustenr` (1.6 MB), which holds them as an R database of lines.
Whatever the source, the text is checked.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import debian
import numpy as np
from data_files import DataError, check, default_cache
from r_data import read_database

PACKAGE = debian.Package(
    name="r-cran-janeaustenr",
    pool="r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
    size=1_626_392,
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
)
FOLDER = "usr/lib/R/site-library/janeaustenr/data"  # in the package
DATABASE = ("Rdata.rdx", "Rdata.rdb")

NOVELS = (
    "emma",
    "mansfieldpark",
    "northangerabbey",
    "persuasion",
    "prideprejudice",
    "sensesensibility",
)
SIZE = 4_025_028  # bytes of the joined text in UTF-8
SHA256 = "1f48a6d7751aa60776b8aacf34d3b6898c46f4ee0fd103d733dd04f45e761841"

HELD_OUT = 0.05  # for validation, and as much again for the test


class Corpus(NamedTuple):
    """The text as indices into its alphabet, int32; in the order of the novels."""

    train: np.ndarray  # [characters], the first 90 %
    validation: np.ndarray  # [characters], the next 5 %, for choosing constants
    test: np.ndarray  # [characters], the last 5 %
    alphabet: str  # every character that occurs, sorted


def load(path: Path | None = None, cache: Path | None = None) -> Corpus:
    """Loads and splits the text.

    Args:
        path: the .deb package, or a folder with its files Rdata.rdx and Rdata.rdb.
        cache: the folder that keeps the download; by default
            `$XDG_CACHE_HOME/kfac_jax`, else `~/.cache/kfac_jax`.

    Returns:
        The parts and the alphabet.

    Raises:
        DataError: the data is missing, damaged or cannot be downloaded.
    """
    what = "Jane Austen's six novels (4.0 million characters)"
    return debian.load(PACKAGE, path, cache or default_cache(), what, _read)


def _read(found: Path) -> Corpus:
    text = _join(_files(found), found)
    check(text.encode(), SIZE, SHA256, f"The text in {found}")
    return _split(text)


def _files(found: Path) -> list[bytes]:
    if not found.is_dir():
        return debian.read(found, [f"{FOLDER}/{name}" for name in DATABASE])
    missing = [name for name in DATABASE if not (found / name).exists()]
    if missing:
        raise DataError(
            f"{found} lacks {' and '.join(missing)}, R's files in {FOLDER} of the "
            f"package {PACKAGE.name}. Without --data-path it is fetched."
        )
    return [(found / name).read_bytes() for name in DATABASE]


def _join(files: list[bytes], found: Path) -> str:
    """The novels one after the other, a line break after each line but the last."""
    try:
        books = read_database(*files)
        return "\n".join("\n".join(books[name]) for name in NOVELS)
    except (ValueError, KeyError, TypeError, OSError, zlib.error) as error:
        raise DataError(
            f"The R database in {found} cannot be read: {error!r}. It is damaged or of "
            "another version of janeaustenr than 1.0.0. Delete it and run again."
        ) from error


def _split(text: str) -> Corpus:
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = np.array([index[character] for character in text], np.int32)
    held_out = int(HELD_OUT * len(tokens))
    train, validation, test = np.split(
        tokens, [len(tokens) - 2 * held_out, len(tokens) - held_out]
    )
    return Corpus(train, validation, test, alphabet)
