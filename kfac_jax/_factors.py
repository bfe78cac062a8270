"""Statistics of batches, and the factors: moving averages of them, layer by layer."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._products import Products
from kfac_jax._products import check as check_products
from kfac_jax.blocks import Block, Kronecker
from kfac_jax.layers import CROSS, Layer

Factors = dict[str, dict[str, Array]]
"""By layer name."""


class Statistics(NamedTuple):
    """Second moments of one or more batches, as sums.

    Statistics of micro-batches may be added, those of devices added or averaged:
    factors are ratios of these sums.
    """

    weight: Array  # []: how many batches the sums are over; 0 means no information
    layers: Factors  # for each layer the sums its block asks for, float32 or wider
    # the sides of gradients that stay products (Kronecker(gradient_products=True)):
    # of this very batch only, so a sum of several says nothing here
    products: Products


def zeros(layers: Sequence[Layer], which: str) -> Factors:
    """Zeros, and standard bases where factors are in one.

    Args:
      layers: the plan's layers.
      which: "factor_shapes" or "statistics_shapes".

    Returns:
      Arrays of those shapes.
    """
    return {layer.name: _zeros(layer, which) for layer in layers}


def _zeros(layer: Layer, which: str) -> dict[str, Array]:
    standard = layer.carried_shapes if which == "factor_shapes" else {}
    return {
        name: jnp.broadcast_to(jnp.eye(shape[-1], dtype=layer.dtype), shape)
        if name in standard
        else jnp.zeros(shape, layer.dtype)
        for name, shape in _shapes(layer, which).items()
    }


def _shapes(layer: Layer, which: str) -> dict[str, tuple[int, ...]]:
    if which == "factor_shapes" or layer.block is None or not layer.tagged:
        return layer.factor_shapes
    return layer.block.statistics_shapes(layer.shape) | layer.cross_shapes


_WHAT = {"factor_shapes": "factors", "statistics_shapes": "statistics"}


def check(layers: Sequence[Layer], which: str, found: Any) -> None:
    """Raises ValueError unless `found` has the layers and shapes of this plan."""
    names, what = {layer.name for layer in layers}, _WHAT[which]
    if not isinstance(found, dict) or set(found) != names:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{what} must have an entry for each layer of the plan, {sorted(names)}; "
            f"got {got}. Use what this plan returned."
        )
    for layer in layers:
        expected = _shapes(layer, which)
        got = {name: jnp.shape(x) for name, x in found[layer.name].items()}
        if got != expected:
            raise ValueError(
                f"{what} must have the shapes {expected} for layer '{layer.name}'; "
                f"got {got}. Use what this very plan returned."
            )


@jax.named_scope("kfac_factors")
def average(
    layers: Sequence[Layer],
    factors: Factors,
    statistics: Statistics,
    step: Any,
    decay: Any,
) -> tuple[Factors, Array]:
    """Moves the averages on by one batch; see `Curvature.update_factors`.

    Args:
      layers: the plan's layers.
      factors: the averages so far.
      statistics: the batch's.
      step: k, counted from 1.
      decay: the largest ε.

    Returns:
      The averages, and how many layers' statistics were refused as not finite.

    Raises:
      ValueError: if factors or statistics are of another plan.
    """
    check(layers, "factor_shapes", factors)
    check(layers, "statistics_shapes", statistics.layers)
    check_products(layers, statistics.products)
    informed = statistics.weight > 0
    weight = jnp.where(informed, statistics.weight, 1.0)
    epsilon = jnp.minimum(
        1.0 - 1.0 / jnp.asarray(step, float), jnp.asarray(decay, float)
    )
    blocks = {
        layer.name: layer.block
        for layer in layers
        if layer.block is not None and statistics.layers[layer.name]
    }
    new = {
        layer.name: blocks[layer.name].factors(
            {
                name: x
                for name, x in statistics.layers[layer.name].items()
                if name not in layer.cross_shapes
            },
            weight.astype(layer.dtype),
        )
        for layer in layers
        if layer.name in blocks
    }
    finite = _finite_trees(layers, _finite_layers(blocks, new))
    for layer in layers:
        if layer.cross_shapes:
            new[layer.name] |= _cross(layer, blocks, statistics.layers, weight)
    result = dict(factors)
    for layer in new:
        averages = blocks[layer].average(factors[layer], new[layer], epsilon)
        result[layer] = {
            name: jnp.where(informed & finite[layer], averages[name], old)
            for name, old in factors[layer].items()
        }
    refused = [(informed & ~flag).astype(jnp.int32) for flag in finite.values()]
    return result, sum(refused, jnp.zeros((), jnp.int32))


def _cross(
    layer: Layer, blocks: dict[str, Block], statistics: Factors, weight: Array
) -> dict[str, Array]:
    """The factors of a link.

    Where the numbers of rows that count differ, inputs are divided by their geometric
    mean, which keeps the second moments of both layers together semidefinite.
    """
    assert layer.link is not None
    assert layer.link.parent is not None
    counts: list[Array] = []
    for name in (layer.name, layer.link.parent):
        block = blocks[name]
        assert isinstance(block, Kronecker)
        counts.append(block.count(statistics[name]))
    inputs, outputs = (statistics[layer.name][name] for name in CROSS)
    rows = jnp.sqrt(counts[0]) * jnp.sqrt(counts[1])
    factors = inputs / rows, outputs / weight.astype(layer.dtype)
    return dict(zip(CROSS, factors, strict=True))


def _finite_trees(layers: Sequence[Layer], flags: dict[str, Array]) -> dict[str, Array]:
    """Linked layers are finite only together: each other's moments must fit."""
    trees: dict[str, list[str]] = {}
    for layer in layers:
        if layer.link is not None:
            trees.setdefault(layer.link.root, []).append(layer.name)
    result = dict(flags)
    for names in trees.values():
        together = functools.reduce(jnp.logical_and, [flags[name] for name in names])
        result |= dict.fromkeys(names, together)
    return result


def _finite_layers(blocks: dict[str, Block], factors: Factors) -> dict[str, Array]:
    """Whether all factors of a layer are finite, by layer name.

    Of a basis the diagonal is looked at, too: an eigendecomposition that fails is NaN
    throughout.
    """
    matrices = [
        [x for name, x in part.items() if name not in blocks[layer].elementwise]
        for layer, part in factors.items()
    ]
    flags = dict(zip(factors, linalg.finite_diagonals(matrices), strict=True))
    for layer, part in factors.items():
        for name, x in part.items():
            if name in blocks[layer].elementwise:
                flags[layer] &= jnp.isfinite(x).all()
    return flags
