"""Losses on derivatives of the network: Sobolev training and physics-informed nets.

Forward mode uses every weight once for each derivative that it carries along, which is
weight sharing. The oracle carries the derivatives along by hand, with one explicit
probe for each use.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import jet

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

D, N, BOUNDARY = 2, 4, 3  # inputs; points of both losses
PARAMS = models.dense_params(0, D, 3, 2, 1)
POINTS, WALL = models.array(1, N, D), models.array(2, BOUNDARY, D)
SOURCE, VALUES = models.array(3, N), models.array(4, N, 1)
SLOPES = models.array(5, N, D)
WALL_WEIGHT = 3.0

fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def directions(x):
    """The axes, `[d, n, d]`, one copy for each point."""
    return jnp.broadcast_to(jnp.eye(D)[:, None], (D, *x.shape))


def one(params, x):
    """The net at one point."""
    return models.mlp(params, x)[0]


# ------------------------------------------------- the ways in which losses are written


def sobolev(slopes):
    """Values and slopes, from `slopes(params, x) -> (values, slopes)`."""

    def loss_fn(params, x, values, expected):
        z, dz = slopes(params, x)
        fit = squared_error(z, values).sum(-1).mean()
        return fit + squared_error(dz, expected).sum(-1).mean()

    return loss_fn, (POINTS, VALUES, SLOPES)


def poisson(laplacian):
    """`Δu = f` inside and `u = 0` on the wall, which has fewer points."""

    def loss_fn(params, x, source, wall):
        inside = squared_error(laplacian(params, x), source).mean()
        z = models.mlp(params, wall)
        bound = squared_error(z, jnp.zeros_like(z), weight=WALL_WEIGHT)
        return inside + WALL_WEIGHT * bound.sum(-1).mean()

    return loss_fn, (POINTS, SOURCE, WALL)


def second(f, x, t):
    """The second derivative along t, forward over forward."""
    first = lambda x: jax.jvp(f, (x,), (t,))[1]  # noqa: E731
    return jax.jvp(first, (x,), (t,))[1]


def slopes_by_jvp(params, x):
    f = functools.partial(models.mlp, params)
    (z, *_), dz = zip(*(jax.jvp(f, (x,), (t,)) for t in directions(x)), strict=True)
    return z, jnp.concatenate(dz, -1)


def slopes_by_linearize(params, x):
    z, push = jax.linearize(functools.partial(models.mlp, params), x)
    return z, jax.vmap(push)(directions(x))[..., 0].T


def slopes_by_grad(params, x):
    f = functools.partial(models.mlp, params)
    return f(x), jax.grad(lambda x: f(x).sum())(x)


def slopes_by_jvp_of_each(params, x):
    """Under vmap, where the directions are given for each point."""

    def each(x, ts):
        f = functools.partial(one, params)
        (z, *_), dz = zip(*(jax.jvp(f, (x,), (t,)) for t in ts), strict=True)
        return z[None], jnp.stack(dz)

    return jax.vmap(each, (0, 1))(x, directions(x))


def laplacian_by_loop(params, x):
    f = functools.partial(models.mlp, params)
    return sum(second(f, x, t) for t in directions(x))[:, 0]


def laplacian_by_vmap(params, x):
    f = functools.partial(models.mlp, params)
    along = jax.vmap(lambda t: second(f, x, t))(directions(x))
    return along.sum(0)[:, 0]


def laplacian_by_scan(params, x):
    def body(total, t):
        return total + second(functools.partial(models.mlp, params), x, t), None

    return jax.lax.scan(body, jnp.zeros((len(x), 1)), directions(x))[0][:, 0]


def laplacian_by_jet(params, x):
    f = functools.partial(models.mlp, params)
    series = [jet.jet(f, (x,), ((t, jnp.zeros_like(t)),))[1][1] for t in directions(x)]
    return sum(series)[:, 0]


# -------------------------------------------------------------------------- the oracle

FIRST, BACK = ("value", "inner"), ("value", "back")
OUTER, SERIES = (*FIRST, "outer", "second"), (*FIRST, "second")


def carried(params, x, ts, use, kinds):
    """Values, first and second derivatives along ts `[k, n, d]`, by hand.

    `use(layer, kind, rows)` is the product with a weight. Nested derivatives carry the
    first one twice ("inner" and "outer"); series once, and half of the second one,
    which for the inputs is zero but counts as a row.
    """
    v, a, b = x, ts, ts if "outer" in kinds else None
    c = jnp.zeros_like(ts) if kinds == SERIES else None
    for i in range(len(params)):
        v = use(i, "value", v)
        v = v + jnp.broadcast_to(params[f"layer{i}"]["b"], v.shape)
        a = use(i, "inner", a) if "inner" in kinds else None
        b = use(i, "outer", b) if "outer" in kinds else a
        if c is not None:
            c = 2 * use(i, "second", c / 2) if kinds == SERIES else use(i, "second", c)
        if i < len(params) - 1:
            v = jnp.tanh(v)
            slope = jnp.broadcast_to(1 - v**2, ts.shape[:1] + v.shape)
            bend = jnp.broadcast_to(-2 * v * (1 - v**2), slope.shape)
            if "second" in kinds:
                c = bend * a * b + (0 if c is None else slope * c)
            a, b = (None if d is None else slope * d for d in (a, b))
    return v, a, c


def pulled_back(params, x, use):
    """The slopes in reverse mode, which uses the weights transposed."""
    v, slopes, last = x, [], len(params) - 1
    for i in range(last):
        v = use(i, "value", v)
        v = jnp.tanh(v + jnp.broadcast_to(params[f"layer{i}"]["b"], v.shape))
        slopes.append(1 - v**2)
    g = use(last, "back", jnp.ones((len(x), 1)))
    for i in reversed(range(last)):
        g = use(i, "back", g * slopes[i])
    return g


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to write the loss, and what it carries along together.

    Attributes:
      problem: the loss, and its arguments.
      each: whether every direction carries values of its own.
      kinds: the kinds of uses.
      uses: at how many places each layer's weight is used.
    """

    problem: tuple[Callable, tuple[jax.Array, ...]]
    each: bool
    kinds: tuple[str, ...]
    uses: tuple[int, int, int]


