"""Factors of a whole data set, batch by batch."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.operator import inverses
from kfac_jax.plan.group import Factors, Group


class Gathered(NamedTuple):
    """How far `Curvature.gathered` has come. Saved, a later run goes on from it."""

    passes: int  # over the batches, which are complete
    batches: int  # of the present pass, which are in the factors
    cases: Array  # [], the number of cases in these
    factors: Factors  # their means


def gathered(
    groups: tuple[Group, ...],
    add: Callable[..., tuple[Factors, Array]],
    empty: Factors,
    batches: Iterable[Any],
    rng: Array | None,
    start: Gathered | None,
) -> Iterator[Gathered]:
    """Adds one batch after the other, with bases of all of them.

    Args:
      groups: the plan's groups.
      add: from factors, cases, a batch and a key to the new factors and cases.
      empty: factors without data.
      batches: for each batch the loss function's further arguments, as a tuple.
      rng: a key, of which every batch gets its own.
      start: what another run came to.

    Yields:
      What is gathered after each batch. The last has all.

    Raises:
      TypeError: if a batch is no tuple.
      ValueError: if there is no batch.
    """
    moving = [group for group in groups if group.moves]
    start = start or Gathered(0, 0, jnp.zeros((), float), empty)
    first, done = int(start.passes), int(start.batches)
    cases, factors = start.cases, start.factors
    for sweep in range(first, 2 if moving else 1):
        if not done:
            cases, factors = jnp.zeros((), float), _based(moving, factors, empty)
        count = done
        for count, args in enumerate(itertools.islice(batches, done, None), done + 1):
            arguments.sequence("each batch", args, "arguments of the loss function")
            arguments.trees("args", tuple(args))
            key = None if rng is None else jax.random.fold_in(rng, count)
            factors, cases = add(factors, cases, tuple(args), key)
            yield Gathered(sweep, count, cases, factors)
        if not count:
            raise ValueError(
                "over needs at least one batch, a tuple of the loss function's "
                "arguments after the parameters; got none."
            )
        done = 0


def _based(moving: list[Group], factors: Factors, empty: Factors) -> Factors:
    """Factors without data, but for the bases that those of a pass have."""
    if not moving:
        return empty
    bases = inverses.move(moving, factors)
    fresh = {name: dict(parts) for name, parts in empty.items()}
    for group in moving:
        for layer, names in group.carried.items():
            fresh[layer] |= {name: bases[layer][name] for name in names}
    return fresh


def check_start(start: Any, groups: tuple[Group, ...]) -> None:
    """Raises TypeError or ValueError unless a run can go on from there."""
    arguments.instance("start", start, Gathered, "what Curvature.gathered yielded")
    passes = 2 if any(group.moves for group in groups) else 1
    for name, value in (("passes", start.passes), ("batches", start.batches)):
        arguments.integer(f"start.{name}", value, arrays=True)
    if not (0 <= start.passes < passes and start.batches >= 0):
        raise ValueError(
            "start must be what Curvature.gathered of this plan yielded: expected less "
            f"than {passes} complete passes, got passes={start.passes} and "
            f"batches={start.batches}."
        )
