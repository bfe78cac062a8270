"""Optimizer state of which devices keep rows: its way back, and its application."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils.trees import TreeSpec
from kfac_jax.blocks import TNT, Block, Kronecker
from kfac_jax.blocks._sides import sides
from kfac_jax.devices import Distribution, OverAxis, by_rows
from kfac_jax.devices.rows import row_axis
from kfac_jax.plan import Layer
from kfac_jax.statistics.averages import Factors


def check(layers: Sequence[Layer]) -> None:
    """Raises ValueError unless devices can keep rows of all layers' factors."""
    refused = [
        layer.name
        for layer in layers
        if layer.block is not None
        and (layer.carried_shapes or type(layer.block).average is not Block.average)
    ]
    if refused:
        raise ValueError(
            "With state_axes devices keep rows of the factors: expected blocks whose "
            f"factors are averages by entry and carry no basis, got layers {refused}. "
            "Give them Kronecker blocks, or leave state_axes out."
        )


def whole(
    layers: Sequence[Layer], kept: Factors, which: str, sharing: Distribution
) -> Factors:
    """Arrays of which devices have rows, in one collective.

    Args:
      layers: of which layers.
      kept: their rows, by layer name.
      which: "factor_shapes" or "inverse_shapes".
      sharing: the devices.

    Returns:
      The arrays by layer name.
    """
    shapes = {layer.name: getattr(layer, which) for layer in layers}
    names = [(name, key) for name, part in shapes.items() for key in part]
    found = sharing.whole(
        [kept[name][key] for name, key in names],
        [shapes[name][key] for name, key in names],
    )
    result: Factors = {name: {} for name in shapes}
    for (name, key), x in zip(names, found, strict=True):
        result[name][key] = x
    return result


def solve(
    layers: Sequence[Layer],
    inverses: Factors,
    vectors: Mapping[str, Array],
    sharing: Distribution,
) -> dict[str, Array]:
    """`A⁻¹ V G⁻¹` where that is all, each device computing the rows it has.

    Rows of `A⁻¹ V` come from the rows of A⁻¹, and are exchanged; then those of
    `G⁻¹ (A⁻¹ V)ᵀ`. Two collectives, whatever the number of layers.

    Args:
      layers: the plan's layers.
      inverses: rows, by layer name.
      vectors: `[*e, i, o]`, by layer name.
      sharing: the devices.

    Returns:
      The products of those layers that have such a block.
    """
    chosen = [x for x in layers if x.name in vectors and is_product(x)]
    if not chosen:
        return {}
    rows = {layer.name: inverses[layer.name] for layer in chosen}
    whole = {layer.name: vectors[layer.name] for layer in chosen}
    local = functools.partial(_local_solve, chosen)
    return sharing.apart(local, rows, whole)


def is_product(layer: Layer) -> bool:
    """Whether a layer's inverse is `A⁻¹ ⊗ G⁻¹`, with rows where they are expected.

    Subclasses of these blocks may solve in another way.
    """
    if layer.link is not None or type(layer.block) not in (Kronecker, TNT):
        return False
    lead = len(layer.shape.lead)
    return all(row_axis(shape) == lead for shape in layer.inverse_shapes.values())


def _local_solve(
    layers: Sequence[Layer],
    over: OverAxis,
    rows: Factors,
    vectors: dict[str, Array],
) -> dict[str, Array]:
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


def velocity(
    tree: TreeSpec, kept: Any, devices: Distribution | None
) -> list[Array | None]:
    """The leaves of δ0, None where a mask hides them.

    Args:
      tree: describes the parameters.
      kept: δ0 as it is in the state.
      devices: the devices, which may keep rows of it.

    Returns:
      The leaves, whole.
    """
    if not by_rows(devices):
        return tree.masked_leaves(kept, "the velocity")
    shapes = tuple(map(devices.kept_shape, tree.shapes))
    rows = dataclasses.replace(tree, shapes=shapes).masked_leaves(kept, "the velocity")
    places = [i for i, x in enumerate(rows) if x is not None]
    found = devices.whole(
        [x for x in rows if x is not None], [tree.shapes[i] for i in places]
    )
    result: list[Array | None] = [None] * len(rows)
    for i, x in zip(places, found, strict=True):
        result[i] = x
    return result
