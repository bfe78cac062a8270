"""Programs as people report them, each against an oracle of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

import kfac_jax
from kfac_jax import blocks, losses
from kfac_jax.distributions import NormalWithVariance
from tests.helpers import models, oracles
from tests.reliability.reported import (
    KEY,
    LABELS,
    NET,
    C,
    D,
    H,
    N,
    X,
    assert_exact,
    classified,
    cross_entropy,
    dense_of,
    log_loss,
    regressed,
    square,
)

pytestmark = pytest.mark.usefixtures("any_rank")


# ------------------------------------------------------------ weights that are computed

MASKS = [models.array(3, D, H) > -0.5, models.array(4, H, C) > -0.5]
MASKS = [mask.astype(float) for mask in MASKS]


def masked(params, x):
    for i, mask in enumerate(MASKS):
        layer = params[f"layer{i}"]
        x = jnp.tanh(x) if i else x
        x = x @ (layer["w"] * mask) + layer["b"]
    return x


def test_masked_weights():
    full = {"dense": blocks.Full(), "shift": blocks.Full()}
    options = {"blocks": full, "on_unmatched": "error"}
    plan, _, found = dense_of(classified(masked), NET, X, LABELS, **options)
    outputs = lambda p: masked(p, X)  # noqa: E731
    assert_exact(plan, found, oracles.ggn(outputs, log_loss, NET, LABELS))
    plan, _, found = dense_of(regressed(masked), NET, X)
    sides = {x.name: x.factor_shapes for x in plan.layers if x.kind == "dense"}
    assert sides["layer0/w"] == {"input": (D, D), "output": (H, H)}
    assert sides["layer1/w"] == {"input": (H, H), "output": (C, C)}
    both = found, oracles.ggn(outputs, square, NET)
    traces = [
        np.trace(oracles.block(m, NET, "layer1/w")) for m in map(np.asarray, both)
    ]
    np.testing.assert_allclose(*traces)


def on_grid(w):
    return jnp.round(4 * w) / 4


@jax.custom_jvp
def forward_rule(w):
    return on_grid(w)


forward_rule.defjvp(lambda primals, tangents: (on_grid(*primals), *tangents))


@jax.custom_vjp
def backward_rule(w):
    """Its step is that of the largest weight."""
    step = jax.lax.stop_gradient(jnp.abs(w).max() / 7)
    return jnp.round(w / step) * step


backward_rule.defvjp(lambda w: (backward_rule(w), None), lambda _, g: (g,))

ADDED = {
    "straight through": lambda w: w + jax.lax.stop_gradient(on_grid(w) - w),
    "frozen and delta": lambda w: jnp.ones_like(w) + w,
    "noise": lambda w: w + jax.random.normal(KEY, w.shape, w.dtype),
}
COMPUTED = ADDED | {"forward rule": forward_rule, "backward rule": backward_rule}


def through(function):
    def apply(params, x):
        layers = params.values()
        return models.mlp(
            {
                f"layer{i}": {"w": function(layer["w"]), "b": layer["b"]}
                for i, layer in enumerate(layers)
            },
            x,
        )

    return apply


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_have_the_blocks_of_plain_ones_of_their_value(name):
    function = COMPUTED[name]
    value = {k: v | {"w": function(v["w"])} for k, v in NET.items()}
    exact = oracles.ggn(lambda p: models.mlp(p, X), log_loss, value, LABELS)
    loss_fn = classified(through(function))
    options = {"blocks": blocks.Full(), "on_unmatched": "error"}
    plan, _, found = dense_of(loss_fn, NET, X, LABELS, **options)
    assert_exact(plan, found, exact)
    if name in ADDED:
        _, factors = models.exact_factors(loss_fn, NET, X, LABELS)
        plain = models.exact_factors(classified(models.mlp), value, X, LABELS)[1]
        models.assert_trees_close(factors, plain)


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_to_a_large_weight_makes_no_larger_factors(name):
    params, x = jax.eval_shape(
        lambda: (models.dense_params(0, 256, 128, 3), jnp.ones((8, 256)))
    )
    ours, plain = (
        kfac_jax.make_curvature(classified(apply), params, x, jnp.zeros(8, int))
        for apply in (through(ADDED[name]), models.mlp)
    )
    assert [x.factor_shapes for x in ours.layers] == [
        x.factor_shapes for x in plain.layers
    ]
    assert ours.totals == plain.totals


def normed(params, x):
    v = params["v"]
    w = v / jnp.linalg.norm(v, axis=0) * params["g"]
    return jnp.tanh(x @ w + params["b"]) @ params["w"]


def test_scales_of_normed_weights():
    """With positive inputs, as after a rectifier, whose mean is far from zero."""
    params = {
        "v": models.array(1, D, H),
        "g": 1 + 0.1 * models.array(2, H),
        "b": models.array(3, H),
        "w": models.array(4, H, C),
    }
    x = jnp.abs(X)
    plan, _, found = dense_of(regressed(normed), params, x, on_unmatched="error")
    kinds = {x.name: type(x.block).__name__ for x in plan.layers}
    assert kinds == {
        "b": "Diagonal",
        "g": "Diagonal",
        "v": "Kronecker",
        "w": "Kronecker",
    }
    exact = oracles.ggn(lambda p: normed(p, x), square, params)
    assert_exact(plan, found, exact, blocks.Diagonal)


def test_a_long_table_that_is_the_output_layer():
    """It keeps diagonals of its rows, by both uses, and the step is taken."""
    params = {"table": models.array(1, 9, D), "w": models.array(2, D, D)}
    ids = models.classes(3, 9, 2 * N)

    def loss_fn(params, ids):
        h = jnp.tanh(params["table"][ids] @ params["w"])
        return cross_entropy(h @ params["table"].T, ids[::-1]).mean()

    short, whole = blocks.Kronecker(max_factor_dim=5), blocks.Kronecker()
    plan, found = models.exact_factors(loss_fn, params, ids, blocks=short)
    full = models.exact_factors(loss_fn, params, ids, blocks=whole)[1]["table"]
    full["transposed_output_diagonal"] = jnp.diag(full.pop("transposed_output"))
    models.assert_trees_close(found["table"], full)
    assert "input_diagonal[9]" in str(plan)
    assert "transposed_output_diagonal[9]" in str(plan)
    tx = kfac_jax.kfac(plan, 0.1, 0.9, 1e-2)
    step, state = jax.jit(kfac_jax.make_step(plan, tx)), tx.init(params)
    start = loss_fn(params, ids)
    for _ in range(5):
        params, state, value = step(params, state, KEY, ids)
    assert value < start and int(state.info.skipped_updates) == 0


# ------------------------------------------------------------------ rules of their own


def root(a, h):
    def one(h):
        return jax.lax.custom_root(
            lambda z: z - jnp.tanh(0.3 * z @ a + h),
            h,
            lambda f, z: jax.lax.fori_loop(0, 40, lambda _, z: z - f(z), z),
            lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y),
        )

    return jax.vmap(one)(h)


def around(solver):
    """A layer before it and one after."""

    def apply(params, x):
        return solver(params["a"], jnp.tanh(x @ params["v"])) @ params["w"]

    return apply


def plan_around(apply, x, **options):
    size = x.shape[1]
    params = {
        "v": models.array(1, size, size),
        "a": models.array(2, size, size, scale=0.3),
        "w": models.array(3, size, 2),
    }
    loss_fn = regressed(apply)
    with pytest.warns(UserWarning, match=r"1 parameter\(s\) that no layer covers"):
        plan = kfac_jax.make_curvature(
            loss_fn, params, x, estimation_mode="ggn_exact", **options
        )
    value, grads, statistics = jax.jit(plan.value_grad_and_statistics)(params, x)
    expected = jax.jit(jax.value_and_grad(loss_fn))(params, x)
    models.assert_trees_close((value, grads), expected)
    factors = plan.update_factors(plan.init_factors(params), statistics, 1)
    return params, plan, factors


@pytest.mark.slow
def test_layers_around_a_root():
    apply, full = around(root), blocks.Full()
    params, plan, factors = plan_around(apply, X, blocks={"v": full, "w": full})
    exact = oracles.ggn(lambda p: apply(p, X), square, params)
    assert_exact(plan, plan.approximation(factors).to_dense(), exact)


def flow(a, h):
    """With constant times."""
    rough = {"rtol": 1e-4, "atol": 1e-4, "mxstep": 50}
    times = jnp.asarray([0.0, 1.0])
    return odeint(lambda h, _, a: jnp.tanh(h @ a), h, times, a, **rough)[-1]


def linear_system(a, h):
    matrix = jnp.eye(len(a)) + a @ a.T
    inverse = lambda _, y: jnp.linalg.solve(matrix, y.T).T  # noqa: E731
    return jax.lax.custom_linear_solve(lambda v: v @ matrix, h, inverse, symmetric=True)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:Which examples the registered")
@pytest.mark.parametrize("solver", [flow, linear_system])
def test_factors_around_a_solver_of_all_cases(solver):
    x = X[:3, :2]
    params, _, factors = plan_around(around(solver), x)

    @jax.jit
    def exact(h):
        solve = lambda h: solver(params["a"], h)  # noqa: E731
        return solve(h), jax.jacobian(lambda h: solve(h) @ params["w"])(h)

    h = jnp.tanh(x @ params["v"])
    solved, j = exact(h)
    for name, rows in (("v", x), ("w", solved)):
        np.testing.assert_allclose(factors[name]["input"], rows.T @ rows / 3)
    j = np.einsum("ncmi,mi->ncmi", j, 1 - h**2)
    output = 2 * np.einsum("ncmi,ncmj->ij", j, j) / 3
    # steps of the flow's adjoint are as long as those of all cotangents together
    tolerance = 1e-3 if solver is flow else 1e-9
    np.testing.assert_allclose(factors["v"]["output"], output, rtol=tolerance)


@jax.custom_vjp
def with_penalty(z, labels):
    """Cross entropies plus the squares of their normalizers."""
    return _with_penalty(z, labels)[0]


def _with_penalty(z, labels):
    total = jax.nn.logsumexp(z, -1)
    values = jax.vmap(log_loss)(z, labels) + 0.01 * total**2
    return values, (jax.nn.softmax(z), total, labels)


def _backward(saved, g):
    p, total, labels = saved
    slopes = p * (1 + 0.02 * total[:, None]) - jax.nn.one_hot(labels, C, dtype=p.dtype)
    return g[:, None] * slopes, None


with_penalty.defvjp(_with_penalty, _backward)


def test_a_loss_by_a_rule_of_its_own():
    """Of which the curvature is that of the cross entropy alone."""

    def loss_fn(params, x, y):
        z = models.mlp(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(z)
        return with_penalty(z, y).mean()

    args = NET, X, LABELS
    plan, factors = models.exact_factors(loss_fn, *args)
    plain, expected = models.exact_factors(classified(models.mlp), *args)
    models.assert_trees_close(factors, expected)
    grads = jax.jit(plan.value_grad_and_statistics)(*args)[1]
    models.assert_trees_close(grads, jax.jit(jax.grad(loss_fn))(*args))
    v = oracles.random_like(NET, 5)
    product, wanted = (jax.jit(x.matvec)(NET, v, X, LABELS) for x in (plan, plain))
    models.assert_trees_close(product, wanted)
    tx = kfac_jax.kfac(plan)
    step = jax.jit(kfac_jax.make_step(plan, tx))
    params, _, first = step(NET, tx.init(NET), KEY, X, LABELS)
    assert loss_fn(params, X, LABELS) < first


def test_a_loss_and_its_penalty_as_one_convex_function():
    def penalized(z, label):
        return log_loss(z, label) + 0.01 * jax.nn.logsumexp(z) ** 2

    def loss_fn(params, x, y):
        return losses.convex(penalized, models.mlp(params, x), y).mean()

    plan, _, found = dense_of(loss_fn, NET, X, LABELS, blocks=blocks.Full())
    exact = oracles.ggn(lambda p: models.mlp(p, X), penalized, NET, LABELS)
    assert_exact(plan, found, exact)


# ------------------------------------------------------- objectives with further terms


def drawn(params, key):
    """Normal weights of learned means and deviations."""
    return {
        name: p["mean"]
        + jax.nn.softplus(p["deviation"])
        * jax.random.normal(jax.random.fold_in(key, i), p["mean"].shape)
        for i, (name, p) in enumerate(params.items())
    }


def two_layers(weights, x):
    return jnp.tanh(x @ weights["v"]) @ weights["w"]


def test_a_bayesian_network():
    params = {
        "v": {"mean": models.array(1, D, H), "deviation": models.array(2, D, H) - 3},
        "w": {"mean": models.array(3, H, 2), "deviation": models.array(4, H, 2) - 3},
    }

    def apply(params, x, key):
        return two_layers(drawn(params, key), x)

    def divergence(params):
        s = jax.nn.softplus(params["deviation"])
        return (0.5 * (s**2 + params["mean"] ** 2 - 1) - jnp.log(s)).sum()

    def loss_fn(params, x, key):
        rest = sum(map(divergence, params.values())) / 1000
        return regressed(apply)(params, x, key) + rest

    args = params, X, KEY
    deviations = {f"{name}/deviation": blocks.Full() for name in params}
    with pytest.warns(UserWarning, match="has a term that is not registered") as told:
        plan, factors, found = dense_of(loss_fn, *args, blocks=deviations)
    assert len(told) == 1
    assert all(layer.kind == "dense" for layer in plan.layers)
    grads = jax.jit(plan.value_grad_and_statistics)(*args)[1]
    models.assert_trees_close(grads, jax.jit(jax.grad(loss_fn))(*args))
    exact = oracles.ggn(lambda p: apply(p, X, KEY), square, params)
    assert_exact(plan, found, exact, blocks.Full)
    plain = models.exact_factors(regressed(two_layers), drawn(params, KEY), X)[1]
    for name, part in plain.items():
        models.assert_trees_close(factors[f"{name}/mean"], part)


def policy(params, x):
    mean = models.mlp(params["net"], x)
    return jnp.stack([mean, jnp.broadcast_to(2 * params["log_std"], mean.shape)], -1)


def test_a_gaussian_policy_of_free_deviations():
    """By the score function, whose value says nothing of the registered loss."""
    params = {"net": NET, "log_std": models.array(5, C, scale=0.3)}
    action, advantage = models.array(6, N, C), models.array(7, N)

    def loss_fn(params, x, action, advantage):
        z = policy(params, x)
        kfac_jax.register_loss(NormalWithVariance(), z)
        mean, log_variance = z[..., 0], z[..., 1]
        nll = log_variance / 2 + (action - mean) ** 2 / (2 * jnp.exp(log_variance))
        return (nll.sum(-1) * advantage).mean()

    args = params, X, action, advantage
    plan, _, found = dense_of(loss_fn, *args, blocks=blocks.Full())
    grads = plan.value_grad_and_statistics(*args)[1]
    models.assert_trees_close(grads, jax.grad(loss_fn)(*args))
    j = oracles.jacobian(lambda p: policy(p, X), params).reshape(N, C, 2, -1)
    fisher = [np.exp(-policy(params, X)[..., 1]), np.full((N, C), 0.5)]
    exact = np.einsum("nakp,nak,nakq->pq", j, np.stack(fisher, -1), j) / N
    assert_exact(plan, found, exact)


def test_an_actor_that_learns_from_a_critic():
    """Whose parameters are an argument and no cases, so that a fraction leaves them."""
    critic = models.dense_params(7, D + C, N, 1)

    def loss_fn(params, critic, x):
        action = jnp.tanh(models.mlp(params, x))
        kfac_jax.register_normal_predictive_distribution(action, variance=1.0)
        return -models.mlp(critic, jnp.concatenate([x, action], -1)).mean()

    args = NET, critic, X
    options = {"blocks": blocks.Full(), "statistics_fraction": 0.5}
    options["batch_argnums"] = 1
    plan, _, found = dense_of(loss_fn, *args, **options)
    grads = plan.value_grad_and_statistics(*args)[1]
    models.assert_trees_close(grads, jax.grad(loss_fn)(*args))
    half = X[: N // 2]
    outputs = lambda p: jnp.tanh(models.mlp(p, half))  # noqa: E731
    exact = oracles.ggn(outputs, lambda z: square(z) / 2, NET)
    assert_exact(plan, found, exact)


def route(params, x):
    weight, expert = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    return weight / weight.sum(-1, keepdims=True), expert


def ragged(params, x):
    weight, expert = route(params, x)
    order = jnp.argsort(expert.reshape(-1))
    token, sizes = order // 2, jnp.bincount(expert.reshape(-1), length=3)
    h = jnp.tanh(jax.lax.ragged_dot(x[token], params["up"], sizes))
    y = jax.lax.ragged_dot(h, params["down"], sizes)
    y = y * weight.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[token].add(y)


def gathered(params, x):
    weight, expert = route(params, x)
    h = jnp.tanh(jnp.einsum("nd,nkdh->nkh", x, params["up"][expert]))
    y = jnp.einsum("nkh,nkhd->nkd", h, params["down"][expert])
    return (y * weight[..., None]).sum(1)


@pytest.mark.filterwarnings("ignore:Which examples the registered")
def test_experts_by_sorted_rows_and_by_gathered_weights():
    params = {
        "router": models.array(1, D, 3),
        "up": models.array(2, 3, D, H),
        "down": models.array(3, 3, H, D),
    }
    (_, ours), (_, theirs) = (
        models.exact_factors(regressed(apply), params, X, on_unmatched="error")
        for apply in (ragged, gathered)
    )
    models.assert_trees_close(ours, theirs)


# ------------------------------------------------------------------- batches and runs


def test_a_plan_of_no_cases_is_refused():
    with pytest.raises(ValueError, match="needs at least one case"):
        kfac_jax.make_curvature(classified(models.mlp), NET, X[:0], LABELS[:0])


def time_major(params, x):
    """Attention within each of the cases, which are the second axis."""
    h = x.swapaxes(0, 1) @ params["v"]
    scores = jax.nn.softmax(jnp.einsum("nti,nsi->nts", h, h))
    return (scores @ h).mean(1) @ params["w"]


def pooled(params, x):
    return (x @ params["v"]).sum(0, keepdims=True) @ params["w"]


MIXED = {  # the function, its data, and the block that needs to know the cases
    "time major": (time_major, models.array(5, 3, N, D), blocks.Full()),
    "rows of one case": (pooled, X, blocks.Kronecker(weight_sharing="reduce")),
}


@pytest.mark.filterwarnings("ignore:Which examples the registered")
@pytest.mark.parametrize("name", MIXED)
def test_rows_that_are_no_cases_are_told_and_have_exact_diagonals(name):
    apply, x, block = MIXED[name]
    params = {"v": models.array(1, D, D), "w": models.array(2, D, 2)}
    with pytest.warns(UserWarning, match="which rows belong to one example"):
        plan, _, found = dense_of(regressed(apply), params, x, blocks=block)
    assert not any(layer.tagged for layer in plan.layers)
    exact = oracles.ggn(lambda p: apply(p, x), square, params)
    assert_exact(plan, found, exact)


def test_rows_of_one_case_behind_an_axis_of_cases():
    params = {"v": models.array(1, D, D), "w": models.array(2, D, 2)}
    loss_fn = regressed(lambda p, x: pooled(p, x[0]))
    block = blocks.Kronecker(weight_sharing="reduce")
    plan, _, found = dense_of(loss_fn, params, X[None], blocks=block)
    exact = oracles.ggn(lambda p: pooled(p, X), square, params)
    assert_exact(plan, found, exact, blocks.Kronecker)
