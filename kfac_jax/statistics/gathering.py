"""Gathers statistics by pulling cotangents back from the registered outputs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.loops import sum_over
from kfac_jax._jaxpr.states import State
from kfac_jax._utils.dtypes import wide
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.plan.group import Factors, Group, layers_of
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.modes import is_exact
from kfac_jax.statistics import estimation

Pull = Callable[[list[Array]], tuple[list[Array], Factors]]
"""Maps cotangents of the outputs to cotangents of the parameters, and statistics."""


class Squares(NamedTuple):
    """What gathers exact diagonals of parameters without a layer, case by case."""

    names: frozenset[str]
    of: Callable[[Sequence[Array]], Factors]  # from cotangents of the outputs


def gather(
    groups: Sequence[Group],
    mode: str,
    num_samples: int,
    losses: Sequence[RegisteredLoss],
    states: Sequence[State],
    pull: Pull,
    rng: Array | None,
    independent_cases: bool = False,
    diagonals: Factors | None = None,
    squares: Squares | None = None,
) -> tuple[Factors, int]:
    """Gathers the statistics of one batch.

    A parameter without a layer has only its batch gradient `Σ_n g_n / √N`, whose square
    is the diagonal's unbiased estimate `N · ḡ²` if the cases' gradients have mean zero
    and are independent. Sampled ones are; others get a random sign for each case.

    Args:
      groups: the plan's groups.
      mode: the estimation mode.
      num_samples: how many samples the sampled modes draw.
      losses: the registered losses.
      states: for each loss, where the examples are in its output.
      pull: pulls cotangents back.
      rng: a key; without one the random numbers are always the same.
      independent_cases: whether cases count as examples, in exact modes, where the
        examples are not known.
      diagonals: exact diagonals of parameters without a layer, if there are any.
      squares: what gathers exact diagonals of others in exact modes.

    Returns:
      The sums, and the number of samples that they are over.
    """
    key = jax.random.key(0) if rng is None else rng
    if is_exact(mode):
        return (
            _exact(
                groups,
                mode,
                losses,
                states,
                pull,
                key,
                independent_cases,
                diagonals or {},
                squares or Squares(frozenset(), lambda _: {}),
            ),
            1,
        )
    if mode == "fisher_empirical":
        targets = estimation.target_cotangents(losses)
        sums = pull(targets)[1]
        if _squared(groups):
            signed = estimation.random_signs(targets, key)
            sums = {**sums, **_squares(groups, pull(signed)[0])}
        return sums, 1

    def sample(index: Array) -> Factors:
        one = key if num_samples == 1 else jax.random.fold_in(key, index)
        return _both(groups, pull, estimation.random_cotangents(losses, mode, one))

    return sum_over(sample, num_samples), num_samples


def _exact(
    groups: Sequence[Group],
    mode: str,
    losses: Sequence[RegisteredLoss],
    states: Sequence[State],
    pull: Pull,
    key: Array,
    independent_cases: bool,
    diagonals: Factors,
    squares: Squares,
) -> Factors:
    """Sums over all outputs; statistics of inputs only are gathered once."""
    known = {n: part for x in groups for n, part in x.row_statistics.items()}
    exact = {*diagonals, *squares.names}
    drawn = [x for x in _squared(groups) if x.name not in exact]

    def every(cotangents: list[Array]) -> Factors:
        return {**pull(cotangents)[1], **squares.of(cotangents)}

    only = estimation.only_column(losses, states, independent_cases)
    if only is not None and not drawn:
        return {**every(only), **diagonals}

    def column(cotangents: list[Array]) -> Factors:
        return {
            layer: {n: x for n, x in part.items() if n not in known[layer]}
            for layer, part in every(cotangents).items()
        }

    once = _both(groups, pull, estimation.random_cotangents(losses, mode, key))
    columns = estimation.sum_over_outputs(losses, states, column, independent_cases)
    names = {**once, **columns}
    sums = {n: once.get(n, {}) | columns.get(n, {}) for n in names}
    return {**sums, **diagonals}


def _both(groups: Sequence[Group], pull: Pull, cotangents: list[Array]) -> Factors:
    gradients, sums = pull(cotangents)
    return {**sums, **_squares(groups, gradients)}


def _squared(groups: Sequence[Group]) -> list[Layer]:
    return [layer for layer in layers_of(groups) if layer.is_squared]


def _squares(groups: Sequence[Group], gradients: Sequence[Array]) -> Factors:
    result: Factors = {}
    for layer in _squared(groups):
        own = layer.to_matrix([gradients[i] for i in layer.leaves])
        result[layer.name] = {"diagonal": jnp.square(wide(own))}
    return result
