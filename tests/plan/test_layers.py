"""Every kind of layer under every block, in and out of transformations.

A net is one layer, tanh and a dense head under the squared error. The oracles are the
exact GGN from whole Jacobians and, for Kronecker factors, rows gathered in naive loops.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax._jaxpr.kinds.convolution import Convolution
from kfac_jax.blocks import TNT, Diagonal, Eigen, Full, Kronecker
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

DAMPING = 0.3
# half the time to compile: the compiler's own optimizations are not what is tested
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
UNIQUE = {
    "Full": Full(),
    "Diagonal": Diagonal(),
    "Kronecker": Kronecker(),
    "TNT": TNT(),
}
"""Blocks whose factors are unique; the basis of `Eigen` is not, in the null space."""
BLOCKS = UNIQUE | {"Eigen": Eigen()}


@dataclasses.dataclass(frozen=True)
class Axes:
    """Where an array has its examples, features and independent layers; others: rows.

    Groups are independent layers that divide the features.
    """

    batch: int
    features: tuple[int, ...]
    independent: tuple[int, ...] = ()
    groups: int = 1

    def canonical(self, a) -> np.ndarray:
        """Brings an array to `[e, n, s, features]`."""
        a = np.asarray(a)
        named = (*self.independent, self.batch, *self.features)
        rows = [i for i in range(a.ndim) if i not in named]
        size = lambda axes: math.prod(a.shape[i] for i in axes)  # noqa: E731
        moved = a.transpose(*self.independent, self.batch, *rows, *self.features)
        shape = size(self.independent), a.shape[self.batch], size(rows), self.groups
        split = moved.reshape(*shape, size(self.features) // self.groups)
        return np.moveaxis(split, 3, 0).reshape(-1, *shape[1:3], split.shape[-1])

    def expand(self, b, rank: int):
        """Gives a bias the axes of an output."""
        at = (*self.independent, *self.features)
        return jnp.expand_dims(b, [i for i in range(rank) if i not in at])


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer as the user writes it, and what its canonical form should be."""

    kind: str
    apply: Callable  # from weight (None for a shift) and data [n, ...] to y
    x: jax.Array
    w: jax.Array | None
    y: Axes
    inputs: Callable[[np.ndarray], np.ndarray]  # from data to rows [e, n, s, i]
    matrix: Callable[[np.ndarray], np.ndarray]  # from the weight to [e, i, o]
    bias: bool = False
    scale: float = 1.0  # between weight and output
    mask: np.ndarray | None = None  # over y

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The output's shape."""
        return jax.eval_shape(self.apply, self.w, self.x).shape

    def layer(self, p, x):
        """The layer with its bias."""
        y = self.apply(p.get("w"), x)
        if "b" in p:
            y = y + jnp.broadcast_to(self.y.expand(p["b"], y.ndim), y.shape)
        return y

    def params(self, steps: int = 1):
        """The layer's parameters and those of a head over the outputs of all steps."""
        layer = {} if self.w is None else {"w": self.w}
        if self.bias:
            at = sorted((*self.y.independent, *self.y.features))
            layer["b"] = models.array(3, *(self.shape[i] for i in at), scale=0.5)
        size = steps * math.prod(self.shape) // len(self.x)
        return {"head": models.array(4, size, 2, scale=size**-0.5), "layer": layer}

    def net(self, params, x, wrap=lambda f: f, over=None, probe=None):
        """The net's output `[n, 2]`; `probe` is added to that of the layer."""
        layer = wrap(self.layer) if over is None else over(wrap(self.layer))
        y = layer(params["layer"], x)
        y = y[None] if over is None else y
        h = jnp.tanh(y if probe is None else y + probe)
        if self.mask is not None:
            h = h * jnp.broadcast_to(jnp.asarray(self.mask), h.shape)
        h = jnp.moveaxis(h, 1 + self.y.batch, 0)
        return h.reshape(len(h), -1) @ params["head"]

    def loss_fn(self, **options):
        """The net's loss."""
        return lambda params, x: (
            squared_error(self.net(params, x, **options)).sum(-1).mean()
        )

    def places(self, layer) -> np.ndarray:
        """Where a layer's arrays have the entries of the matrices `[e, i, o]`."""
        parts = [] if self.w is None else [self.matrix(np.asarray(layer["w"]))]
        if self.bias:
            b = self.y.expand(np.asarray(layer["b"]), len(self.shape))
            parts.append(self.y.canonical(np.broadcast_to(b, self.shape))[:, 0, :1])
        return np.concatenate(parts, 1)

    def dense(self, params, blocks) -> np.ndarray:
        """A matrix over all parameters with these blocks, that of the head being I."""
        result = np.eye(len(oracles.vector(params)))
        places = self.places(entries(params)["layer"])
        for place, block in zip(places, blocks, strict=True):
            result[np.ix_(place.reshape(-1), place.reshape(-1))] = block
        return result