FORMS = {
    "sobolev, jvp": Form(sobolev(slopes_by_jvp), True, FIRST, (4, 4, 3)),
    "sobolev, vmap of jvp": Form(
        sobolev(slopes_by_jvp_of_each), True, FIRST, (4, 4, 3)
    ),
    "sobolev, linearize": Form(sobolev(slopes_by_linearize), False, FIRST, (2, 2, 2)),
    "sobolev, grad": Form(sobolev(slopes_by_grad), True, BACK, (3, 3, 2)),
    "poisson, loop": Form(poisson(laplacian_by_loop), True, OUTER, (7, 9, 3)),
    "poisson, vmap": Form(poisson(laplacian_by_vmap), False, OUTER, (4, 5, 2)),
    "poisson, scan": Form(poisson(laplacian_by_scan), True, OUTER, (4, 5, 2)),
    "poisson, jet": Form(poisson(laplacian_by_jet), True, SERIES, (7, 7, 3)),
}


def outputs_of(form, params, use):
    """What both losses register, `[(weight of each entry's square, outputs)]`."""
    ts = directions(POINTS)
    if form.kinds == BACK:
        z, _, _ = carried(params, POINTS, ts, functools.partial(use, 0), ("value",))
        dz = pulled_back(params, POINTS, functools.partial(use, 1))
        return [(1 / N, z), (1 / N, dz)]
    groups = [ts[i : i + 1] for i in range(D)] if form.each else [ts]
    found = [
        carried(params, POINTS, t, functools.partial(use, g), form.kinds)
        for g, t in enumerate(groups)
    ]
    if "second" not in form.kinds:
        dz = jnp.concatenate([a for _, a, _ in found])[..., 0].T
        return [(1 / N, found[0][0]), (1 / N, dz)]
    laplacian = sum(c.sum(0) for _, _, c in found)
    at_wall = functools.partial(use, len(groups))
    wall, _, _ = carried(params, WALL, WALL[None], at_wall, ("value",))
    return [(1 / N, laplacian), (WALL_WEIGHT / BOUNDARY, wall)]


def plain_use(params):
    """The product without a probe."""

    def use(group, layer, kind, x):
        w = params[f"layer{layer}"]["w"]
        return x @ (w.T if kind == "back" else w)

    return use


