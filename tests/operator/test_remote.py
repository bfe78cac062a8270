"""Parameters that reach the data by a map, and those that are used in many ways.

The oracle is the exact Fisher, by products that know nothing of layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models

pytestmark = pytest.mark.usefixtures("any_rank")

N, D, H = 5, 3, 4
X = models.array(0, N, D)
MASK = np.asarray([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]], float)
FIXED = models.array(1, D, H)
INDEX = np.asarray([[0, 1, 2, 1], [2, 2, 0, 1], [1, 0, 0, 2]])


@pytest.fixture(scope="module")
def any_rank():
    """As users write them: `g * w` of different ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def array(seed, *shape):
    return {"w": models.array(seed, *shape)}


def cut(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(x @ q) * jnp.sin(x @ k) + x @ v


def sliced(p, x):
    return jnp.tanh(x @ p["w"][:, :2]) @ p["w"][:2, 1:]


def unrolled(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


def iterated(p, x):
    for w in p["w"]:
        x = jnp.tanh(x @ w)
    return x


def masked(p, x):
    return jnp.tanh(x @ (p["w"] * MASK))


def masked_by_select(p, x):
    return jnp.tanh(x @ jnp.where(MASK > 0, p["w"], 0.0))


def triangular(p, x):
    return jnp.tanh(x @ jnp.tril(p["w"]))


def delta(p, x):
    return jnp.tanh(x @ (FIXED + 0.5 * p["w"]))


def low_rank(p, x):
    return jnp.tanh(x @ (FIXED + p["a"] @ p["b"]))


def low_rank_alone(p, x):
    return jnp.tanh(x @ (p["w"] @ p["a"] @ p["b"]))


def weight_norm(p, x):
    w = p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)
    return jnp.tanh(x @ w + p["c"])


def spectral_norm(p, x):
    u = jnp.ones(D) / D**0.5
    sigma = u @ p["w"] @ np.ones(H)
    return jnp.tanh(x @ (p["w"] / sigma))


def positive(p, x):
    return jnp.tanh(x * jax.nn.softplus(p["s"])) * jnp.exp(p["t"]) - p["u"] ** 2


def scalar(p, x):
    a = jax.nn.softplus(p["a"])
    return jnp.tanh(a**2 / (a + x**2)) * p["a"]


def entries(p, x):
    """Operands of what is neither a product nor a sum."""
    y = jnp.maximum(x, p["a"]) / (p["b"] + 2 + x**2) + jnp.where(x > 0, p["c"], x)
    return jnp.clip(jnp.arctan2(p["d"], y), -p["s"], p["s"]) * p["a"] / p["b"]


def given_directions(p, x):
    """A weight norm with fixed directions."""
    return jnp.tanh(x @ (p["g"] * FIXED))


def both_ways(p, x):
    return jnp.tanh(x @ p["w"]) + p["w"][:1] * jnp.cos(x[:, :1])


def padded(p, x):
    return jnp.tanh(x @ jnp.pad(p["w"], ((0, 1), (1, 0))))


def tiled(p, x):
    return jnp.tanh(x @ jnp.tile(p["w"], (1, 2)))


def stacked_pair(p, x):
    w = jnp.stack([p["a"], p["w"]], axis=0)
    return jnp.tanh(jnp.einsum("ni,kio->no", x, w))


def joined(p, x):
    """Uses of two parameters that are joined to one array."""
    both = jnp.concatenate([p["a"], p["w"]], axis=1)
    picked = both[jnp.argmax(x, axis=1)][:, :3]
    return (
        x @ (both * both)[:, :3]
        + x @ both[:, 1:]
        + x[:, :2] @ both.reshape(4, 3)[:2]
        + jnp.sin(picked)
    )


def tokens(p, x):
    """Parameters that are joined to data, one copy for each case."""
    first, last = (jnp.broadcast_to(p[n], x.shape)[:, None] for n in "ab")
    h = jnp.concatenate([first, jnp.sin(x)[:, None], last], axis=1)
    scale = jnp.broadcast_to(jnp.exp(p["s"]), h.shape)
    return jnp.stack([jnp.tanh(h), scale], axis=1).prod(1)


def bias_table(p, x):
    """A table of relative positions, added to each example."""
    return jnp.tanh(x[:, :, None] + p["t"][INDEX])


def other_rows(p, x):
    rows = p["t"][2 - np.arange(3)] + p["t"][::2] + p["t"][:1]
    part = p["t"].reshape(25)[:15].reshape(3, 5)
    return jnp.tanh(x[:, :, None] + rows + part[:, ::-1])


def generated(p, x):
    """A hypernetwork."""
    w = jnp.tanh(p["e"] @ p["h"]).reshape(D, H)
    return jnp.tanh(x @ w)


def kernel(p, x):
    image = x[:, :, None] * np.ones((1, 1, 2))
    w = p["w"] - p["w"].mean(0)
    return jax.lax.conv_general_dilated(
        jnp.tanh(image), w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def basis(p, x):
    """Weights and biases in fixed bases."""
    left, right = BASES
    h = jnp.tanh(x @ (left @ p["a"] + p["c"]))
    return h @ (right @ p["w"] @ left) * (p["g"] @ left) + right[0] @ p["s"]


def constant_code(p, x):
    """A network of constants."""
    return x * jnp.tanh(np.ones((1, 2)) @ p["w"] + p["b"][None])


def basis_of_kernels(p, x):
    image = jnp.tanh(x[:, :, None] * np.ones((1, 1, 2)))
    w = jnp.einsum("kb,bio->kio", models.array(52, 3, 2), p["w"])
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        image, w, (1,), "SAME", dimension_numbers=numbers
    )


def in_scan(p, x):
    w = p["w"] * MASK[:, :3]

    def step(h, _):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(step, x, length=3)[0]


def in_branches(p, x):
    w = jnp.exp(p["w"])
    return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: jnp.sin(x @ w))