def entries(tree):
    """The tree with the places of its entries in the raveled tree."""
    return jax.tree.unflatten(jax.tree.structure(tree), oracles.indices(tree).values())


# ------------------------------------------------------------------ the kinds of layers


def dense(spec, **options):
    """An einsum of data, stored with its examples first, and weight."""
    sizes = dict(zip("btdhkoe", (4, 3, 3, 2, 3, 2, 2), strict=True))
    left, right, out = spec.replace("->", ",").split(",")
    data = "b" + left.replace("b", "")
    shared = [a for a in left if a in right and a in out]
    contracted = [a for a in right if a not in out]
    free = [a for a in out if a not in left]
    at = lambda letters, spec: tuple(spec.index(a) for a in letters)  # noqa: E731
    rows = Axes(0, at(contracted, data), at(shared, data)).canonical

    def matrix(w):
        w = w.transpose(at([*shared, *contracted, *free], right))
        count = lambda letters: math.prod(sizes[a] for a in letters)  # noqa: E731
        return w.reshape(count(shared), count(contracted), count(free))

    apply = lambda w, x: jnp.einsum(spec, x.transpose(at(left, data)), w)  # noqa: E731
    x, w = (models.array(7, *(sizes[a] for a in spec)) for spec in (data, right))
    y = Axes(out.index("b"), at(free, out), at(shared, out))
    return Case("dense", apply, x, w, y, rows, matrix, **options)


