"""The only place that knows how JAX versions differ (0.8 to 0.12).

Supported forms: `Jaxpr` and `ClosedJaxpr` apart (until 0.10) or merged (0.12); `scan`
with `num_consts`/`num_carry` or with `ft_in`.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.extend import core as extend_core
from jax.extend import source_info_util
from jax.interpreters import ad, batching, mlir, partial_eval

source_info_util.register_exclusion(str(pathlib.Path(__file__).parents[1]))
"""The library's own frames are not the user's source lines."""

Literal = extend_core.Literal
Primitive = extend_core.Primitive
Var = extend_core.Var
Equation = extend_core.JaxprEqn


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Splits a jaxpr, closed, merged or open, into an open one and its constants."""
    constants = tuple(getattr(jaxpr, "consts", ()) or ())
    return getattr(jaxpr, "jaxpr", jaxpr), constants


@functools.cache
def _template() -> Any:
    """An empty jaxpr that has the debug information JAX asks for."""
    return open_jaxpr(jax.make_jaxpr(lambda: ())())[0]


def evaluate(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on `inputs`, its operands that are not literals.

    Goes through the public `jax.core.eval_jaxpr`, so custom derivative rules, effects
    and the user's source lines are kept.
    """
    variables: dict[int, Any] = {}
    for var, value in zip(equation.invars, inputs, strict=True):
        if not isinstance(var, Literal):
            variables[id(var)] = (var, value)
    jaxpr = _template().replace(
        invars=[var for var, _ in variables.values()],
        outvars=list(equation.outvars),
        eqns=[equation],
        effects=equation.effects,
    )
    return jax.core.eval_jaxpr(jaxpr, (), *(value for _, value in variables.values()))


class ScanLayout(NamedTuple):
    """How the operands of a `scan` equation are divided."""

    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def scan_layout(params: dict[str, Any]) -> ScanLayout:
    """Reads the layout of a `scan` from its equation's parameters."""
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # JAX 0.12: a flat tree of (consts, carry, xs)
        consts, carry = (len(part) for part in tuple(params["ft_in"].unpack())[:2])
    return ScanLayout(
        consts, carry, params["length"], params["reverse"], params["unroll"]
    )


def source_line(equation: Any) -> str:
    """Returns `file:line (function)` of the user's code that made the equation."""
    line = source_info_util.summarize(equation.source_info)
    return "" if line.startswith("<unknown>") else line


def uses_reference(equation: Any) -> bool:
    """Whether the equation makes, reads or writes a mutable array (`jax.new_ref`)."""
    variables = (*equation.invars, *equation.outvars)
    return any(type(v.aval).__name__ == "AbstractRef" for v in variables)


def under(equation: Any) -> Any:
    """Returns a context in which new equations get this one's source line."""
    return source_info_util.user_context(equation.source_info.traceback)


def identity_primitive(name: str) -> Any:
    """Makes a primitive that returns its first operand, at no cost once compiled."""
    primitive = Primitive(name)
    primitive.def_impl(lambda operand, *_, **__: operand)
    primitive.def_abstract_eval(lambda operand, *_, **__: operand)
    mlir.register_lowering(primitive, lambda _, operand, *__, **___: [operand])
    return primitive


def kept(primitive: Any) -> Any:
    """Keeps a primitive's equations whose results are not used, where JAX drops such.

    It does when it differentiates a function under `jit`, `scan` or `checkpoint`.
    """

    def rule(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
        equation = rest[-1]  # JAX 0.12 tells before which operands are live
        return [True] * len(equation.invars), equation

    partial_eval.dce_rules[primitive] = rule
    return primitive


def set_jvp(primitive: Any, rule: Any) -> None:
    """Registers `rule(primals, tangents, **params)`; a zero tangent is None there."""

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        tangents = [None if type(t) is ad.Zero else t for t in tangents]
        out, tangent = rule(primals, tangents, **params)
        if tangent is None:
            zero: Any = ad.Zero
            tangent = zero.from_primal_value(out)
        return out, tangent

    ad.primitive_jvps[primitive] = jvp


def set_batching(primitive: Any, rule: Any) -> None:
    """Registers `rule(operands, axes, **params) -> (out, axis)`.

    Axes are int or None.
    """

    def batcher(operands: Any, axes: Any, **params: Any) -> Any:
        axes = [axis if isinstance(axis, int) else None for axis in axes]
        return rule(operands, axes, **params)

    batching.primitive_batchers[primitive] = batcher


def manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """The mesh axes that a `shard_map` takes over (its parameter's name changed)."""
    names = ("newly_manual_axes", "manual_axes")
    return frozenset(next(params[name] for name in names if name in params))


def vary_like(x: Array, *others: Array | None) -> Array:
    """Marks x as varying over the mesh axes that others vary over, inside `shard_map`.

    The transpose of this is the sum over those axes.
    """
    return _vary_over(
        x, frozenset[str]().union(*(varying(y) for y in others if y is not None))
    )


def _vary_over(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - varying(x)))
    if not missing:
        return x
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)


def all_gather(x: Array, axis: str | tuple[str, ...]) -> Array:
    """Stacks the devices' x, `[devices, ...]`, the same on all of them."""
    lax: Any = jax.lax
    if not varying(x):  # inside pmap, which does not tell what varies
        return lax.all_gather(x, axis)
    if hasattr(lax, "all_gather_invariant"):
        return lax.all_gather_invariant(x, axis)
    return lax.all_gather(x, axis, to="invarying")


def summed_devices(outputs: Sequence[Array], sums: Any) -> int:
    """Over how many devices' outputs cotangents have been summed, inside `shard_map`.

    JAX does so where what the cotangents belong to does not vary over an axis but the
    outputs do.

    Args:
      outputs: what was pulled back.
      sums: a tree of the cotangents.

    Returns:
      The product of the sizes of those axes.

    Raises:
      ValueError: if it is not the same for all.
    """
    all_axes = frozenset[str]().union(*map(varying, outputs))
    found = {all_axes - varying(x) for x in jax.tree.leaves(sums)}
    if len(found) > 1:
        axes = " and ".join(sorted(str(sorted(each)) for each in found))
        raise ValueError(
            "Inside of shard_map some parameters vary over a mesh axis and others do "
            f"not: expected gradients that are summed over the same axes, got {axes}. "
            "Mark all parameters as varying (jax.lax.pcast) or none."
        )
    lax: Any = jax.lax
    return math.prod(lax.axis_size(axis) for axis in next(iter(found), ()))


def varies(x: Array, axes: Sequence[str]) -> bool:
    """Whether `shard_map` tells that x varies over one of the axes."""
    return not varying(x).isdisjoint(axes)


def zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Zeros of a shape from `eval_shape`, varying over the same axes."""
    x = jnp.zeros(like.shape, like.dtype)
    return _vary_over(x, varying(like))


def varying(x: Any) -> frozenset[str]:
    """The mesh axes that an array, or its shape, varies over inside `shard_map`."""
    aval: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    found = getattr(aval, "manual_axis_type", None)  # since JAX 0.10
    return frozenset(
        getattr(aval, "vma", None) or () if found is None else found.varying
    )
