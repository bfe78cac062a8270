"""Making a plan: trace, group, apply the policy, check the loss, place taps."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax._jaxpr import _compat, axis_types
from kfac_jax._jaxpr import graph as graph_lib
from kfac_jax._jaxpr.constants import mixed
from kfac_jax._jaxpr.discovery import Found, discover
from kfac_jax._jaxpr.interpreter import (
    Gather,
    Probe,
    Program,
    Tap,
    replaces_rules,
    run,
)
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Lost
from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide
from kfac_jax._utils.trees import TreeSpec
from kfac_jax._utils.trees import tree_spec as tree_spec
from kfac_jax.blocks import Block, Identity
from kfac_jax.distributions import Convex, RegisteredLoss
from kfac_jax.plan import BlocksSpec, Layer, batch, choose_products, group, link, report
from kfac_jax.plan.structures import BlockTridiagonal, Structure
from kfac_jax.statistics import estimation
from kfac_jax.statistics.gathering import link_rows, product_rows, site_statistics


def check_options(
    has_aux: bool,
    estimation_mode: str,
    on_unmatched: str,
    num_samples: int,
    statistics_fraction: float,
    l2: float,
    independent_cases: bool,
) -> None:
    """Checks the options of `make_curvature` that stand alone.

    Args:
      has_aux: a bool.
      estimation_mode: one of `estimation.MODES`.
      on_unmatched: "warn", "error" or "ignore".
      num_samples: at least one.
      statistics_fraction: in (0, 1].
      l2: at least zero.
      independent_cases: a bool.

    Raises:
      TypeError: if one is of the wrong type.
      ValueError: if one is out of its range.
    """
    arguments.flag("has_aux", has_aux)
    arguments.flag("independent_cases", independent_cases)
    arguments.choice("estimation_mode", estimation_mode, tuple(estimation.MODES))
    arguments.choice("on_unmatched", on_unmatched, ("warn", "error", "ignore"))
    arguments.count("num_samples", num_samples, 1)
    arguments.number("statistics_fraction (τ1)", statistics_fraction)
    if not 0.0 < statistics_fraction <= 1.0:
        raise ValueError(
            f"statistics_fraction (τ1) must be in (0, 1]; got {statistics_fraction!r}."
        )
    arguments.number("l2 (η)", l2)
    if not 0.0 <= l2 < float("inf"):
        raise ValueError(f"l2 (η) must be finite and at least 0; got {l2!r}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A traced loss function, with what discovery found in it."""

    found: Found
    aux_tree: Any

    def unflatten_aux(self, leaves: Sequence[Any]) -> Any:
        """Rebuilds the auxiliary output."""
        return jax.tree.unflatten(self.aux_tree, leaves)


def trace(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    tree: TreeSpec,
    params: Any,
    args: Any,
    batch_argnums: batch.Argnums,
) -> Traced:
    """Traces the loss function abstractly and finds its layers.

    Args:
      loss_fn: the user's loss function.
      has_aux: whether it returns auxiliary data.
      tree: the parameters' description.
      params: the parameters, or their shapes.
      args: the further arguments, or their shapes.
      batch_argnums: which of them are the batch.

    Returns:
      The program and its layers.

    Raises:
      TypeError: if the loss is not a real scalar.
      ValueError: if tracing fails on arguments whose leading axes disagree, or if no
        loss is registered.
    """
    arguments.trees("args", args)
    structure: list[Any] = []

    def flat_loss(params: Any, *args: Any) -> list[Any]:
        result = loss_fn(params, *args)
        if has_aux and not (isinstance(result, tuple | list) and len(result) == 2):
            raise LossTypeError(
                "With has_aux=True the loss function must return a pair (loss, aux); "
                f"got {type(result).__name__}."
            )
        loss, aux = result if has_aux else (result, ())
        _check_scalar(loss, has_aux)
        leaves, treedef = jax.tree.flatten(aux)
        structure.append(treedef)
        return [loss, *leaves]

    try:
        closed = jax.make_jaxpr(flat_loss)(params, *args)
    except (TypeError, ValueError) as error:
        axes = batch.leading_axes(args, batch_argnums)
        if len({size for _, size in axes}) > 1 and not isinstance(error, LossTypeError):
            raise ValueError(
                "The loss function fails on arguments whose leading (batch) axes "
                f"disagree: got {batch.describe(axes)}. Expected one batch size. The "
                f"loss function's own error: {error}"
            ) from error
        raise
    program = graph_lib.build(closed)
    losses = [node for node in program.walk() if node.name == "kfac_loss"]
    cases = [n.shape()[0] for n in losses if n.shape()]
    states = [*batch.examples(args, batch_argnums, cases)]
    found = discover(program, tree.shapes, states)
    if not found.losses:
        raise ValueError(
            "No loss is registered. Expected a call to a function of kfac_jax.losses "
            "or kfac_jax.register_*_loss on the network's output inside the loss "
            "function; add one, e.g. "
            "kfac_jax.register_softmax_cross_entropy_loss(logits, labels). One in the "
            "rule of a custom_jvp is met where the gradient is taken: see "
            "value_and_statistics. JAX may drop one within a scan or a call without "
            "results that is differentiated: use the array that it returns."
        )
    _check_cases(program)
    _check_closures(program)
    return Traced(found, structure[-1])


