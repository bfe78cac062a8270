"""A jaxpr as a small graph with calls inlined and control flow as nested graphs.

Every value of the program has its own integer id, also in repeated calls of one jitted
function (whose jaxpr JAX shares between calls). So passes can store their results in
plain dictionaries.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from kfac_jax._jaxpr import _compat

Atom = Any
"""A value's id (int), or a `Literal`."""

Place = int | tuple[int, int]
"""A value's id, or one operand of an equation: the id of the equation's first result,
and the operand's index. An operand counts as broadcast to that result, except where
the equation joins its operands."""

_BODY_PARAMS: dict[str, tuple[str, ...]] = {
    "scan": ("jaxpr",),
    "cond": ("branches",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "checkpoint": ("jaxpr",),
    "remat2": ("jaxpr",),
    "remat": ("jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "custom_vjp_call_jaxpr": ("fun_jaxpr", "call_jaxpr"),
    "shard_map": ("jaxpr",),
    "xla_pmap": ("call_jaxpr",),
}
"""Equations that do more with their jaxprs than call them, and where the jaxprs are.

Any other equation with a jaxpr is a plain call.
"""

BODY_OFFSETS = {
    "scan": 0,
    "cond": 1,
    "checkpoint": 0,
    "remat2": 0,
    "remat": 0,
    "custom_jvp_call": 0,
    "custom_vjp_call": 0,
    "shard_map": 0,
}
"""Equations whose bodies passes follow values into, and the index of the operand that
is the body's first input. (The first operand of `cond` chooses the branch.)"""

_CUSTOM = ("custom_jvp", "custom_vjp")

_CALL_PARAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation: its operands and results by id, and its nested graphs, if any.

    `callers` are the equations of the calls that it was inlined from, outermost first.
    """

    equation: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    bodies: tuple["Graph", ...] = ()
    callers: tuple[Any, ...] = ()

    @property
    def source(self) -> str:
        """The user's source line, of the equation or the call it was inlined from."""
        lines = map(_compat.source_line, (self.equation, *reversed(self.callers)))
        return next((line for line in lines if line), "")

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The equation's static parameters."""
        return self.equation.params

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of one operand."""
        return tuple(self.equation.invars[index].aval.shape)

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of one result."""
        return tuple(self.equation.outvars[index].aval.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in order of evaluation; `constants` are arrays by the ids they define."""

    inputs: tuple[int, ...]
    constants: Mapping[int, Any]
    nodes: tuple[Node, ...]
    outputs: tuple[Atom, ...]

    def walk(self) -> Iterator[Node]:
        """Yields every node, also the nested ones."""
        for node in self.nodes:
            yield node
            for body in node.bodies:
                yield from body.walk()

    @functools.cached_property
    def sources(self) -> "Sources":
        """Where the values of this program come from."""
        makers = {out: node for node in self.walk() for out in node.outputs}
        outer: dict[int, Atom] = {}
        constants = dict(self.constants)
        for node in self.walk():
            for body in node.bodies:
                constants.update(body.constants)
                outer.update(given(node, body))
        return Sources(makers, outer, constants)


class Sources(NamedTuple):
    """Where values come from, nested ones too."""

    makers: Mapping[int, Node]
    outer: Mapping[int, Atom]  # inputs of bodies that are values around them
    constants: Mapping[int, Any]

    def constant(self, atom: Atom) -> Any:
        """What a value is that is a literal or a constant; None for others."""
        while is_value(atom) and atom not in self.constants:
            if atom not in self.outer:
                return None
            atom = self.outer[atom]
        return self.constants[atom] if is_value(atom) else atom.val


def given(node: Node, body: Graph) -> Iterator[tuple[int, Atom]]:
    """The inputs of a body that are operands of its equation in every step."""
    offset = BODY_OFFSETS.get(node.name)
    if offset is None or node.name == "shard_map":
        return
    inputs, operands = body.inputs, node.inputs[offset:]
    if node.name == "scan":
        count = _compat.scan_layout(node.params).num_consts
        inputs, operands = inputs[:count], operands[:count]
    yield from zip(inputs, operands, strict=True)


def is_value(atom: Atom) -> bool:
    """Tells a value's id from a literal."""
    return isinstance(atom, int)


class _Builder:
    def __init__(self) -> None:
        self._ids = itertools.count()
        self._recomputing = False

    def graph(self, closed: Any) -> Graph:
        jaxpr, constants = _compat.open_jaxpr(closed)
        env: dict[Any, Atom] = {}
        inputs = tuple(self._define(env, var) for var in jaxpr.invars)
        names = [self._define(env, var) for var in jaxpr.constvars]
        bound = dict(zip(names, constants, strict=True))
        nodes: list[Node] = []
        outputs = self._body(jaxpr, env, nodes, bound, ())
        return Graph(inputs, bound, tuple(nodes), outputs)

    def _graphs(self, equation: Any) -> tuple[Graph, ...]:
        before = self._recomputing
        # A `checkpoint` equation with this parameter is the backward pass of a function
        # that computes a gradient itself. It repeats the forward pass, loss tags
        # included, and these must not count twice.
        self._recomputing |= bool(equation.params.get("differentiated"))
        graphs = tuple(self.graph(body) for body in _bodies(equation))
        self._recomputing = before
        return graphs

    def _define(self, env: dict[Any, Atom], var: Any) -> int:
        env[var] = next(self._ids)
        return env[var]

    def _body(
        self,
        jaxpr: Any,
        env: dict[Any, Atom],
        nodes: list[Node],
        bound: dict[int, Any],
        callers: tuple[Any, ...],
    ) -> tuple[Atom, ...]:
        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, _compat.Literal) else env[atom]

        for equation in jaxpr.eqns:
            inputs = tuple(read(atom) for atom in equation.invars)
            callee = plain_call(equation)
            if callee is not None:
                inner, constants = _compat.open_jaxpr(callee)
                scope = dict(zip(inner.invars, inputs, strict=True))
                for var, value in zip(inner.constvars, constants, strict=True):
                    bound[self._define(scope, var)] = value
                results = self._body(inner, scope, nodes, bound, (*callers, equation))
                env.update(zip(equation.outvars, results, strict=True))
                continue
            if self._recomputing and equation.primitive.name == "kfac_loss":
                env[equation.outvars[0]] = inputs[0]
                continue
            outputs = tuple(self._define(env, var) for var in equation.outvars)
            bodies = self._graphs(equation)
            nodes.append(Node(equation, inputs, outputs, bodies, callers))
        return tuple(read(atom) for atom in jaxpr.outvars)


def _bodies(equation: Any) -> Sequence[Any]:
    found: list[Any] = []
    for name in _BODY_PARAMS.get(equation.primitive.name, ()):
        value = equation.params.get(name)
        if value is not None:
            found.extend(value if isinstance(value, tuple | list) else [value])
    return found


def plain_call(equation: Any) -> Any:
    """Returns the jaxpr that an equation merely calls, as `jit` does, or None.

    A call is recognised by its operands and results, whose shapes are those of the
    jaxpr's inputs and outputs. (Names would miss new call primitives.) The jaxprs of
    reductions and kernels work on blocks or entries of the operands; those are excluded
    by name, because for some shapes they look like calls.
    """
    if equation.primitive.name in _BODY_PARAMS:
        return None
    callee = next(
        (equation.params[n] for n in _CALL_PARAMS if n in equation.params), None
    )
    if callee is None or equation.primitive.name.startswith(("reduce", "pallas")):
        return None
    inner, _ = _compat.open_jaxpr(callee)
    if not hasattr(inner, "eqns"):
        return None
    ours = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
    theirs = [v.aval.shape for v in (*inner.invars, *inner.outvars)]
    return callee if ours == theirs else None


def build(closed: Any) -> Graph:
    """Builds the graph of a closed jaxpr, with plain calls inlined."""
    return _Builder().graph(closed)


def custom_body(equation: Any) -> Any:
    """The jaxpr of a function with a custom derivative rule; None of others."""
    if not equation.primitive.name.startswith(_CUSTOM):
        return None
    return next(iter(_bodies(equation)), None)


def has_own_rule(node: Node) -> bool:
    """Whether a node is a function with a custom derivative rule."""
    return node.name.startswith(_CUSTOM)


def read_inputs(node: Node) -> tuple[Atom, ...]:
    """The operands that discovery follows.

    A layer tag's operands are the raw output `y`, then inputs and parameters. The tag
    stands for the equations that computed `y`, so only the latter are followed. The tag
    of a convolution does not say its strides and padding, so there `y` is followed back
    to the convolution itself.
    """
    if node.name != "kfac_layer":
        return node.inputs
    return node.inputs[:1] if node.params["kind"] == "conv2d" else node.inputs[1:]


def use_counts(graph: Graph) -> dict[int, int]:
    """Counts, for every value of the program, the places that read it."""
    counts: dict[int, int] = {}
    graphs = [graph, *(body for node in graph.walk() for body in node.bodies)]
    for part in graphs:
        atoms = [*part.outputs, *(a for node in part.nodes for a in node.inputs)]
        for atom in atoms:
            if is_value(atom):
                counts[atom] = counts.get(atom, 0) + 1
    return counts


def epsilon(graph: Graph, dtypes: Iterable[Any]) -> float:
    """The precision of a program.

    Args:
      graph: the program.
      dtypes: those of its arguments.

    Returns:
      The largest ε of the inexact types of these and of the results of equations; 0
      without any.
    """
    made = (x.aval.dtype for node in graph.walk() for x in node.equation.outvars)
    types = {x for x in (*dtypes, *made) if jnp.issubdtype(x, jnp.inexact)}
    return max((float(jnp.finfo(x).eps) for x in types), default=0.0)
