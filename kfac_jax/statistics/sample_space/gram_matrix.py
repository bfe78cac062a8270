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

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._utils.dtypes import wide
from kfac_jax.blocks._layout import Arrays
from kfac_jax.devices import ALONE, Devices
from kfac_jax.plan.modes import is_exact
from kfac_jax.plan.plan import Plan
from kfac_jax.plan.programs import outputs_program
from kfac_jax.statistics.averages import Statistics
from kfac_jax.statistics.sample_space.layer_rows import LayerRows, layer_rows
from kfac_jax.statistics.sample_space.rows import RowSet, centered, draws

NAME = "sample space"
"""The name of the cotangents of sampled rows among statistics."""

LARGEST = 2**26
"""How many numbers the gradients of all rows by a chunk of inputs are, at most."""

PIECES, LEAST = 4, 64
"""Into how many pieces T is cut, and how many rows these have at least."""


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
      RowsError: if a parameter has no gradient of each case.
    """
    parts, sets = layer_rows(plan, params, args, drawn)
    total = _total([*parts.values()], sets, devices)
    if plan.structure.centered:  # type: ignore[attr-defined]
        total = centered(sets, centered(sets, total, devices).T, devices)
    return total


def _total(
    parts: Sequence[Sequence[LayerRows | None]],
    sets: Sequence[RowSet],
    devices: Devices,
) -> Array:
    """The sum over layers of the products of rows; this device's rows by all."""
    # of several, also under `jit`, cases may be spread over devices, and are not cut
    alone, dtype = devices.size() == 1, jnp.result_type(float)
    pieces = [x for i, one in enumerate(sets) for x in _pieces(i, one, alone)]
    every = range(len(pieces))
    # T is symmetric, of which one device computes one side of the diagonal's pieces
    pairs = [(p, q) for p in every for q in every if not alone or p <= q]
    blocks = {
        (p, q): jnp.zeros((pieces[p].rows, devices.parts() * pieces[q].rows), dtype)
        for p, q in pairs
    }
    for of_sets in parts:
        for p, q, block in _products(of_sets, pieces, pairs, devices):  # [n, k, m, l]
            old = blocks[p, q]
            blocks[p, q] = old + block.reshape(old.shape).astype(dtype)
    grid = [
        [blocks[p, q] if (p, q) in blocks else blocks[q, p].T for q in every]
        for p in every
    ]
    rows = [devices.joined(jnp.concatenate(row, 1)) for row in grid]
    # the mean over devices of their own Fisher matrices
    return jnp.concatenate(rows) / devices.parts()


class _Piece(NamedTuple):
    """Some of a set's cases."""

    set: int
    cases: slice
    rows: int


def _pieces(index: int, one: RowSet, alone: bool) -> list[_Piece]:
    """Those of one set: several for a device by itself, if they are large."""
    count = PIECES if alone and one.cases * one.columns >= PIECES * LEAST else 1
    ends = [one.cases * k // count for k in range(count + 1)]
    return [
        _Piece(index, slice(a, b), (b - a) * one.columns)
        for a, b in itertools.pairwise(ends)
    ]


def _products(
    sets: Sequence[LayerRows | None],
    pieces: Sequence[_Piece],
    pairs: Sequence[tuple[int, int]],
    devices: Devices,
) -> Iterator[tuple[int, int, Array]]:
    """One layer's part of T: for pairs of pieces the products of their rows."""
    present = {i: x for i, x in enumerate(sets) if x is not None}
    if all(map(is_pairwise, present.values())):
        mine = {
            p: present[x.set].of(x.cases)
            for p, x in enumerate(pieces)
            if x.set in present
        }
        everyone = {p: x.joined(devices) for p, x in mine.items()}
        for p, q in pairs:
            if p in mine and q in mine:
                yield p, q, _pair(mine[p], everyone[q])
        return
    # the gradients of all rows, by a chunk of the inputs at a time
    inputs = next(iter(present.values())).inputs
    width = max(1, min(inputs, LARGEST // sum(map(_per_input, present.values()))))
    for start in range(0, inputs, width):
        rows = {i: _gradients(x, start, width) for i, x in present.items()}
        own = {
            p: rows[x.set][x.cases] for p, x in enumerate(pieces) if x.set in present
        }
        others = {p: devices.joined(x) for p, x in own.items()}
        for p, q in pairs:
            if p in own and q in own:
                yield p, q, jnp.einsum("nkp,mlp->nkml", own[p], others[q])


def is_pairwise(rows: LayerRows) -> bool:
    """Whether products of inputs and of output gradients cost less than gradients."""
    if rows.x is None:
        return False
    cases, positions, outputs = rows.dy.shape[-3:]
    fits = (rows.dy.shape[0] * cases * positions) ** 2 <= LARGEST
    inputs = 1 if rows.of_integers else rows.inputs
    cheaper = positions**2 * (inputs + outputs) <= rows.inputs * outputs
    return fits or cheaper if rows.of_integers else fits and cheaper


def _pair(a: LayerRows, b: LayerRows) -> Array:
    """`[n, k, m, l]`: the sum over positions of `(x · x) (dy · dy)`."""
    assert a.x is not None and b.x is not None
    xa, xb = (_flat(x, lead, 0) for x, lead in ((a.x, a.lead), (b.x, b.lead)))
    ya, yb = (wide(_flat(x.dy, x.lead, 1)) for x in (a, b))  # [k, e, n, s, o]
    if a.of_integers:  # [e, n, s]
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


def _per_input(rows: LayerRows) -> int:
    """How many numbers the gradients of all rows by one input are."""
    lead = math.prod(rows.dy.shape[1 : 1 + rows.lead])
    return rows.dy.shape[0] * lead * rows.dy.shape[-3] * rows.dy.shape[-1]


def _gradients(rows: LayerRows, start: int, width: int) -> Array:
    """`[N, K, p]`: the gradients by some inputs."""
    dy = _flat(rows.dy, rows.lead, 1)
    if rows.x is None:
        own = dy[..., start : start + width, :]
    else:
        x = _flat(rows.x, rows.lead, 0)
        if rows.of_integers:
            stop = min(start + width, rows.inputs)
            x = x[..., None] == jnp.arange(start, stop, dtype=x.dtype)
            x = x.astype(wide(dy).dtype)
        else:
            x = wide(x[..., start : start + width])
        own = jnp.einsum("ensi,kenso->kenio", x, wide(dy))
    moved = jnp.moveaxis(wide(own), 2, 0)  # [N, K, e, i, o]
    return moved.reshape(*moved.shape[:2], -1)
