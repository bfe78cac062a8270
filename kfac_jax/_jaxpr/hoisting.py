"""Takes what a loop computes from weights alone out of the loop.

A step of a `scan` may compute its weight from its slice of a parameter, as in
`w * mask` or `jnp.split(w, 3)`, or may take the slice by its own number, as in `w[i]`.
Such equations depend on no carry, so they can be applied to all slices at once before
the loop, which then runs over weights. The results are the same. A function with a
custom derivative rule around such a loop becomes its body, where its rule agrees.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax._jaxpr import _compat, view_rules
from kfac_jax._jaxpr.custom_rules import Agreements
from kfac_jax._jaxpr.graph import custom_body, plain_call


class _Origin(NamedTuple):
    """What a value depends on."""

    data: bool = False  # a case, or the carry of a loop
    weight: bool = False  # a parameter
    step: bool = False  # the number of the innermost loop's step

    @property
    def is_ahead(self) -> bool:
        """Whether all steps' values can be computed before the loop."""
        return self.step and not self.data


def hoisted(
    closed: Any,
    args: Sequence[Any],
    is_weight: Sequence[bool],
    is_data: Sequence[bool],
    agreements: Agreements | None = None,
) -> Any:
    """Takes equations out of loops.

    Args:
      closed: a closed jaxpr.
      args: its inputs, or their shapes.
      is_weight: for each input whether it is a parameter.
      is_data: for each input whether it has cases.
      agreements: says which functions may be replaced by their bodies.

    Returns:
      The closed jaxpr of the same function; None if it would be the same program.
    """
    origins = [*map(_Origin, is_data, is_weight)]
    found = None
    while True:  # what has left an inner loop may leave the next one
        jaxpr, constants = _compat.open_jaxpr(closed if found is None else found)
        plan = _plan(jaxpr, origins, agreements or Agreements())
        if not plan.changes:
            return found
        run = functools.partial(_rest, plan, constants, iter(()))
        found = jax.make_jaxpr(lambda *args, run=run: run(args))(*args)


@dataclasses.dataclass(eq=False)
class _Plan:
    """What becomes of the equations of a jaxpr.

    Attributes:
      jaxpr: the jaxpr.
      ahead: the equations that leave the loop around it, by index.
      before: these, and others that they need values of.
      live: the equations that are left.
      supplied: the results of `ahead` that those read.
      inner: the plans of nested jaxprs that are run in a new way.
      needs: for each input whether `before` reads it.
      reads: for each input whether `live` reads it.
    """

    jaxpr: Any
    ahead: set[int]
    before: set[int]
    live: set[int]
    supplied: set[Any]
    inner: dict[int, "_Plan"]
    needs: list[bool]
    reads: list[bool]

    @property
    def takes(self) -> bool:
        """Whether something leaves the loop around the jaxpr."""
        return self.count > 0

    @property
    def changes(self) -> bool:
        """Whether something leaves a loop in the jaxpr."""
        pairs = ((self.jaxpr.eqns[i], p) for i, p in self.inner.items())
        return any(p.changes or (_is_scan(e) and p.takes) for e, p in pairs)

    @property
    def calls(self) -> list["_Plan"]:
        """The plans of functions and checkpoints."""
        pairs = self.inner.items()
        return [plan for i, plan in pairs if not _is_scan(self.jaxpr.eqns[i])]

    @property
    def count(self) -> int:
        """How many arrays leave the loop."""
        return len(self.supplied) + sum(plan.count for plan in self.calls)

    @property
    def room(self) -> int:
        """How many numbers leave the loop in a step, or are computed at once for it."""
        made = (x for i in self.before for x in self.jaxpr.eqns[i].outvars)
        largest = max((math.prod(x.aval.shape) for x in made), default=0)
        own = sum(math.prod(x.aval.shape) for x in self.supplied)
        inner = [plan.room for plan in self.calls]
        return max(largest, own + sum(inner), *inner, 0)


