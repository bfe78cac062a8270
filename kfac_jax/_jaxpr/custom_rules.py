"""Which custom derivative rules may be replaced by the derivative of their function.

A tap inside of a `custom_jvp` or `custom_vjp` function is met only if its body is
differentiated in place of the rule. That gives the same only where both agree: not for
a straight-through estimate, nor for implicit differentiation.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.graph import (
    Graph,
    Node,
    Sources,
    build,
    custom_body,
    epsilon,
    has_own_rule,
    is_value,
)
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax._jaxpr.sites import OtherUse, Site, Use
from kfac_jax._jaxpr.slicing import dependent

REASON = "is in a function whose custom derivative rule is not its body's derivative"


def kept(graph: Graph, uses: Sequence[Use], parameters: int) -> tuple[int, ...]:
    """The functions with uses inside whose rule must not be replaced.

    Each is differentiated both ways at random operands.

    Args:
      graph: the program.
      uses: what discovery found.
      parameters: the number of parameters, which are the program's first inputs.

    Returns:
      Their places among all functions with a rule, in order.
    """
    outputs = {_value(use) for use in uses if isinstance(use, Site)}
    values = dependent(graph, graph.inputs[:parameters])
    return tuple(
        i
        for i, node in enumerate(_functions(graph))
        if not outputs.isdisjoint(_made(node))
        and not any(x.name == "kfac_loss" for b in node.bodies for x in b.walk())
        and not _agrees(node, values, graph.sources)
    )


def without(graph: Graph, uses: Sequence[Use], rules: Collection[int]) -> list[Use]:
    """Refuses the uses inside of functions whose rule is kept.

    Args:
      graph: the program.
      uses: what discovery found.
      rules: what `kept` returned, for this program or one like it.

    Returns:
      The uses.
    """
    inside = {
        value
        for i, node in enumerate(_functions(graph))
        if i in rules
        for value in _made(node)
    }
    return [
        OtherUse(use.leaf, "unmatched", REASON, use.source)
        if _value(use) in inside
        else use
        for use in uses
    ]


def _functions(graph: Graph) -> list[Node]:
    return [node for node in graph.walk() if has_own_rule(node)]


def _made(node: Node) -> set[int]:
    return {x for body in node.bodies for inner in body.walk() for x in inner.outputs}


def _value(use: Use) -> int | None:
    if not isinstance(use, Site):
        return use.at if use.kind == "unmatched" else None
    place = use.output
    return place[0] if isinstance(place, tuple) else place


def _agrees(node: Node, values: Collection[int], sources: Sources) -> bool:
    """Whether a function's rule gives the derivative of its body.

    Not where either has none, or cannot be evaluated outside of the program.

    Args:
      node: the function.
      values: the values that depend on parameters, by which it is differentiated.
      sources: where values come from; a rule may know constants that it closes over.

    Returns:
      Whether it does.
    """
    known = [sources.constant(atom) for atom in node.inputs]
    # of constants that an outer trace will know only their types are known
    operands = [
        _random(x.aval, i)
        if value is None or isinstance(value, jax.core.Tracer)
        else jnp.asarray(value, x.aval.dtype)
        for i, (x, value) in enumerate(zip(node.equation.invars, known, strict=True))
    ]
    real = [
        i
        for i, (atom, x) in enumerate(zip(node.inputs, operands, strict=True))
        if is_value(atom) and atom in values and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return _same_derivatives(node.equation, node.bodies[0], operands, real)


class Agreements:
    """Whether rules of functions agree with their bodies, asked in a fixed order.

    A rule is tried when the plan is made. When the program is traced again, maybe for
    other shapes, the answers are those of the plan.
    """

    def __init__(self, known: Sequence[bool] | None = None):
        self._known = None if known is None else iter(known)
        self.answers: list[bool] = []

    def __call__(self, equation: Any, varies: Sequence[bool]) -> bool:
        """Whether a function's rule gives the derivative of its body.

        Args:
          equation: the function's.
          varies: for each operand whether it may depend on parameters.

        Returns:
          Whether it does, at random operands.
        """
        if self._known is not None:
            answer = next(self._known, False)
        else:
            operands = [
                jnp.asarray(x.val)
                if isinstance(x, _compat.Literal)
                else _random(x.aval, i)
                for i, x in enumerate(equation.invars)
            ]
            real = [
                i
                for i, (yes, x) in enumerate(zip(varies, operands, strict=True))
                if yes and jnp.issubdtype(x.dtype, jnp.floating)
            ]
            body = build(custom_body(equation))
            answer = _same_derivatives(equation, body, operands, real)
        self.answers.append(answer)
        return answer


def _same_derivatives(
    equation: Any, body: Graph, operands: Sequence[Array], real: Sequence[int]
) -> bool:
    program = Program(body, {}, {})

    def derivatives(function: Any) -> list[Array]:
        def outputs(values: list[Array]) -> list[Array]:
            full = list(operands)
            for i, value in zip(real, values, strict=True):
                full[i] = value
            found = function(full)
            return [y for y in found if jnp.issubdtype(y.dtype, jnp.floating)]

        ys, pull = jax.vjp(outputs, [operands[i] for i in real])
        (found,) = pull([_random(y, -i - 1) for i, y in enumerate(ys)])
        return found

    try:
        with jax.ensure_compile_time_eval():
            by_rule = derivatives(lambda x: _compat.evaluate(equation, x))
            by_body = derivatives(lambda x: run(program, x, None)[0])
            precision = epsilon(program.graph, (x.dtype for x in operands))
            close = functools.partial(_close, precision=precision)
            return all(map(close, by_rule, by_body))
    except jax.errors.UnexpectedTracerError:
        # A rule that closes over traced arrays can only be evaluated where it was
        # traced. No later run of the program could keep it.
        return True
    except Exception:  # whatever a rule may raise
        return False


def _random(like: Any, seed: int) -> Array:
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.zeros(like.shape, like.dtype)
    return jax.random.normal(jax.random.key(seed % 2**31), like.shape, like.dtype)


def _close(a: Array, b: Array, *, precision: float) -> bool:
    tolerance = min(10 * precision**0.5, 0.1)
    scale = jnp.nanmax(jnp.abs(b), initial=0.0)
    error = jnp.nanmax(jnp.abs(a - b), initial=0.0)
    return bool(error <= tolerance * scale)