def in_checkpoint(p, x):
    w = jnp.exp(p["w"])
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)


def map_in_scan(p, x):
    def step(h, _):
        return jnp.tanh(h @ jnp.exp(p["w"] - p["w"].max(0))), None

    return jax.lax.scan(step, x, length=2)[0]


def map_in_branches(p, x):
    return jax.lax.cond(
        x.sum() > 0, lambda: x @ p["w"] ** 2, lambda: jnp.sin(x @ jnp.tril(p["w"]))
    )


@jax.checkpoint
def low_rank_in_checkpoint(p, x):
    h = jnp.tanh(x @ (FIXED + p["a"] @ p["b"]))
    return jax.checkpoint(lambda x: jnp.tanh(x * jax.nn.softplus(p["b"][0])))(h)


BASES = models.array(50, D, D), models.array(51, H, 2)


def chosen(p, x):
    """Weights of each case's task, by one index and of the best two."""
    task = jnp.argmax(x, axis=1)
    h = jnp.tanh(jnp.einsum("ni,nio->no", x, p["w"][task]) + p["b"][task])
    best = jnp.argsort(h, axis=1)[:, :2]
    both = jnp.einsum("ni,nkio->nko", h, p["v"][best])
    down = jnp.einsum("nko,nkop->np", jnp.tanh(both), p["u"][best])
    return jnp.concatenate([both.sum(1), jnp.sin(both[:, 0]), down], axis=1)


def chosen_by_position(p, x):
    """By each position, under vmap, in a scan over stacked tables, and negative."""
    positions = jnp.stack([x, jnp.sin(x)], axis=1)
    kinds = jnp.argsort(positions.sum(-1), axis=1) - 2

    def step(h, table):
        one = lambda row, kind: jnp.tanh(row @ table[kind])  # noqa: E731
        return jax.vmap(jax.vmap(one))(h, kinds), None

    return jax.lax.scan(step, positions, p["w"])[0]


def chosen_in_both_ways(p, x):
    """Also by itself, and a part of the chosen weight."""
    task = jnp.argmax(x, axis=1)
    y = jnp.tanh(x @ p["w"][1]) + jnp.einsum("ni,nio->no", x, p["w"][task])
    return y + jnp.einsum("ni,nio->no", x[:, :2], p["v"][task][:, :2])


