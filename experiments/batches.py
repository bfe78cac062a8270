"""Mini-batches as pure functions of the iteration, so that a run resumes exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

Batch = tuple[np.ndarray, ...]


class Source(Protocol):
    """Gives the batch of each step: the loss function's arguments after params."""

    def __call__(self, iteration: int) -> Batch:
        """The batch of step `iteration`, counted from 0."""
        ...


class Batches:
    """Cases in random order.

    Each epoch is a fresh permutation; the cases left over at its end are dropped.
    """

    def __init__(self, arrays: Batch, size: int, seed: int) -> None:
        """Checks the size.

        Args:
            arrays: one or more, each [cases, ...]; case i is the i-th row of them all.
            size: cases per batch.
            seed: of the permutations.

        Raises:
            ValueError: the size is not between 1 and the number of cases, or the arrays
                differ in their number of cases.
        """
        counts = {len(array) for array in arrays}
        if len(counts) != 1:
            raise ValueError(f"The arrays must be of one length; got {sorted(counts)}.")
        (self._cases,) = counts
        if not 0 < size <= self._cases:
            raise ValueError(
                f"The batch size must be from 1 to {self._cases}, the number of "
                f"training cases; got {size}."
            )
        self._size, self._arrays, self._seed = size, arrays, seed
        self._epoch = -1
        self._order = np.arange(0)

    def __call__(self, iteration: int) -> Batch:
        """The batch of step `iteration`, counted from 0."""
        epoch, position = divmod(iteration, self._cases // self._size)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self._cases)
        first = position * self._size
        chosen = self._order[first : first + self._size]
        return tuple(array[chosen] for array in self._arrays)


class GrowingBatches:
    """Random cases, as many at each step as a schedule says, none twice in a batch."""

    def __init__(self, arrays: Batch, size_at: Callable[[int], int], seed: int) -> None:
        """Keeps the cases.

        Args:
            arrays: one or more, each [cases, ...]; case i is the i-th row of them all.
            size_at: iteration, from 0 -> how many cases.
            seed: of the choice.
        """
        self._arrays, self._size_at, self._seed = arrays, size_at, seed

    def __call__(self, iteration: int) -> Batch:
        """The batch of step `iteration`, counted from 0."""
        rng = np.random.default_rng((self._seed, iteration))
        size, cases = self._size_at(iteration), len(self._arrays[0])
        chosen = rng.choice(cases, size, replace=False)
        return tuple(array[chosen] for array in self._arrays)


class Windows:
    """Stretches of a text from random places, each with the character after each."""

    def __init__(self, tokens: np.ndarray, length: int, size: int, seed: int) -> None:
        """Checks the sizes.

        Args:
            tokens: [characters], the text.
            length: characters in a window.
            size: windows per batch.
            seed: of the places.

        Raises:
            ValueError: the batch is empty, or the text is too short for a window.
        """
        if size < 1:
            raise ValueError(f"The batch size must be at least 1; got {size}.")
        if len(tokens) <= length:
            raise ValueError(
                f"A window of {length} needs a text that is longer; got {len(tokens)}."
            )
        self._tokens, self._length = tokens, length
        self._size, self._seed = size, seed

    def __call__(self, iteration: int) -> Batch:
        """Inputs and targets of step `iteration`, both [windows, length]."""
        rng = np.random.default_rng((self._seed, iteration))
        starts = rng.integers(0, len(self._tokens) - self._length, self._size)
        return windows(self._tokens, starts, self._length)


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Inputs and targets, both [windows, length], from given places on.

    >>> [x.tolist() for x in windows(np.arange(9), np.array([0, 4]), 3)]
    [[[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]]]
    """
    places = starts[:, None] + np.arange(length + 1)
    stretches = tokens[places]
    return stretches[:, :-1], stretches[:, 1:]