@functools.cache
def oracle(name):
    """For each layer's weight A and G, of its transpose too, and G of the bias."""
    form = FORMS[name]

    def outputs(probes):
        rows, results = {}, {}

        def use(group, layer, kind, x):
            y = plain_use(PARAMS)(group, layer, kind, x)
            rows[layer, kind, group], results[layer, kind, group] = x, y
            return y + probes[layer, kind, group] if probes else y

        found = outputs_of(form, PARAMS, use)
        return [z for _, z in found], ([w for w, _ in found], rows, results)

    _, (weights, inputs, results) = outputs({})
    probes = jax.tree.map(jnp.zeros_like, results)
    jacobians, _ = fast_jit(jax.jacobian(outputs, has_aux=True))(probes)
    a, g = {}, {}
    for key, x in inputs.items():
        layer, kind, _ = key
        size = results[key].shape[-1]
        x = np.asarray(x).reshape(-1, x.shape[-1])
        total = np.zeros((size, size))
        active = np.zeros(len(x), bool)
        for weight, jacobian in zip(weights, jacobians, strict=True):
            j = np.asarray(jacobian[key]).reshape(-1, len(x), size)
            total += 2 * weight * np.einsum("zro,zrp->op", j, j)
            active |= (j != 0).any((0, 2))
        prefix = "transposed_" if kind == "back" else ""
        a.setdefault((layer, prefix + "input"), []).append(x[active])
        for side in [prefix + "output"] + ["bias"] * (kind == "value"):
            g[layer, side] = g.get((layer, side), 0) + total
    rows = {key: np.concatenate(x) for key, x in a.items()}
    return {key: x.T @ x / len(x) for key, x in rows.items()} | g


# -------------------------------------------------------------------------------- tests


def make(problem, **options):
    loss_fn, args = problem
    options = {"estimation_mode": "ggn_exact"} | options
    return kfac_jax.make_curvature(loss_fn, PARAMS, *args, **options)


def by_name(plan):
    return {layer.name: layer for layer in plan.layers}


@functools.cache
def computed(name):
    """The plan; by it value, gradient and factors; and value and gradient by JAX."""
    loss_fn, args = problem = FORMS[name].problem
    plan = make(problem, on_unmatched="error")

    @fast_jit
    def compute(params, *args):
        value, grads, statistics = plan.value_grad_and_statistics(params, *args)
        factors = plan.update_factors(plan.init_factors(params), statistics, 1)
        return (value, grads), factors, jax.value_and_grad(loss_fn)(params, *args)

    return plan, *compute(PARAMS, *args)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FORMS)
def test_every_layer_is_found_with_all_its_uses(name):
    plan, found, _, expected = computed(name)
    layers = by_name(plan)
    weight = "tied" if FORMS[name].kinds == BACK else "dense"
    assert {n: layer.kind for n, layer in layers.items()} == {
        f"layer{i}/{key}": kind
        for i in range(3)
        for key, kind in {"w": weight, "b": "shift"}.items()
    }
    uses = tuple(layers[f"layer{i}/w"].uses for i in range(3))
    assert uses == FORMS[name].uses
    jax.tree.map(functools.partial(close, rtol=1e-12), found, expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FORMS)
def test_factors_are_those_of_weight_sharing_over_all_uses(name):
    _, _, factors, _ = computed(name)
    expected = oracle(name)
    for i in range(3):
        found = factors[f"layer{i}/w"]
        sides = {side for layer, side in expected if layer == i} - {"bias"}
        assert set(found) == sides
        for side in sides:
            close(found[side], expected[i, side])
        bias, shift = expected[i, "bias"], factors[f"layer{i}/b"]
        if "output" in shift:
            close(shift["input"], np.ones((1, 1)))
            close(shift["output"], bias)
        else:
            close(np.ravel(shift["diagonal"]), np.diag(bias))


