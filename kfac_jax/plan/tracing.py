"""Traces a loss function and discovers its layers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr import graph as graph_lib
from kfac_jax._jaxpr.custom_rules import Agreements
from kfac_jax._jaxpr.discovery import Found, discover
from kfac_jax._jaxpr.hoisting import hoisted
from kfac_jax._jaxpr.sites import unmatched
from kfac_jax._jaxpr.slicing import needed
from kfac_jax._utils import arguments
from kfac_jax._utils.trees import TreeSpec
from kfac_jax.distributions import Convex
from kfac_jax.plan import batch


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A traced loss function, and the results of discovery in it."""

    found: Found
    aux_tree: Any
    in_batch: tuple[bool, ...]  # for each array of the arguments
    agreements: tuple[bool, ...]  # of derivative rules with bodies, as they were asked

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
    whole: bool = False,
    agreements: Sequence[bool] | None = None,
) -> Traced:
    """Traces the loss function abstractly and finds its layers.

    Args:
      loss_fn: the user's loss function.
      has_aux: whether it returns auxiliary data.
      tree: the parameters' description.
      params: the parameters, or their shapes.
      args: the further arguments, or their shapes.
      batch_argnums: the indices of the arguments that are the batch, or None.
      whole: whether layers are found from the loss, and none need be registered.
      agreements: those of an earlier trace; None to try the rules.

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
    _check_cases(program)
    losses = [node for node in program.walk() if node.name == "kfac_loss"]
    cases = [n.shape()[0] for n in losses if n.shape()]
    states = [*batch.examples(args, batch_argnums, cases)]
    found = discover(program, tree.shapes, states, whole)
    is_weight = [True] * len(tree.shapes) + [False] * len(states)
    is_data = [False] * len(tree.shapes) + [state is not None for state in states]
    asked = Agreements(agreements)
    leaves = jax.tree.leaves((params, args))
    better = hoisted(closed, leaves, is_weight, is_data, asked)
    if better is not None:
        other = discover(graph_lib.build(better), tree.shapes, states, whole)
        left, before = (
            sum(math.prod(tree.shapes[leaf]) for leaf in unmatched(x.uses))
            for x in (other, found)
        )
        found = other if left <= before else found
    if not found.losses and not whole:
        raise ValueError(
            "No loss is registered. Expected a call to a function of kfac_jax.losses "
            "or kfac_jax.register_*_loss on the network's output inside the loss "
            "function; add one, e.g. "
            "kfac_jax.register_softmax_cross_entropy_loss(logits, labels). One in the "
            "rule of a custom_jvp is met where the gradient is taken: see "
            "value_and_statistics. JAX may drop one within a scan or a call without "
            "results that is differentiated: use the array that it returns."
        )
    _check_references(program)
    _check_closures(program)
    in_batch = tuple(state is not None for state in states)
    return Traced(found, structure[-1], in_batch, tuple(asked.answers))


def _check_cases(program: graph_lib.Graph) -> None:
    for node in program.walk():
        if node.name != "kfac_loss":
            continue
        shape, rank = node.shape(), node.params["distribution"].event_rank
        if len(shape) > rank and shape[0] == 0:
            raise ValueError(
                "A registered output needs at least one case; got shape "
                f"{shape} at {_compat.source_line(node.equation)}. Leave out batches "
                "without cases: their mean loss is no number."
            )
        if len(shape) < 1 + rank:
            raise ValueError(
                "A registered output needs a leading axis of cases; got shape "
                f"{shape} at {_compat.source_line(node.equation)}. Register the "
                "batch's output, e.g. [n, classes], or the output of one case inside "
                "vmap."
            )


def _check_references(program: graph_lib.Graph) -> None:
    """Refuses registered outputs that are read from a mutable array.

    What was written to it is not among the operands of what reads it.

    Args:
      program: the traced loss function.

    Raises:
      ValueError: with the line.
    """
    nodes = [*program.walk()]
    outputs = {node.inputs[0] for node in nodes if node.name == "kfac_loss"}
    live = needed(program, {x for x in outputs if graph_lib.is_value(x)})
    for node in nodes:
        reads = any(out in live for out in node.outputs)
        if reads and not node.bodies and _compat.uses_reference(node.equation):
            raise ValueError(
                f"A registered output depends on a mutable array (jax.new_ref) at "
                f"{node.source}, where kfac_jax cannot follow parameters: expected "
                "functions of arrays. Compute with x = x.at[...].set(...) instead, and "
                "keep references for what the registered loss does not depend on."
            )


def _check_closures(program: graph_lib.Graph) -> None:
    """Checks that convex losses do not close over values of the trace.

    They are evaluated after the trace has ended, when its values are no longer valid.

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
    """Whether a loss can only be evaluated within the trace of the program.

    Tracers of an outer trace (a plan made inside of `jit`) stay valid. Such tracers are
    among the program's constants.
    """
    operands = node.equation.invars[: 1 + node.params["num_data"]]
    case = [jax.ShapeDtypeStruct(v.aval.shape[1:], v.aval.dtype) for v in operands]
    try:
        closed = jax.make_jaxpr(distribution.per_case_loss)(*case)
    except jax.errors.UnexpectedTracerError:
        return True
    outer = {id(x) for x in tracers(program)}
    return any(id(x) not in outer for x in tracers(graph_lib.build(closed)))


def tracers(graph: graph_lib.Graph) -> list[Any]:
    """The constants of a graph that belong to a trace around it."""
    graphs = [graph, *(body for node in graph.walk() for body in node.bodies)]
    constants = [x for one in graphs for x in one.constants.values()]
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