def pruned(p, x):
    """Masks that are computed from the weight itself, and have no derivative."""
    least = jnp.sort(jnp.abs(p["w"]).ravel())[4]
    w = jnp.where(jnp.abs(p["w"]) > least, p["w"], 0.1 * p["w"])
    w *= (p["w"] < 2).astype(float)
    return jnp.tanh(x @ w + p["w"][jnp.argmax(p["w"][:, 0])])


def orthogonal(p, x):
    skew = p["w"] - p["w"].T
    h = jnp.tanh(x @ jax.scipy.linalg.expm(skew))
    turned = jnp.linalg.solve(jnp.eye(D) + skew, jnp.eye(D) - skew)
    return jnp.sin(h @ turned) @ jnp.linalg.qr(p["v"])[0]


def iterated_map(p, x):
    """A weight that loops compute."""
    w = jax.lax.fori_loop(0, 3, lambda i, w: jnp.tanh(w @ w) / (i + 1), p["w"])
    v = jax.lax.scan(lambda v, _: (jnp.sin(v @ w), None), p["w"], length=2)[0]
    return jnp.tanh(x @ w) @ v


def spectral(p, x):
    """Complex weights of a Fourier transform, and a convolution by it."""
    modes = jnp.fft.rfft(x) * jax.lax.complex(p["re"], p["im"])
    kernel = jnp.fft.rfft(jax.lax.complex(p["w"], 0.5 * p["w"]).real, D)
    h = jnp.tanh(jnp.fft.irfft(modes, D))
    return jnp.fft.irfft(jnp.fft.rfft(h) * kernel, D)


def complex_dense(p, x):
    w = jax.lax.complex(p["re"], p["im"])
    z = jax.lax.complex(jnp.cos(x), jnp.sin(x)) @ w[0] + w[1, :1]
    return jnp.concatenate([jnp.abs(z @ w[1]) ** 2, z.real, z.imag], axis=1)


def maps_of_slices(p, x):
    """Maps of what a scan runs over: cut, masked, normed, low rank, exponentials."""

    def step(h, own):
        first, second = jnp.split(own["w"], 2, axis=1)
        y = jnp.tanh(h @ (first * MASK[:, :3])) + h @ (own["a"] @ own["b"])
        w = own["g"] * second / jnp.linalg.norm(second, axis=0)
        return jnp.tanh(y @ w + jnp.exp(own["s"])) * jax.nn.softplus(own["t"]), None

    return jax.lax.scan(step, x, p)[0]


def maps_of_slices_in_checkpoint(p, x):
    @jax.checkpoint
    def layer(h, own):
        inner = jax.checkpoint(lambda h: h @ jnp.tril(own["w"]))
        return jax.jit(lambda h: jnp.tanh(inner(h) * jnp.exp(own["s"])))(h)

    def step(h, own):
        return layer(h, own), layer(h, own).sum(-1)

    h, sums = jax.lax.scan(step, x, p, reverse=True)
    return jnp.concatenate([h, sums.T], axis=1)


def rows_by_number(p, x):
    """Layers that a loop takes by its own number, two of them in another order."""

    def step(i, h):
        return jnp.tanh(h @ p["w"][i] + jnp.exp(p["s"][i]))

    def permuted(h, i):
        return jnp.sin(h @ p["v"][i]), None

    h = jax.lax.fori_loop(0, 3, step, x)
    return jax.lax.scan(permuted, h, np.asarray([2, 0, 2]))[0]


def maps_in_nested_scans(p, x):
    def inner(h, w):
        return jnp.tanh(h @ (w * MASK[:, :3])), None

    def outer(h, own):
        h = jax.lax.scan(inner, h, own["w"])[0]
        return h * jnp.exp(own["s"]), None

    def only_inner(h, w):
        return jax.lax.scan(inner, h, w)[0], None

    h = jax.lax.scan(only_inner, x, p["v"])[0]
    return jax.lax.scan(outer, h, {n: p[n] for n in "sw"})[0]


