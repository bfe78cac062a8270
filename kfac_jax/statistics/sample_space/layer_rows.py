"""The rows of each layer: inputs and output gradients, or gradients of cases."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.differentiation import reverse_mode
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax.blocks._layout import Arrays
from kfac_jax.devices import Devices
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.operator.remote import Remote
from kfac_jax.operator.summed import GRADIENTS
from kfac_jax.plan.group import Factors
from kfac_jax.plan.plan import Derived, Plan
from kfac_jax.plan.programs import split_program, tapped_program
from kfac_jax.statistics.sample_space.rows import RowSet, cases_of, row_sets, varying
from kfac_jax.statistics.sample_space.taps import Rows, one_by_one, tapped


class LayerRows(NamedTuple):
    """One layer's part of one set's rows, as `Σ_s x dyᵀ` or as gradients."""

    x: Array | None  # [*e, N, S, i], or integers [*e, N, S]; None for gradients
    dy: Array  # [K, *e, N, S, o], or gradients [K, *e, N, i, o]
    lead: int  # the number of axes e
    inputs: int  # i

    @property
    def of_integers(self) -> bool:
        """Whether x are places of ones in rows that are zero elsewhere."""
        return self.x is not None and self.x.ndim == self.lead + 2

    def of(self, cases: slice) -> "LayerRows":
        """The rows of some cases."""
        axes = (slice(None),) * self.lead
        x = None if self.x is None else self.x[(*axes, cases)]
        return self._replace(x=x, dy=self.dy[(slice(None), *axes, cases)])

    def joined(self, devices: Devices) -> "LayerRows":
        """The rows of all devices."""
        x = None if self.x is None else devices.joined(self.x, self.lead)
        return self._replace(x=x, dy=devices.joined(self.dy, self.lead + 1))


ByLayer = dict[str, list[LayerRows | None]]
"""For each layer its part of the rows of each set; None where it has none."""


def layer_rows(
    plan: Plan, params: Any, args: Any, drawn: Sequence[Array]
) -> tuple[ByLayer, list[RowSet]]:
    """The rows of every layer.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      drawn: the cotangents of sampled rows.

    Returns:
      The rows by layer, and the sets that they are of.

    Raises:
      RowsError: if a parameter has no gradient of each case.
    """
    leaves = varying(plan, params, args)
    params = jax.tree.unflatten(plan.tree.treedef, leaves)
    derived = plan.derive(params, args, quiet=True)
    groups, others = tapped(derived)
    losses, pull = _linearized(derived, groups, leaves, args)
    states = derived.traced.found.loss_examples
    sets = row_sets(plan, losses, states, drawn)
    columns = [
        jax.vmap(lambda k, one=one: pull(one.cotangents(k)))(jnp.arange(one.columns))
        for one in sets
    ]
    if all(one.columns == 1 for one in sets):
        dense = jax.tree.map(lambda *own: sum(x[0] for x in own), *columns)
    else:
        # inputs are the same for all rows; only rows without a gradient have none
        key = jax.random.key(0)
        dense = pull([jax.random.normal(key, x.z.shape, x.z.dtype) for x in losses])
    parts = {
        group.layers[0].name: [
            _of_layer(group, dense, own, one.cases)
            for one, own in zip(sets, columns, strict=True)
        ]
        for group in groups
    }
    if not others:
        return parts, sets
    arranged = [
        cases_of(loss, state, plan.independent_cases)
        for loss, state in zip(losses, states, strict=True)
    ]
    for one in sets:
        us = jax.vmap(one.cotangents)(jnp.arange(one.columns))
        found = one_by_one(plan, derived, others, args, leaves, us, arranged, one.cases)
        for name, g in found.items():
            flat = jnp.moveaxis(g[:, :, None], 0, 1)
            parts.setdefault(name, []).append(LayerRows(None, flat, 0, 1))
    return parts, sets


def _linearized(
    derived: Derived, groups: Sequence[Any], leaves: Sequence[Array], args: Any
) -> tuple[list[RegisteredLoss], Any]:
    """The registered losses, and what maps cotangents of them to what taps return."""
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

    return losses, pulled


def _of_layer(group: Any, dense: Factors, sums: Factors, size: int) -> LayerRows | None:
    layer = group.layers[0]
    lead = len(layer.shape.lead)
    if not isinstance(group, Rows):
        own = sums[layer.name][GRADIENTS]
        if isinstance(group, Remote):
            own = jax.vmap(jax.vmap(lambda g: layer.to_matrix([g])))(own)
            own = jnp.moveaxis(own, 1, -3)
        if own.shape[-3] != size:
            return None
        return LayerRows(None, own, lead, own.shape[-2])
    mine = [k for k, x in enumerate(group.sites) if _size(x) == size]
    if not mine:
        return None
    axis = -1 if layer.shape.one_hot else -2
    x = _joined([dense[layer.name][f"x{k}"] for k in mine], axis)
    dy = _joined([sums[layer.name][f"dy{k}"] for k in mine], -2)
    return LayerRows(x, dy, lead, layer.shape.inputs)


def _joined(rows: list[Array], axis: int) -> Array:
    """Joins the rows of several uses, in the widest of their types."""
    widest = max((x.dtype for x in rows), key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([x.astype(widest) for x in rows], axis)


def _size(site: Site) -> int:
    assert isinstance(site.examples, Examples)
    return site.examples.size
