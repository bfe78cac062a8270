"""Statistics of batches, and the factors: moving averages of them, layer by layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import fresh
from kfac_jax._utils.arguments import dtype_of, instance, is_array, is_number, shown
from kfac_jax.blocks._block import divide
from kfac_jax.devices import ALONE, Devices
from kfac_jax.plan.group import (
    Factors,
    FactorShapes,
    Group,
    Products,
    abstract_factors,
    layers_of,
    names_of,
    widened,
)


class Statistics(NamedTuple):
    """Second moments of one or more batches, as sums over their cases.

    Statistics of micro-batches of any size may be added, those of devices added or
    averaged: factors are ratios of these sums.
    """

    weight: Array  # []: how many cases the losses are means of; 0 means no information
    cases: Array  # []: how many of them no mask hides; 0 means no information either
    layers: Factors  # for each layer the sums its block asks for, float32 or wider
    # the sides of gradients that stay products (Kronecker(gradient_products=True)):
    # of this very batch only, so a sum of several says nothing here
    products: Products


def init_factors(groups: Sequence[Group]) -> Factors:
    """Zeros, and standard bases where factors are in one."""
    carried = {name: x for group in groups for name, x in group.carried.items()}
    return {
        layer: {
            name: fresh.identities(x.shape, x.dtype)
            if name in carried[layer]
            else fresh.full(x.shape, 0.0, x.dtype)
            for name, x in part.items()
        }
        for layer, part in abstract_factors(groups).items()
    }


def zero_statistics(groups: Sequence[Group]) -> "Statistics":
    """Statistics that say nothing, with as many rows as in the plan's batch."""
    products = {
        x.name: (
            jnp.zeros((group.product_rows, x.shape.inputs), x.dtype),
            jnp.zeros((group.product_rows, x.shape.outputs), x.dtype),
        )
        for group in groups
        for x in group.layers
        if group.product_rows
    }
    shapes = _shapes(groups, "statistics_shapes")
    sums = {
        x.name: {n: fresh.full(s, 0.0, x.dtype) for n, s in shapes[x.name].items()}
        for x in layers_of(groups)
    }
    weight, cases = (jnp.zeros((), jnp.float32) for _ in range(2))
    return Statistics(weight, cases, sums, products)


def _shapes(groups: Sequence[Group], which: str) -> FactorShapes:
    return {n: part for x in groups for n, part in getattr(x, which).items()}


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
    groups: Sequence[Group], which: str, found: Any, devices: Devices = ALONE
) -> None:
    """Raises ValueError unless `found` has the layers and shapes of this plan.

    Args:
      groups: the plan's groups.
      which: "factor_shapes" or "statistics_shapes".
      found: arrays by layer name.
      devices: over which they may be spread by rows.

    Raises:
      TypeError: if an array is not of real floating point.
      ValueError: if names or shapes are others.
    """
    names, what = names_of(groups), _WHAT[which]
    if not isinstance(found, dict) or set(found) != names:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{what} must have an entry for each layer of the plan, {sorted(names)}; "
            f"got {got}. Use what this plan returned."
        )
    for layer, shapes in _shapes(groups, which).items():
        expected = {n: devices.kept_shape(s) for n, s in shapes.items()}
        got = _shapes_of(found[layer])
        if got != expected:
            raise ValueError(
                f"{what} must have the shapes {expected} for layer '{layer}'; "
                f"got {got}. Use what this very plan returned; a state that was made "
                "for another number of devices goes through whole_state and "
                "spread_state first."
            )
        for name, x in found[layer].items():
            if not jnp.issubdtype(dtype_of(x), jnp.floating):
                raise TypeError(
                    f"{what} must be real floating point; got {shown(x)} for "
                    f"'{name}' of layer '{layer}'. Use what this very plan "
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
    groups: Sequence[Group],
    factors: Factors,
    statistics: Statistics,
    step: Any,
    decay: Any,
    devices: Devices = ALONE,
    usable: Array | bool = True,
) -> Averaged:
    """Moves the averages on by one batch; see `Curvature.update_factors`.

    Factors are sums over all devices divided by counts over all devices: both add up.

    Args:
      groups: the plan's groups.
      factors: the averages so far, as the devices keep them.
      statistics: the batch's.
      step: k, counted from 1.
      decay: the largest ε.
      devices: over which the batch, and possibly the factors, are spread.
      usable: whether the batch may be used, as far as its loss tells.

    Returns:
      The averages, and what was done with the statistics.

    Raises:
      ValueError: if factors or statistics are of another plan.
    """
    check(groups, "factor_shapes", factors, devices)
    check(groups, "statistics_shapes", statistics.layers)
    _check_products(groups, statistics.products)
    statistics = jax.tree.map(jnp.asarray, statistics)  # which NumPy may have averaged
    weight, cases, new = _means(groups, statistics, devices)
    offered = weight > 0
    taken = offered & (cases > 0) & usable
    epsilon = jnp.minimum(
        1.0 - 1.0 / jnp.asarray(step, float), jnp.asarray(decay, float)
    )
    told = [group for group in groups if group.name in new]
    finite = devices.finite([group.looked_at(new) for group in told])
    result = dict(factors)
    for group, flag in zip(told, finite, strict=True):
        averages = group.average(widened([group], factors), new, epsilon)
        for layer, part in averages.items():
            result[layer] = {
                name: jnp.where(taken & flag, part[name].astype(old.dtype), old)
                for name, old in factors[layer].items()
            }
    # one sum of all flags: XLA would repeat what they are made of for each reduction
    wrong = sum((~flag).astype(jnp.int32) for flag in finite)
    informed = taken & (wrong < max(1, len(finite)))
    return Averaged(result, informed, offered & (~taken | (wrong > 0)))


def _means(
    groups: Sequence[Group], statistics: Statistics, devices: Devices
) -> tuple[Array, Array, Factors]:
    """Weight and cases, and the batch's own factors, as the devices keep factors."""
    counts: Factors = {}
    for group in groups:
        counts |= group.counts(statistics.layers, statistics.weight)
    sums = {
        layer: {name: statistics.layers[layer][name] for name in part}
        for layer, part in counts.items()
    }
    weight, (cases, counts), sums = devices.sums(
        statistics.weight, (statistics.cases, counts), sums
    )
    means: Factors = {}
    for group in groups:
        shapes = group.factor_shapes
        for layer, part in group.divisors(counts).items():
            means[layer] = {
                name: divide(
                    sums[layer][name], devices.fitting(count, shapes[layer][name])
                )
                for name, count in part.items()
            }
    return weight, cases, means


def _check_products(groups: Sequence[Group], products: Products) -> None:
    """Raises ValueError unless the layers and lengths of rows are this plan's."""
    expected = {
        x.name: (x.shape.inputs, x.shape.outputs)
        for group in groups
        for x in group.layers
        if group.product_rows
    }
    got = {name: tuple(jnp.shape(x)[-1] for x in xs) for name, xs in products.items()}
    # where a custom derivative rule decides about gradients there are none
    if got and got != expected:
        raise ValueError(
            f"statistics.products must have rows of lengths {expected}; got {got}. Use "
            "what this very plan returned."
        )
