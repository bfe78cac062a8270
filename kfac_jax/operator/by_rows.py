"""Inverses whose rows are spread over devices: how they are joined, and applied."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kfac_jax.blocks._sides import sides
from kfac_jax.devices import Devices, OverAxis
from kfac_jax.plan.group import Factors, FactorShapes, Group, Vectors
from kfac_jax.plan.layer import Layer


def full(shapes: FactorShapes, rows: Factors, devices: Devices) -> Factors:
    """Joins the rows of arrays in one collective.

    Args:
      shapes: the shapes of the full arrays, by layer name.
      rows: this device's rows of them, by layer name.
      devices: the devices.

    Returns:
      The full arrays by layer name.
    """
    names = [(name, key) for name, part in shapes.items() for key in part]
    found = devices.full(
        [rows[name][key] for name, key in names],
        [shapes[name][key] for name, key in names],
    )
    result: Factors = {name: {} for name in shapes}
    for (name, key), x in zip(names, found, strict=True):
        result[name][key] = x
    return result


def solve(
    groups: Sequence[Group], inverses: Factors, vectors: Vectors, devices: Devices
) -> Vectors:
    """Computes `A⁻¹ V G⁻¹` from rows of A⁻¹ and G⁻¹, without joining the inverses.

    Each device multiplies its rows of A⁻¹ by V, and the rows of `A⁻¹ V` are exchanged;
    then the same with `G⁻¹ (A⁻¹ V)ᵀ`. That makes two collectives for any number of
    layers.

    Args:
      groups: the plan's groups.
      inverses: this device's rows, by layer name.
      vectors: `[*e, i, o]`, by layer name.
      devices: the devices.

    Returns:
      The products of the layers in groups with `solves_by_rows`; none if devices do not
      keep rows.
    """
    if not devices.cuts_state:
        return {}
    chosen = [
        layer
        for group in groups
        if group.solves_by_rows
        for layer in group.layers
        if layer.name in vectors
    ]
    if not chosen:
        return {}
    rows = {layer.name: inverses[layer.name] for layer in chosen}
    given = {layer.name: vectors[layer.name] for layer in chosen}
    return devices.apart(functools.partial(_local_solve, chosen), rows, given)


def _local_solve(
    layers: Sequence[Layer], over: OverAxis, rows: Factors, vectors: Vectors
) -> Vectors:
    """Multiplies by A⁻¹, then by G⁻¹, exchanging rows after each.

    `_multiply` contracts the last axis but one. After the first round the axes of V are
    swapped, so that the second one contracts its other side.
    """
    for inputs in (True, False):
        parts: list[Array] = []
        for layer in layers:
            a, g = (side.array for side in sides(rows[layer.name]))
            v = vectors[layer.name]
            parts.append(_multiply(a if inputs else g, v, over))
        exchanged = over.gather(parts)
        for layer, x in zip(layers, exchanged, strict=True):
            count = layer.shape.inputs if inputs else layer.shape.outputs
            # cuts off the padding, and puts the multiplied side last
            vectors = vectors | {layer.name: jnp.moveaxis(x[:count], 0, -1)}
    return vectors


def _multiply(rows: Array, v: Array, over: OverAxis) -> Array:
    """This device's rows of `K V`, `[rows, *e, c]`.

    Args:
      rows: the same rows of K, `[rows, *e, d]`, or `[rows, *e]` of a diagonal K.
      v: V, `[*e, d, c]`.
      over: the devices.

    Returns:
      The rows of the product.
    """
    if rows.ndim == v.ndim:
        return jnp.einsum("r...d,...dc->r...c", rows, v)
    return rows[..., None] * over.own_part(jnp.moveaxis(v, -2, 0))
