"""Statistics of batches, and the factors, which are moving averages of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax._utils import fresh
from kfac_jax._utils.arguments import dtype_of, instance, is_array, is_number, shown
from kfac_jax.blocks._block import divide
from kfac_jax.devices import ALONE, Devices
from kfac_jax.plan.group import (
    Arrays,
    Factors,
    FactorShapes,
    Group,
    Products,
    abstract_factors,
    layers_of,
    names_of,
    widened,
)
from kfac_jax.plan.layer import Layer


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
    """Zeros, and identities (or ones) for what is carried."""
    shapes = abstract_factors(groups)
    return {
        layer.name: {
            name: _initial(layer, name, x) for name, x in shapes[layer.name].items()
        }
        for layer in layers_of(groups)
    }


def _initial(layer: Layer, name: str, like: jax.ShapeDtypeStruct) -> Array:
    if name not in layer.carried_shapes:
        return fresh.full(like.shape, 0.0, like.dtype)
    if layer.block is not None and name in layer.block.elementwise:
        return fresh.full(like.shape, 1.0, like.dtype)
    return fresh.identities(like.shape, like.dtype)


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


def check_bases(groups: Sequence[Group], factors: Factors) -> None:
    """Raises ValueError if blocks still have the standard basis that is not theirs.

    Only arrays that are known are looked at.

    Args:
      groups: the plan's groups.
      factors: by layer name.

    Raises:
      ValueError: naming the layers.
    """
    wrong = [
        layer.name
        for layer in layers_of(groups)
        if any(_has_no_basis(factors[layer.name], name) for name in layer.bases)
    ]
    if wrong:
        raise ValueError(
            f"Layers {wrong} have factors but no basis yet, only the standard one: "
            "expected bases of these factors. Use curvature.at or curvature.over, "
            "which find them, curvature.renew_factors, or a state of kfac."
        )


def _has_no_basis(own: Arrays, name: str) -> bool:
    basis, factor = own[name], own.get(name.removesuffix("_basis"))
    if factor is None or any(isinstance(x, jax.core.Tracer) for x in (basis, factor)):
        return False
    basis, sizes = jnp.asarray(basis), jnp.abs(jnp.asarray(factor))
    unit = jnp.broadcast_to(jnp.eye(basis.shape[-1], dtype=bool), basis.shape)
    rounding = jnp.finfo(basis.dtype).eps ** 0.5 * sizes.max().astype(basis.dtype)
    outside = jnp.where(unit, 0, sizes).max().astype(basis.dtype) > rounding
    return bool((basis == unit.astype(basis.dtype)).all() & outside)


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
    cases: Array  # []: the running mean of the number of cases in a batch


@jax.named_scope("kfac_factors")
def average(
    groups: Sequence[Group],
    factors: Factors,
    statistics: Statistics,
    step: Any,
    decay: Any,
    devices: Devices = ALONE,
    usable: Array | bool = True,
    cases_so_far: Array | None = None,
) -> Averaged:
    """Updates the averages with one batch; see `Curvature.update_factors`.

    With the number of cases so far, a batch counts by its own: `1 - ε` is its share if
    it has as many as those before, and less for the smaller last batch of an epoch.

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
      cases_so_far: the running mean of the number of cases in a batch, 0 if there are
        none yet; None if all batches count alike.

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
    mean_cases = jnp.zeros((), float)
    if cases_so_far is not None:
        epsilon, mean_cases = _by_cases(epsilon, cases_so_far, weight)
    updated = [group for group in groups if group.name in new]
    finite = [
        flag & _in_one_basis(group, new, offered)
        for flag, group in zip(
            devices.finite([group.looked_at(new) for group in updated]),
            updated,
            strict=True,
        )
    ]
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
    if cases_so_far is not None:
        mean_cases = jnp.where(informed, mean_cases, cases_so_far)
    refused = offered & (~taken | (wrong > 0))
    return Averaged(result, informed, refused, mean_cases)


def _by_cases(epsilon: Array, before: Array, own: Array) -> tuple[Array, Array]:
    """ε where batches count by their cases, and the running mean of these.

    Both means are `(ε n' x' + (1 - ε) n x) / (ε n' + (1 - ε) n)`, with n' that before.
    """
    own = own.astype(before.dtype)
    old = epsilon.astype(before.dtype) * jnp.where(before > 0, before, own)
    total = old + (1 - epsilon.astype(before.dtype)) * own
    share = old / jnp.where(total > 0, total, 1)
    return jnp.where(before > 0, share.astype(epsilon.dtype), epsilon), total


def _in_one_basis(group: Group, means: Factors, offered: Array) -> Array | bool:
    """Whether what the batch's statistics carry as bases are bases.

    Statistics that carry a basis are in it. Only those in one basis add up: a mean of
    different orthogonal matrices shortens vectors, as one random vector shows.

    Args:
      group: the group.
      means: the batch's factors.
      offered: whether there are statistics.

    Returns:
      The flag.

    Raises:
      ValueError: naming the layer, if it is known when the program is traced.
    """
    found: Array | bool = True
    for layer in group.layers:
        for name in layer.bases:
            x = means[layer.name][name]
            # a constant, as drawing it would cost more than the product
            v = np.random.default_rng(0).normal(size=x.shape[-1]).astype(x.dtype)
            shorter = jnp.linalg.norm(x @ v, axis=-1) < 0.99 * np.linalg.norm(v)
            mixed = offered & shorter.any()
            if not isinstance(mixed, jax.core.Tracer) and mixed:
                raise ValueError(
                    f"statistics of '{layer.name}' were added up in different bases: "
                    "expected one basis for all batches. Pass factors=... (the "
                    "optimizer state's, or of init_factors) to "
                    "value_grad_and_statistics, or use Curvature.over for a data set."
                )
            found &= ~mixed
    return found


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