def patches(x, kernel, strides, padding, x_dilation, w_dilation):
    """From `[n, c, *space]` to `[n, c, taps, positions]`, naively."""
    n, c, *space = x.shape
    rank = range(len(space))
    span = [(kernel[d] - 1) * w_dilation[d] for d in rank]
    wide = [(space[d] - 1) * x_dilation[d] + 1 + sum(padding[d]) for d in rank]
    positions = [(wide[d] - span[d] - 1) // strides[d] + 1 for d in rank]
    result = np.zeros((n, c, math.prod(kernel), math.prod(positions)))
    for p, position in enumerate(np.ndindex(*positions)):
        for t, tap in enumerate(np.ndindex(*kernel)):
            at = [position[d] * strides[d] + tap[d] * w_dilation[d] for d in rank]
            at = [at[d] - padding[d][0] for d in rank]
            from_data = all(at[d] % x_dilation[d] == 0 for d in rank)
            at = [at[d] // x_dilation[d] for d in rank]
            if from_data and all(0 <= at[d] < space[d] for d in rank):
                result[:, :, t, p] = x[(slice(None), slice(None), *at)]
    return result


def conv(x, w, strides=None, padding=None, *, n=4, specs=None, call=None, **options):
    """A convolution of `[c, *space]` data and an `[o, i, *space]` kernel.

    They are stored as `specs` say. `call` is a function, strides and padding that come
    to `conv_general_dilated` with those given.
    """
    ones = (1,) * (len(x) - 1)
    space = "DHW"[-len(ones) :]
    x_spec, w_spec, y_spec = specs or (f"NC{space}", f"OI{space}", f"NC{space}")
    sizes = dict(zip("OI" + space, w, strict=True))
    taps = [a for a in w_spec if a in space]
    to_x = [("NC" + space).index(a) for a in x_spec]
    groups, bias = options.get("feature_group_count", 1), options.pop("bias", True)
    strides, padding = strides or ones, padding or [(0, 0)] * len(ones)
    dilations = [options.get(k, ones) for k in ("lhs_dilation", "rhs_dilation")]
    numbers = {"dimension_numbers": (x_spec, w_spec, y_spec)}
    plain = functools.partial(jax.lax.conv_general_dilated, **options)
    call, *given = call or (plain, strides, padding)

    def inputs(x):
        x = x.transpose(0, 1, *(2 + space.index(a) for a in taps))
        rows = patches(x, [sizes[a] for a in taps], strides, padding, *dilations)
        return rows.reshape(len(x), groups, -1, rows.shape[-1]).transpose(1, 0, 3, 2)

    def matrix(w):
        w = w.transpose([w_spec.index(a) for a in ["O", "I", *taps]])
        return w.reshape(groups, len(w) // groups, -1).swapaxes(1, 2)

    def apply(w, x):
        return call(x.transpose(to_x), w, *given, **numbers)

    x, w = models.array(1, n, *x), models.array(2, *(sizes[a] for a in w_spec))
    y = Axes(y_spec.index("N"), (y_spec.index("C"),), groups=groups)
    return Case("conv", apply, x, w, y, inputs, matrix, bias)


IDS = np.array([[0, 2, 2], [1, 0, 3], [3, 3, 3], [0, 2, 1]])  # of 5: row 4 is not used
OUTSIDE = np.array([[0, 2, 9], [7, 0, -8], [3, 3, 4], [5, 2, -1]])


def embedding(apply, ids=IDS, seen=lambda ids: ids, w=(5, 2), axis=0, scale=1.0):
    """Rows of a table; `seen` are the rows taken, none where out of range."""

    def inputs(ids):
        one_hot = seen(ids)[..., None] == np.arange(5)
        return one_hot.astype(float).reshape(1, len(ids), -1, 5)

    matrix = lambda w: np.moveaxis(w, axis, 0).reshape(1, 5, -1)  # noqa: E731
    after = range(axis + ids.ndim, ids.ndim + len(w) - 1)
    x, w, y = jnp.asarray(ids), models.array(2, *w), Axes(axis, (*range(axis), *after))
    return Case("embedding", apply, x, w, y, inputs, matrix, scale=scale)


def elementwise(kind, shape, axes, weight=True, bias=False):
    """A scale, a shift or both, which vary along the last axes of `[n, *shape]`."""
    x, w = models.array(1, 4, *shape), models.array(2, *shape[-len(axes) :])
    y = Axes(0, (), axes) if weight else Axes(0, axes)
    inputs = lambda x: y.canonical(x)[..., : int(weight)]  # noqa: E731
    matrix = lambda w: w.reshape(-1, 1, 1)  # noqa: E731
    apply = lambda w, x: x if w is None else x * jnp.broadcast_to(w, x.shape)  # noqa: E731
    return Case(kind, apply, x, w if weight else None, y, inputs, matrix, bias)


def crops(case):
    """Two images in each example, which the convolution sees as one batch."""
    merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

    def apply(w, x):
        y = case.apply(w, merge(x))
        return y.reshape(-1, 2, *y.shape[1:])

    inputs = lambda x: case.inputs(merge(x)).reshape(1, len(x), -1, 6)  # noqa: E731
    x, y = models.array(1, 4, 2, *case.x.shape[1:]), Axes(0, (2,))
    return dataclasses.replace(case, apply=apply, inputs=inputs, x=x, y=y)


pick = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]], float)[..., None]
NHWC, ODD = ("NHWC", "HWIO", "NHWC"), ("HCNW", "WOHI", "CWNH")
SAME = jax.lax.conv_general_dilated, (1, 2), "SAME"
TRANSPOSE = jax.lax.conv_transpose, (2, 1), "SAME"
LHS = {"lhs_dilation": (2, 1)}
ALL = {"feature_group_count": 2, "lhs_dilation": (1, 2), "rhs_dilation": (2, 1)}
CASES = {
    "dense": dense("bd,do->bo", bias=True),
    "dense, masked": dense("btd,do->bto", mask=MASK, bias=True),
    "dense, masked, no bias": dense("btd,do->bto", mask=MASK),
    "dense, rows moved": dataclasses.replace(
        dense("btd,do->bto"),
        apply=lambda w, x: (jax.lax.reshape(x, (12, 3), (1, 0, 2)) @ w).reshape(
            3, 4, 2
        ),
        y=Axes(1, (2,)),
    ),
    "dense, transposed": dataclasses.replace(
        dense("btd,dk->btk"),
        apply=lambda w, x: x @ jax.lax.reshape(w, (3, 3), (1, 0)),
        matrix=lambda w: w.T[None],
    ),
    "heads": dense("btd,dhk->bthk", bias=True),
    "heads to features": dense("bthk,hkd->btd", bias=True),
    "experts": dense("ebd,edo->ebo", bias=True),
    "conv 1-D": conv((2, 5), (3, 2, 3)),
    "conv 2-D": conv((2, 3, 4), (2, 2, 2, 3)),
    "conv 3-D": conv((2, 2, 3, 2), (2, 2, 2, 2, 1)),
    "conv, no bias": conv((2, 3, 4), (2, 2, 2, 3), bias=False),
    "conv, 1x1": conv((2, 2, 2), (3, 2, 1, 1), specs=NHWC),
    "conv, masked": dataclasses.replace(
        conv((2, 5), (2, 2, 3), bias=False), mask=MASK.swapaxes(1, 2)
    ),
    "conv, crops": crops(conv((2, 5), (3, 2, 3))),
    "strides": conv((2, 5, 4), (2, 2, 3, 2), (2, 3)),
    "SAME": conv((2, 3, 4), (2, 2, 2, 3), (1, 2), [(0, 1), (0, 1)], call=SAME),
    "padding": conv((2, 3, 2), (2, 2, 2, 3), padding=[(0, 2), (1, 0)]),
    "negative padding": conv((2, 4, 4), (2, 2, 2, 2), padding=[(-1, 0), (2, -1)]),
    "kernel dilation": conv((2, 5, 3), (2, 2, 2, 2), rhs_dilation=(3, 1)),
    "input dilation": conv(
        (2, 3, 2), (2, 2, 3, 2), padding=[(1, 2), (-1, 1)], lhs_dilation=(2, 3)
    ),
    "conv_transpose": conv(
        (2, 2, 2), (2, 2, 3, 2), None, [(2, 1), (1, 0)], call=TRANSPOSE, **LHS
    ),
    "groups": conv((4, 3, 2), (4, 2, 2, 2), feature_group_count=2),
    "depthwise": conv((3, 4), (6, 1, 2), feature_group_count=3),
    "depthwise, NHWC": conv((3, 3, 2), (3, 1, 2, 2), specs=NHWC, feature_group_count=3),
    "NHWC": conv((2, 3, 4), (3, 2, 2, 3), specs=NHWC),
    "odd axes": conv((2, 3, 4), (3, 2, 2, 3), (1, 2), specs=ODD),
    "all at once": conv(
        (4, 4, 3), (2, 2, 2, 2), (1, 2), [(1, -1), (2, 0)], n=5, specs=ODD, **ALL
    ),
    "w[ids]": embedding(lambda w, ids: w[ids]),
    "w[ids], one of 3-D": embedding(lambda w, ids: w[ids], IDS[:, 1], w=(5, 2, 2)),
    "w[negative ids]": embedding(lambda w, ids: w[ids], IDS - 4, lambda ids: ids % 5),
    "take": embedding(lambda w, ids: jnp.take(w, ids, axis=0)),
    "take, clip": embedding(
        functools.partial(jnp.take, axis=0, mode="clip"),
        OUTSIDE,
        lambda ids: np.clip(ids, 0, 4),
    ),
    "get, fill": embedding(
        lambda w, ids: w.at[ids].get(mode="fill", fill_value=0),
        OUTSIDE,
        lambda ids: np.where(ids < 0, ids + 5, ids),
    ),
    "w[ids], masked": dataclasses.replace(embedding(lambda w, ids: w[ids]), mask=MASK),
    "w[i] in vmap": embedding(jax.vmap(pick, (None, 0)), IDS[:, 1]),
    "w[:, ids]": embedding(lambda w, ids: w[:, ids], w=(2, 5), axis=1),
    "(2 w)[ids]": embedding(lambda w, ids: (2.0 * w)[ids], scale=2.0),
    "scale": elementwise("scale", (2, 3), (2,)),
    "scale, two axes": elementwise("scale", (2, 2, 3), (2, 3)),
    "scale, a scalar": dataclasses.replace(
        elementwise("scale", (2, 3), (2,)),
        apply=lambda w, x: w * x,
        w=models.array(2),
        y=Axes(0, ()),
        inputs=Axes(0, ()).canonical,
    ),
    "shift": elementwise("shift", (2, 3), (2,), weight=False, bias=True),
    "scale and shift": elementwise("scale_and_shift", (2, 3), (2,), bias=True),
}
EACH = [  # one of each sort, for what does not depend on its details
    *("dense, masked", "heads", "experts", "conv 2-D", "groups", "odd axes"),
    *("w[ids]", "w[:, ids]", "get, fill", "shift", "scale and shift"),
]

