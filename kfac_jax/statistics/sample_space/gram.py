"""The Gram matrix `T = U Uᵀ` of all rows, which are never formed.

Of a layer that is used once for each case, with inputs x and output gradients dy, rows
have the products `(x_n · x_m) (dy_nr · dy_mq)`; of others the gradients of cases are
formed, a layer and a chunk of its inputs at a time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat, axis_types
from kfac_jax._jaxpr.differentiation import reverse_mode
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax._utils.dtypes import wide
from kfac_jax.blocks._layout import Arrays
from kfac_jax.devices import ALONE, Devices
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.operator.remote import Remote
from kfac_jax.operator.summed import GRADIENTS
from kfac_jax.plan.group import Factors
from kfac_jax.plan.modes import is_exact
from kfac_jax.plan.plan import Plan
from kfac_jax.plan.programs import outputs_program, split_program, tapped_program
from kfac_jax.statistics.averages import Statistics
from kfac_jax.statistics.sample_space.rows import (
    RowSet,
    cases_of,
    centered,
    draws,
    row_sets,
    varying,
)
from kfac_jax.statistics.sample_space.taps import Rows, one_by_one, tapped

NAME = "sample space"
"""The name of the cotangents of sampled rows among statistics."""

LARGEST = 2**26
"""How many numbers the gradients of all rows by a chunk of inputs are, at most."""


def statistics(
    plan: Plan, params: Any, args: Any, leaves: Sequence[Array], rng: Array | None
) -> Statistics:
    """The cotangents of sampled rows; exact modes have none.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      leaves: the parameters' leaves.
      rng: a key for the sampled modes.

    Returns:
      Statistics with arrays of that name.
    """
    arrays: Arrays = {}
    if not is_exact(plan.estimation_mode):
        traced = plan.derive(params, args, quiet=True).traced
        data = jax.tree.leaves(args)
        _, losses = run(outputs_program(traced), [*leaves, *data], None)
        drawn = axis_types.auto(lambda own: draws(plan, own, rng))(losses)
        arrays = {f"cotangents {i:03}": u for i, u in enumerate(drawn)}
    one = jnp.ones((), jnp.float32)
    return Statistics(one, one, {NAME: arrays}, {})


def sampled(gathered: Statistics) -> list[Array]:
    """The cotangents among statistics, `[S, ...]` for each registered loss."""
    arrays = gathered.layers[NAME]
    return [arrays[name] for name in sorted(arrays)]


def gram(
    plan: Plan,
    params: Any,
    args: Any,
    drawn: Sequence[Array],
    devices: Devices = ALONE,
) -> Array:
    """`T = U Uᵀ`, `[NR, NR]`.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      drawn: the cotangents of sampled rows, from `sampled`.
      devices: devices that have a part each of the batch. Each multiplies its rows by
        those of all.

    Returns:
      T, the same on all devices.

    Raises:
      ValueError: if a parameter has no gradient of each case.
    """
    leaves = varying(plan, params, args)
    params = jax.tree.unflatten(plan.tree.treedef, leaves)
    derived = plan.derive(params, args, quiet=True)
    groups, others = tapped(derived)
    found, data = derived.traced.found, jax.tree.leaves(args)
    # without what follows the registered outputs, a gradient of the loss's own for one
    program, _ = split_program(tapped_program(derived.traced, groups, derived.sites))
    fixed = jax.lax.stop_gradient([*leaves, *data])

    def probes_of(group: Any) -> Arrays:
        own = (
            group.probes()
            if isinstance(group, Rows)
            else group.probes(derived.sites, data)[group.name]
        )
        return {name: _compat.vary_like(x, *data) for name, x in own.items()}

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
            pairs = zip(cotangents, zs, strict=True)
            (sums,) = pull([_compat.vary_like(u, z) for u, z in pairs])
        return sums

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
    total = _total(parts, sets, devices)
    if plan.structure.centered:  # type: ignore[attr-defined]
        total = centered(sets, centered(sets, total, devices).T, devices)
    return total


def _total(
    parts: Sequence[Sequence["_LayerRows | None"]],
    sets: Sequence[RowSet],
    devices: Devices,
) -> Array:
    """The sum over layers of the products of rows; this device's rows by all."""
    blocks: dict[tuple[int, int], Array] = {}
    for of_sets in parts:
        for i, j, block in _products(of_sets, devices):  # [n, k, m, l]
            blocks[i, j] = blocks[i, j] + block if (i, j) in blocks else block
    count = devices.parts()
    sizes = [one.cases * one.columns for one in sets]
    dtype = jnp.result_type(float)

    def of_pair(i: int, j: int) -> Array:
        shape = sizes[i], count * sizes[j]
        block = blocks.get((i, j))
        zeros = jnp.zeros(shape, dtype)
        return zeros if block is None else block.reshape(shape).astype(dtype)

    rows = [
        jnp.concatenate([of_pair(i, j) for j in range(len(sets))], 1)
        for i in range(len(sets))
    ]
    # the mean over devices of their own Fisher matrices
    return jnp.concatenate([devices.joined(x) for x in rows]) / count


class _LayerRows(NamedTuple):
    """One layer's part of one set's rows, as `Σ_s x dyᵀ` or as gradients."""

    x: Array | None  # [*e, N, S, i], or integers [*e, N, S]; None for gradients
    dy: Array  # [K, *e, N, S, o], or gradients [K, *e, N, i, o]
    lead: int  # the number of axes e

    def joined(self, devices: Devices) -> "_LayerRows":
        """The rows of all devices."""
        x = None if self.x is None else devices.joined(self.x, self.lead)
        return self._replace(x=x, dy=devices.joined(self.dy, self.lead + 1))


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


def _products(
    sets: Sequence[_LayerRows | None], devices: Devices
) -> Iterator[tuple[int, int, Array]]:
    """One layer's part of T: for pairs of sets the products of their rows."""
    present = [(i, x) for i, x in enumerate(sets) if x is not None]
    if all(_is_pairwise(x) for _, x in present):
        everyone = [(i, x.joined(devices)) for i, x in present]
        for i, a in present:
            for j, b in everyone:
                yield i, j, _pair(a, b)
        return
    # the gradients of all rows, by a chunk of the inputs at a time
    inputs = _inputs(present[0][1])
    width = max(1, min(inputs, LARGEST // sum(_per_input(x) for _, x in present)))
    for start in range(0, inputs, width):
        rows = [(i, _gradients(x, start, width)) for i, x in present]
        everyone = [(i, devices.joined(x)) for i, x in rows]
        for i, a in rows:
            for j, b in everyone:
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
