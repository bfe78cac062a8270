"""Statistics of batches, and the factors, which are moving averages of them."""

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

    weight: Array  # []: number of cases that the losses are means of; 0: no information
    cases: Array  # []: number of cases that no mask hides; 0: no information
    layers: Factors  # for each layer the sums that its block needs, float32 or wider
    # the sides of gradients kept as products (Kronecker(gradient_products=True)); they
    # belong to one batch's gradient, so a sum over several batches has no meaning
    products: Products


def init_factors(groups: Sequence[Group]) -> Factors:
    """Zeros, and identities for bases."""
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
    """Statistics without information, shaped like those of the plan's batch."""
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
    """Raises TypeError unless a value is statistics that a plan returned."""
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
      devices: the devices that the rows of arrays may be spread over.

    Raises:
      TypeError: if an array is not of real floating point.
      ValueError: if names or shapes are not the plan's.
    """
    names, what = names_of(groups), _WHAT[which]
    if not isinstance(found, dict) or set(found) != names:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{what} must have an entry for each layer of the plan, {sorted(names)}; "
            f"got {got}. Use what this plan returned."
        )
    for layer, shapes in _shapes(groups, which).items():
        expected = {n: devices.row_shape(s) for n, s in shapes.items()}
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
    """The shapes of arrays by name; a description of anything else."""
    if not isinstance(part, dict):
        return shown(part)
    return {name: jnp.shape(x) if is_array(x) else shown(x) for name, x in part.items()}


class Averaged(NamedTuple):
    """The averages after one batch."""

    factors: Factors
    informed: Array  # []: whether any layer accepted the statistics
    refused: Array  # []: whether there were statistics that a layer did not accept


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
    """Updates the averages with one batch; see `Curvature.update_factors`.

    The batch's factors are sums over all devices divided by counts over all devices. A
    mean of the devices' own quotients would weigh devices wrongly where masks hide
    different numbers of rows.

    Args:
      groups: the plan's groups.
      factors: the averages so far, or this device's rows of them.
      statistics: the batch's statistics.
      step: k, counted from 1.
      decay: the largest ε.
      devices: the devices that the batch, and possibly the factors, are spread over.
      usable: whether the batch may be used, as far as its loss tells.

    Returns:
      The averages, and whether the statistics were accepted.

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
    updated = [group for group in groups if group.name in new]
    finite = devices.finite([group.looked_at(new) for group in updated])
    result = dict(factors)
    for group, flag in zip(updated, finite, strict=True):
        averages = group.average(widened([group], factors), new, epsilon)
        for layer, part in averages.items():
            result[layer] = {
                name: jnp.where(taken & flag, part[name].astype(old.dtype), old)
                for name, old in factors[layer].items()
            }
    # The flags are summed once. XLA fuses the computation of a flag into each reduction
    # that reads it, so `any` and `all` of them would do that work twice.
    wrong = sum((~flag).astype(jnp.int32) for flag in finite)
    informed = taken & (wrong < max(1, len(finite)))
    return Averaged(result, informed, offered & (~taken | (wrong > 0)))


def _means(
    groups: Sequence[Group], statistics: Statistics, devices: Devices
) -> tuple[Array, Array, Factors]:
    """The weight, the number of cases, and the batch's factors (or rows of them)."""
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
    # there are none if a custom derivative rule decides about gradients
    if got and got != expected:
        raise ValueError(
            f"statistics.products must have rows of lengths {expected}; got {got}. Use "
            "what this very plan returned."
        )