def _plan(
    jaxpr: Any,
    origins: Sequence[_Origin],
    agreements: Agreements,
    *,
    stays: bool = False,
) -> _Plan:
    """Decides which equations leave the loop that a jaxpr is the body of.

    Args:
      jaxpr: an open jaxpr.
      origins: what its inputs depend on.
      agreements: says which functions may be replaced by their bodies.
      stays: whether none do.

    Returns:
      The plan.
    """
    known: dict[Any, _Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(atom: Any) -> _Origin:
        literal = isinstance(atom, _compat.Literal)
        return _Origin() if literal else known.get(atom, _Origin())

    ahead: set[int] = set()
    inner: dict[int, _Plan] = {}
    for i, equation in enumerate(jaxpr.eqns):
        operands = [*map(origin, equation.invars)]
        whole = (
            _Origin(*map(any, zip(*operands, strict=True))) if operands else _Origin()
        )
        name = equation.primitive.name
        if equation.effects or name.startswith("kfac_"):
            whole = whole._replace(data=True)
        known.update((out, whole) for out in equation.outvars)
        body = _body(equation)
        if body is not None and whole.data and whole.weight:
            if _is_scan(equation):
                inner[i] = _plan_of_scan(equation, operands, agreements)
            else:
                call = _plan(body, operands, agreements, stays=stays)
                changed = call.takes or call.changes  # others are run as they are
                if changed and custom_body(equation) is not None:
                    changed = agreements(
                        equation, [x.data or x.weight for x in operands]
                    )
                if changed:
                    inner[i] = call
        elif whole.is_ahead and whole.weight and not _is_view(equation) and not stays:
            ahead.add(i)

    needed = {*_variables(jaxpr.outvars)}
    live: set[int] = set()
    before = {*ahead}
    wanted: set[Any] = set()
    for i, equation in [*enumerate(jaxpr.eqns)][::-1]:
        operands = equation.invars
        call = None if _is_scan(equation) else inner.get(i)
        if i in ahead:
            wanted.update(_variables(operands))
            continue
        if call is None and any(out in wanted for out in equation.outvars):
            before.add(i)
            wanted.update(_variables(operands))
        if i in before and not any(out in needed for out in equation.outvars):
            continue
        live.add(i)
        needed.update(_variables(operands, call.reads if call else None))
        if call:
            wanted.update(_variables(operands, call.needs))
    outs = (out for i in ahead for out in jaxpr.eqns[i].outvars)
    supplied = {out for out in outs if out in needed}
    needs, reads = ([x in some for x in jaxpr.invars] for some in (wanted, needed))
    return _Plan(jaxpr, ahead, before, live, supplied, inner, needs, reads)


def _variables(atoms: Sequence[Any], chosen: Sequence[bool] | None = None) -> list[Any]:
    pairs = zip(atoms, chosen or [True] * len(atoms), strict=True)
    return [x for x, yes in pairs if yes and not isinstance(x, _compat.Literal)]


def _plan_of_scan(
    equation: Any, operands: Sequence[_Origin], agreements: Agreements
) -> _Plan:
    layout = _compat.scan_layout(equation.params)
    first, end = layout.num_consts, layout.num_consts + layout.num_carry
    body = _body(equation)
    origins = [
        *(x._replace(step=False) for x in operands[:first]),
        *(
            _Origin(step=True) if counts else _Origin(data=True, weight=True)
            for counts in _counters(equation)
        ),
        *(x._replace(step=True) for x in operands[end:]),
    ]
    plan = _plan(body, origins, agreements)
    # not what is much larger than what it is computed from, as copies for each case
    given = zip(equation.invars, operands, strict=True)
    room = sum(math.prod(x.aval.shape) for x, own in given if not own.data)
    if plan.room * layout.length > 2 * room:
        return _plan(body, origins, agreements, stays=True)
    return plan


def _counters(equation: Any) -> list[int]:
    """For each carry by how much it grows in a step; 0 for others."""
    layout = _compat.scan_layout(equation.params)
    body = _body(equation)
    makers = {out: inner for inner in body.eqns for out in inner.outvars}
    result: list[int] = []
    for i in range(layout.num_carry):
        at = layout.num_consts + i
        start, carry, out = equation.invars[at], body.invars[at], body.outvars[i]
        made = None if isinstance(out, _compat.Literal) else makers.get(out)
        grows = made is not None and made.primitive.name == "add"
        operands = made.invars if made is not None and grows else ()
        by = [x for x in operands if isinstance(x, _compat.Literal)]
        counts = (
            carry in _variables(operands)
            and isinstance(start, _compat.Literal)
            and jnp.shape(start.val) == ()
            and jnp.issubdtype(jnp.result_type(start.val), jnp.integer)
        )
        result.append(int(by[0].val) if counts and by else 0)
    return result


def _is_scan(equation: Any) -> bool:
    return equation.primitive.name == "scan"


def _is_checkpoint(equation: Any) -> bool:
    return equation.primitive.name in ("checkpoint", "remat", "remat2")


def _callee(equation: Any) -> Any:
    """The jaxpr of a loop, of a checkpoint or of a function; None of others."""
    if _is_scan(equation) or _is_checkpoint(equation):
        return equation.params["jaxpr"]
    own = custom_body(equation)
    return plain_call(equation) if own is None else own


def _body(equation: Any) -> Any:
    """The open jaxpr of a loop, of a checkpoint or of a function."""
    body = _callee(equation)
    return None if body is None else _compat.open_jaxpr(body)[0]


# Without those that pick entries: with strides, or by the loop's own number, they are
# views only before the loop, or not at all.
_VIEWS = view_rules.TABLE.keys() - {"dynamic_slice", "gather", "slice", "tile"}


def _is_view(equation: Any) -> bool:
    """Whether discovery follows a slice through the equation inside of the loop."""
    name = equation.primitive.name
    if name in ("mul", "div"):
        factors = equation.invars if name == "mul" else equation.invars[1:]
        return any(isinstance(x, _compat.Literal) for x in factors)
    return name in _VIEWS


class _Values:
    """The values of a jaxpr's variables."""

    def __init__(self, jaxpr: Any, constants: Sequence[Any], args: Sequence[Any]):
        names = (*jaxpr.constvars, *jaxpr.invars)
        self._values = dict(zip(names, (*constants, *args), strict=True))

    def read(self, atoms: Sequence[Any]) -> list[Any]:
        """The values of some atoms; None for what was not computed."""
        return [
            x.val if isinstance(x, _compat.Literal) else self._values.get(x)
            for x in atoms
        ]

    def write(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        self._values.update(zip(variables, values, strict=True))


def _ahead(plan: _Plan, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Computes what leaves a loop, for one step of it.

    Args:
      plan: the plan of the loop's body.
      constants: its constants.
      args: its inputs; None for those that it needs not.

    Returns:
      What `_rest` is given, in its order.
    """
    values = _Values(plan.jaxpr, constants, args)
    result: list[Any] = []
    for i, equation in enumerate(plan.jaxpr.eqns):
        operands = values.read(equation.invars)
        if i in plan.before:
            values.write(equation.outvars, _one(equation, operands))
        if i in plan.ahead:
            own = [x for x in equation.outvars if x in plan.supplied]
            result += values.read(own)
        elif i in plan.inner and not _is_scan(equation):
            result += _ahead(plan.inner[i], _constants(equation), operands)
    return result


def _one(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluates an equation; a row that is taken by its number as one of a table."""
    inner = plain_call(equation)
    if inner is not None:
        jaxpr, constants = _compat.open_jaxpr(inner)
        values = _Values(jaxpr, constants, operands)
        for one in jaxpr.eqns:
            values.write(one.outvars, _one(one, values.read(one.invars)))
        return values.read(jaxpr.outvars)
    if equation.primitive.name == "dynamic_slice":
        table, row, *_ = operands
        sizes = equation.params["slice_sizes"]
        if sizes == (1, *table.shape[1:]):
            with _compat.under(equation):
                numbers = jax.lax.GatherDimensionNumbers(
                    offset_dims=tuple(range(table.ndim - 1)),
                    collapsed_slice_dims=(0,),
                    start_index_map=(0,),
                )
                at = jnp.asarray(row)[None]
                found = jax.lax.gather(table, at, numbers, sizes, mode="clip")
                return [found[None]]
    return _compat.evaluate(equation, operands)


def _rest(
    plan: _Plan, constants: Sequence[Any], given: Iterator[Any], args: Sequence[Any]
) -> list[Any]:
    """Evaluates what is left of a jaxpr.

    Args:
      plan: its plan.
      constants: its constants.
      given: what has left the loop around it.
      args: its inputs.

    Returns:
      Its results.
    """
    values = _Values(plan.jaxpr, constants, args)
    for i, equation in enumerate(plan.jaxpr.eqns):
        if i in plan.ahead:
            own = [x for x in equation.outvars if x in plan.supplied]
            values.write(own, [*itertools.islice(given, len(own))])
        if i not in plan.live:
            continue
        operands, inner = values.read(equation.invars), plan.inner.get(i)
        if inner is None or not (inner.takes or inner.changes):
            found = _compat.evaluate(equation, operands)
        elif _is_scan(equation):
            found = _scan(equation, inner, operands)
        else:
            found = _call(equation, inner, given, operands)
        values.write(equation.outvars, found)
    return values.read(plan.jaxpr.outvars)


def _constants(equation: Any) -> Sequence[Any]:
    return _compat.open_jaxpr(_callee(equation))[1]


def _call(
    equation: Any, plan: _Plan, given: Iterator[Any], operands: Sequence[Any]
) -> list[Any]:
    own = [*itertools.islice(given, plan.count)]

    def call(own: list[Any], operands: Sequence[Any]) -> list[Any]:
        return _rest(plan, _constants(equation), iter(own), operands)

    if _is_checkpoint(equation):
        options = {n: equation.params[n] for n in ("prevent_cse", "policy")}
        call = jax.checkpoint(call, **options)
    read = [x if yes else None for x, yes in zip(operands, plan.reads, strict=True)]
    return call(own, read)


def _scan(equation: Any, plan: _Plan, operands: Sequence[Any]) -> list[Any]:
    layout = _compat.scan_layout(equation.params)
    first, end = layout.num_consts, layout.num_consts + layout.num_carry
    constants = _compat.open_jaxpr(equation.params["jaxpr"])[1]
    free, start, slices = operands[:first], operands[first:end], operands[end:]

    steps = jnp.arange(layout.length)[:: -1 if layout.reverse else 1]
    counters = [
        jnp.asarray(a + by * steps, a.dtype) if by else None
        for a, by in zip(start, _counters(equation), strict=True)
    ]

    def ahead(counters: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
        return _ahead(plan, constants, [*free, *counters, *slices])

    needed, read = (
        [x if yes else None for x, yes in zip(slices, some[end:], strict=True)]
        for some in (plan.needs, plan.reads)
    )
    more: list[Any] = []  # if only an inner loop has something to take out
    if plan.takes:
        more = jax.vmap(ahead)(counters, needed)

    def step(carry: Any, xs: Any) -> Any:
        slices, more = xs
        found = _rest(plan, constants, iter(more), [*free, *carry, *slices])
        return found[: layout.num_carry], found[layout.num_carry :]

    carry, ys = jax.lax.scan(
        step,
        [*start],
        (read, more),
        length=layout.length,
        reverse=layout.reverse,
        unroll=layout.unroll,
    )
    return [*carry, *ys]