@pytest.mark.parametrize("name", ["poisson, vmap", "sobolev, grad"])
def test_exact_products_add_up_both_losses(name):
    form, (plan, *_) = FORMS[name], computed(name)
    losses = outputs_of(form, PARAMS, plain_use(PARAMS))
    exact = 0
    for i, (weight, _) in enumerate(losses):

        def outputs(params, i=i):
            return outputs_of(form, params, plain_use(params))[i][1]

        j = oracles.jacobian(outputs, PARAMS)
        exact += 2 * weight * np.einsum("nap,naq->pq", j, j)
    v = oracles.random_like(PARAMS, 6)
    found = fast_jit(plan.matvec)(PARAMS, v, *form.problem[1])
    close(oracles.vector(found), exact @ oracles.vector(v))


# ------------------------------------------------------------------- one use, and many


def test_layers_used_once_are_exact_under_blocks_that_sum_within_an_example():
    """Of a loss on slopes alone the last layer is used once, for all directions."""

    def outputs(params):
        return slopes_by_linearize(params, POINTS)[1]

    def loss_fn(params, x, expected):
        return squared_error(slopes_by_linearize(params, x)[1], expected).sum(-1).mean()

    nll = lambda z, y: squared_error(z, y).sum()  # noqa: E731
    exact = oracles.ggn(outputs, nll, PARAMS, SLOPES)
    problem = loss_fn, (POINTS, SLOPES)
    names = ["layer2/w", "layer0/b", "layer1/b"]
    every = {name: blocks.Full() for name in names}
    plan = make(problem, blocks=every)
    uses = {layer.name: layer.uses for layer in plan.layers}
    expected = {f"layer{i}/w": 2 for i in range(2)} | dict.fromkeys(names, 1)
    assert uses == expected | {"layer2/b": 0}
    factors = fast_jit(functools.partial(models.statistics_to_factors, plan))(
        PARAMS, *problem[1]
    )
    found = np.asarray(plan.approximation(factors).to_dense())
    for name in names:
        close(oracles.block(found, PARAMS, name), oracles.block(exact, PARAMS, name))


@pytest.mark.parametrize(
    "block",
    [blocks.Full(), blocks.Diagonal(), blocks.TNT(), blocks.Eigen()],
    ids=lambda block: type(block).__name__,
)
def test_directions_that_all_points_share_have_no_examples_gradients(block):
    with pytest.warns(UserWarning, match="sums within an example, and"):
        plan = make(poisson(laplacian_by_vmap), blocks={"dense": block})
    weights = [layer for layer in plan.layers if layer.name.endswith("w")]
    assert [layer.kind for layer in weights] == ["unmatched"] * 3


def test_rows_of_several_uses_cannot_be_reduced():
    block = blocks.Kronecker(weight_sharing="reduce")
    with pytest.warns(UserWarning, match="used several times for each example"):
        plan = make(poisson(laplacian_by_vmap), blocks={"dense": block})
    weights = [layer for layer in plan.layers if layer.name.endswith("w")]
    assert [layer.kind for layer in weights] == ["unmatched"] * 3


# ------------------------------------------------------------- what all points share


def along_fixed(params, x):
    """Under vmap, along axes which all points share."""

    def each(x):
        f = functools.partial(one, params)
        return sum(second(f, x, t) for t in jnp.eye(D))

    return jax.vmap(each)(x)


def hessian(params, x):
    return jax.vmap(lambda x: jnp.trace(jax.hessian(one, 1)(params, x)))(x)


def slopes_of_each(params, x):
    values, slopes = jax.vmap(jax.value_and_grad(one, 1), (None, 0))(params, x)
    return values[:, None], slopes


def along_broadcast(params, x):
    f = functools.partial(models.mlp, params)
    return sum(second(f, x, t) for t in directions(x))[:, 0]


def hessian_broadcast(params, x):
    slopes = jax.grad(lambda x: models.mlp(params, x).sum())
    along = jax.vmap(lambda t: jax.jvp(slopes, (x,), (t,))[1])(directions(x))
    return jnp.einsum("dnd->n", along)


def slopes_by_pulling(params, x):
    z, pull = jax.vjp(functools.partial(models.mlp, params), x)
    return z, pull(jnp.ones_like(z))[0]


