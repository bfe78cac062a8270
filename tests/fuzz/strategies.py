"""Hypothesis strategies that compose programs."""

import dataclasses
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.fuzz import programs as p
from tests.fuzz.interpreter import ACTIVATIONS, MIXERS, POOLS
from tests.fuzz.problem import LOSS_KINDS, VOCABULARY
from tests.fuzz.views import VIEWS

WIDTHS = st.sampled_from((2, 3, 4))
PLAIN = ("plain",) * 6
COVERED = tuple(name for name, view in VIEWS.items() if view.covered)
SOME = tuple(name for name, view in VIEWS.items() if not view.covered)
VIEW_CHOICE = (*PLAIN, *COVERED, *COVERED, *SOME)
LOCAL = ("jit", "remat", "custom_jvp", "custom_vjp")


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where an operation is: what may be there, and which nests are stacked."""

    width: int
    positions: int
    nests: tuple[tuple[int, int], ...] = ()  # of stacked nests: id and length
    mapped: bool = False
    depth: int = 0


class Builder:
    """Draws operations, and collects their parameters."""

    def __init__(self, draw: Any) -> None:
        """With hypothesis's `draw`."""
        self.draw = draw
        self.params: list[p.Param] = []
        self.nests = 0
        self.budget = draw(st.integers(2, 7))  # of operations with parameters

    def weight(self, shape: tuple[int, ...], scope: Scope) -> p.Weight:
        """A weight of that shape, of new parameters or of one that there is."""
        view = self.draw(st.sampled_from(VIEW_CHOICE))
        too_small = VIEWS[view].least_rank > len(shape)
        if too_small or any(0 in stored for stored in VIEWS[view].stored(shape)):
            view = "plain"
        found: list[int] = []
        for stored in VIEWS[view].stored(shape):
            found.append(self._param(stored, scope, found))
        return p.Weight(tuple(found), view)

    def _param(self, shape: tuple[int, ...], scope: Scope, taken: list[int]) -> int:
        ids = tuple(nest for nest, _ in scope.nests)
        lead = tuple(length for _, length in scope.nests)
        old = [
            i
            for i, param in enumerate(self.params)
            if param.nests in ((), ids)
            and param.shape[len(param.nests) :] == shape
            and i not in taken
        ]
        if old and self.draw(st.integers(0, 2)) == 0:
            return self.draw(st.sampled_from(old))
        outside = bool(ids) and self.draw(st.integers(0, 3)) == 0
        dtype = self.draw(st.sampled_from(("float64",) * 11 + ("float32",)))
        param = p.Param(shape if outside else (*lead, *shape), () if outside else ids)
        self.params.append(dataclasses.replace(param, dtype=dtype))
        return len(self.params) - 1

    def maybe(self, shape: tuple[int, ...], scope: Scope) -> p.Weight | None:
        """A weight or none."""
        return self.weight(shape, scope) if self.draw(st.booleans()) else None

    # --------------------------------------------------------------------- operations

    def body(self, scope: Scope, most: int, out: int | None = None):
        """Some operations, and the width and positions that they leave.

        With `out` the last one is a dense layer of that width, if it is needed.
        """
        ops: list[p.Op] = []
        for _ in range(self.draw(st.integers(1, most))):
            if self.budget <= 0:
                break
            op, scope = self.op(scope)
            ops.append(op)
        if out is not None and scope.width != out:
            ops.append(self.dense(scope, out))
            scope = dataclasses.replace(scope, width=out)
        return tuple(ops), scope

    def dense(self, scope: Scope, out: int) -> p.Dense:
        """A dense layer."""
        self.budget -= 1
        return p.Dense(
            self.weight((scope.width, out), scope),
            out,
            self.maybe((out,), scope),
            self.draw(st.integers(0, 7)) == 7,
        )

    def op(self, scope: Scope) -> tuple[p.Op, Scope]:
        """One operation, and what it leaves."""
        choices = ["dense"] * 5 + ["act"] * 4 + ["heads", "norm", "gate", "embed"] * 2
        choices += ["residual", "cast"] + ["conv features"] * (scope.width <= 4)
        if scope.depth < 3:
            choices += ["nest"] * 6 + ["cond"]
        if scope.positions:
            choices += ["mix", "conv positions"] * 2 + ["rnn", "token"]
            choices += ["conv image"] * (scope.width <= 4)
        if scope.positions and scope.depth == 0:
            choices += ["pool"]
        choice = self.draw(st.sampled_from(choices))
        return getattr(self, "_" + choice.replace(" ", "_"))(scope)

    def _dense(self, scope: Scope) -> tuple[p.Op, Scope]:
        out = self.draw(WIDTHS)
        return self.dense(scope, out), dataclasses.replace(scope, width=out)

    def _act(self, scope: Scope) -> tuple[p.Op, Scope]:
        return p.Act(self.draw(st.sampled_from(tuple(ACTIVATIONS)))), scope

    def _mix(self, scope: Scope) -> tuple[p.Op, Scope]:
        return p.Mix(self.draw(st.sampled_from(tuple(MIXERS)))), scope

    def _pool(self, scope: Scope) -> tuple[p.Op, Scope]:
        few = scope.width * scope.positions <= 9
        kind = self.draw(st.sampled_from(tuple(POOLS)[: None if few else -1]))
        width = scope.width * (scope.positions if kind == "flatten" else 1)
        return p.Pool(kind), dataclasses.replace(scope, width=width, positions=0)

    def _heads(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        side = self.draw(st.sampled_from(("out", "in", "each")))
        if side == "out":
            heads, width = self.draw(st.integers(1, 2)), scope.width
        else:
            heads = self.draw(
                st.sampled_from([n for n in (1, 2, 3) if scope.width % n == 0])
            )
            width = scope.width // heads
        out = self.draw(st.integers(1 if side != "in" and heads > 1 else 2, 2))
        shape = (width, heads, out) if side == "out" else (heads, width, out)
        op = p.Heads(self.weight(shape, scope), side, heads, width, out)
        left = out if side == "in" else heads * out
        return op, dataclasses.replace(scope, width=left)

    def _conv_features(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        size, out = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 2))
        weight = self.weight((size, 1, out), scope)
        op = p.Conv(weight, "features", size, out, bias=self.maybe((out,), scope))
        op = dataclasses.replace(op, **self._moves())
        return op, dataclasses.replace(scope, width=scope.width * out)

    def _moves(self) -> dict[str, int]:
        """Strides of a convolution, or what is spread."""
        return {
            name: self.draw(st.sampled_from((1, 1, 1, 2)))
            for name in ("stride", "spread")
        }

    def _conv_image(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        size, out = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 2))
        dilation = self.draw(st.integers(1, 2))
        weight = self.weight((size, size, 1, out), scope)
        bias, tag = self.maybe((out,), scope), self.draw(st.integers(0, 3)) == 3
        op = p.Conv(weight, "image", size, out, dilation=dilation, bias=bias, tag=tag)
        op = dataclasses.replace(op, **self._moves())
        return op, dataclasses.replace(scope, width=scope.width * out)

    def _token(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        return p.Token(self.weight((scope.width,), scope)), scope

    def _conv_positions(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        size, dilation = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 2))
        groups = self.draw(
            st.sampled_from([n for n in (1, 1, 2) if scope.width % n == 0])
        )
        out = groups * self.draw(st.integers(1, 2)) if groups > 1 else self.draw(WIDTHS)
        weight = self.weight((size, scope.width // groups, out), scope)
        bias = self.maybe((out,), scope)
        op = p.Conv(weight, "positions", size, out, groups, dilation, bias)
        op = dataclasses.replace(op, **self._moves())
        return op, dataclasses.replace(scope, width=out)

    def _embed(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        hows = ["index", "take", "one_hot"] + ["places"] * bool(scope.positions)
        how = self.draw(st.sampled_from(hows))
        add = self.draw(st.booleans())
        out = scope.width if add else self.draw(WIDTHS)
        rows = VOCABULARY + self.draw(st.integers(0, 1))
        op = p.Embed(self.weight((rows, out), scope), how, rows, out, add)
        return op, dataclasses.replace(scope, width=out)

    def _norm(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        kind = self.draw(st.sampled_from(("layer", "rms", "none")))
        overs = ["features"] * 3 + ["scalar"] + ["positions"] * bool(scope.positions)
        over = self.draw(st.sampled_from(overs))
        shape = {
            "features": (scope.width,),
            "scalar": (),
            "positions": (scope.positions, scope.width),
        }[over]
        scale = self.maybe(shape, scope)
        shift = self.maybe(shape, scope) if scale else self.weight(shape, scope)
        tag = over == "features" and self.draw(st.integers(0, 5)) == 5
        return p.Norm(kind, scale, shift, over, tag), scope

    def _gate(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 1
        kind = self.draw(st.sampled_from(("glu", "self")))
        out = self.draw(WIDTHS) if kind == "glu" else scope.width
        shape = scope.width, 2 * out if kind == "glu" else out
        op = p.Gate(self.weight(shape, scope), kind, out)
        return op, dataclasses.replace(scope, width=out)

    def _rnn(self, scope: Scope) -> tuple[p.Op, Scope]:
        self.budget -= 2
        out = self.draw(WIDTHS)
        op = p.Rnn(
            self.weight((scope.width, out), scope),
            self.weight((out, out), scope),
            self.maybe((out,), scope),
            out,
            self.draw(st.sampled_from(("scan", "loop"))),
        )
        return op, dataclasses.replace(scope, width=out)

    def _residual(self, scope: Scope) -> tuple[p.Op, Scope]:
        return p.Residual(self._same(scope)), scope

    def _cast(self, scope: Scope) -> tuple[p.Op, Scope]:
        dtype = self.draw(st.sampled_from(("float32",) * 3 + ("bfloat16",)))
        inner = dataclasses.replace(scope, depth=scope.depth + 1)
        body, left = self.body(inner, 2)
        return p.Cast(dtype, body), dataclasses.replace(left, depth=scope.depth)

    def _same(self, scope: Scope, most: int = 2, **changes: Any) -> tuple[p.Op, ...]:
        """A body that keeps the width."""
        inner = dataclasses.replace(scope, depth=scope.depth + 1, **changes)
        return self.body(inner, most, scope.width)[0]

    def _cond(self, scope: Scope) -> tuple[p.Op, Scope]:
        return p.Cond(self._same(scope), self._same(scope)), scope

    def _nest(self, scope: Scope) -> tuple[p.Op, Scope]:
        kinds = [*LOCAL, *p.STACKED, "stacked", "scan", "unrolled", "ensemble"]
        kinds += [] if scope.mapped else ["vmap", "vmap", "map"]
        kinds += ["positions vmap", "positions scan"] if scope.positions else []
        kind, nest = self.draw(st.sampled_from(kinds)), self.nests
        self.nests += 1
        n = self.draw(st.integers(1, 3)) if kind in ("scan", *p.STACKED) else 2
        if kind in (*p.STACKED, "scan", "unrolled", "ensemble"):
            stacks = kind in (*p.STACKED, "ensemble") or (
                kind == "unrolled" and self.draw(st.integers(0, 3)) == 0
            )
            nests = (*scope.nests, (nest, n)) if stacks else scope.nests
            return p.Nest(kind, self._same(scope, nests=nests), nest, n), scope
        mapped = kind in ("vmap", "map")
        inner = dataclasses.replace(
            scope,
            depth=scope.depth + 1,
            mapped=scope.mapped or mapped,
            positions=0 if kind.startswith("positions") else scope.positions,
        )
        body, left = self.body(inner, 3)
        outside = dataclasses.replace(scope, width=left.width)
        return p.Nest(kind, body, nest, 1), outside


def _beyond_jax(body: tuple[p.Op, ...], place: str) -> bool:
    """What `jax.grad` cannot transpose, in a `custom_jvp` under a map.

    A choice for each example, and a function with a `custom_vjp`.
    """
    for op, inside in p.walk(body):
        kinds = {x.kind for x in inside if isinstance(x, p.Nest)}
        mapped = place == "vmap" or not kinds.isdisjoint(("vmap", "map"))
        if isinstance(op, p.Cond) and "custom_jvp" in kinds and mapped:
            return True
        mapped = mapped or not kinds.isdisjoint(("positions vmap", "ensemble"))
        with_vjp = isinstance(op, p.Nest) and op.kind == "custom_vjp"
        if with_vjp and "custom_jvp" in kinds and mapped:
            return True
    return False


@st.composite
def programs(draw: Any) -> p.Program:
    """Whole programs."""
    build = Builder(draw)
    batch = draw(st.sampled_from((3, 3, 3, 1)))
    positions, width = draw(st.sampled_from((0, 0, 2, 3))), draw(WIDTHS)
    place = draw(st.sampled_from(("outside", "outside", "jit", "remat", "vmap")))
    body, scope = build.body(Scope(width, positions, mapped=place == "vmap"), 4)
    out = draw(WIDTHS)
    body = (*body, build.dense(scope, out))
    assume(not _beyond_jax(body, place))
    kinds = LOSS_KINDS if out % 2 == 0 else LOSS_KINDS[:-1]
    loss = p.Loss(
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from(("rows", "sum"))) if scope.positions else "rows",
        place,
    )
    flags = tuple(draw(st.booleans()) for _ in range(batch))
    return p.Program(
        batch,
        positions,
        width,
        tuple(build.params),
        body,
        loss,
        flags,
        draw(st.integers(0, 9)),
    )