# ------------------------------------------------------------------------------ oracles


def data(case, steps):
    """The case's data, or with `steps` different data along a second axis."""
    if not steps:
        return case.x
    change = (lambda x: x + 1) if case.kind == "embedding" else (lambda x: x / 2 + 0.1)
    return jnp.stack([case.x, change(case.x)][:steps], axis=1)


def loop(layer):
    """The layer at each step, in Python."""
    return lambda p, x: jnp.stack([layer(p, x[:, t]) for t in range(x.shape[1])])


def scan(layer):
    """The layer at each step, in a scan that closes over its parameters."""

    def run(p, x):
        step = lambda _, x: (None, layer(p, x))  # noqa: E731
        return jax.lax.scan(step, None, jnp.moveaxis(x, 1, 0))[1]

    return run


@functools.cache
def oracle(name, steps=0):
    """The exact GGN of the parameters, and the Kronecker factors A, G `[e, d, d]`.

    The GGN is taken with respect to a probe added to the layer's output, too: `(1/N)
    Σ_n J_rᵀ H J_r` of a row r is a diagonal block of it.
    """
    case, count = CASES[name], max(steps, 1)
    x, over = data(case, steps), loop if steps else None
    tree = case.params(count) | {"probe": jnp.zeros((count, *case.shape))}
    outputs = lambda t: case.net(t, x, over=over, probe=t["probe"])  # noqa: E731
    j = oracles.jacobian(outputs, tree)
    matrix = 2 * np.einsum("nap,naq->pq", j, j) / len(j)  # as oracles.ggn: H = 2 I
    parts = [x[:, t] for t in range(count)] if steps else [x]
    return matrix, *sides(case, matrix, parts, tree["layer"], entries(tree)["probe"])


