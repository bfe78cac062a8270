"""One forward pass of a plan's loss, and the pull-backs through it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat, axis_types
from kfac_jax._jaxpr.differentiation import reverse_mode
from kfac_jax._jaxpr.interpreter import replaces_rules, run
from kfac_jax._jaxpr.states import Lost
from kfac_jax._utils.dtypes import wide
from kfac_jax.devices import collectives
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.plan.group import Factors, Group, Products, layers_of
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.modes import is_exact, of_inputs
from kfac_jax.plan.plan import Derived, Plan
from kfac_jax.plan.programs import outputs_program, split_program
from kfac_jax.statistics import alone, estimation
from kfac_jax.statistics.averages import Statistics
from kfac_jax.statistics.exact_diagonals import by_entries, exact_diagonals
from kfac_jax.statistics.gathering import Squares, gather


class Linearized(NamedTuple):
    """A forward pass, and functions that pull back through it on demand."""

    value: Any
    """The loss function's result."""

    gradient: Callable[[], tuple[list[Array], Products]] | None
    """Returns the leaves of the gradient, and the sides of gradients kept as products.
    None if that is not the program's that was run: a user's custom derivative rule
    decides about it, or it goes through the batch's means."""

    statistics: Callable[[Array | None], Statistics]
    """Returns the curvature statistics, from a random key if the mode samples."""


def linearize(
    plan: Plan,
    params: Any,
    args: Any,
    leaves: Sequence[Array],
    factors: Factors | None,
    *,
    own_gradient: bool = False,
) -> Linearized:
    """Runs one forward pass; its result pulls back the loss or output cotangents.

    Inside of `shard_map` the probes are marked as varying over devices, so statistics
    stay on their device and are summed together at the end. JAX would sum each layer's
    in a collective of its own.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      leaves: the parameters' leaves, in the plan's order.
      factors: the factors, from which carried ones (bases) are taken; None without.
      own_gradient: whether the loss function computes its own gradient. Then only the
        equations that lead to the registered outputs are differentiated.

    Returns:
      The value, and functions for the rest.

    Raises:
      ValueError: if the program's layers are not the plan's.
    """
    derived, program = plan.tapped(params, args)
    traced, rest = derived.traced, None
    inputs = of_inputs(plan.estimation_mode)
    if own_gradient and not inputs:
        program, rest = split_program(program)
    carried = _carried(plan.groups, factors)
    data = jax.tree.leaves(args)
    probes = _probes(derived, plan.groups, data, carried)

    def forward(leaves: Sequence[Array], probes: Any) -> Any:
        spread = _spread(derived, plan.groups, [*leaves, *data], probes)
        outputs, losses = run(program, [*leaves, *data], spread)
        if rest is not None:
            outputs = [jnp.zeros((), losses[0].z.dtype), *outputs]
        loss, *aux = outputs
        return (loss, [one.z for one in losses]), (aux, losses)

    (loss, zs), pull, (aux, losses) = jax.vjp(
        forward, list(leaves), probes, has_aux=True
    )
    total = loss
    if rest is not None:
        (total, *aux), _ = run(rest, aux, None)

    @functools.cache  # which statistics of inputs come from, too
    def pull_loss() -> tuple[list[Array], Factors]:
        zeros = [jnp.zeros_like(z) for z in zs]
        with reverse_mode(program.graph, len(leaves)):
            return pull((jnp.ones_like(loss), zeros))

    def gradient() -> tuple[list[Array], Products]:
        grads, sums = pull_loss()
        products = {n: x for g in plan.groups for n, x in g.products(sums).items()}
        if any(map(_compat.varying, jax.tree.leaves(products))):
            products = {}  # one device's rows, while gradients are sums over devices
        return grads, products

    def pull_back(cotangents: list[Array]) -> Any:
        with reverse_mode(program.graph, len(leaves)):
            return pull((jnp.zeros_like(loss), cotangents))

    def pull_outputs(cotangents: list[Array]) -> Any:
        pairs = zip(cotangents, zs, strict=True)
        cotangents = [_compat.vary_like(u, z) for u, z in pairs]
        grads, sums = axis_types.explicit(pull_back, zs)(cotangents)
        return grads, _collected(plan.groups, sums, carried)

    def statistics(rng: Array | None) -> Statistics:
        if inputs:
            sums = _collected(plan.groups, pull_loss()[1], carried)
            cases = _cases(args, traced.in_batch)
            return _statistics_of_inputs(plan, losses, loss, cases, sums)
        examples = traced.found.loss_examples
        squared = [layer for layer in plan.layers if layer.is_squared]
        wanted = squared if is_exact(plan.estimation_mode) else []
        known = exact_diagonals(wanted, program, leaves, data)
        others = [layer for layer in wanted if layer.name not in known]
        squares = None
        if others:
            with contextlib.suppress(alone.CaseError):  # the report tells it
                squares = _by_case(plan, derived, others, args, leaves, losses)
        return _statistics(
            plan, losses, examples, pull_outputs, known, squares, carried, rng
        )

    value = (total, traced.unflatten_aux(aux)) if plan.has_aux else total
    other = replaces_rules(program) or bool(traced.found.constant_means)
    return Linearized(value, None if other else gradient, statistics)


