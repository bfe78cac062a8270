"""Random JAX programs as small frozen descriptions: what a program is made of.

The `repr` of a `Program` is code that builds it again, to be pasted into a test. Values
are `[batch, features]` or `[batch, positions, features]`; every operation works on the
trailing axes, so that it may stand inside of a `vmap` over examples too.
"""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter; `nests` are the stacked nests around it, outermost first.

    Each of them has a leading axis in `shape`.
    """

    shape: tuple[int, ...]
    nests: tuple[int, ...] = ()
    dtype: str = "float64"


@dataclasses.dataclass(frozen=True)
class Weight:
    """An array made of one or two parameters; see `views.VIEWS`."""

    params: tuple[int, ...]
    view: str = "plain"


class Op:
    """One operation on the value."""


@dataclasses.dataclass(frozen=True)
class Dense(Op):
    """`h @ w + b`, perhaps under `register_dense`."""

    weight: Weight
    out: int
    bias: Weight | None = None
    tag: bool = False


@dataclasses.dataclass(frozen=True)
class Heads(Op):
    """An einsum of which a side ("out", "in") or both ("each", on its own) has heads.

    The widths of one head are `width` and `out`.
    """

    weight: Weight
    side: str
    heads: int
    width: int
    out: int


@dataclasses.dataclass(frozen=True)
class Conv(Op):
    """A convolution over "positions", over "features", or over an "image" of both.

    The last two have one channel. As many outputs as inputs are kept along each axis,
    also with a `stride`, and where the inputs are spread by zeros in between.
    """

    weight: Weight
    over: str
    size: int
    out: int
    groups: int = 1
    dilation: int = 1
    bias: Weight | None = None
    stride: int = 1
    spread: int = 1
    tag: bool = False


@dataclasses.dataclass(frozen=True)
class Embed(Op):
    """Rows of a table, added or instead.

    They are picked by "index", "take" or "one_hot", or are those of the "places".
    """

    weight: Weight
    how: str
    rows: int
    out: int
    add: bool = True


@dataclasses.dataclass(frozen=True)
class Token(Op):
    """A parameter in the place of the first position; the last one is dropped."""

    weight: Weight


@dataclasses.dataclass(frozen=True)
class Norm(Op):
    """A norm ("layer", "rms" or "none") and an elementwise scale and shift.

    These vary over "features", over "positions" and features, or are a "scalar".
    """

    kind: str
    scale: Weight | None = None
    shift: Weight | None = None
    over: str = "features"
    tag: bool = False


@dataclasses.dataclass(frozen=True)
class Gate(Op):
    """`u σ(v)` of two halves of `h @ w` ("glu"), or `h σ(h @ w)` ("self")."""

    weight: Weight
    kind: str
    out: int


@dataclasses.dataclass(frozen=True)
class Rnn(Op):
    """`c ← tanh(x @ w + c @ u + b)` over positions, by a "scan" or a "loop"."""

    inner: Weight
    recurrent: Weight
    bias: Weight | None
    out: int
    how: str = "scan"


@dataclasses.dataclass(frozen=True)
class Act(Op):
    """An operation without parameters, of `interpreter.ACTIVATIONS`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Mix(Op):
    """One that lets positions see each other, of `interpreter.MIXERS`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Pool(Op):
    """From positions to none: "mean", "sum", "last" or "flatten"."""

    name: str


@dataclasses.dataclass(frozen=True)
class Residual(Op):
    """`h + body(h)`."""

    body: tuple[Op, ...]


@dataclasses.dataclass(frozen=True)
class Cast(Op):
    """The body in another type."""

    dtype: str
    body: tuple[Op, ...]


@dataclasses.dataclass(frozen=True)
class Cond(Op):
    """One of two bodies: by the first example's flag or, where mapped, by each's."""

    body: tuple[Op, ...]
    other: tuple[Op, ...]


STACKED = ("stacked", "numbered")
"""The nests whose steps have slices of parameters: by a scan, or by their number."""


@dataclasses.dataclass(frozen=True)
class Nest(Op):
    """A body inside of a transformation or loop, see `interpreter.NESTS`.

    `id` names the nest for the parameters that are stacked in it; `n` is the number of
    steps or members.
    """

    kind: str
    body: tuple[Op, ...]
    id: int = -1
    n: int = 1


@dataclasses.dataclass(frozen=True)
class Loss:
    """A registered loss: which family, what its cases are and where it is registered.

    `cases`: "rows" takes positions for cases, "sum" sums over them. `place`: "outside",
    inside of "jit", or of a "vmap" over examples.
    """

    kind: str
    cases: str = "rows"
    place: str = "outside"


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole program: shapes, parameters, body, loss; the seed is that of the data."""

    batch: int
    positions: int
    width: int
    params: tuple[Param, ...]
    body: tuple[Op, ...]
    loss: Loss
    flags: tuple[bool, ...]
    seed: int = 0


def name(index: int) -> str:
    """A parameter's path."""
    return f"p{index:02d}"


def bodies(op: Op) -> tuple[tuple[Op, ...], ...]:
    """The bodies of an operation."""
    if isinstance(op, Cond):
        return op.body, op.other
    return (op.body,) if isinstance(op, Residual | Cast | Nest) else ()


def walk(body: tuple[Op, ...], inside: tuple[Op, ...] = ()) -> Iterator:
    """Every operation with those that it is in, outermost first."""
    for op in body:
        yield op, inside
        for inner in bodies(op):
            yield from walk(inner, (*inside, op))


def weights(op: Op) -> list[Weight]:
    """The weights of an operation by itself."""
    values = (getattr(op, field.name) for field in dataclasses.fields(op))
    return [value for value in values if isinstance(value, Weight)]


def features(program: Program) -> frozenset[str]:
    """What a program holds, for the count of what has been covered."""
    found = {f"loss {program.loss.kind}", f"loss in {program.loss.place}"}
    found |= {f"batch {program.batch}", "positions" if program.positions else "flat"}
    uses: dict[int, int] = {}
    for op, _ in walk(program.body):
        kind = type(op).__name__.lower()
        detail = {
            Heads: "side",
            Conv: "over",
            Embed: "how",
            Norm: "kind",
            Gate: "kind",
            Rnn: "how",
            Cast: "dtype",
        }.get(type(op))
        if isinstance(op, Nest):
            kind = op.kind
        elif detail is not None:
            kind = f"{kind} {getattr(op, detail)}"
        found.add(kind)
        if getattr(op, "tag", False):
            found.add("tagged")
        for weight in weights(op):
            found.add(f"view {weight.view}")
            for index in weight.params:
                uses[index] = uses.get(index, 0) + 1
    if any(count > 1 for count in uses.values()):
        found.add("reuse")
    if any(param.dtype != "float64" for param in program.params):
        found.add("float32 parameter")
    return frozenset(found)