def sides(case, matrix, parts, layer, probes):
    """The Kronecker factors of a layer from the GGN of probes, one for each use.

    Of each use there are the data, in `parts`, and the places of its probe in `matrix`.
    """
    rows = np.concatenate([case.inputs(np.asarray(x)) for x in parts], 1)
    if case.bias:
        rows = np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], -1)
    # the oracle's own check: rows times matrices are what the parameters do
    zero = jax.tree.map(jnp.zeros_like, layer)
    linear = fast_jit(lambda p, x: case.layer(p, x) - case.layer(zero, x))
    y = np.concatenate([case.y.canonical(linear(layer, x)) for x in parts], 1)
    weights = case.places(layer)[:, None]
    np.testing.assert_allclose(case.scale * (rows @ weights), y, atol=1e-12)
    at = np.concatenate([case.y.canonical(part) for part in probes], 1)
    g = matrix[at[..., :, None], at[..., None, :]]  # [e, n, s, o, o]
    counts = (g != 0).any((-1, -2))
    if case.kind == "embedding":  # nor do indices count that are out of range
        counts &= rows.any(-1)
    a = np.einsum("ens,ensi,ensj->eij", counts, rows, rows)
    a = a / counts.sum((1, 2))[:, None, None]
    return a, case.scale**2 * np.einsum("ens,ensop->eop", counts, g)


def expected(case, block, matrix, places, a, g) -> np.ndarray:
    """What a block is over all of `matrix`, with zeros outside of `places`."""
    result = np.zeros_like(matrix)
    each = matrix[places[..., None, None], places[:, None, None]]  # [e, i, o, j, p]
    one_hot = case.kind == "embedding"
    if block in ("Full", "Diagonal"):
        at = np.unique(places)
        result[np.ix_(at, at)] = matrix[np.ix_(at, at)]
        return result if block == "Full" else np.diag(np.diag(result))
    if block == "TNT":
        a, g = np.einsum("eiojo->eij", each), np.einsum("eioip->eop", each)
        a = a * np.eye(a.shape[-1]) if one_hot else a
        g = g / np.trace(g, axis1=1, axis2=2)[:, None, None]
    found = map(np.kron, a, g)
    if block == "Eigen":
        u = [np.tile(np.eye(a.shape[-1]), (len(a), 1, 1)), np.linalg.eigh(a)[1]]
        u = map(np.kron, u[not one_hot], np.linalg.eigh(g)[1])
        flat = each.reshape(len(each), *[math.prod(places.shape[1:])] * 2)
        found = ((v * np.diag(v.T @ m @ v)) @ v.T for v, m in zip(u, flat, strict=True))
    for place, part in zip(places.reshape(len(places), -1), found, strict=True):
        result[np.ix_(place, place)] = part
    return result


def close(found, expected, rtol=1e-10, atol=1e-13):
    """Compares trees."""
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(compare, found, expected)


def check_factors(case, factors, a, g, limit=8192):
    """A side longer than the limit, or an embedding's, has a diagonal."""
    assert len(factors) == 2
    for side, full in {"input": a, "output": g}.items():
        if full.shape[-1] > limit or (side, case.kind) == ("input", "embedding"):
            side, full = side + "_diagonal", np.diagonal(full, axis1=1, axis2=2)
        close(np.reshape(factors[side], full.shape), full)


# --------------------------------------------------------------------- what is computed


def plan_of(loss_fn, params, x, block):
    """A plan of the layer without the head; from shapes, so that nothing compiles."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    choice = {"layer": block, "head": None}
    return kfac_jax.make_curvature(
        loss_fn, params, shape, estimation_mode="ggn_exact", blocks=choice
    )


def layers_of(plan):
    """The plan's layers without the head."""
    return [layer for layer in plan.layers if layer.name != "head"]


def factors_of(plan, params, x):
    """The factors of one batch by layer, without the head, which has none."""
    factors = models.statistics_to_factors(plan, params, x)
    return {layer.name: factors[layer.name] for layer in layers_of(plan)}


def vmapped(case):
    """The layer written for one example."""

    def wrap(layer):
        one = lambda p, x: jnp.squeeze(layer(p, x[None]), case.y.batch)  # noqa: E731
        return jax.vmap(one, in_axes=(None, 0), out_axes=case.y.batch)

    return wrap


WRAPS = {
    "bare": lambda case: lambda f: f,
    "jit": lambda case: jax.jit,
    "checkpoint": lambda case: jax.checkpoint,
    "vmap": vmapped,
}


@functools.cache
def computed(name, wrap):
    """Plans, results by block, and value and gradient by the library and by JAX."""
    case = CASES[name]
    params, loss_fn = case.params(), case.loss_fn(wrap=WRAPS[wrap](case))
    plans = {key: plan_of(loss_fn, params, case.x, b) for key, b in BLOCKS.items()}

    def results(plan, params, x):
        factors = models.statistics_to_factors(plan, params, x)
        return factors, plan.approximation(factors).to_dense()

    @fast_jit
    def compute(params, x):
        found = {key: results(plan, params, x) for key, plan in plans.items()}
        gradient = plans["Kronecker"].value_grad_and_statistics(params, x)[:2]
        return found, gradient, jax.value_and_grad(loss_fn)(params, x)

    return plans, *compute(params, case.x)


# -------------------------------------------------------------------------------- tests