def _check_cases(program: graph_lib.Graph) -> None:
    for node in program.walk():
        if node.name != "kfac_loss":
            continue
        shape, rank = node.shape(), node.params["distribution"].event_rank
        if len(shape) < 1 + rank:
            raise ValueError(
                "A registered output needs a leading axis of cases; got shape "
                f"{shape} at {_compat.source_line(node.equation)}. Register the "
                "batch's output, e.g. [n, classes], or the output of one case inside "
                "vmap."
            )


def _check_closures(program: graph_lib.Graph) -> None:
    """Convex losses are evaluated after the trace: nothing of it may be left in them.

    Args:
      program: the traced loss function.

    Raises:
      ValueError: if the loss of a case closes over a value of the trace.
    """
    for node in program.walk():
        if node.name != "kfac_loss":
            continue
        distribution = node.params["distribution"]
        if isinstance(distribution, Convex) and _is_bound(distribution, node, program):
            raise ValueError(
                f"The per_case_loss of losses.convex at {node.source} closes over an "
                "array that is traced with the loss function: a parameter, an "
                "argument, or what is computed of them. Pass it as data, with an entry "
                "for each case: losses.convex(per_case_loss, outputs, *data, "
                "jnp.broadcast_to(array, (len(outputs), *array.shape)))."
            )


def _is_bound(
    distribution: Convex, node: graph_lib.Node, program: graph_lib.Graph
) -> bool:
    """Whether a loss can be evaluated only within the trace of the program.

    Tracers that outlive it, as where a plan is made inside of `jit`, are among the
    program's constants.
    """
    operands = node.equation.invars[: 1 + node.params["num_data"]]
    case = [jax.ShapeDtypeStruct(v.aval.shape[1:], v.aval.dtype) for v in operands]
    try:
        closed = jax.make_jaxpr(distribution.per_case_loss)(*case)
    except jax.errors.UnexpectedTracerError:
        return True
    outer = {id(x) for x in _tracers(program)}
    return any(id(x) not in outer for x in _tracers(graph_lib.build(closed)))


def _tracers(graph: graph_lib.Graph) -> list[Any]:
    """The constants that are traced by a transformation around it."""
    graphs = [graph, *(body for node in graph.walk() for body in node.bodies)]
    constants = [x for part in graphs for x in part.constants.values()]
    return [x for x in constants if isinstance(x, jax.core.Tracer)]


class LossTypeError(TypeError):
    """The loss function does not return a real scalar."""