STACK = {n: models.array(ord(n), 2, D) for n in "gst"} | {
    "w": models.array(61, 2, D, 2 * D),
    "a": models.array(62, 2, D, 1),
    "b": models.array(63, 2, 1, D),
}
PAIR = {"a": models.array(2, D, 2), "b": models.array(3, 2, H)}
FAMILIES = {  # the program, its parameters
    "cut": (cut, array(4, D, 6)),
    "sliced": (sliced, array(4, D, D)),
    "unrolled": (unrolled, array(5, 3, D, D)),
    "iterated": (iterated, array(5, 3, D, D)),
    "masked": (masked, array(6, D, H)),
    "masked by select": (masked_by_select, array(6, D, H)),
    "triangular": (triangular, array(6, D, D)),
    "delta": (delta, array(7, D, H)),
    "low rank": (low_rank, PAIR),
    "low rank alone": (low_rank_alone, {"w": models.array(8, D, D), **PAIR}),
    "weight norm": (
        weight_norm,
        {"g": models.array(8, H), **array(9, D, H), "c": models.array(7, H)},
    ),
    "spectral norm": (spectral_norm, array(9, D, H)),
    "positive": (positive, {n: models.array(ord(n), D) for n in "stu"}),
    "scalar": (scalar, {"a": np.asarray(0.7)}),
    "entries": (
        entries,
        {n: models.array(ord(n), D) for n in "abcd"} | {"s": np.asarray(1.2)},
    ),
    "given directions": (given_directions, {"g": models.array(2, H)}),
    "both ways": (both_ways, array(1, D, H)),
    "padded": (padded, array(2, D - 1, H)),
    "tiled": (tiled, array(2, D, 2)),
    "stacked pair": (stacked_pair, {"a": models.array(1, D, H), **array(2, D, H)}),
    "joined": (joined, {"a": models.array(1, D, 1), **array(2, D, 3)}),
    "tokens": (tokens, {n: models.array(ord(n), D) for n in "abs"}),
    "bias table": (bias_table, {"t": models.array(2, D)}),
    "other rows": (other_rows, {"t": models.array(2, 5, 5)}),
    "generated": (generated, {"e": models.array(2, 2), "h": models.array(3, 2, D * H)}),
    "kernel": (kernel, array(3, 3, 2, 2)),
    "basis": (
        basis,
        {
            "a": models.array(2, D, H),
            "c": models.array(3, H),
            "w": models.array(4, 2, D),
        }
        | {"g": models.array(5, D), "s": models.array(6, 2)},
    ),
    "constant code": (constant_code, {**array(2, 2, D), "b": models.array(3, D)}),
    "basis of kernels": (basis_of_kernels, array(2, 2, 2, 2)),
    "in scan": (in_scan, array(3, D, D)),
    "in branches": (in_branches, array(3, D, H)),
    "in checkpoint": (in_checkpoint, array(3, D, H)),
    "map in scan": (map_in_scan, array(3, D, D)),
    "map in branches": (map_in_branches, array(3, D, H)),
    "low rank in checkpoint": (low_rank_in_checkpoint, PAIR),
    "chosen": (
        chosen,
        {
            "w": models.array(71, 3, D, H),
            "b": models.array(72, 3, H),
            "v": models.array(73, H, H, 2),
            "u": models.array(77, H, 2, 2),
        },
    ),
    "chosen by position": (chosen_by_position, array(74, 2, 2, D, D)),
    "chosen in both ways": (
        chosen_in_both_ways,
        {**array(75, 3, D, H), "v": models.array(76, 3, D, H)},
    ),
    "pruned": (pruned, array(6, D, D)),
    "orthogonal": (orthogonal, {**array(7, D, D), "v": models.array(8, D, D)}),
    "iterated map": (iterated_map, array(9, D, D)),
    "spectral": (
        spectral,
        {n: models.array(ord(n[0]), 2) for n in ("re", "im")} | array(70, D),
    ),
    "complex dense": (
        complex_dense,
        {n: models.array(ord(n[0]), 2, D, D) for n in ("re", "im")},
    ),
    "maps of slices": (maps_of_slices, STACK),
    "maps of slices in checkpoint": (
        maps_of_slices_in_checkpoint,
        {**array(64, 3, D, D), "s": models.array(65, 3, D)},
    ),
    "rows by number": (
        rows_by_number,
        {n: models.array(ord(n), 3, D, D) for n in "vw"}
        | {"s": models.array(66, 3, D)},
    ),
    "maps in nested scans": (
        maps_in_nested_scans,
        {n: models.array(ord(n), 2, 2, D, D) for n in "vw"}
        | {"s": models.array(68, 2, D)},
    ),
}
BLOCKS = [
    blocks.Full(),
    blocks.Diagonal(),
    blocks.TNT(),
    blocks.Eigen(),
    blocks.Kronecker(),
]