@pytest.mark.sampled(6)
@pytest.mark.parametrize("check", ["gradient", *BLOCKS])
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        pytest.param(n, wrap, marks=[pytest.mark.slow] * (wrap != "bare"))
        for n in CASES
        for wrap in WRAPS
        if wrap == "bare" or n in EACH
    ],
)
def test_statistics_and_gradient(name, wrap, check):
    case = CASES[name]
    params = case.params()
    plans, found, gradient, jax_gradient = computed(name, wrap)
    if check == "gradient":
        close(gradient, jax_gradient, rtol=1e-12, atol=1e-14)
        return
    (layer,), (factors, found) = layers_of(plans[check]), found[check]
    names = [f"layer/{key}" for key in params["layer"]]
    assert (layer.kind, layer.uses, layer.reason) == (case.kind, 1, "")
    assert sorted(layer.params) == sorted(names)
    exact, a, g = oracle(name)
    if check == "Kronecker":
        check_factors(case, factors[layer.name], a, g)
    places = case.places(entries(params)["layer"])
    found, wanted = (
        oracles.block(np.asarray(matrix), params, *names)
        for matrix in (found, expected(case, check, exact, places, a, g))
    )
    close(found, wanted)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 2) for name in EACH), ("groups", 1), ("w[ids]", 1)]
)
def test_a_scan_that_shares_the_layer_is_the_unrolled_loop(name, steps):
    case = CASES[name]
    params, x = case.params(steps), data(case, steps)
    losses = [case.loss_fn(over=over) for over in (scan, loop)]
    plans = [plan_of(loss_fn, params, x, Kronecker()) for loss_fn in losses]
    found = fast_jit(lambda p, x: [factors_of(plan, p, x) for plan in plans])(params, x)
    _, a, g = oracle(name, steps)
    for plan, factors, uses in zip(plans, found, (1, steps), strict=True):
        (layer,) = layers_of(plan)
        assert (layer.kind, layer.uses) == (case.kind, uses)
        check_factors(case, factors[layer.name], a, g)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("block", ["Full", "Eigen"])
@pytest.mark.parametrize("name", EACH)
def test_blocks_that_sum_within_an_example_take_a_shared_layer(name, block):
    """Full is exact, Eigen in its trace."""
    case = CASES[name]
    for over, steps in ((scan, 2), (loop, 2)):
        params, x = case.params(steps), data(case, steps)
        plan = plan_of(case.loss_fn(over=over), params, x, BLOCKS[block])
        (layer,) = layers_of(plan)
        assert (layer.kind, layer.reason) == (case.kind, "")

        def dense(p, x, plan=plan):
            return plan.approximation(models.statistics_to_factors(plan, p, x))

        found = fast_jit(lambda p, x, dense=dense: dense(p, x).to_dense())(params, x)
        exact, a, g = oracle(name, steps)
        names = [f"layer/{key}" for key in params["layer"]]
        mine, full = (
            oracles.block(np.asarray(matrix), params, *names)
            for matrix in (found, exact)
        )
        np.testing.assert_allclose(np.trace(mine), np.trace(full), rtol=1e-10)
        assert np.linalg.eigvalsh(mine).min() > -1e-10 * np.trace(mine)
        if block == "Full":
            places = case.places(entries(params)["layer"])
            wanted = expected(case, block, exact, places, a, g)
            close(mine, oracles.block(np.asarray(wanted), params, *names))


def by_scan(layer):
    """The layer with each slice of its parameters, in a scan over them."""
    return lambda p, x: jax.lax.scan(lambda x, p: (x, layer(p, x)), x, p)[1]


def one_by_one(layer):
    """The layer with each of several sets of parameters, in Python."""
    return lambda p, x: jnp.stack([layer(p[key], x) for key in sorted(p)])


def two_layers(case):
    """Two layers side by side: parameters stacked, and results of a scan by block."""
    first = case.params(2)
    second = jax.tree.map(lambda w: 0.5 - w, first["layer"])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), first["layer"], second)
    params, loss_fn = first | {"layer": both}, case.loss_fn(over=by_scan)
    plans = {key: plan_of(loss_fn, params, case.x, b) for key, b in BLOCKS.items()}

    def results(plan, params, x):
        factors = models.statistics_to_factors(plan, params, x)
        return factors, plan.approximation(factors).to_dense()

    compute = lambda *a: {key: results(plan, *a) for key, plan in plans.items()}  # noqa: E731
    return params, plans, fast_jit(compute)(params, case.x)


def two_layers_oracle(case, params):
    """The exact GGN and, for each of two layers side by side, its A and G."""
    slices = [jax.tree.map(lambda w: w[k], params["layer"]) for k in (0, 1)]  # noqa: B023
    tree = params | {"probe": jnp.zeros((2, *case.shape))}

    def outputs(t):
        each = {str(k): jax.tree.map(lambda w: w[k], t["layer"]) for k in (0, 1)}  # noqa: B023
        return case.net(t | {"layer": each}, case.x, over=one_by_one, probe=t["probe"])

    j = oracles.jacobian(outputs, tree)
    matrix = 2 * np.einsum("nap,naq->pq", j, j) / len(j)
    probes = entries(tree)["probe"]
    return matrix, [
        sides(case, matrix, [case.x], slices[k], [probes[k]]) for k in (0, 1)
    ]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", EACH)