def estimated_diagonals(
    plan: Plan, derived: Derived, params: Any, args: Any
) -> tuple[str, ...]:
    """Lines for the report: the diagonals that an exact mode has by random signs.

    Args:
      plan: the plan.
      derived: its program and layers.
      params: the parameters, or their shapes.
      args: the loss function's further arguments, or their shapes.

    Returns:
      The lines; none if all are exact.
    """
    program = outputs_program(derived.traced)
    squared = [layer for layer in plan.layers if layer.is_squared]
    known = by_entries(squared, program)
    others = [layer for layer in squared if layer not in known]
    if not others or not is_exact(plan.estimation_mode):
        return ()

    def trace(params: Any, args: Any) -> None:
        leaves = plan.tree.leaves(params, "params")
        losses = run(program, [*leaves, *jax.tree.leaves(args)], None)[1]
        _by_case(plan, derived, others, args, leaves, losses)

    try:
        jax.eval_shape(trace, params, args)
    except alone.CaseError as error:
        names = ", ".join(layer.name for layer in others)
        return (
            "Diagonals estimated with random signs, as cases cannot be evaluated one "
            f"by one ({error}): {names}.",
        )
    return ()


def _probes(
    derived: Derived, groups: Sequence[Group], data: Sequence[Any], carried: Factors
) -> Factors:
    """The arguments of the taps: zeros, and what is carried to them."""
    probes: Factors = {}
    for group in groups:
        for name, zeros in group.probes(derived.sites, data).items():
            probes[name] = zeros | carried.get(name, {})
    return jax.tree.map(lambda x: _compat.vary_like(x, *data), probes)


def _spread(
    derived: Derived, groups: Sequence[Group], inputs: Sequence[Any], probes: Factors
) -> Factors:
    """What the taps take, of each group."""
    # these are functions of the probes alone
    fixed = jax.lax.stop_gradient(list(inputs))
    graph = derived.traced.found.graph
    result: Factors = {}
    for group in groups:
        own = {name: probes[name] for name in group.names if name in probes}
        result |= group.spread(own, derived.sites, graph, fixed)
    return result


def _collected(groups: Sequence[Group], sums: Factors, carried: Factors) -> Factors:
    """The statistics of all groups, from what the taps returned."""
    result: Factors = {}
    for group in groups:
        result |= group.collect(sums, carried)
    return result


def _carried(groups: Sequence[Group], factors: Factors | None) -> Factors:
    """The factors that the groups carry."""
    if factors is None:
        return {}
    return {
        layer: {name: jnp.asarray(factors[layer][name]) for name in names}
        for group in groups
        for layer, names in group.carried.items()
        if names
    }


def _by_case(
    plan: Plan,
    derived: Derived,
    layers: Sequence[Layer],
    args: Any,
    leaves: Sequence[Array],
    losses: Sequence[RegisteredLoss],
) -> Squares:
    """What sums squares of the cases' gradients by some layers.

    Raises:
      CaseError: if cases cannot be evaluated one by one.
    """
    states = derived.traced.found.loss_examples
    divided = [
        estimation.within(loss, state, False)
        for loss, state in zip(losses, states, strict=True)
    ]
    sizes = {cases.size for cases in divided}
    for state in states:
        if isinstance(state, Lost):
            where = state.where or "an argument"
            raise alone.CaseError(f"they could not be followed since {where}")
    if len(sizes) > 1:
        raise alone.CaseError(f"the losses are of {sorted(sizes)} cases")
    (size,) = sizes
    prepared = alone.prepare(plan, derived, layers, args, leaves, divided, size)

    def squares(cotangents: Sequence[Array]) -> Factors:
        pairs = zip(divided, cotangents, strict=True)
        by_case = [cases.split(u) for cases, u in pairs]
        return alone.squares(prepared, by_case)

    return Squares(frozenset(x.name for x in layers), squares)


