"""Turns a description into a JAX function, with its nests as JAX has them.

`Flat` in `flat.py` overrides the nests: loops are unrolled, maps are whole batches, and
nothing is left of jit, checkpoint and custom rules.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfac_jax
from tests.fuzz import programs as p
from tests.fuzz.views import VIEWS


def _shown(h: Any) -> Any:
    jax.debug.callback(lambda _: None, h)
    return h


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "square": lambda h: h + 0.3 * jnp.square(h),
    "softmax": lambda h: jax.nn.softmax(2.0 * h),
    "detached": lambda h: h * jnp.tanh(jax.lax.stop_gradient(h)),
    "double": lambda h: 2.0 * h,
    "shown": _shown,
    "reverse": lambda h: h[..., ::-1],
    "cumsum": lambda h: jnp.cumsum(h, -1),
    "split": lambda h: jnp.concatenate(jnp.split(h, [1], -1)[::-1], -1),
    "sort": lambda h: jnp.sort(h, -1),
    "top": lambda h: jnp.where(h < h.max(-1, keepdims=True), 0.5 * h, h),
    "loop": lambda h: h * _halved(jax.lax.stop_gradient(h)),
    "dropout": lambda h: h * wide(_dropped(h.shape[-1:]), h),
}
LINEAR = ("double", "shown", "reverse", "cumsum", "split", "dropout")


def _halved(h: Any) -> Any:
    """Each entry as often as it must be, by a loop."""
    large = lambda h: jnp.abs(h) > 0.8  # noqa: E731
    halve = lambda h: jnp.where(large(h), 0.5 * h, h)  # noqa: E731
    return jax.lax.while_loop(lambda h: large(h).any(), halve, h)


def _dropped(shape: Any) -> Any:
    return 1.5 * jax.random.bernoulli(jax.random.key(5), 0.7, shape).astype(float)


def _centre(h: Any) -> Any:
    return h - 0.5 * jnp.broadcast_to(h.mean(-2, keepdims=True), h.shape)


def _attend(h: Any) -> Any:
    scores = jnp.einsum("...sd,...td->...st", h, h)
    return jnp.einsum("...st,...td->...sd", jax.nn.softmax(scores), h)


MIXERS: dict[str, Callable[[Any], Any]] = {
    "centre": _centre,
    "attend": _attend,
    "reverse": lambda h: h[..., ::-1, :],
    "delay": lambda h: jnp.concatenate(
        [jnp.zeros_like(h[..., :1, :]), h[..., :-1, :]], -2
    ),
    "cumsum": lambda h: jnp.cumsum(h, -2),
}
LINEAR_MIXERS = ("centre", "reverse", "delay", "cumsum")

POOLS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda h: h.mean(-2),
    "sum": lambda h: h.sum(-2),
    "last": lambda h: h[..., -1, :],
    "flatten": lambda h: h.reshape(*h.shape[:-2], -1),
}


CONV_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


def conv_padding(op: p.Conv, length: int) -> tuple[int, int]:
    """What keeps the length: as "SAME" does without a stride; it may be negative."""
    span = (op.size - 1) * op.dilation
    total = (length - 1) * (op.stride - op.spread) + span
    return total // 2, total - total // 2


class Context(NamedTuple):
    """What goes with the value: integers like its leading axes, and flags."""

    ids: Any  # [batch] or [batch, positions]
    flags: Any  # [batch], or one where mapped over examples


Params = dict[str, Any]
Body = Callable[[Params, Any, Context], Any]


def wide(x: Any, like: Any) -> Any:
    """Repeats along leading axes, and casts."""
    return jnp.broadcast_to(x, like.shape).astype(like.dtype)


class Interpreter:
    """Applies operations to a value."""

    def __init__(self, program: p.Program) -> None:
        """The interpreter of one program."""
        self.program = program

    # ------------------------------------------------- what the flat interpreter does

    def tap(self, kind: str, y: Any, *use: Any, **more: Any) -> Any:
        """Notes that a weight was used, with output y."""
        return y

    # --------------------------------------------------------------------- operations

    def run(self, body: Sequence[p.Op], params: Params, h: Any, context: Context):
        """Applies a body."""
        for op in body:
            h = getattr(self, "_" + type(op).__name__.lower())(op, params, h, context)
        return h

    def weight(self, params: Params, weight: p.Weight, shape: Any, h: Any) -> Any:
        """The weight of some shape, in the type of the value."""
        arrays = [params[p.name(index)].astype(h.dtype) for index in weight.params]
        return VIEWS[weight.view].make(*arrays, tuple(shape))

    def _biased(self, op: Any, params: Params, y: Any, size: int) -> Any:
        if op.bias is None:
            return y
        shift = self.weight(params, op.bias, (size,), y)
        return self.tap("shift", y + wide(shift, y), params, op.bias, (size,))

    def _dense(self, op: p.Dense, params: Params, h: Any, context: Context) -> Any:
        shape = h.shape[-1], op.out
        w = self.weight(params, op.weight, shape, h)
        y = self.tap("dense", h @ w, params, op.weight, shape, x=h)
        out = self._biased(op, params, y, op.out)
        if not op.tag:
            return out
        b = None if op.bias is None else self.weight(params, op.bias, (op.out,), h)
        return kfac_jax.register_dense(out, h, w, b)

    def _heads(self, op: p.Heads, params: Params, h: Any, context: Context) -> Any:
        lead = h.shape[:-1]
        if op.side == "out":
            shape = op.width, op.heads, op.out
            w = self.weight(params, op.weight, shape, h)
            y = jnp.einsum("...i,iho->...ho", h, w)
            y = self.tap("heads out", y, params, op.weight, shape, x=h)
            return y.reshape(*lead, op.heads * op.out)
        shape = op.heads, op.width, op.out
        w = self.weight(params, op.weight, shape, h)
        h = h.reshape(*lead, op.heads, op.width)
        if op.side == "in":
            y = jnp.einsum("...hi,hio->...o", h, w)
            return self.tap("heads in", y, params, op.weight, shape, x=h)
        y = jnp.einsum("...hi,hio->...ho", h, w)
        y = self.tap("heads each", y, params, op.weight, shape, x=h)
        return y.reshape(*lead, op.heads * op.out)

    def _conv(self, op: p.Conv, params: Params, h: Any, context: Context) -> Any:
        own = {"positions": h.shape[-2:], "features": (*h.shape[-1:], 1)}
        own["image"] = (*h.shape[-2:], 1)
        x = h.reshape(-1, *own[op.over])
        axes = x.ndim - 2
        shape = *(op.size,) * axes, x.shape[-1] // op.groups, op.out
        w = self.weight(params, op.weight, shape, h)
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (op.stride,) * axes,
            [conv_padding(op, n) for n in x.shape[1:-1]],
            lhs_dilation=(op.spread,) * axes,
            rhs_dilation=(op.dilation,) * axes,
            feature_group_count=op.groups,
            dimension_numbers=CONV_LAYOUTS[axes],
        )
        y = self.tap("conv", y, params, op.weight, shape, x=x, op=op)
        y = self._biased(op, params, y, op.out)
        if op.tag:
            b = None if op.bias is None else self.weight(params, op.bias, (op.out,), h)
            y = kfac_jax.register_conv2d(y, x, w, b)
        width = op.out if op.over == "positions" else h.shape[-1] * op.out
        return y.reshape(*h.shape[:-1], width)

    def ids(self, h: Any, context: Context) -> Any:
        """The integers of the value's rows."""
        ids = context.ids
        return ids[..., 0] if ids.ndim >= h.ndim else ids

    def _embed(self, op: p.Embed, params: Params, h: Any, context: Context) -> Any:
        shape, ids = (op.rows, op.out), self.ids(h, context)
        table = self.weight(params, op.weight, shape, h)
        if op.how == "places":
            ids = jnp.arange(h.shape[-2])
            y = jnp.broadcast_to(table[ids], (*h.shape[:-1], op.out))
            ids = jnp.broadcast_to(ids, h.shape[:-1])
        elif op.how == "index":
            y = table[ids]
        elif op.how == "take":
            y = jnp.take(table, ids, axis=0)
        else:
            y = jax.nn.one_hot(ids, op.rows, dtype=h.dtype) @ table
        y = self.tap("embed", y, params, op.weight, shape, x=ids)
        return h + y if op.add else y

    def _token(self, op: p.Token, params: Params, h: Any, context: Context) -> Any:
        first, shape = h[..., :1, :], h.shape[-1:]
        token = wide(self.weight(params, op.weight, shape, h), first)
        token = self.tap("shift", token, params, op.weight, shape)
        return jnp.concatenate([token, h[..., :-1, :]], -2)

    def _vector(self, weight: p.Weight, params: Params, h: Any, over: str) -> Any:
        shape = {"features": h.shape[-1:], "positions": h.shape[-2:], "scalar": ()}
        return wide(self.weight(params, weight, shape[over], h), h), shape[over]

    def _norm(self, op: p.Norm, params: Params, h: Any, context: Context) -> Any:
        if op.kind == "layer":
            h = h - wide(h.mean(-1, keepdims=True), h)
        if op.kind != "none":
            square = jnp.square(h).mean(-1, keepdims=True) + 0.1
            h = h * wide(jax.lax.rsqrt(square), h)
        x = h
        if op.scale is not None:
            scale, shape = self._vector(op.scale, params, h, op.over)
            h = self.tap("scale", h * scale, params, op.scale, shape, x=h)
        if op.shift is not None:
            shift, shape = self._vector(op.shift, params, h, op.over)
            h = self.tap("shift", h + shift, params, op.shift, shape)
        if op.tag:
            given = [
                None if w is None else self.weight(params, w, h.shape[-1:], h)
                for w in (op.scale, op.shift)
            ]
            return kfac_jax.register_scale_and_shift(h, x, *given)
        return h

    def _gate(self, op: p.Gate, params: Params, h: Any, context: Context) -> Any:
        out = 2 * op.out if op.kind == "glu" else op.out
        w = self.weight(params, op.weight, (h.shape[-1], out), h)
        y = self.tap("dense", h @ w, params, op.weight, (h.shape[-1], out), x=h)
        u, v = jnp.split(y, 2, axis=-1) if op.kind == "glu" else (h, y)
        return u * jax.nn.sigmoid(v)

    def _rnn(self, op: p.Rnn, params: Params, h: Any, context: Context) -> Any:
        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            shapes = (x.shape[-1], op.out), (op.out, op.out)
            total = None
            for weight, shape, rows in zip(
                (op.inner, op.recurrent), shapes, (x, carry), strict=True
            ):
                y = rows @ self.weight(params, weight, shape, x)
                y = self.tap("dense", y, params, weight, shape, x=rows)
                total = y if total is None else total + y
            new = jnp.tanh(self._biased(op, params, total, op.out))
            return new, new

        start = jnp.zeros((*h.shape[:-2], op.out), h.dtype)
        return self.steps(op.how, step, start, h)

    def steps(self, how: str, step: Any, start: Any, h: Any) -> Any:
        """Runs over positions, which come out again."""
        if how == "scan":
            return jnp.moveaxis(
                jax.lax.scan(step, start, jnp.moveaxis(h, -2, 0))[1], 0, -2
            )
        found = []
        for t in range(h.shape[-2]):
            start, y = step(start, h[..., t, :])
            found.append(y)
        return jnp.stack(found, -2)

    def _act(self, op: p.Act, params: Params, h: Any, context: Context) -> Any:
        return ACTIVATIONS[op.name](h)

    def _mix(self, op: p.Mix, params: Params, h: Any, context: Context) -> Any:
        return MIXERS[op.name](h)

    def _pool(self, op: p.Pool, params: Params, h: Any, context: Context) -> Any:
        return POOLS[op.name](h)

    def _residual(self, op: p.Residual, params: Params, h: Any, context: Context):
        return h + self.run(op.body, params, h, context)

    def _cast(self, op: p.Cast, params: Params, h: Any, context: Context) -> Any:
        inner = self.run(op.body, params, h.astype(op.dtype), context)
        return inner.astype(h.dtype)

    # -------------------------------------------------------------------------- nests

    def _cond(self, op: p.Cond, params: Params, h: Any, context: Context) -> Any:
        def branch(body: Sequence[p.Op]) -> Body:
            return lambda params, h, context: self.run(body, params, h, context)

        flag = context.flags[0] if context.flags.ndim else context.flags
        return jax.lax.cond(flag, branch(op.body), branch(op.other), params, h, context)

    def _nest(self, op: p.Nest, params: Params, h: Any, context: Context) -> Any:
        def body(params: Params, h: Any, context: Context) -> Any:
            return self.run(op.body, params, h, context)

        own = [
            p.name(index)
            for index, param in enumerate(self.program.params)
            if op.id in param.nests
        ]
        return NESTS[op.kind](body, params, h, context, own, op.n)