def test_a_scan_over_stacked_layers_is_a_batch_of_layers(name):
    """Two layers side by side, in a scan over both and one after the other."""
    case = CASES[name]
    params, plans, found = two_layers(case)
    matrix, factors = two_layers_oracle(case, params)
    at, names = entries(params)["layer"], [f"layer/{key}" for key in params["layer"]]
    places = [case.places({key: w[k] for key, w in at.items()}) for k in (0, 1)]
    for block, plan in plans.items():
        (layer,) = layers_of(plan)
        assert (layer.kind, layer.uses, layer.reason) == (case.kind, 1, "")
        assert layer.shape.stacked == (2,)
        wanted = sum(
            expected(case, block, matrix, places[k], *factors[k]) for k in (0, 1)
        )
        stack, dense = found[block]
        close(
            oracles.block(np.asarray(dense), params, *names),
            oracles.block(wanted, params, *names),
        )
        for k, (a, g) in enumerate(factors):
            if block == "Kronecker":
                sliced = {side: f[k] for side, f in stack[layer.name].items()}
                check_factors(case, sliced, a, g)


OPERATORS = {"odd axes": 8192, "heads": 3, "experts": 3, "groups": 3, "take": 1}
OPERATORS["dense, masked, no bias"] = 2


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_of_full_and_diagonal_factors(name):
    case, limit = CASES[name], OPERATORS[name]
    params = case.params()
    plan = plan_of(case.loss_fn(), params, case.x, Kronecker(max_factor_dim=limit))
    v = oracles.random_like(params, 5)

    @fast_jit
    def compute(params, x):
        factors = models.statistics_to_factors(plan, params, x)
        op = plan.approximation(factors)
        solved = op.solve(v, DAMPING), op.solve(v, DAMPING, "exact")
        power = op.power(v, -0.5, DAMPING, "exact")
        return factors, op.to_dense(), [op.matvec(v), op.diagonal(), *solved, power]

    factors, found, vectors = compute(params, case.x)
    _, a, g = oracle(name)
    (layer,) = layers_of(plan)
    check_factors(case, factors[layer.name], a, g, limit)
    a, g = (f * np.eye(f.shape[-1]) if f.shape[-1] > limit else f for f in (a, g))
    flat, eye = oracles.vector(v), np.eye(a.shape[-1] * g.shape[-1])
    dense = case.dense(params, map(np.kron, a, g))
    krons = [np.kron(*f) + DAMPING * eye for f in zip(a, g, strict=True)]
    exact = case.dense(params, krons)
    factored = [oracles.factored_damping(*f, DAMPING) for f in zip(a, g, strict=True)]
    solved = np.linalg.solve(case.dense(params, factored), flat)
    powers = [oracles.matrix_power(exact, p) @ flat for p in (-1.0, -0.5)]
    close(found, dense)
    expected = [dense @ flat, np.diag(dense), solved, *powers]
    close([oracles.vector(one) for one in vectors], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", [0, -1, 2.5, "8", True])
def test_a_bad_longest_side_is_refused(limit):
    with pytest.raises(ValueError, match="max_factor_dim must be an integer ≥ 1 or"):
        Kronecker(max_factor_dim=limit)


@pytest.mark.parametrize(("n", "parts"), [(5, (2, 2)), (7, (2, 3))])
def test_parts_of_a_batch_add_up_to_the_whole(n, parts, monkeypatch):
    """Patches are made of part of the batch at a time: of 7 for 3, 3 and 1."""
    case = conv((2, 5, 3), (2, 2, 3, 3), (2, 2), [(1, 1), (1, 1)], n=n)
    params, seen = case.params(), set()

    def factors(chunks):
        monkeypatch.setattr(Convolution, "chunks", chunks)
        plans = [plan_of(case.loss_fn(), params, case.x, b) for b in UNIQUE.values()]
        compute = lambda p, x: [factors_of(plan, p, x) for plan in plans]  # noqa: E731
        return fast_jit(compute)(params, case.x)

    def noting(self, batch, chunks=Convolution.chunks):
        seen.add(chunks(self, batch))
        return chunks(self, batch)

    close(factors(noting), factors(lambda self, batch: (1, batch)))
    assert seen == {parts}


X = models.array(1, 4, 2, 3, 3)
convolved = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME"
)
ROWS = models.array(5, 3, 5)
grouped = functools.partial(convolved, batch_group_count=2)
REFUSED = {  # by reason: the parameter's shape, its use, the data
    "data as the kernel": (X.shape, lambda w, x: convolved(w, x), X),
    "batch_group_count > 1": (X.shape, lambda w, x: grouped(x, w), X),
    "only partly used by `gather`": ((5, 4), lambda w, ids: w[ids, ids], IDS),
    # all examples share the output: the gradients at it are sums over them
    "so gradients mix the examples": (
        (5, 3),
        lambda w, x: jax.lax.scan(
            lambda c, _: (2 * c, x + jnp.broadcast_to(c, x.shape)), ROWS @ w, length=1
        )[1][0],
        X,
    ),
}