def _check_scalar(loss: Any, has_aux: bool) -> None:
    shape = getattr(loss, "shape", None)
    if shape is None and isinstance(loss, float | int):
        shape, dtype = (), jnp.result_type(float)
    else:
        dtype = getattr(loss, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(loss).__name__ if shape is None else f"{dtype}{list(shape)}"
        hint = (
            "" if has_aux else " If it returns (loss, aux), pass has_aux=True."
        ) + " Average the loss over the cases, e.g. with .mean()."
        raise LossTypeError(
            f"The loss must be a real scalar; loss_fn returned {got}.{hint}"
        )


def group_layers(
    traced: Traced,
    tree: TreeSpec,
    blocks: BlocksSpec,
    weight_sharing: str,
    estimation_mode: str,
    structure: Structure,
) -> tuple[list[Layer], Mapping[int, list[Site]]]:
    """Groups what was found into layers with blocks, and links them if asked to."""
    uses = traced.found.uses
    if not estimation.needs_rng(estimation_mode):
        where = f"; only sampled modes can tell them apart, not {estimation_mode!r}"
        uses = [
            mixed(use, where) if isinstance(use, Site) and use.cases else use
            for use in uses
        ]
    layers, sites = group(
        uses, tree.paths, tree.shapes, tree.dtypes, blocks, weight_sharing
    )
    if isinstance(structure, BlockTridiagonal):
        layers = link(layers, sites, traced.found.graph)
    return layers, sites


def keep_products(
    traced: Traced,
    layers: Sequence[Layer],
    sites: Mapping[int, Sequence[Site]],
    l2: float,
) -> list[Layer]:
    """Decides where gradients stay products of inputs and output gradients."""
    custom = replaces_rules(tapped_program(traced, layers, sites))
    return choose_products(layers, sites, traced.found.graph, l2, custom)


def apply_policy(
    layers: Sequence[Layer], on_unmatched: str, *, quiet: bool
) -> list[Layer]:
    """Applies `on_unmatched` to parameters that no layer covers.

    Args:
      layers: the layers.
      on_unmatched: "warn", "error" or "ignore".
      quiet: do not repeat warnings that the plan gave.

    Returns:
      The layers, those ignored with the identity.

    Raises:
      ValueError: with "error", naming each parameter, the reason and the line.
    """
    unmatched = [layer for layer in layers if layer.kind == "unmatched"]
    if unmatched and not quiet:
        listing = "\n".join(report.explain(layer) for layer in unmatched)
        if on_unmatched == "error":
            raise ValueError(
                f"No layer covers {len(unmatched)} parameter(s):\n{listing}\nRewrite "
                "the use as a product, scale or shift, tag it with register_generic, "
                "or pass "
                'on_unmatched="warn".'
            )
        if on_unmatched == "warn":
            warnings.warn(
                f"kfac_jax gives {len(unmatched)} parameter(s) that no layer covers a "
                f"diagonal block:\n{listing}",
                stacklevel=3,
            )
    if on_unmatched != "ignore":
        return list(layers)
    return [
        dataclasses.replace(layer, block=Identity())
        if layer.kind == "unmatched" and layer.block is not None
        else layer
        for layer in layers
    ]


def check_cases(traced: Traced, estimation_mode: str, independent_cases: bool) -> str:
    """Warns of what an exact mode costs where the axis of examples was lost.

    Args:
      traced: the traced loss function.
      estimation_mode: the mode.
      independent_cases: whether cases are then taken for examples.

    Returns:
      Where it was lost; empty if it was not.
    """
    where = lost_examples(traced, estimation_mode)
    if where and not independent_cases:
        warnings.warn(cost_of_lost_examples(where), stacklevel=3)
    return where


def lost_examples(traced: Traced, estimation_mode: str) -> str:
    """Where the axis of examples was lost, if the mode has to know it."""
    if not estimation.is_exact(estimation_mode):
        return ""
    states = traced.found.loss_examples
    return next((state.where for state in states if isinstance(state, Lost)), "")


def cost_of_lost_examples(where: str) -> str:
    """What it costs, and what to do instead."""
    return (
        "Which examples the registered outputs belong to could not be followed since "
        f"{where}: this exact mode pulls back every case by itself, so that the time "
        "of its statistics grows with the square of the batch. "
        'estimation_mode="fisher_gradients" samples, and pulls back all cases at once; '
        "so does independent_cases=True, which is right if no case's output depends on "
        "another's input."
    )


def signature(layer: Layer) -> tuple[Any, ...]:
    """What must not change between the plan and a later trace of the loss function."""
    return layer.name, layer.kind, layer.block, layer.shape, layer.layouts, layer.link


def check_loss(traced: Traced, params: Any, args: Any, l2: float) -> None:
    """Compares the returned loss with the registered one, where arrays are concrete.

    Warns about convex losses that are not convex there.

    Args:
      traced: the traced loss function.
      params: the parameters.
      args: the further arguments.
      l2: the weight of the declared penalty.

    Raises:
      ValueError: if they differ, with their ratio.
    """
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(args)]
    concrete = all(
        isinstance(x, Array | np.ndarray | np.generic | float | int)
        and not isinstance(x, jax.core.Tracer)
        for x in leaves
    )
    if not concrete or _tracers(traced.found.graph):
        return
    program = bare_program(traced)
    known: list[bool] = []

    def compared(
        leaves: Sequence[Any], outputs: Sequence[Any], losses: Sequence[RegisteredLoss]
    ) -> tuple[Array, Array, Array, Array]:
        low = min((loss.z.dtype for loss in losses), key=lambda d: jnp.finfo(d).bits)
        tolerance = jnp.sqrt(jnp.asarray(float(jnp.finfo(low).eps)))
        concavity = _concavity(losses)
        known.append(all(loss.data for loss in losses))
        if not known[-1]:  # nothing is compared, so that nothing need be computed
            return jnp.zeros(()), jnp.zeros(()), tolerance, concavity
        n = len(jax.tree.leaves(params))
        penalty = sum(jnp.vdot(x, x).astype(float) for x in leaves[:n]) * (l2 / 2)
        values = [loss.value().astype(float) for loss in losses]
        total = functools.reduce(jnp.add, values) + penalty
        return outputs[0], total, tolerance, concavity

    @jax.jit
    def values(leaves: Sequence[Any]) -> tuple[Array, Array, Array, Array]:
        return axis_types.auto(compared)(leaves, *run(program, leaves, None))

    # Compiled before the context, which lets values be known while a caller's jit is
    # being traced around the plan: in it JAX compiles each constant expression alone.
    compiled = values.lower(leaves).compile()
    with jax.ensure_compile_time_eval():
        returned, registered, tolerance, concavity = map(float, compiled(leaves))
    if concavity > tolerance:
        _warn_of_concavity(concavity)
    if not known[-1] or not np.isfinite(returned):
        return
    if abs(returned - registered) <= max(tolerance, 1e-6) * max(
        abs(registered), abs(returned), 1e-6
    ):
        return
    ratio = returned / registered if registered else float("inf")
    penalty_hint = f" plus (l2 / 2)·‖params‖² with l2={l2}" if l2 else ""
    raise ValueError(
        f"The loss function returned {returned:.6g}, but the registered loss is "
        f"{registered:.6g}: ratio returned/registered = {ratio:.6g}. Expected the "
        "mean over the leading axis of what is registered, of the sum within a "
        f"case{penalty_hint}. Average over cases (not a sum), pass "
        f"`weight={ratio:.6g}` to the registered loss, register every term, or "
        "declare a penalty with `l2`."
    )


