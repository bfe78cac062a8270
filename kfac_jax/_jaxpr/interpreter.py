"""Evaluates a program, gathers statistics at its layers and returns registered losses.

Every layer's output passes through a *tap*: the identity with one extra argument, a
zero *probe* shaped like the layer's statistics. The tap's VJP rule computes statistics
from the layer's input and the incoming cotangent, and returns them as the cotangent of
the probe. So JAX's own reverse mode sums them over uses, scans, rematerialisation and
devices.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat, axis_types
from kfac_jax._jaxpr.graph import Atom, Graph, Node, Place, is_value
from kfac_jax.distributions import RegisteredLoss

JOINING = ("concatenate", "scan", "stack")
"""Equations whose tapped operands are not broadcast to the result."""

Probe = dict[str, Array]
Gather = Callable[[Array | None, Array, Probe], Probe]
"""Maps a layer's input and output cotangent (shaped as in the program) and the values
that its probe carries to statistics. Statistics that it leaves out are zero."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """Gathers a layer's statistics at one value of the program.

    Attributes:
      layer: the layer's name, which is also its probe's.
      x: the id of the layer's input, or of several operands; None for a shift.
      gather: computes the statistics.
      carried: entries of the probe that hold values for `gather`, not zeros.
    """

    layer: str
    x: Atom | tuple[Atom, ...] | None
    gather: Gather
    carried: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A graph with taps on the outputs of its layers.

    Attributes:
      graph: the program.
      taps: by the tapped place; several where parameters are joined.
      scanned: for each scan (by the id of its first result) the names of the layers
        whose parameters, and so whose probes, it runs over.
      constants: values without a derivative here, though in the user's program they
        have one.
    """

    graph: Graph
    taps: Mapping[Place, Sequence[Tap]]
    scanned: Mapping[int, frozenset[str]]
    constants: Collection[int] = ()


def run(
    program: Program, inputs: Sequence[Any], probes: Mapping[str, Probe] | None
) -> tuple[list[Any], list[RegisteredLoss]]:
    """Evaluates the program.

    Args:
      program: what to run.
      inputs: its inputs.
      probes: zeros like each layer's statistics; None to run without taps. (Taps are
        `custom_vjp` functions, which forward mode cannot pass.)

    Returns:
      The program's outputs and its registered losses, in order of evaluation.
    """
    return _run(program, program.graph, inputs, probes)


def _run(
    program: Program,
    graph: Graph,
    inputs: Sequence[Any],
    probes: Mapping[str, Probe] | None,
) -> tuple[list[Any], list[RegisteredLoss]]:
    # as JAX's arrays, which a user's derivative rule may index with a traced integer
    env: dict[int, Any] = {
        value: jnp.asarray(x) for value, x in graph.constants.items()
    }
    env.update(zip(graph.inputs, inputs, strict=True))
    losses: list[RegisteredLoss] = []

    def read(atom: Any) -> Any:
        if isinstance(atom, tuple):
            return tuple(map(read, atom))
        return env[atom] if is_value(atom) else atom.val

    def tapped(result: Any, place: Place, node: Node) -> Any:
        for tap in program.taps.get(place, ()):
            if probes is None or tap.layer not in probes:
                continue
            x = None if tap.x is None else read(tap.x)
            with _under(node):
                if isinstance(place, tuple) and node.name not in JOINING:
                    result = jnp.broadcast_to(result, node.out_shape())
                result = _apply_tap(tap, result, x, probes[tap.layer])
        return result

    for node in graph.nodes:
        operands = [read(atom) for atom in node.inputs]
        if node.outputs and (not node.bodies or node.name == "scan"):
            operands = [
                tapped(x, (node.outputs[0], i), node) for i, x in enumerate(operands)
            ]
        if node.name == "kfac_loss":
            losses.append(_registered(node, operands))
            outputs = [operands[0]]
        elif node.name in ("kfac_layer", "kfac_generic"):
            outputs = [operands[0]]
        elif _must_enter(program, node, probes):
            rule = CONTROL.get(node.name)
            if rule is None:
                raise ValueError(
                    f"A loss is registered inside `{node.name}` at "
                    f"{_compat.source_line(node.equation)}, which kfac_jax cannot "
                    "bring out. Register the loss outside of it."
                )
            with _under(node):
                outputs, inner = rule(program, node, operands, probes)
            losses.extend(inner)
        else:
            # as the user wrote it, custom derivative rules included
            outputs = _compat.evaluate(node.equation, operands)
        for value, result in zip(node.outputs, outputs, strict=True):
            env[value] = tapped(result, value, node)
    return [read(atom) for atom in graph.outputs], losses


