"""One forward pass of a plan's loss, and what is pulled back from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat, axis_types
from kfac_jax._jaxpr.differentiation import reverse_mode
from kfac_jax._jaxpr.interpreter import replaces_rules, run
from kfac_jax.devices import collectives
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.operator.products import Products
from kfac_jax.plan import Layer, tracing
from kfac_jax.statistics.averages import Factors, Statistics
from kfac_jax.statistics.estimation import is_exact
from kfac_jax.statistics.exact_diagonals import exact_diagonals
from kfac_jax.statistics.gathering import (
    Sums,
    gather,
    is_squared,
    is_tapped,
    probe,
    split_products,
    with_cross,
)

if TYPE_CHECKING:
    from kfac_jax.curvature import Curvature


class Linearized(NamedTuple):
    """What a forward pass leaves to be asked for."""

    value: Any
    """What the loss function returned."""

    gradient: Callable[[], tuple[list[Array], Products]] | None
    """Leaves of the gradient, and those that stay products; None where a custom
    derivative rule of the user's decides about the gradient."""

    statistics: Callable[[Array | None], Statistics]
    """The curvature statistics, from a key where the mode samples."""


def linearize(
    plan: Curvature,
    params: Any,
    args: Any,
    leaves: Sequence[Array],
    factors: Factors | None,
    *,
    own_gradient: bool = False,
) -> Linearized:
    """One forward pass; pulls back the loss, or output cotangents, on demand.

    Inside of `shard_map` statistics stay on their device, and are summed at once at the
    end, where JAX would sum each by itself.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      leaves: the parameters' leaves, in the plan's order.
      factors: what blocks carry is taken from them.
      own_gradient: whether the loss function has a gradient of its own. Then what does
        not lead to the registered outputs is computed but not differentiated.

    Returns:
      The value, and functions for the rest.

    Raises:
      ValueError: if the program's layers are not the plan's.
    """
    traced = tracing.trace(
        plan.loss_fn, plan.has_aux, plan.tree, params, args, plan.batch_argnums
    )
    program, sites = _tapped_program(plan, traced)
    rest = None
    if own_gradient:
        program, rest = tracing.split_program(program)
    carried = _carried(plan.layers, factors)
    data = jax.tree.leaves(args)
    probes = {
        index: probe(layer, sites[index], data) | carried.get(layer.name, {})
        for index, layer in enumerate(plan.layers)
        if is_tapped(layer)
    }
    probes = jax.tree.map(lambda x: _compat.vary_like(x, *data), probes)

    def forward(leaves: Sequence[Array], probes: Any) -> Any:
        outputs, losses = run(program, [*leaves, *data], probes)
        zero = jnp.zeros((), losses[0].z.dtype)
        loss, *aux = outputs if rest is None else [zero, *outputs]
        return (loss, [one.z for one in losses]), (aux, losses)

    (loss, zs), pull, (aux, losses) = jax.vjp(
        forward, list(leaves), probes, has_aux=True
    )
    total = loss
    if rest is not None:
        (total, *aux), _ = run(rest, aux, None)

    def gradient() -> tuple[list[Array], Products]:
        zeros = [jnp.zeros_like(z) for z in zs]
        with reverse_mode(program.graph, len(leaves)):
            grads, sums = pull((jnp.ones_like(loss), zeros))
        products = split_products(plan.layers, sums)[1]
        if any(map(_compat.varying, jax.tree.leaves(products))):
            products = {}  # of one device, where gradients are of all
        return grads, products

    def pull_back(cotangents: list[Array]) -> Any:
        with reverse_mode(program.graph, len(leaves)):
            return pull((jnp.zeros_like(loss), cotangents))

    def pull_outputs(cotangents: list[Array]) -> Any:
        pairs = zip(cotangents, zs, strict=True)
        cotangents = [_compat.vary_like(u, z) for u, z in pairs]
        grads, sums = axis_types.explicit(pull_back, zs)(cotangents)
        sums, _ = split_products(plan.layers, sums)
        return grads, with_cross(plan.layers, sums)

    def diagonals() -> Sums:
        if not is_exact(plan.estimation_mode):
            return {}
        squared = [i for i, layer in enumerate(plan.layers) if is_squared(layer)]
        return exact_diagonals(plan.layers, squared, program, leaves, data)

    def statistics(rng: Array | None) -> Statistics:
        examples = traced.found.loss_examples
        return _statistics(
            plan, losses, examples, pull_outputs, diagonals(), carried, rng
        )

    value = (total, traced.unflatten_aux(aux)) if plan.has_aux else total
    return Linearized(value, None if replaces_rules(program) else gradient, statistics)