def _warn_of_concavity(concavity: float) -> None:
    warnings.warn(
        "A loss given to losses.convex is not convex in the network's output: at these "
        f"arrays its Hessians have eigenvalues down to {-concavity:.2g} times their "
        "size. For K-FAC its negative curvature is taken for zero.",
        stacklevel=4,
    )


def _concavity(losses: Sequence[RegisteredLoss]) -> Array:
    """The largest of the convex losses'."""
    each = [
        loss.distribution.concavity(wide(loss.z), loss.data).astype(float)
        for loss in losses
        if isinstance(loss.distribution, Convex)
    ]
    return jnp.stack(each).max() if each else jnp.zeros(())


def bare_program(traced: Traced) -> Program:
    """The program without taps."""
    return Program(traced.found.graph, {}, {})


def outputs_program(traced: Traced) -> Program:
    """What the registered losses are computed from, without taps."""
    graph = traced.found.graph
    return Program(graph_lib.without_rest(graph, _tags(graph)), {}, {})


def split_program(program: Program) -> tuple[Program, Program]:
    """What the registered losses are computed from, and the rest without taps."""
    first, rest = graph_lib.split(program.graph, _tags(program.graph))
    return dataclasses.replace(program, graph=first), Program(rest, {}, {})


def _tags(graph: graph_lib.Graph) -> set[int]:
    """The results of the loss tags."""
    return {
        out for node in graph.walk() if node.name == "kfac_loss" for out in node.outputs
    }


def tapped_program(
    traced: Traced, layers: Sequence[Layer], sites: Mapping[int, Sequence[Site]]
) -> Program:
    """The program with a tap at each site of each layer."""
    taps: dict[int, list[Tap]] = {}
    owner: dict[int, int] = {}
    for index, layer in enumerate(layers):
        owner.update(dict.fromkeys(layer.leaves, index))
        for site in sites[index]:
            carried = tuple(layer.carried_shapes)
            tap = Tap(index, site.x, _gather(site, layer), carried)
            taps.setdefault(site.output, []).append(tap)
    scanned = {
        node: frozenset(owner[leaf] for leaf in leaves)
        for node, leaves in traced.found.scanned.items()
    }
    return Program(traced.found.graph, taps, scanned)


def _gather(site: Site, layer: Layer) -> Gather:
    block: Block | None = layer.block

    def gather(x: Array | None, dy: Array, carried: Probe) -> Probe:
        assert block is not None
        sums = site_statistics(site, block, layer.shape, x, dy, carried)
        if layer.link is not None:
            sums |= link_rows(site, block, layer.shape, x, dy)
        if layer.product_rows:
            sums |= product_rows(site, layer.shape, x, dy)
        return sums

    return gather