def _statistics(
    plan: Plan,
    losses: Sequence[RegisteredLoss],
    examples: Any,
    pull_outputs: Callable[[list[Array]], Any],
    diagonals: Factors,
    squares: Squares | None,
    carried: Factors,
    rng: Array | None,
) -> Statistics:
    """Gathers sums over the cases of all devices, and adds the carried bases."""
    groups = plan.groups

    def gathered(
        losses: Sequence[RegisteredLoss], rng: Array | None, known: Factors
    ) -> Any:
        outputs = [one.z for one in losses]
        own, counted = (
            _compat.vary_like(f(losses), *outputs) for f in (_averaged, _counted)
        )
        # gradients of a sum over cases, whose squares add up
        weights = [wide(x.weight) for x in losses]
        summed = [
            dataclasses.replace(x, weight=weight * own.astype(weight.dtype))
            for x, weight in zip(losses, weights, strict=True)
        ]
        sums, count = gather(
            groups,
            plan.estimation_mode,
            plan.num_samples,
            summed,
            examples,
            pull_outputs,
            rng,
            plan.independent_cases,
            jax.tree.map(lambda x: x * own.astype(x.dtype), known),
            squares,
        )
        exact = known.keys() | (squares.names if squares else set())
        sums = _over_devices(groups, sums, exact)
        _compat.check_summed_alike(outputs, sums)
        like = next(iter(jax.tree.leaves(sums)), None)
        weight, cases = collectives.summed([own, counted], [like, like])
        return sums, count * weight, count * cases

    sums, weight, cases = axis_types.auto(gathered)(losses, rng, diagonals)
    # A basis is returned with the statistics that are in it. Its "sum" is weighted like
    # theirs, so that it survives the division by the weight and the sum over batches.
    counted = {
        name: {key: x * weight.astype(x.dtype) for key, x in part.items()}
        for name, part in carried.items()
    }
    return Statistics(
        weight.astype(jnp.float32),
        cases,
        {
            name: {**sums.get(name, {}), **counted.get(name, {})}
            for name in (layer.name for layer in plan.layers)
        },
        {},
    )


def _statistics_of_inputs(
    plan: Plan,
    losses: Sequence[RegisteredLoss],
    loss: Array,
    cases: int,
    sums: Factors,
) -> Statistics:
    """Sums over all devices, from what taps returned for the loss's cotangent.

    Args:
      plan: the plan.
      losses: the registered losses, which tell how many cases count; if any.
      loss: the loss, which varies over devices as its cases do.
      cases: how many there are without registered losses.
      sums: what the taps returned.

    Returns:
      The statistics.
    """

    def gathered(losses: Sequence[RegisteredLoss], sums: Factors) -> Any:
        numbers = [jnp.asarray(cases, jnp.float32)] * 2
        if losses:
            numbers = [_averaged(losses), _counted(losses)]
        like = [loss, *(x.z for x in losses), *jax.tree.leaves(sums)]
        weight, count = (_compat.vary_like(x, *like) for x in numbers)
        sums = _over_devices(plan.groups, sums, ())
        alike = next(iter(jax.tree.leaves(sums)), None)
        weight, count = collectives.summed([weight, count], [alike, alike])
        return sums, weight, count

    sums, weight, count = axis_types.auto(gathered)(losses, sums)
    layers = {x.name: sums.get(x.name, {}) for x in plan.layers}
    return Statistics(weight.astype(jnp.float32), count, layers, {})


def _cases(args: Any, in_batch: Sequence[bool]) -> int:
    """The number of examples of the batch; 1 if no argument is of it."""
    pairs = zip(jax.tree.leaves(args), in_batch, strict=True)
    sizes = [len(x) for x, own in pairs if own]
    return max(sizes, default=1)


def _averaged(losses: Sequence[RegisteredLoss]) -> Array:
    """`[]`: the number of cases that the losses are means of.

    A loss of `w / n` times a sum over n cases is a mean over `n / w` cases, up to a
    factor that is the same for all batches. These are all cases if w = 1, and those
    that a mask leaves if w makes the loss their mean.
    """
    total = jnp.zeros((), jnp.float32)
    for x in losses:
        weight = x.weight.astype(jnp.float32)
        counts = weight > 0
        # no division by zero in the branch that is not taken, for jax_debug_nans
        total += jnp.where(counts, len(x.z) / jnp.where(counts, weight, 1.0), 0.0)
    return total


def _counted(losses: Sequence[RegisteredLoss]) -> Array:
    """`[]`: the number of cases that no mask hides."""
    total = jnp.zeros((), jnp.float32)
    for x in losses:
        all_count = x.mask is None
        total += len(x.z) if all_count else jnp.sum(x.mask != 0, dtype=jnp.float32)
    return total


def _over_devices(
    groups: Sequence[Group], sums: Factors, known: Collection[str]
) -> Factors:
    """Sums statistics over the devices of a `shard_map`, except for carried bases.

    Squares of a parameter's own gradient are of one that JAX has summed already, whose
    square has the expectation of the devices' sum.

    Args:
      groups: the plan's groups.
      sums: one device's sums.
      known: the names of squares that are known exactly, from no such gradient.

    Returns:
      The sums over all devices.
    """
    squared = {x.name for x in layers_of(groups) if x.is_squared} - {*known}
    carried = {name: x for group in groups for name, x in group.carried.items()}
    own = {
        (layer, name): x
        for layer, part in sums.items()
        for name, x in part.items()
        if name not in carried[layer]
    }
    like = [x if layer in squared else None for (layer, _), x in own.items()]
    result: Factors = {layer: {} for layer in sums}
    summed = collectives.summed(list(own.values()), like)
    for (layer, name), x in zip(own, summed, strict=True):
        result[layer][name] = x
    return result