SHARED = {  # with constants, with a copy for each point; kinds in exact modes
    "along fixed axes": (
        poisson(along_fixed),
        poisson(along_broadcast),
        ("unmatched", "dense", "dense"),
    ),
    "grad": (
        sobolev(slopes_of_each),
        sobolev(slopes_by_pulling),
        ("tied", "tied", "unmatched"),
    ),
    "hessian": (
        poisson(hessian),
        poisson(hessian_broadcast),
        ("unmatched", "tied", "unmatched"),
    ),
}
SAMPLES, MONTE_CARLO = 6000, 0.05  # the largest error, relative to the largest entry


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SHARED)
def test_sampled_factors_of_constants_are_those_of_copies(name):
    """Under vmap, what all points share: directions, the one that grad begins with.

    At its output there is the sum of the points' gradients, whose square has the
    expectation of the sum of squares.
    """
    shared, copied, _ = SHARED[name]
    options = {"on_unmatched": "error"}
    sampled = {"estimation_mode": "fisher_gradients", "num_samples": SAMPLES}
    plan, exact = make(shared, **options, **sampled), make(copied, **options)
    ours, theirs = (
        {layer.name: (layer.kind, layer.uses) for layer in p.layers}
        for p in (plan, exact)
    )
    assert ours == theirs

    @fast_jit
    def factors(params, rng):
        found = []
        for p, (_, args) in ((plan, shared), (exact, copied)):
            statistics = p.value_grad_and_statistics(params, *args, rng=rng)[2]
            found.append(p.update_factors(p.init_factors(params), statistics, step=1))
        return found

    estimated, expected = factors(PARAMS, jax.random.key(0))
    for layer, parts in expected.items():
        for part, value in parts.items():
            found, scale = estimated[layer][part], np.abs(value).max()
            if part.endswith("input"):
                close(found, value)
            else:
                assert np.abs(found - value).max() <= MONTE_CARLO * scale, (layer, part)


def test_blocks_that_do_not_tell_inputs_apart_refuse_constants():
    options = {
        "estimation_mode": "fisher_gradients",
        "blocks": {"layer0/w": blocks.Full()},
    }
    with pytest.warns(UserWarning, match="is not for inputs that all cases share"):
        plan = make(SHARED["along fixed axes"][0], **options)
    assert by_name(plan)["layer0/w"].kind == "unmatched"


@pytest.mark.parametrize("name", SHARED)
def test_exact_modes_refuse_products_of_a_weight_and_a_constant(name):
    problem, _, kinds = SHARED[name]
    loss_fn, args = problem
    reason = "do not depend on the batch, so gradients mix the examples"
    with pytest.warns(UserWarning, match=reason):
        plan = make(problem)
    found = by_name(plan)
    weights = [found[f"layer{i}/w"] for i in range(3)]
    assert tuple(layer.kind for layer in weights) == kinds
    for layer in weights:
        assert (reason in layer.reason) == (layer.kind == "unmatched")
    compute = fast_jit(
        lambda p, *a: (plan.value_and_grad(p, *a), jax.value_and_grad(loss_fn)(p, *a))
    )
    jax.tree.map(functools.partial(close, rtol=1e-12), *compute(PARAMS, *args))


# ---------------------------------------------------------------------------- training

STEPS, FACTOR = 25, 0.02


def test_kfac_solves_a_poisson_equation():
    """`Δu = -2π² sin(πx) sin(πy)` in the unit square, which is zero on its edges."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(64, D)))
    wall = jnp.asarray(rng.uniform(size=(32, D)))
    edge = jnp.arange(32) % 2
    wall = wall.at[jnp.arange(32), edge].set((jnp.arange(32) // 2 % 2).astype(float))
    solution = lambda x: jnp.sin(jnp.pi * x).prod(-1)  # noqa: E731
    args = x, -2 * jnp.pi**2 * solution(x), wall
    params = models.dense_params(3, D, 12, 12, 1)
    loss_fn, _ = poisson(laplacian_by_vmap)
    plan = kfac_jax.make_curvature(loss_fn, params, *args, on_unmatched="error")
    tx = kfac_jax.kfac(
        plan,
        learning_rate=kfac_jax.QuadraticModel(),
        momentum=None,
        damping=kfac_jax.LevenbergMarquardt(1.0),
        inverse_every=1,
    )

    def step(carry, key):
        params, state = carry
        value, grads, statistics = plan.value_grad_and_statistics(
            params, *args, rng=key
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), STEPS)
    run = fast_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys))
    (params, _), values = run(params)
    assert loss_fn(params, *args) < FACTOR * values[0]