@pytest.mark.filterwarnings("ignore:Which examples the registered")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_layer_is_refused_by_name(reason):
    shape, apply, x = REFUSED[reason]

    def loss_fn(params, x):
        z = jnp.tanh(apply(params["layer"]["w"], x))
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    params = {"layer": {"w": models.array(2, *shape)}, "head": jnp.ones(1)}
    with pytest.warns(UserWarning, match=reason):
        plan = plan_of(loss_fn, params, x, None)
    (layer,) = layers_of(plan)
    assert layer.kind == "unmatched" and reason in layer.reason


POSITIONS = {  # rows of a table of positions, in order, are added to [4, 3, 2, 5]
    "w[arange]": ((3, 2, 5), lambda w: w[jnp.arange(3)][None]),
    "w[arange[None]]": ((3, 2, 5), lambda w: w[jnp.arange(3)[None]]),
    "w[:, arange]": ((2, 3, 5), lambda w: w[:, jnp.arange(3)].swapaxes(0, 1)[None]),
    "take": ((3, 2, 5), lambda w: jnp.take(w, jnp.arange(3), axis=0)[None]),
    "of a scaled view": ((3, 10), lambda w: (2 * w)[jnp.arange(3)].reshape(1, 3, 2, 5)),
    "two axes": ((6, 5), lambda w: w[jnp.arange(6).reshape(1, 3, 2)]),
    "w[:n]": ((7, 2, 5), lambda w: w[None, :3]),
    "w[arange(n)]": ((7, 2, 5), lambda w: w[jnp.arange(3)][None]),
    "w[m:n]": ((7, 2, 5), lambda w: w[2:5][None]),
    "w[m + arange(n)]": ((7, 2, 5), lambda w: w[2 + jnp.arange(3)][None]),
    "part of two axes": ((7, 4, 5), lambda w: w[4:, 1:3][None]),
    "part of a view": ((5, 2, 7), lambda w: (2 * w.T)[None, 3:6]),
    "dynamic slice": (
        (7, 2, 5),
        lambda w: jax.lax.dynamic_slice_in_dim(w, 1 + 1, 3)[None],
    ),
    "dynamic slice, clamped": (
        (7, 2, 5),
        lambda w: jax.lax.dynamic_slice_in_dim(w, 6, 3)[None],
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", POSITIONS)
def test_a_table_of_positions_is_a_shift(name):
    shape, rows = POSITIONS[name]
    x = models.array(1, 4, 3, 2, 5)
    params = {"layer": {"w": models.array(2, *shape)}, "head": jnp.ones(1)}

    def loss_fn(params, x, shift=rows):
        z = jnp.tanh(x + jnp.broadcast_to(shift(params["layer"]["w"]), x.shape))
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    plan = plan_of(loss_fn, params, x, Full())
    (layer,) = layers_of(plan)
    assert (layer.kind, layer.reason) == ("shift", "")
    factors = fast_jit(lambda p, x: models.statistics_to_factors(plan, p, x))(params, x)
    found = plan.approximation(factors).to_dense()

    def outputs(tree):
        z = jnp.tanh(x + jnp.broadcast_to(rows(tree["layer"]["w"]), x.shape))
        return z.reshape(len(z), -1)

    j = oracles.jacobian(outputs, params)
    exact = 2 * np.einsum("nap,naq->pq", j, j) / len(j)
    close(
        oracles.block(np.asarray(found), params, "layer/w"),
        oracles.block(exact, params, "layer/w"),
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, bool])
@pytest.mark.parametrize("block", [None, "Kronecker", "Full", "Diagonal", "TNT"])
def test_integers_as_inputs_count_as_their_numbers(dtype, block):
    """Products take them as they are; the weight's factor must not be rounded to 0."""
    x = (np.arange(15).reshape(5, 3) % 4).astype(dtype)
    w = models.array(0, 3, 2)
    blocks = None if block is None else getattr(kfac_jax.blocks, block)()

    def loss_fn(w, x):
        return kfac_jax.losses.squared_error(x @ (0.5 * w)).sum(-1).mean()

    def statistics(x):
        plan = kfac_jax.make_curvature(
            loss_fn, w, x, estimation_mode="ggn_exact", blocks=blocks
        )
        return plan.value_grad_and_statistics(w, x)

    with jax.numpy_dtype_promotion("standard"):
        found = statistics(jnp.asarray(x))
        expected = statistics(jnp.asarray(x, float))
    jax.tree.map(np.testing.assert_allclose, found, expected)
