"""The oracle: the same program without control flow, with every use laid open.

Loops are unrolled and maps are whole batches. A zero is added to each use's output, so
that Jacobians over those zeros are what K-FAC's output gradients are made of. Which
entries of a parameter meet which inputs and outputs comes from the entries' numbers,
that take the same way as the parameter.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import programs as p
from tests.fuzz.interpreter import Context, Interpreter, Params, conv_padding
from tests.fuzz.views import VIEWS

NUMBERS = 10**6
"""More than any parameter has entries."""


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of (a part of) one parameter as a linear map.

    Attributes:
      param: which one.
      entries: `[e, i, o]`, which entries of the parameter.
      x: `[e, rows, i]`, its inputs.
      scale: the factor between the parameter's entries and what multiplies `x`.
      rows: from arrays `[k, *output]` to `[k, e, rows, o]`.
      tap: which of the zeros was added to the output.
    """

    param: int
    entries: np.ndarray
    x: Any
    scale: float
    rows: Callable[[Any], Any]
    tap: int


def numbered(program: p.Program) -> dict[str, np.ndarray]:
    """For each parameter the numbers of its entries, under the name with an @."""
    return {
        "@" + p.name(i): i * NUMBERS
        + np.arange(int(np.prod(param.shape))).reshape(param.shape)
        for i, param in enumerate(program.params)
    }


class Flat(Interpreter):
    """Runs a program so; `uses` are those of the last run."""

    def __init__(self, program: p.Program, zeros: Sequence[Any] | None) -> None:
        """With the zeros to add, or None in a run that finds their shapes."""
        super().__init__(program)
        self.zeros = zeros
        self.shapes: list[Any] = []
        self.uses: list[Use] = []
        self.mapped = program.loss.place == "vmap"

    # --------------------------------------------------------------------------- taps

    def tap(
        self,
        kind: str,
        y: Any,
        params: Params,
        weight: p.Weight,
        shape: Sequence[int],
        *,
        x: Any = None,
        op: Any = None,
    ) -> Any:
        if VIEWS[weight.view].index is None:
            return y
        number = len(self.shapes)
        self.shapes.append(y)
        if self.zeros is not None:
            y = y + self.zeros[number].astype(y.dtype)
        scale = VIEWS[weight.view].scale
        for term in self._entries(params, weight, shape):
            entries, inputs, rows = LAYOUTS[kind](term, x, y.shape, op)
            if inputs is None:
                inputs = jnp.ones((len(entries), *np.shape(rows(y[None]))[2:3], 1))
            self.uses += _by_parameter(entries, inputs, scale, rows, number)
        return y

    def _entries(
        self, params: Params, weight: p.Weight, shape: Any
    ) -> list[np.ndarray]:
        """For each term the numbers of its entries."""
        arrays = [params["@" + p.name(index)] for index in weight.params]
        index = VIEWS[weight.view].index
        assert index is not None
        found = index(*arrays, tuple(shape))
        terms = found if isinstance(found, tuple) else (found,)
        return [np.broadcast_to(term, tuple(shape)) for term in terms]

    # -------------------------------------------------------------------------- nests

    def steps(self, how: str, step: Any, start: Any, h: Any) -> Any:
        return super().steps("loop", step, start, h)

    def _cond(self, op: p.Cond, params: Params, h: Any, context: Context) -> Any:
        if not self.mapped:
            body = op.body if self.program.flags[0] else op.other
            return self.run(body, params, h, context)
        first, second = (
            self.run(body, params, h, context) for body in (op.body, op.other)
        )
        flags = context.flags.reshape(-1, *[1] * (first.ndim - 1))
        return jnp.where(flags, first, second)

    def _nest(self, op: p.Nest, params: Params, h: Any, context: Context) -> Any:
        if op.kind in ("vmap", "map"):
            before, self.mapped = self.mapped, True
            h = self.run(op.body, params, h, context)
            self.mapped = before
            return h
        own = [
            prefix + p.name(index)
            for index, param in enumerate(self.program.params)
            if op.id in param.nests
            for prefix in ("", "@")
        ]
        if op.kind not in (*p.STACKED, "scan", "unrolled", "ensemble"):
            return self.run(op.body, params, h, context)
        total = None
        for k in range(op.n):
            each = {**params, **{name: params[name][k] for name in own}}
            y = self.run(op.body, each, h, context)
            if op.kind == "ensemble":
                total = y if total is None else total + y
            else:
                h = y
        return h if total is None else total


