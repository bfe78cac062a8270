"""Statistics of batches, and the factors: moving averages of them, layer by layer."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._utils import fresh
from kfac_jax._utils.arguments import dtype_of, instance, is_array, is_number, shown
from kfac_jax.blocks import Block
from kfac_jax.blocks._block import divide
from kfac_jax.devices import Distribution, by_rows
from kfac_jax.operator.products import Products
from kfac_jax.operator.products import check as check_products
from kfac_jax.plan import CROSS, Layer

Factors = dict[str, dict[str, Array]]
"""By layer name."""


class Statistics(NamedTuple):
    """Second moments of one or more batches, as sums.

    Statistics of micro-batches may be added, those of devices added or averaged:
    factors are ratios of these sums.
    """

    weight: Array  # []: how many batches the sums are over; 0 means no information
    cases: Array  # []: how many cases no mask hides; 0 means no information either
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
        name: fresh.identities(shape, layer.dtype)
        if name in standard
        else fresh.full(shape, 0.0, layer.dtype)
        for name, shape in _shapes(layer, which).items()
    }


def _shapes(layer: Layer, which: str) -> dict[str, tuple[int, ...]]:
    if which == "factor_shapes" or layer.block is None or not layer.tagged:
        return layer.factor_shapes
    return layer.block.statistics_shapes(layer.shape) | layer.cross_shapes


def check_statistics(value: Any) -> None:
    """Raises TypeError unless it is what a plan returns."""
    instance(
        "statistics",
        value,
        Statistics,
        "what curvature.value_grad_and_statistics returned",
    )
    if not is_number(value.weight, arrays=True):
        raise TypeError(
            f"statistics.weight must be a scalar; got {shown(value.weight)}. Add "
            "statistics leaf by leaf, jax.tree.map(jnp.add, first, second)."
        )


_WHAT = {"factor_shapes": "factors", "statistics_shapes": "statistics"}


def check(
    layers: Sequence[Layer],
    which: str,
    found: Any,
    sharing: Distribution | None = None,
) -> None:
    """Raises ValueError unless `found` has the layers and shapes of this plan.

    Args:
      layers: the plan's layers.
      which: "factor_shapes" or "statistics_shapes".
      found: arrays by layer name.
      sharing: over which devices they may be spread by rows.

    Raises:
      TypeError: if an array is not of real floating point.
      ValueError: if names or shapes are others.
    """
    names, what = {layer.name for layer in layers}, _WHAT[which]
    if not isinstance(found, dict) or set(found) != names:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{what} must have an entry for each layer of the plan, {sorted(names)}; "
            f"got {got}. Use what this plan returned."
        )
    for layer in layers:
        expected = _shapes(layer, which)
        if by_rows(sharing):
            expected = {n: sharing.kept_shape(s) for n, s in expected.items()}
        got = _shapes_of(found[layer.name])
        if got != expected:
            raise ValueError(
                f"{what} must have the shapes {expected} for layer '{layer.name}'; "
                f"got {got}. Use what this very plan returned; a state that was made "
                "for another number of devices goes through whole_state and "
                "spread_state first."
            )
        for name, x in found[layer.name].items():
            if not jnp.issubdtype(dtype_of(x), jnp.floating):
                raise TypeError(
                    f"{what} must be real floating point; got {shown(x)} for "
                    f"'{name}' of layer '{layer.name}'. Use what this very plan "
                    "returned."
                )


def _shapes_of(part: Any) -> Any:
    """The shapes of arrays by name; of what is none, what it is."""
    if not isinstance(part, dict):
        return shown(part)
    return {name: jnp.shape(x) if is_array(x) else shown(x) for name, x in part.items()}


class Averaged(NamedTuple):
    """The averages after one batch."""

    factors: Factors
    informed: Array  # []: whether any layer took the statistics
    refused: Array  # []: whether there were some that a layer did not take


@jax.named_scope("kfac_factors")
def average(
    layers: Sequence[Layer],
    factors: Factors,
    statistics: Statistics,
    step: Any,
    decay: Any,
    sharing: Distribution | None = None,
    usable: Array | bool = True,
) -> Averaged:
    """Moves the averages on by one batch; see `Curvature.update_factors`.

    Factors are sums over all devices divided by counts over all devices: both add up.

    Args:
      layers: the plan's layers.
      factors: the averages so far, as the devices keep them.
      statistics: the batch's.
      step: k, counted from 1.
      decay: the largest ε.
      sharing: over which devices the batch, and possibly the factors, are spread.
      usable: whether the batch may be used, for all that its loss says.

    Returns:
      The averages, and what was done with the statistics.

    Raises:
      ValueError: if factors or statistics are of another plan.
    """
    check(layers, "factor_shapes", factors, sharing)
    check(layers, "statistics_shapes", statistics.layers)
    check_products(layers, statistics.products)
    weight, cases, new = _means(layers, statistics, sharing)
    offered = weight > 0
    taken = offered & (cases > 0) & usable
    epsilon = jnp.minimum(
        1.0 - 1.0 / jnp.asarray(step, float), jnp.asarray(decay, float)
    )
    blocks = {
        layer.name: layer.block
        for layer in layers
        if layer.block is not None and layer.name in new
    }
    finite = _finite_layers(blocks, new, sharing)
    finite = _finite_trees(layers, finite)
    result = dict(factors)
    for layer in new:
        averages = blocks[layer].average(factors[layer], new[layer], epsilon)
        result[layer] = {
            name: jnp.where(taken & finite[layer], averages[name], old)
            for name, old in factors[layer].items()
        }
    # one sum of all flags: XLA would repeat what they are made of for each reduction
    wrong = sum((~flag).astype(jnp.int32) for flag in finite.values())
    informed = taken & (wrong < max(1, len(finite)))
    return Averaged(result, informed, offered & (~taken | (wrong > 0)))


def _means(
    layers: Sequence[Layer], statistics: Statistics, sharing: Distribution | None
) -> tuple[Array, Array, Factors]:
    """Weight and cases, and the batch's own factors, as the devices keep factors."""
    layers = [x for x in layers if statistics.layers[x.name]]
    counts = {
        layer.name: _counts(layer, statistics)
        for layer in layers
        if layer.block is not None
    }
    sums = {
        name: {key: statistics.layers[name][key] for key in part}
        for name, part in counts.items()
    }
    weight, cases = statistics.weight, statistics.cases
    if sharing is not None:
        weight, (cases, counts), sums = sharing.sums(weight, (cases, counts), sums)
    roots = _cross_counts(layers, counts)
    means: Factors = {}
    for layer in layers:
        part = counts[layer.name] | roots.get(layer.name, {})
        means[layer.name] = {
            key: divide(sums[layer.name][key], _like(count, layer, key, sharing))
            for key, count in part.items()
        }
    return weight, cases, means


