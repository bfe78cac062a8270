"""All differences between JAX versions (0.8 to 0.12) that the library deals with.

Supported forms: `Jaxpr` and `ClosedJaxpr` as two classes (until 0.10) or as one (0.12);
`scan` with `num_consts` and `num_carry` or with `ft_in`.
"""

import functools
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
"""Makes JAX skip the library's frames when it looks for the user's source line."""

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
    """An empty jaxpr, with the debug information that JAX demands of every jaxpr."""
    return open_jaxpr(jax.make_jaxpr(lambda: ())())[0]


def evaluate(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on its operands.

    It becomes the only equation of a jaxpr that the public `jax.core.eval_jaxpr` runs.
    So custom derivative rules, effects and the user's source lines are kept, without
    any knowledge of how the primitive is bound.

    Args:
      equation: the equation.
      inputs: a value for each operand; those of literals are ignored.

    Returns:
      The results.
    """
    # by variable, as an operand that appears twice is one input of the jaxpr
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
    """How the operands of a `scan` equation are divided: constants, carry, the rest."""

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
    """Returns `file:line (function)` of the user's code that an equation is from."""
    line = source_info_util.summarize(equation.source_info)
    return "" if line.startswith("<unknown>") else line


def uses_reference(equation: Any) -> bool:
    """Whether the equation makes, reads or writes a mutable array (`jax.new_ref`)."""
    variables = (*equation.invars, *equation.outvars)
    return any(type(v.aval).__name__ == "AbstractRef" for v in variables)


def under(equation: Any) -> Any:
    """Returns a context that gives new equations the source line of this one."""
    return source_info_util.user_context(equation.source_info.traceback)


def identity_primitive(name: str) -> Any:
    """Makes a primitive that returns its first operand and compiles to nothing."""
    primitive = Primitive(name)
    primitive.def_impl(lambda operand, *_, **__: operand)
    primitive.def_abstract_eval(lambda operand, *_, **__: operand)
    mlir.register_lowering(primitive, lambda _, operand, *__, **___: [operand])
    return primitive


def keep_unused(primitive: Any) -> Any:
    """Makes JAX keep a primitive's equations even if their results are not used.

    JAX removes dead code when it differentiates a function under `jit`, `scan` or
    `checkpoint`, and the result of a loss tag is often not used.
    """

    def rule(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
        equation = rest[-1]  # JAX 0.12 has one more argument, before the equation
        return [True] * len(equation.invars), equation

    partial_eval.dce_rules[primitive] = rule
    return primitive


def set_jvp(primitive: Any, rule: Any) -> None:
    """Registers `rule(primals, tangents, **params)`, with None for a zero tangent."""

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
    """The mesh axes that a `shard_map` maps over (its parameter was renamed)."""
    names = ("newly_manual_axes", "manual_axes")
    return frozenset(next(params[name] for name in names if name in params))


def vary_like(x: Array, *others: Array | None) -> Array:
    """Marks x, inside `shard_map`, as varying over the axes that others vary over.

    The transpose is the sum over those axes.
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
    """Stacks the devices' x to `[devices, ...]`, replicated over them."""
    lax: Any = jax.lax
    if not varying(x):  # inside pmap, where types do not say what varies
        return lax.all_gather(x, axis)
    if hasattr(lax, "all_gather_invariant"):
        return lax.all_gather_invariant(x, axis)
    return lax.all_gather(x, axis, to="invarying")


def check_summed_alike(outputs: Sequence[Array], sums: Any) -> None:
    """Checks, in `shard_map`, that cotangents are summed over the same devices.

    JAX sums a cotangent over every axis that the outputs vary over, but the parameters
    (or probes) do not.

    Args:
      outputs: the outputs from which cotangents were pulled back.
      sums: a tree of the pulled-back cotangents.

    Raises:
      ValueError: if the axes are not the same for all cotangents.
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


def varies(x: Array, axes: Sequence[str]) -> bool:
    """Whether the type of x says that it varies over one of the axes."""
    return not varying(x).isdisjoint(axes)


def zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Zeros like a result of `eval_shape`, varying over the same axes."""
    x = jnp.zeros(like.shape, like.dtype)
    return _vary_over(x, varying(like))


def varying(x: Any) -> frozenset[str]:
    """The mesh axes that an array (or its shape) varies over inside `shard_map`."""
    aval: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    found = getattr(aval, "manual_axis_type", None)  # since JAX 0.10
    return frozenset(
        getattr(aval, "vma", None) or () if found is None else found.varying
    )