@contextlib.contextmanager
def _under(node: Node) -> Generator[None]:
    """A context in which new equations get a node's source line and mesh."""
    with _compat.under(node.equation), axis_types.context_of(node.equation):
        yield


def _registered(node: Node, operands: Sequence[Any]) -> RegisteredLoss:
    z, *rest, weight = operands
    count = node.params["num_data"]
    return RegisteredLoss(
        distribution=node.params["distribution"],
        z=jnp.asarray(z),
        data=tuple(jnp.asarray(x) for x in rest[:count]),
        mask=jnp.asarray(rest[count]) if node.params["has_mask"] else None,
        weight=jnp.asarray(weight),
    )


def _apply_tap(tap: Tap, y: Array, x: Array | None, probe: Probe) -> Array:
    @jax.custom_vjp
    def identity(y: Array, x: Array | None, probe: Probe) -> Array:
        return y

    def forward(y: Array, x: Array | None, probe: Probe) -> Any:
        return y, (x, {name: probe[name] for name in tap.carried})

    def backward(residuals: Any, dy: Array) -> tuple[Array, None, Probe]:
        # as JAX's arrays, which known ones are not on JAX 0.8
        x, carried = jax.tree.map(jnp.asarray, residuals)
        return dy, None, axis_types.auto(statistics, types)(x, dy, carried)

    # A cotangent must have exactly the type of what it belongs to, so zeros fill what
    # `gather` leaves out, and all vary over the devices that the probe varies over.
    def statistics(x: Array | None, dy: Array, carried: Probe) -> Probe:
        xs = jax.tree.leaves(x)
        gathered = tap.gather(x, dy, carried)
        return {
            name: gathered[name].reshape(like.shape).astype(like.dtype)
            if name in gathered
            else _compat.vary_like(jnp.zeros(like.shape, like.dtype), dy, *xs)
            for name, like in types.items()
        }

    # Inside of `shard_map` the statistics vary over devices. Marking the probe as
    # varying makes its transpose, a sum over devices, part of the backward pass.
    probe = {
        name: _compat.vary_like(axis_types.on_mesh_of(p, y), y, *jax.tree.leaves(x))
        for name, p in probe.items()
    }
    types: dict[str, Any] = {name: jax.typeof(p) for name, p in probe.items()}
    identity.defvjp(forward, backward)
    return identity(y, x, probe)


def _must_enter(
    program: Program, node: Node, probes: Mapping[str, Probe] | None
) -> bool:
    """Whether nested graphs hold what the equation, as it is, does not."""
    if not node.bodies:
        return False
    own = {*program.constants}
    if probes is not None:
        own.update(p[0] if isinstance(p, tuple) else p for p in program.taps)
    return any(
        inner.name == "kfac_loss" or any(out in own for out in inner.outputs)
        for body in node.bodies
        for inner in body.walk()
    )


ControlRule = Callable[
    [Program, Node, Sequence[Any], Mapping[str, Probe] | None],
    tuple[list[Any], list[RegisteredLoss]],
]


def _checkpoint(
    program: Program,
    node: Node,
    operands: Sequence[Any],
    probes: Mapping[str, Probe] | None,
) -> tuple[list[Any], list[RegisteredLoss]]:
    def body(operands: Sequence[Any], probes: Mapping[str, Probe] | None) -> Any:
        return _run(program, node.bodies[0], operands, probes)

    return jax.checkpoint(
        body,
        prevent_cse=node.params["prevent_cse"],
        policy=node.params["policy"],
    )(operands, probes)


