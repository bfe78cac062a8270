"""Which rows U has: the outputs, or samples, of every case."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.states import State
from kfac_jax._utils.dtypes import wide
from kfac_jax.devices import ALONE, Devices
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.plan.modes import is_exact
from kfac_jax.plan.plan import Plan
from kfac_jax.statistics import estimation
from kfac_jax.statistics.estimation import Cases


class RowsError(ValueError):
    """A case has no rows, or none that could be told from those of others."""


class RowSet(NamedTuple):
    """Rows of U with as many for each case: outputs, or samples.

    Attributes:
      cases: N.
      columns: K, the number of rows of each case.
      cotangents: for one of the K the cotangents of the registered outputs.
      push: changes of these outputs to `[N, K]`.
      pull: `[N, K]` to cotangents.
      arrange: arrays like the outputs to `[N, entries]`.
    """

    cases: int
    columns: int
    cotangents: Callable[[Array], list[Array]]
    push: Callable[[Sequence[Array]], Array]
    pull: Callable[[Array], list[Array]]
    arrange: Callable[[Sequence[Array]], Array]


def varying(plan: Plan, params: Any, args: Any) -> list[Array]:
    """The parameters' leaves, in `shard_map` as different on each device as data are.

    Each device has rows and products of its own: JAX must not sum them over devices.
    """
    data = jax.tree.leaves(args)
    return [_compat.vary_like(x, *data) for x in plan.tree.leaves(params, "params")]


def cases_of(loss: RegisteredLoss, state: State, independent: bool) -> Cases:
    """How the cases of a registered output are arranged.

    Args:
      loss: the registered loss.
      state: where its examples are.
      independent: whether each case counts as an example where that is not known.

    Returns:
      The arrangement.

    Raises:
      RowsError: if it is not known.
    """
    within = estimation.within(loss, state, independent)
    if within[1] == 1 and len(loss.z) > 1:
        where = getattr(state, "where", "") or "the registered loss"
        raise RowsError(
            "The sample space needs to know which outputs belong to one case, which "
            f"could not be followed since {where}. Pass independent_cases=True if no "
            "case's output depends on another's input, or use another structure."
        )
    return within


def draws(
    plan: Plan, losses: Sequence[RegisteredLoss], rng: Array | None
) -> list[Array]:
    """The cotangents of sampled rows, `[S, ...]` for each loss; none in exact modes."""
    if is_exact(plan.estimation_mode):
        return []
    count = plan.num_samples
    if plan.estimation_mode == "fisher_empirical":
        return [u[None] for u in estimation.target_cotangents(losses)]
    if rng is None:
        raise ValueError(
            f'estimation_mode="{plan.estimation_mode}" samples; pass a key as rng=key: '
            "expected rng, got None."
        )
    draw = functools.partial(estimation.random_cotangents, losses, plan.estimation_mode)
    drawn = jax.vmap(draw)(jax.random.split(rng, count))
    return [u / count**0.5 for u in drawn]


def row_sets(
    plan: Plan,
    losses: Sequence[RegisteredLoss],
    states: Sequence[State],
    drawn: Sequence[Array],
) -> list[RowSet]:
    """The rows of U, in order.

    Args:
      plan: the plan.
      losses: the registered losses.
      states: where the examples are in each.
      drawn: what `draws` returned.

    Returns:
      One set in which rows of one case are adjacent or, if losses are of different
      numbers of cases, one for each loss.
    """
    arranged = [
        cases_of(loss, state, plan.independent_cases)
        for loss, state in zip(losses, states, strict=True)
    ]
    together = len({x.size for x in arranged}) == 1
    every = [*range(len(losses))]
    make = functools.partial(_row_set, losses, arranged, drawn)
    return [make(every)] if together else [make([i]) for i in every]


def _row_set(
    losses: Sequence[RegisteredLoss],
    arranged: Sequence[Cases],
    drawn: Sequence[Array],
    chosen: Sequence[int],
) -> RowSet:
    size = arranged[chosen[0]].size
    widths = [losses[i].z.size // size for i in chosen]
    ends = [sum(widths[:k]) for k in range(len(widths) + 1)]

    def arrange(arrays: Sequence[Array]) -> Array:
        return jnp.concatenate([arranged[i].split(arrays[i]) for i in chosen], 1)

    def placed(parts: Mapping[int, Array]) -> list[Array]:
        zeros = (jnp.zeros_like(x.z) for x in losses)
        return [parts.get(i, zero) for i, zero in enumerate(zeros)]

    if drawn:
        count = len(drawn[0])

        def one(s: Array) -> list[Array]:
            return placed({i: drawn[i][s] for i in chosen})

        def push(dz: Sequence[Array]) -> Array:
            rows = [
                jnp.einsum(
                    "sne,ne->ns",
                    wide(jax.vmap(arranged[i].split)(drawn[i])),
                    wide(arranged[i].split(dz[i])),
                )
                for i in chosen
            ]
            return sum(rows[1:], rows[0])

        def pull(w: Array) -> list[Array]:
            def weighted(i: int) -> Array:
                rows = wide(jax.vmap(arranged[i].split)(drawn[i]))
                like = losses[i].z
                total = jnp.einsum("sne,ns->ne", rows, w.astype(rows.dtype))
                return arranged[i].join(total, like).astype(like.dtype)

            return placed({i: weighted(i) for i in chosen})

        return RowSet(size, count, one, push, pull, arrange)

    def rooted(rows: Array) -> list[Array]:
        parts = {
            i: losses[i].multiply_root(
                arranged[i].join(rows[:, a:b], losses[i].z).astype(losses[i].z.dtype)
            )
            for i, a, b in zip(chosen, ends[:-1], ends[1:], strict=True)
        }
        return placed(parts)

    def column(k: Array) -> list[Array]:
        return rooted(jnp.zeros((size, ends[-1])).at[:, k].set(1))

    def moved(dz: Sequence[Array]) -> Array:
        pairs = zip(losses, dz, strict=True)
        return arrange([loss.multiply_root_transpose(x) for loss, x in pairs])

    return RowSet(size, ends[-1], column, moved, rooted, arrange)


def joined(parts: Sequence[Array], devices: Devices) -> Array:
    """The rows of all devices, `[NR]`, from `[N, K]` of each set on this one."""
    return jnp.concatenate([devices.joined(x.reshape(-1)) for x in parts])


def own(sets: Sequence[RowSet], rows: Array, devices: Devices) -> list[Array]:
    """The inverse of `joined`: this device's `[N, K]` of each set."""
    sizes = [one.cases * one.columns for one in sets]
    ends = [devices.parts() * sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return [
        devices.own(rows[a:b]).reshape(one.cases, one.columns)
        for one, a, b in zip(sets, ends[:-1], ends[1:], strict=True)
    ]


def centered(sets: Sequence[RowSet], rows: Array, devices: Devices = ALONE) -> Array:
    """Rows of all devices (of a matrix or vector) less their mean over the cases."""
    result: list[Array] = []
    start = 0
    for one in sets:
        cases = devices.parts() * one.cases
        stop = start + cases * one.columns
        part = rows[start:stop].reshape(cases, one.columns, *rows.shape[1:])
        part = part - part.mean(0, keepdims=True)
        result.append(part.reshape(stop - start, *rows.shape[1:]))
        start = stop
    return jnp.concatenate(result)