def _by_parameter(
    entries: np.ndarray,
    x: Any,
    scale: float,
    rows: Callable[[Any], Any],
    tap: int,
) -> list[Use]:
    """Splits a use of several joined parameters into theirs."""
    owners = entries // NUMBERS
    found: list[Use] = []
    for param in np.unique(owners):
        mine = owners == param
        e, i, o = (
            np.flatnonzero(mine.any(other)) for other in ((1, 2), (0, 2), (0, 1))
        )
        assert mine[np.ix_(e, i, o)].all()
        found.append(
            Use(
                int(param),
                entries[np.ix_(e, i, o)] % NUMBERS,
                x[e][:, :, i],
                scale,
                lambda j, e=e, o=o: rows(j)[:, e][..., o],
                tap,
            )
        )
    return found


# ----------------------------------------------------- each kind's canonical layout

Layout = tuple[np.ndarray, Any, Callable[[Any], Any]]


def _dense(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    size = entries.shape[-1]
    rows = lambda j: j.reshape(len(j), 1, -1, size)  # noqa: E731
    return entries[None], x.reshape(1, -1, x.shape[-1]), rows


def _heads_out(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    return _dense(entries.reshape(len(entries), -1), x, shape, op)


def _heads_in(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    heads = entries.reshape(-1, entries.shape[-1])
    return _dense(heads, x.reshape(*x.shape[:-2], -1), shape, op)


def _heads_each(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    def by_head(j: Any) -> Any:
        return jnp.moveaxis(j.reshape(len(j), -1, *j.shape[-2:]), 2, 1)

    return entries, by_head(x[None])[0], by_head


def _conv(entries: np.ndarray, x: Any, shape: Any, op: p.Conv) -> Layout:
    g, space = op.groups, x.ndim - 2
    for axis in range(1, 2 * space, 2):  # of [n, position, tap, ..., channel]
        x = _taps(x, axis, op)
    x = x.transpose(0, *range(1, 2 * space, 2), *range(2, 2 * space + 1, 2), x.ndim - 1)
    kernel = op.size**space
    split = x.reshape(len(x), -1, kernel, g, x.shape[-1] // g)
    patches = jnp.moveaxis(split, 3, 0).reshape(g, -1, kernel * split.shape[-1])
    by_group = entries.reshape(kernel, entries.shape[-2], g, op.out // g)
    by_group = np.moveaxis(by_group, 2, 0).reshape(g, -1, op.out // g)

    def rows(j: Any) -> Any:
        split = j.reshape(len(j), -1, g, op.out // g)
        return jnp.moveaxis(split, 2, 1)

    return by_group, patches, rows


def _taps(x: Any, axis: int, op: p.Conv) -> Any:
    """What each output position meets at each tap, a new axis: `y[t, k] = x[...]`."""
    length = x.shape[axis]
    t, k = np.ogrid[:length, : op.size]
    place = t * op.stride + k * op.dilation - conv_padding(op, length)[0]
    inside = (place >= 0) & (place <= (length - 1) * op.spread)
    inside &= place % op.spread == 0
    found = jnp.take(x, np.where(inside, place // op.spread, 0), axis)
    mask = inside.reshape(*[1] * axis, *inside.shape, *[1] * (x.ndim - axis - 1))
    return found * mask.astype(found.dtype)


def _embed(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    one_hot = jax.nn.one_hot(x, len(entries), dtype=float)
    return _dense(entries, one_hot, shape, op)


def _scale(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    def rows(j: Any) -> Any:
        return j.reshape(len(j), -1, entries.size).swapaxes(1, 2)[..., None]

    return entries.reshape(-1, 1, 1), rows(x[None])[0], rows


def _shift(entries: np.ndarray, x: Any, shape: Any, op: Any) -> Layout:
    rows = lambda j: j.reshape(len(j), 1, -1, entries.size)  # noqa: E731
    return entries.reshape(1, 1, -1), None, rows


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "dense": _dense,
    "heads out": _heads_out,
    "heads in": _heads_in,
    "heads each": _heads_each,
    "conv": _conv,
    "embed": _embed,
    "scale": _scale,
    "shift": _shift,
}
"""From a weight's entries, input and output shape to `Use`'s fields."""