def loss_of(apply):
    def loss_fn(p, x):
        y = apply(p, x)
        return squared_error(y.reshape(len(y), -1)).sum(-1).mean()

    return loss_fn


def plan_of(name, block, mode="fisher_exact", **options):
    apply, params = FAMILIES[name]
    return kfac_jax.make_curvature(
        loss_of(apply),
        params,
        X,
        blocks=block,
        estimation_mode=mode,
        on_unmatched="error",
        **options,
    )


@functools.cache
def exact(name):
    """The exact Gauss-Newton matrix of all parameters, by Jacobians."""
    apply, params = FAMILIES[name]
    flat, restore = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, params))
    jacobian = jax.jacobian(lambda v: apply(restore(v), X).reshape(N, -1))(flat)
    return np.einsum("nop,noq->pq", jacobian, jacobian) * 2 / N


FAST = (
    "cut",
    "masked",
    "weight norm",
    "entries",
    "map in scan",
    "maps of slices",
    "spectral",
)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param(
            name, block, marks=[] if i < 1 or name in FAST else [pytest.mark.slow]
        )
        for name in FAMILIES
        for i, block in enumerate(BLOCKS)
    ],
)
def test_the_block_is_that_of_examples_gradients(name, block):
    """Full is exact, Diagonal has its diagonal, the others its trace."""
    plan = plan_of(name, block)
    factors = jax.jit(functools.partial(models.statistics_to_factors, plan))(
        FAMILIES[name][1], X
    )
    matrix = np.asarray(plan.approximation(factors).to_dense())
    fisher = exact(name)
    for layer in plan.layers:
        own = models.places(plan, layer)
        mine, wanted = (x[np.ix_(own, own)] for x in (matrix, fisher))
        summed = not isinstance(layer.block, blocks.Kronecker)
        if summed:
            np.testing.assert_allclose(np.trace(mine), np.trace(wanted), rtol=1e-10)
        assert np.linalg.eigvalsh(mine).min() >= -1e-10 * np.trace(mine)
        if isinstance(block, blocks.Diagonal):
            wanted = np.diag(np.diag(wanted))
        elif not isinstance(block, blocks.Full) or layer.shape.stacked:
            continue
        np.testing.assert_allclose(mine, wanted, atol=1e-10 * np.trace(wanted))


def test_noise_of_each_case_computes_no_weight():
    """Its product with a parameter is a layer with the noise as input."""

    def loss_fn(p, x, key):
        noise = jax.random.normal(key, x.shape)
        return squared_error(jnp.tanh(x + jnp.exp(p["s"] * noise))).sum(-1).mean()

    params, key = {"s": models.array(0, D)}, jax.random.key(0)
    plan = kfac_jax.make_curvature(loss_fn, params, X, key)
    (layer,) = plan.layers
    assert (layer.kind, layer.uses) == ("scale", 1)


@pytest.mark.parametrize("name", FAST)
def test_a_step_with_defaults(name):
    """Statistics do not change gradients, and updates are finite."""
    apply, params = FAMILIES[name]
    plan = plan_of(name, None, mode="fisher_gradients")
    tx = kfac_jax.kfac(plan)

    @jax.jit
    def step(params, state):
        value, grads, statistics = plan.value_grad_and_statistics(
            params, X, rng=jax.random.key(0)
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(X,)
        )
        return grads, updates, state

    grads, updates, state = step(params, tx.init(params))
    models.assert_trees_close(grads, jax.grad(loss_of(apply))(params, X))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert int(state.info.skipped_updates) == 0
