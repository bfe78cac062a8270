"""Inverses of which devices keep rows: their way back, and their application."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kfac_jax.blocks._sides import sides
from kfac_jax.devices import Devices, OverAxis
from kfac_jax.plan.group import Factors, FactorShapes, Group, Vectors
from kfac_jax.plan.layer import Layer


def whole(shapes: FactorShapes, kept: Factors, devices: Devices) -> Factors:
    """Arrays of which devices have rows, in one collective.

    Args:
      shapes: of which arrays, by layer name.
      kept: their rows.
      devices: the devices.

    Returns:
      The arrays by layer name.
    """
    names = [(name, key) for name, part in shapes.items() for key in part]
    found = devices.whole(
        [kept[name][key] for name, key in names],
        [shapes[name][key] for name, key in names],
    )
    result: Factors = {name: {} for name in shapes}
    for (name, key), x in zip(names, found, strict=True):
        result[name][key] = x
    return result


def solve(
    groups: Sequence[Group], inverses: Factors, vectors: Vectors, devices: Devices
) -> Vectors:
    """`A⁻¹ V G⁻¹` where that is all, each device computing the rows it has.

    Rows of `A⁻¹ V` come from the rows of A⁻¹, and are exchanged; then those of
    `G⁻¹ (A⁻¹ V)ᵀ`. Two collectives, whatever the number of layers.

    Args:
      groups: the plan's groups.
      inverses: rows, by layer name.
      vectors: `[*e, i, o]`, by layer name.
      devices: the devices.

    Returns:
      The products of those layers that have such a block; none where each device has
      all of the inverses.
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
    """In each of two rounds the side to multiply is made the rows' side."""
    for inputs in (True, False):
        parts: list[Array] = []
        for layer in layers:
            a, g = (side.array for side in sides(rows[layer.name]))
            v = vectors[layer.name]
            parts.append(_multiply(a if inputs else g, v, over))
        exchanged = over.gather(parts)
        for layer, x in zip(layers, exchanged, strict=True):
            count = layer.shape.inputs if inputs else layer.shape.outputs
            # the other side is next
            vectors = vectors | {layer.name: jnp.moveaxis(x[:count], 0, -1)}
    return vectors


def _multiply(kept: Array, v: Array, over: OverAxis) -> Array:
    """Some rows of `K V`, `[rows, *e, c]`, for V `[*e, d, c]` and the same rows of K.

    Those are `[rows, *e, d]`, or `[rows, *e]` of a diagonal.
    """
    if kept.ndim == v.ndim:
        return jnp.einsum("r...d,...dc->r...c", kept, v)
    return kept[..., None] * over.own_part(jnp.moveaxis(v, -2, 0))
