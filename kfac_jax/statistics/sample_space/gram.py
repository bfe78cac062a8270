"""The Gram matrix `T = U Uᵀ` of all rows, which are never formed.

Of a layer that is used once for each case, with inputs x and output gradients dy, rows
have the products `(x_n · x_m) (dy_nr · dy_mq)`; of others the gradients of cases are
formed, a layer and a chunk of its inputs at a time.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.differentiation import reverse_mode
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax._utils.dtypes import wide
from kfac_jax.blocks._layout import Arrays
from kfac_jax.distributions import (
    RegisteredLoss,
)
from kfac_jax.operator.remote import Remote
from kfac_jax.operator.summed import GRADIENTS
from kfac_jax.plan.group import Factors
from kfac_jax.plan.plan import Plan
from kfac_jax.plan.programs import split_program, tapped_program
from kfac_jax.statistics.averages import Statistics
from kfac_jax.statistics.sample_space.rows import cases_of, centered, draws, row_sets
from kfac_jax.statistics.sample_space.taps import Rows, one_by_one, tapped

NAME = "sample space"
"""The name of T, and of the cotangents of sampled rows, among statistics."""

LARGEST = 2**26
"""How many numbers the gradients of all rows by a chunk of inputs are, at most."""


def statistics(
    plan: Plan, params: Any, args: Any, leaves: Sequence[Array], rng: Array | None
) -> Statistics:
    """T, and the cotangents of sampled rows.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      leaves: the parameters' leaves.
      rng: a key for the sampled modes.

    Returns:
      Statistics with arrays of that name.

    Raises:
      ValueError: if a parameter has no gradient of each case.
    """
    derived = plan.derive(params, args, quiet=True)
    groups, others = tapped(derived)
    found, data = derived.traced.found, jax.tree.leaves(args)
    # without what follows the registered outputs, a gradient of the loss's own for one
    program, _ = split_program(tapped_program(derived.traced, groups, derived.sites))
    fixed = jax.lax.stop_gradient([*leaves, *data])

    def probes_of(group: Any) -> Arrays:
        if isinstance(group, Rows):
            return group.probes()
        return group.probes(derived.sites, data)[group.name]

    probes = {group.layers[0].name: probes_of(group) for group in groups}

    def outputs(probes: Factors) -> tuple[list[Array], list[RegisteredLoss]]:
        spread = dict(probes)
        for group in groups:
            if not isinstance(group, Rows):
                own = {group.name: probes[group.name]}
                spread |= group.spread(own, derived.sites, found.graph, fixed)
        _, losses = run(program, [*leaves, *data], spread)
        return [loss.z for loss in losses], losses

    zs, pull, losses = jax.vjp(outputs, probes, has_aux=True)

    def pulled(cotangents: list[Array]) -> Factors:
        with reverse_mode(program.graph, len(leaves)):
            (sums,) = pull(cotangents)
        return sums

    drawn = draws(plan, losses, rng)
    sets = row_sets(plan, losses, found.loss_examples, drawn)
    # inputs are the same for all rows; only rows without a gradient have none
    dense = pulled([jax.random.normal(jax.random.key(0), z.shape, z.dtype) for z in zs])
    columns = [
        jax.vmap(lambda k, one=one: pulled(one.cotangents(k)))(jnp.arange(one.columns))
        for one in sets
    ]
    parts = [
        [
            _of_layer(group, dense, own, one.cases)
            for one, own in zip(sets, columns, strict=True)
        ]
        for group in groups
    ]
    if others:
        arranged = [
            cases_of(loss, state, plan.independent_cases)
            for loss, state in zip(losses, found.loss_examples, strict=True)
        ]
        by_set: list[list[Array]] = []
        for one in sets:
            us = jax.vmap(one.cotangents)(jnp.arange(one.columns))
            by_set.append(
                one_by_one(plan, derived, others, args, leaves, us, arranged, one.cases)
            )
        for of_sets in zip(*by_set, strict=True):
            flat = [jnp.moveaxis(g[:, :, None], 0, 1) for g in of_sets]
            parts.append([_LayerRows(None, g, 0) for g in flat])
    ends = [0, *itertools.accumulate(one.cases * one.columns for one in sets)]
    total = jnp.zeros((ends[-1], ends[-1]), jnp.result_type(float))
    for of_sets in parts:
        for i, j, block in _products(of_sets):  # [n, k, m, l]
            rows = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
            shape = total[rows].shape
            total = total.at[rows].add(block.reshape(shape).astype(total.dtype))
    if plan.structure.centered:  # type: ignore[attr-defined]
        total = centered(sets, centered(sets, total).T)
    arrays = {f"cotangents {i:03}": u for i, u in enumerate(drawn)}
    one = jnp.ones((), jnp.float32)
    return Statistics(one, one, {NAME: {"gram": total} | arrays}, {})


class _LayerRows(NamedTuple):
    """One layer's part of one set's rows, as `Σ_s x dyᵀ` or as gradients."""

    x: Array | None  # [*e, N, S, i], or integers [*e, N, S]; None for gradients
    dy: Array  # [K, *e, N, S, o], or gradients [K, *e, N, i, o]
    lead: int  # the number of axes e


def _of_layer(
    group: Any, dense: Factors, sums: Factors, size: int
) -> _LayerRows | None:
    layer = group.layers[0]
    lead = len(layer.shape.lead)
    if not isinstance(group, Rows):
        own = sums[layer.name][GRADIENTS]
        if isinstance(group, Remote):
            own = jax.vmap(jax.vmap(lambda g: layer.to_matrix([g])))(own)
            own = jnp.moveaxis(own, 1, -3)
        return _LayerRows(None, own, lead) if own.shape[-3] == size else None
    mine = [k for k, x in enumerate(group.sites) if _size(x) == size]
    if not mine:
        return None
    axis = -1 if layer.shape.one_hot else -2
    x = jnp.concatenate([dense[layer.name][f"x{k}"] for k in mine], axis)
    dy = jnp.concatenate([sums[layer.name][f"dy{k}"] for k in mine], -2)
    return _LayerRows(x, dy, lead)


def _size(site: Site) -> int:
    assert isinstance(site.examples, Examples)
    return site.examples.size


def _products(sets: Sequence[_LayerRows | None]) -> Iterator[tuple[int, int, Array]]:
    """One layer's part of T: for pairs of sets the products of their rows."""
    present = [(i, x) for i, x in enumerate(sets) if x is not None]
    if all(_is_pairwise(x) for _, x in present):
        for i, a in present:
            for j, b in present:
                yield i, j, _pair(a, b)
        return
    # the gradients of all rows, by a chunk of the inputs at a time
    inputs = _inputs(present[0][1])
    width = max(1, min(inputs, LARGEST // sum(_per_input(x) for _, x in present)))
    for start in range(0, inputs, width):
        rows = [(i, _gradients(x, start, width)) for i, x in present]
        for i, a in rows:
            for j, b in rows:
                yield i, j, jnp.einsum("nkp,mlp->nkml", a, b)


def _is_pairwise(rows: _LayerRows) -> bool:
    """Whether products of inputs and of output gradients cost less than gradients."""
    if rows.x is None:
        return False
    if rows.x.ndim == rows.lead + 2:  # integers
        return True
    positions, inputs = rows.x.shape[-2:]
    count, outputs = rows.dy.shape[0] * rows.x.shape[-3], rows.dy.shape[-1]
    pairs = positions**2 * (inputs + outputs)
    return pairs <= inputs * outputs and (count * positions) ** 2 <= LARGEST


def _pair(a: _LayerRows, b: _LayerRows) -> Array:
    """`[n, k, m, l]`: the sum over positions of `(x · x) (dy · dy)`."""
    assert a.x is not None and b.x is not None
    xa, xb = (_flat(x, lead, 0) for x, lead in ((a.x, a.lead), (b.x, b.lead)))
    ya, yb = (wide(_flat(x.dy, x.lead, 1)) for x in (a, b))  # [k, e, n, s, o]
    if a.x.ndim == a.lead + 2:  # integers [e, n, s]
        inputs = (xa[..., None, None] == xb[:, None, None]).astype(ya.dtype)
    else:
        inputs = jnp.einsum("ensi,emti->ensmt", wide(xa), wide(xb))
    outputs = jnp.einsum("kenso,lemto->eknslmt", ya, yb)
    return jnp.einsum("ensmt,eknslmt->nkml", inputs, outputs)


def _flat(x: Array, lead: int, before: int) -> Array:
    """All axes e as one."""
    shape = x.shape
    middle = math.prod(shape[before : before + lead])
    return x.reshape(*shape[:before], middle, *shape[before + lead :])


def _inputs(rows: _LayerRows) -> int:
    return rows.dy.shape[-2] if rows.x is None else rows.x.shape[-1]


def _per_input(rows: _LayerRows) -> int:
    """How many numbers the gradients of all rows by one input are."""
    lead = math.prod(rows.dy.shape[1 : 1 + rows.lead])
    return rows.dy.shape[0] * lead * rows.dy.shape[-3] * rows.dy.shape[-1]


def _gradients(rows: _LayerRows, start: int, width: int) -> Array:
    """`[N, K, p]`: the gradients by some inputs."""
    dy = _flat(rows.dy, rows.lead, 1)
    if rows.x is None:
        own = dy[..., start : start + width, :]
    else:
        x = _flat(rows.x, rows.lead, 0)[..., start : start + width]
        own = jnp.einsum("ensi,kenso->kenio", wide(x), wide(dy))
    moved = jnp.moveaxis(wide(own), 2, 0)  # [N, K, e, i, o]
    return moved.reshape(*moved.shape[:2], -1)
