"""Layers as models compose them: low-rank adapters, routed experts, ensembles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import Diagonal, Full, Kronecker
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

# half the time to compile: the compiler's own optimizations are not what is tested
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
N, I, O = 6, 3, 2  # noqa: E741 (the letters of the layouts)
X = models.array(0, N, I)


def factors_and_dense(outputs, params, *args, **options):
    """The plan of a squared error, its factors on one batch, and their matrix."""

    def loss_fn(params, *args):
        z = outputs(params, *args)
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    shapes = jax.eval_shape(lambda: (params, *args))  # nothing is computed for it
    options = {"estimation_mode": "ggn_exact", "on_unmatched": "error"} | options
    plan = kfac_jax.make_curvature(loss_fn, *shapes, **options)

    @fast_jit
    def compute(params, *args):
        factors = models.statistics_to_factors(plan, params, *args)
        return factors, plan.approximation(factors).to_dense()

    return plan, *compute(params, *args)


def exact(outputs, params, *args):
    return oracles.ggn(
        lambda p: outputs(p, *args), lambda z: jnp.square(z).sum(), params
    )


# ------------------------------------------------------------------- low-rank adapters

ADAPTED = {"w": models.array(1, I, O), "a": models.array(2, I, 1)}
ADAPTED["b"] = models.array(3, 1, O)


def adapted(p, x):
    return jnp.tanh(x @ p["w"] + 0.5 * (x @ p["a"] @ p["b"]))


@pytest.mark.parametrize("block", [Kronecker(), Full(), Diagonal()])
def test_a_low_rank_adapter_is_two_layers_beside_the_weight(block):
    """`x w + (x a) b / 2`: three layers; the gradient at b's output is half w's."""
    plan, factors, found = factors_and_dense(adapted, ADAPTED, X, blocks=block)
    assert [(x.name, x.kind, x.uses) for x in plan.layers] == [
        (name, "dense", 1) for name in ("a", "b", "w")
    ]
    if isinstance(block, Kronecker):
        x = np.asarray(X)
        g = 2 * np.square(1 - np.asarray(adapted(ADAPTED, X)) ** 2)  # [n, o]
        g = g[..., None] * np.eye(O)
        b = np.asarray(ADAPTED["b"])
        rows = {"w": x, "a": x, "b": x @ ADAPTED["a"]}
        sides = {"w": g, "a": 0.25 * b @ g @ b.T, "b": 0.25 * g}
        for name, h in rows.items():
            close(factors[name]["input"], h.T @ h / N)
            close(factors[name]["output"], sides[name].mean(0))
        return
    matrix = exact(lambda p: adapted(p, X), ADAPTED)
    for name in ADAPTED:
        expected = oracles.block(matrix, ADAPTED, name)
        if isinstance(block, Diagonal):
            expected = np.diag(np.diag(expected))
        close(oracles.block(np.asarray(found), ADAPTED, name), expected)


# ---------------------------------------------------------------------- routed experts

EXPERTS = 4
ROUTED = {
    "experts": {"b": models.array(5, EXPERTS, O), "w": models.array(4, EXPERTS, I, O)},
    "head": models.array(6, O, 2),
}
CHOICE = jnp.asarray([0, 2, 2, 0, 2, 1])  # none goes to the last expert


def _each(p, x):
    """All experts on `[e, t, i]`."""
    y = jnp.einsum("eti,eio->eto", x, p["experts"]["w"])
    return y + jnp.broadcast_to(p["experts"]["b"][:, None], y.shape)


def masked(p, x, choice):
    """Every expert sees every token; what is not its own is thrown away."""
    mask = jax.nn.one_hot(choice, EXPERTS, axis=0)[..., None]
    y = _each(p, jnp.broadcast_to(x, (EXPERTS, *x.shape)))
    return (y * jnp.broadcast_to(mask, y.shape)).sum(0)


def dispatched(p, x, choice):
    """Each expert has room for as many tokens as there are, in order (Switch)."""
    mine = jax.nn.one_hot(choice, EXPERTS)  # [n, e]
    place = (jnp.cumsum(mine, 0) * mine).sum(-1).astype(int) - 1
    to = mine[..., None] * jax.nn.one_hot(place, N)[:, None]  # [n, e, t]
    y = _each(p, jnp.einsum("net,ni->eti", to, x))
    return jnp.einsum("net,eto->no", to, y)


ROUTES = {"masked": masked, "dispatched": dispatched}


def routed_net(name):
    return lambda p, x, choice: jnp.tanh(ROUTES[name](p, x, choice)) @ p["head"]


@pytest.mark.filterwarnings("ignore:Which examples the registered")  # cumsum
@pytest.mark.parametrize("name", ROUTES)
def test_an_expert_counts_the_tokens_that_are_routed_to_it(name):
    plan, factors, _ = factors_and_dense(routed_net(name), ROUTED, X, CHOICE)
    by_name = {layer.name: layer for layer in plan.layers}
    assert by_name["experts"].kind == "dense" and by_name["experts"].homogeneous
    x, choice = np.asarray(X), np.asarray(CHOICE)
    rows = np.concatenate([x, np.ones((N, 1))], 1)
    w, b = (np.asarray(ROUTED["experts"][name])[choice] for name in "wb")
    h = np.tanh(np.einsum("ni,nio->no", x, w) + b)
    j = (1 - h**2)[..., None] * np.asarray(ROUTED["head"])  # [n, o, d]
    g = 2 * j @ j.swapaxes(1, 2)
    for e in range(EXPERTS):
        mine = choice == e
        a = rows[mine].T @ rows[mine] / max(mine.sum(), 1)
        close(factors["experts"]["input"][e], a)
        close(factors["experts"]["output"][e], g[mine].sum(0) / N)


def test_blocks_that_sum_within_an_example_are_exact_for_experts():
    net, block = routed_net("masked"), {"experts": Full()}
    plan, _, found = factors_and_dense(net, ROUTED, X, CHOICE, blocks=block)
    assert [type(x.block) for x in plan.layers if x.name == "experts"] == [Full]
    matrix = exact(net, ROUTED, X, CHOICE)
    at = oracles.indices(ROUTED)
    for e in range(EXPERTS):
        own = np.concatenate([at[f"experts/{name}"][e].ravel() for name in "bw"])
        close(np.asarray(found)[np.ix_(own, own)], matrix[np.ix_(own, own)])


# --------------------------------------------------------------------------- ensembles

MEMBERS = 3
ENSEMBLE = jax.tree.map(
    lambda *leaves: jnp.stack(leaves),
    *(models.dense_params(seed, I, 4, O) for seed in range(MEMBERS)),
)
V = oracles.random_like(ENSEMBLE, 0)
OWN = models.array(7, N, MEMBERS, I)  # other data for each member


def together(params, x):
    return jax.vmap(models.mlp, (0, 1), 1)(params, x)


def copied(params, x):
    copies = jnp.broadcast_to(x, (MEMBERS, *x.shape))
    return jax.vmap(models.mlp, out_axes=1)(params, copies)


def mapped(params, x):
    return jnp.moveaxis(jax.lax.map(lambda p: models.mlp(p, x), params), 0, 1)


def shared(params, x):
    return jax.vmap(models.mlp, (0, None), 1)(params, x)


def slice_of(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


@functools.cache
def trained(outputs, *shape):
    """The plan; factors after a batch, parameters after two steps, a vector solved."""

    def loss_fn(params, x):
        z = outputs(params, x)
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    params = slice_of(ENSEMBLE, 0) if outputs is models.mlp else ENSEMBLE
    x = jax.ShapeDtypeStruct(shape, float)
    plan = kfac_jax.make_curvature(loss_fn, params, x, estimation_mode="fisher_exact")
    tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.01, norm_constraint=None)

    @fast_jit
    def run(params, x, v):
        factors = models.statistics_to_factors(plan, params, x)
        solved = plan.approximation(factors).solve(v, 0.1, "exact")
        state = tx.init(params)
        for _ in range(2):
            _, grads, statistics = plan.value_grad_and_statistics(params, x)
            updates, state = tx.update(grads, state, params, statistics=statistics)
            params = jax.tree.map(jnp.add, params, updates)
        return factors, params, solved

    return plan, run


INDEPENDENT = {"own data": together, "a copy of the batch": copied, "in a scan": mapped}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_members_of_an_ensemble_are_as_each_by_itself(name):
    x = OWN if name == "own data" else X
    _, run = trained(INDEPENDENT[name], *x.shape)
    found, alone = run(ENSEMBLE, x, V), trained(models.mlp, N, I)[1]
    for k in range(MEMBERS):
        expected = alone(
            slice_of(ENSEMBLE, k), x[:, k] if x is OWN else x, slice_of(V, k)
        )
        jax.tree.map(lambda a, b: close(a[k], b), found, expected)  # noqa: B023


def test_the_first_layer_of_an_ensemble_with_one_batch_is_one_layer():
    """Its inputs have no axis of members: one A, and all members' outputs in one G."""
    plan, run = trained(shared, *X.shape)
    first, last = (plan.layers[k].factor_shapes for k in (0, 1))
    assert first == {"input": (I + 1, I + 1), "output": (MEMBERS * 4, MEMBERS * 4)}
    assert last == {"input": (MEMBERS, 5, 5), "output": (MEMBERS, O, O)}
    factors, _, solved = run(ENSEMBLE, X, V)
    joint = np.array(factors["layer0"]["output"]).reshape(MEMBERS, 4, MEMBERS, 4)
    alone = trained(models.mlp, N, I)[1]
    for k in range(MEMBERS):
        expected, _, own = alone(slice_of(ENSEMBLE, k), X, slice_of(V, k))
        close(factors["layer0"]["input"], expected["layer0"]["input"])
        close(joint[k, :, k], expected["layer0"]["output"])
        jax.tree.map(lambda a, b: close(a[k], b), factors["layer1"], expected["layer1"])  # noqa: B023
        joint[k, :, k] = 0.0
        jax.tree.map(lambda a, b: close(a[k], b), solved, own)  # noqa: B023
    assert not joint.any()  # between members: zero where it is not sampled


def member_loss(params, x, weight):
    z = models.mlp(params, x)
    return squared_error(z, weight=weight).sum(-1).mean()


def test_a_loss_inside_a_vmap_over_members_needs_a_weight():
    """The mapped axis is that of cases, so what was a mean became a sum within one."""

    def loss_fn(params, x, weight=1 / N):
        each = functools.partial(member_loss, weight=weight)
        return jax.vmap(each, (0, 1))(params, x).mean()

    _, found = models.exact_factors(loss_fn, ENSEMBLE, OWN)
    expected, *_ = trained(together, *OWN.shape)[1](ENSEMBLE, OWN, V)
    for layer, sides in found.items():
        close(sides["input"], expected[layer]["input"])
        close(sides["output"] * MEMBERS, expected[layer]["output"])  # of the mean
    unweighted = functools.partial(loss_fn, weight=1.0)
    with pytest.raises(ValueError, match=r"ratio returned/registered = 0\.1666"):
        kfac_jax.make_curvature(unweighted, ENSEMBLE, OWN)