def _tapped_program(plan: Curvature, traced: tracing.Traced) -> tuple[Any, Any]:
    """The program with a tap at every site, and each layer's sites.

    Raises:
      ValueError: if the program's layers are not the plan's.
    """
    layers, sites = tracing.group_layers(
        traced,
        plan.tree,
        plan.blocks,
        plan.weight_sharing,
        plan.estimation_mode,
        plan.structure,
    )
    layers = tracing.apply_policy(layers, plan.on_unmatched, quiet=True)
    mine = [tracing.signature(layer) for layer in plan.layers]
    theirs = [tracing.signature(layer) for layer in layers]
    if mine != theirs:
        changed = sorted({n for n, *_ in set(mine).symmetric_difference(theirs)})
        raise ValueError(
            "The loss function uses its parameters differently from when the "
            f"plan was made: layers {changed} changed. Make a new plan with "
            "make_curvature for these arguments."
        )
    return tracing.tapped_program(traced, plan.layers, sites), sites


def _carried(layers: Sequence[Layer], factors: Factors | None) -> Factors:
    """What the layers' blocks carry, of those factors."""
    return {
        layer.name: {n: factors[layer.name][n] for n in layer.carried_shapes}
        for layer in layers
        if factors is not None and layer.carried_shapes
    }


def _statistics(
    plan: Curvature,
    losses: Sequence[RegisteredLoss],
    examples: Any,
    pull_outputs: Callable[[list[Array]], Any],
    diagonals: Sums,
    carried: Factors,
    rng: Array | None,
) -> Statistics:
    """Sums over the cases of all devices, and what they were gathered in."""
    layers = plan.layers

    def gathered(
        losses: Sequence[RegisteredLoss], rng: Array | None, known: Sums
    ) -> Any:
        sums, count = gather(
            layers,
            plan.estimation_mode,
            plan.num_samples,
            losses,
            examples,
            pull_outputs,
            rng,
            plan.independent_cases,
            known,
        )
        (cases,) = collectives.summed([_cases(losses)], [None])
        return _over_devices(layers, sums, known), count, count * cases

    sums, count, cases = axis_types.auto(gathered)(losses, rng, diagonals)
    count *= _compat.summed_devices([one.z for one in losses], sums)
    counted = {
        name: {key: x * count for key, x in part.items()}
        for name, part in carried.items()
    }
    return Statistics(
        jnp.asarray(count, jnp.float32),
        cases,
        {
            layer.name: {**sums.get(i, {}), **counted.get(layer.name, {})}
            for i, layer in enumerate(layers)
        },
        {},
    )


def _cases(losses: Sequence[RegisteredLoss]) -> Array:
    """`[]`: how many cases count, by the losses' masks."""
    total = jnp.zeros((), jnp.float32)
    for x in losses:
        all_count = x.mask is None
        total += len(x.z) if all_count else jnp.sum(x.mask != 0, dtype=jnp.float32)
    return total


def _over_devices(layers: Sequence[Layer], sums: Sums, known: Sums) -> Sums:
    """Sums what `shard_map` has on each device, without what blocks carry.

    Squares that are not known exactly are of gradients, which JAX has summed.
    """
    own = {
        (i, name): x
        for i, part in sums.items()
        for name, x in part.items()
        if name not in layers[i].carried_shapes
    }
    squared = [is_squared(layers[i]) and i not in known for i, _ in own]
    like = [x if s else None for s, x in zip(squared, own.values(), strict=True)]
    result: Sums = {i: {} for i in sums}
    summed = collectives.summed(list(own.values()), like)
    for (i, name), x in zip(own, summed, strict=True):
        result[i][name] = x
    return result
