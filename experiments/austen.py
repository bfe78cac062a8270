"""Jane Austen's six novels as one text of four million characters.

They are downloaded (1.2 MB) as the source of the Debian package `r-cran-janeaustenr`,
which holds each as R's data, a vector of lines.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdata
from archives import DEBIAN, Archive

ARCHIVE = Archive(
    f"{DEBIAN}/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0.orig.tar.gz",
    "b4c32ee1395ee4a8efe714c535c0fe578b0dbf5f3bb85b41fa5cc87569b8e8aa",
)
NOVELS = (
    "emma",
    "mansfieldpark",
    "northangerabbey",
    "persuasion",
    "prideprejudice",
    "sensesensibility",
)
HELD_OUT = 0.05  # for validation, and as much again for the test


class Corpus(NamedTuple):
    """The text as indices into its alphabet, int32; in the order of the novels."""

    train: np.ndarray  # [characters], the first 90 %
    validation: np.ndarray  # [characters], the next 5 %, for choosing constants
    test: np.ndarray  # [characters], the last 5 %
    alphabet: str  # every character that occurs, sorted


def load(cache: Path | None = None) -> Corpus:
    """Loads and splits the text.

    Args:
        cache: the folder of downloads; see `Archive.read`.

    Returns:
        The parts and the alphabet.

    Raises:
        DataError: the data cannot be downloaded.
    """
    files = [f"janeaustenr/data/{name}.rda" for name in NOVELS]
    novels = [rdata.read_rda(BytesIO(raw)) for raw in ARCHIVE.read(files, cache)]
    lines = [line for novel in novels for line in next(iter(novel.values()))]
    return _split("\n".join(lines))


def _split(text: str) -> Corpus:
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = np.array([index[character] for character in text], np.int32)
    held_out = int(HELD_OUT * len(tokens))
    train, validation, test = np.split(
        tokens, [len(tokens) - 2 * held_out, len(tokens) - held_out]
    )
    return Corpus(train, validation, test, alphabet)