def _with_rule(body: Body) -> Body:
    wrapped = jax.custom_jvp(body)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(body, primals, tangents))
    return wrapped


def _with_vjp(body: Body) -> Body:
    wrapped = jax.custom_vjp(body)
    wrapped.defvjp(lambda *a: jax.vjp(body, *a), lambda pull, g: pull(g))
    return wrapped


def _wrapped(wrap: Callable[[Body], Body]) -> Callable[..., Any]:
    return lambda body, params, h, context, own, n: wrap(body)(params, h, context)


def _vmap(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    return jax.vmap(body, (None, 0, 0))(params, h, context)


def _map(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    return jax.lax.map(lambda args: body(params, *args), (h, context))


def _positions_vmap(body: Body, params: Params, h: Any, context: Context, own, n):
    axes = Context(-1, None)
    return jax.vmap(body, (None, -2, axes), -2)(params, h, context)


def _positions_scan(body: Body, params: Params, h: Any, context: Context, own, n):
    def step(carry: int, xs: Any) -> tuple[int, Any]:
        x, ids = xs
        return carry, body(params, x, context._replace(ids=ids))

    xs = jnp.moveaxis(h, -2, 0), jnp.moveaxis(context.ids, -1, 0)
    return jnp.moveaxis(jax.lax.scan(step, 0, xs)[1], 0, -2)


def _scan(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    step = lambda h, _: (body(params, h, context), None)  # noqa: E731
    return jax.lax.scan(step, h, length=n)[0]


def _stacked(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    def step(h: Any, each: Params) -> tuple[Any, None]:
        return body({**params, **each}, h, context), None

    return jax.lax.scan(step, h, {k: params[k] for k in own}, length=n)[0]


def _numbered(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    def step(i: Any, h: Any) -> Any:
        each = {name: params[name][i] for name in own}
        return body({**params, **each}, h, context)

    return jax.lax.fori_loop(0, n, step, h)


def _unrolled(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    for k in range(n):
        each = {name: params[name][k] for name in own}
        h = body({**params, **each}, h, context)
    return h


def _ensemble(body: Body, params: Params, h: Any, context: Context, own: Any, n: int):
    """Each member has a copy of the batch; their outputs are added up."""
    axes = {name: 0 if name in own else None for name in params}
    h, ids = (jnp.broadcast_to(x, (n, *x.shape)) for x in (h, context.ids))
    mapped = jax.vmap(body, (axes, 0, Context(0, None)))
    return mapped(params, h, context._replace(ids=ids)).sum(0)


NESTS: dict[str, Callable[..., Any]] = {
    "jit": _wrapped(jax.jit),
    "remat": _wrapped(jax.checkpoint),
    "custom_jvp": _wrapped(_with_rule),
    "custom_vjp": _wrapped(_with_vjp),
    "vmap": _vmap,
    "map": _map,
    "positions vmap": _positions_vmap,
    "positions scan": _positions_scan,
    "scan": _scan,
    "stacked": _stacked,
    "numbered": _numbered,
    "unrolled": _unrolled,
    "ensemble": _ensemble,
}
"""Of a body with all parameters, those of its own by name, and the number of steps."""