def _scan(
    program: Program,
    node: Node,
    operands: Sequence[Any],
    probes: Mapping[str, Probe] | None,
) -> tuple[list[Any], list[RegisteredLoss]]:
    """Probes of shared layers are closed over, so that their cotangents are summed.

    Probes of layers whose parameters are stacked are scanned like the parameters.
    """
    layout = _compat.scan_layout(node.params)
    start, stop = layout.num_consts, layout.num_consts + layout.num_carry
    consts = operands[:start]
    stacked_layers = program.scanned.get(node.outputs[0], frozenset())
    shared = {k: v for k, v in (probes or {}).items() if k not in stacked_layers}
    stacked = {k: v for k, v in (probes or {}).items() if k in stacked_layers}

    def body(carry: list[Any], xs: Any) -> Any:
        values, stacked = xs
        inner = None if probes is None else {**shared, **stacked}
        outputs, losses = _run(
            program, node.bodies[0], [*consts, *carry, *values], inner
        )
        split = layout.num_carry
        return outputs[:split], (outputs[split:], losses)

    carry, (ys, losses) = jax.lax.scan(
        body,
        list(operands[start:stop]),
        (list(operands[stop:]), stacked),
        length=layout.length,
        reverse=layout.reverse,
        unroll=layout.unroll,
    )
    return [*carry, *ys], [_unstack(loss) for loss in losses]


def _unstack(loss: RegisteredLoss) -> RegisteredLoss:
    """Turns the losses of a scan's steps into one, with the steps inside of each case.

    A loss is a mean over its leading axis and a sum over the others. Steps add up, so
    their axis goes second. The weight may differ from step to step, so it becomes part
    of the mask, which multiplies entry by entry.
    """
    data = tuple(jnp.moveaxis(x, 0, 1) for x in loss.data)
    mask = loss.mask
    if mask is not None:
        mask = jnp.moveaxis(mask, 0, 1)
    weight = loss.weight  # [t]: the factor of each step's loss
    steps = (
        weight.reshape(1, -1)
        if mask is None
        else weight.reshape(1, -1, *([1] * (mask.ndim - 2)))
    )
    z = jnp.moveaxis(loss.z, 0, 1)
    mask = jnp.broadcast_to(steps, z.shape[:2]) if mask is None else mask * steps
    return dataclasses.replace(
        loss, z=z, data=data, mask=mask, weight=jnp.ones((), weight.dtype)
    )


def _cond(
    program: Program,
    node: Node,
    operands: Sequence[Any],
    probes: Mapping[str, Probe] | None,
) -> tuple[list[Any], list[RegisteredLoss]]:
    if any(n.name == "kfac_loss" for body in node.bodies for n in body.walk()):
        raise ValueError(
            "A loss is registered inside `cond` at "
            f"{_compat.source_line(node.equation)}, so that it is not always "
            "computed. Register the loss outside of the cond."
        )
    branches = [
        lambda *values, body=body: _run(program, body, values, probes)[0]
        for body in node.bodies
    ]
    return list(jax.lax.switch(operands[0], branches, *operands[1:])), []


def _shard_map(
    program: Program,
    node: Node,
    operands: Sequence[Any],
    probes: Mapping[str, Probe] | None,
) -> tuple[list[Any], list[RegisteredLoss]]:
    """Probes enter replicated, so that their cotangents are summed over devices."""
    if any(n.name == "kfac_loss" for n in node.bodies[0].walk()):
        raise ValueError(
            "A loss is registered inside `shard_map` at "
            f"{_compat.source_line(node.equation)}, where only one device's part of "
            "the outputs is known. Register the loss outside of it."
        )

    def body(operands: Sequence[Any], probes: Mapping[str, Probe] | None) -> list[Any]:
        return _run(program, node.bodies[0], operands, probes)[0]

    mapped = jax.shard_map(
        body,
        mesh=node.params["mesh"],
        in_specs=(list(node.params["in_specs"]), jax.sharding.PartitionSpec()),
        out_specs=list(node.params["out_specs"]),
        axis_names=set(_compat.manual_axes(node.params)),
        check_vma=node.params["check_vma"],
    )
    return list(mapped(list(operands), probes)), []


def _inline(
    program: Program,
    node: Node,
    operands: Sequence[Any],
    probes: Mapping[str, Probe] | None,
) -> tuple[list[Any], list[RegisteredLoss]]:
    """Evaluates the function's body, so that its own derivative replaces the rule.

    A custom rule does not know of probes. So this run gives statistics only; the
    gradient comes from a run that keeps the rule (see `replaces_rules`).
    """
    return _run(program, node.bodies[0], operands, probes)


CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")


def replaces_rules(program: Program) -> bool:
    """Whether taps lie inside of a function whose custom rule they bypass."""
    return any(
        node.name in CUSTOM_RULES and _must_enter(program, node, {})
        for node in program.graph.walk()
    )


CONTROL: dict[str, ControlRule] = {
    "custom_jvp_call": _inline,
    "custom_vjp_call": _inline,
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
    "remat": _checkpoint,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
}