def _counts(layer: Layer, statistics: Statistics) -> dict[str, Array]:
    """What a layer's sums are divided by; those of a link come with the parent's."""
    assert layer.block is not None
    own = {
        name: x
        for name, x in statistics.layers[layer.name].items()
        if name not in layer.cross_shapes
    }
    weight = statistics.weight.astype(layer.dtype)
    return layer.block.counts(own, weight) | dict.fromkeys(layer.cross_shapes, weight)


def _cross_counts(layers: Sequence[Layer], counts: Factors) -> Factors:
    """The counts of links' inputs.

    Where the numbers of rows that count differ, inputs are divided by their geometric
    mean, which keeps the second moments of both layers together semidefinite.
    """
    result: Factors = {}
    for layer in layers:
        if layer.link is not None and layer.link.parent is not None:
            both = counts[layer.name]["input"], counts[layer.link.parent]["input"]
            result[layer.name] = {CROSS[0]: jnp.sqrt(both[0]) * jnp.sqrt(both[1])}
    return result


def _like(count: Array, layer: Layer, name: str, sharing: Distribution | None) -> Array:
    """A count, so that it broadcasts to what a device keeps of the factor."""
    if not by_rows(sharing) or count.ndim == 0:
        return count
    if count.size == 1:
        return count.reshape(())
    whole = jnp.broadcast_to(count, layer.factor_shapes[name])
    return sharing.rows([whole])[0]


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


def _finite_layers(
    blocks: dict[str, Block], factors: Factors, sharing: Distribution | None
) -> dict[str, Array]:
    """Whether all factors of a layer are finite, by layer name.

    Of a basis the diagonal is looked at, too: an eigendecomposition that fails is NaN
    throughout. Of rows, everything is.
    """
    if by_rows(sharing):
        own = [
            jnp.stack([jnp.isfinite(x).all() for x in part.values()]).all()
            for part in factors.values()
        ]
        return dict(zip(factors, sharing.everywhere(own), strict=True))
    matrices = [
        [
            x
            for name, x in part.items()
            if name not in blocks[layer].elementwise and name not in CROSS
        ]
        for layer, part in factors.items()
    ]
    flags = dict(zip(factors, linalg.finite_diagonals(matrices), strict=True))
    for layer, part in factors.items():
        for name, x in part.items():
            if name in blocks[layer].elementwise:
                flags[layer] &= jnp.isfinite(x).all()
    return flags
