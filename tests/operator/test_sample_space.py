"""The sample space: `T = U Uᵀ`, products with U, and the exact natural gradient.

The oracle is dense: rows of the Jacobian times a root of the Fisher over the outputs,
by autodiff of plain networks that register nothing.
"""

import functools
import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import SampleSpace, Spring, natural_gradient
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels, squared_error
from kfac_jax.statistics import sample_space
from kfac_jax.statistics.sample_space import gram_matrix, layer_rows
from tests.helpers import models

pytestmark = pytest.mark.usefixtures("any_rank")

N, D, H, C = 5, 4, 3, 2
X = models.array(0, N, D)
DENSE = {
    "w": models.array(1, D, H),
    "b": models.array(2, H),
    "o": models.array(3, H, C),
}


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["o"]


def convolution(p, x):
    images = x[:, :, None, None] * jnp.ones((1, 1, 3, 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        images, p["k"], (1, 1), "SAME", dimension_numbers=numbers
    )
    return jnp.tanh(y).mean((1, 2))


def shared_scan(p, x):
    step = lambda h, _: (jnp.tanh(h @ p["u"]), None)  # noqa: E731
    return jax.lax.scan(step, x, length=3)[0]


def stacked_scan(p, x):
    step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(step, x, p["s"])[0]


def laplacian(p, x):
    def one(x):
        return jnp.trace(jax.hessian(lambda x: mlp(p, x)[0])(x))

    return jax.vmap(one)(x)[:, None]


def tied(p, x):
    return jnp.tanh(p["e"][(x[:, 0] > 0).astype(int)]) @ p["e"].T


def normed(p, x):
    h = x @ p["w"]
    h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 0.1)
    return (h * p["g"] + p["b"]) @ p["o"]


def attention(p, x):
    x = x[:, :, None] * jnp.asarray([1.0, -0.5, 0.3])
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    scores = jax.nn.softmax(jnp.einsum("nid,njd->nij", q, k))
    return jnp.einsum("nij,njd->nid", scores, v).mean(1) @ p["o"]


def masked(p, x):
    return x @ jnp.where(p["w"] > 0, p["w"], 0.0) + jnp.sin(p["b"])


def cut(p, x):
    """One part of a parameter has rows, and the other is evaluated case by case."""
    first, second = p["w"][:, :H], p["w"][:, H:]

    def one(x):
        return jnp.trace(jax.hessian(lambda x: jnp.tanh(x @ second).sum())(x))

    return jnp.tanh(x @ first) + jax.vmap(one)(x)[:, None]


NETWORKS = {
    "cut": (cut, {"w": models.array(12, D, 2 * H)}),
    "mlp": (mlp, DENSE),
    "convolution": (convolution, {"k": models.array(4, 3, 3, 2, 2)}),
    "shared scan": (shared_scan, {"u": models.array(5, D, D)}),
    "stacked scan": (stacked_scan, {"s": models.array(6, 3, D, D)}),
    "Laplacian": (laplacian, DENSE),
    "tied": (tied, {"e": models.array(7, 3, 2)}),
    "normed": (normed, DENSE | {"g": models.array(8, H)}),
    "attention": (
        attention,
        {"qkv": models.array(9, 3, 9), "o": models.array(10, 3, 2)},
    ),
    "masked": (masked, {"w": DENSE["w"], "b": DENSE["b"]}),
}


FAST = ("mlp", "attention", "shared scan", "cut")


def marked(names):
    """The others are slow."""
    slow = pytest.mark.slow
    return [n if n in FAST else pytest.param(n, marks=slow) for n in names]


def squares(apply):
    def loss_fn(p, x):
        z = apply(p, x)
        return squared_error(z, jnp.ones_like(z)).sum(-1).mean()

    return loss_fn


def classes(apply):
    def loss_fn(p, x):
        z = apply(p, x)
        labels = jnp.zeros(len(x), int)
        return softmax_cross_entropy_with_integer_labels(z, labels).mean()

    return loss_fn


def fisher(apply, params, loss_fn, x=X):
    """The exact matrix, `[P, P]`."""
    flat, restore = jax.flatten_util.ravel_pytree(params)
    z = apply(params, x)
    j = jax.jacobian(lambda v: apply(restore(v), x).reshape(len(x), -1))(flat)
    if loss_fn is squares:
        return 2 * np.einsum("nop,noq->pq", j, j) / len(x)
    p = jax.nn.softmax(z)
    h = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    return np.einsum("nop,nom,nmq->pq", j, h, j) / len(x)


def plan(apply, params, loss=squares, **options):
    return plan_of(loss(apply), params, options.pop("x", X), **options)


def plan_of(loss_fn, params, *args, mode="ggn_exact", centered=False, **options):
    return kfac_jax.make_curvature(
        loss_fn,
        params,
        *args,
        structure=SampleSpace(centered=centered),
        estimation_mode=mode,
        **options,
    )


def dense_rows(curvature, params, *args):
    """U by its pull-backs and by its push-forwards, and T."""
    key = jax.random.key(1)
    compute = jax.jit(curvature.value_grad_and_statistics)
    drawn = sample_space.sampled(compute(params, *args, rng=key)[2])
    matrix = np.asarray(jax.jit(curvature.gram)(params, *args, rng=key))
    rows = sample_space.products(curvature, params, args, drawn)
    flat, restore = jax.flatten_util.ravel_pytree(params)
    ravel = lambda leaves: jnp.concatenate([x.ravel() for x in leaves])  # noqa: E731
    pulled = jax.vmap(lambda w: ravel(rows.pull(w)))(jnp.eye(len(matrix)))
    pushed = jax.vmap(lambda v: rows.push(jax.tree.leaves(restore(v))))(
        jnp.eye(len(flat))
    )
    return np.asarray(pulled), np.asarray(pushed).T, matrix


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "loss", [squares, pytest.param(classes, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", marked(NETWORKS))
def test_rows_are_those_of_the_exact_matrix(name, loss):
    apply, params = NETWORKS[name]
    curvature = plan(apply, params, loss)
    u, same, matrix = dense_rows(curvature, params, X)
    np.testing.assert_allclose(u, same, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-9, atol=1e-12)
    exact = fisher(apply, params, loss)
    np.testing.assert_allclose(u.T @ u, exact, rtol=1e-9, atol=1e-12)
    # rows of one case are adjacent
    outputs = apply(params, X).shape[-1]
    assert len(matrix) == N * outputs
    one = fisher(apply, params, loss, X[:1]) / N
    first = u[:outputs]
    np.testing.assert_allclose(first.T @ first, one, rtol=1e-9, atol=1e-12)


def test_layers_of_different_types():
    """T is in the default type, whatever its layers are in."""

    def network(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return (h.astype(jnp.float32) @ p["o"]).astype(float)

    params = DENSE | {"o": DENSE["o"].astype(jnp.float32)}
    matrix = plan(network, params).gram(params, X)
    assert matrix.dtype == np.float64
    expected = plan(mlp, DENSE).gram(DENSE, X)
    np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fisher_gradients", "fisher_empirical"])
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("attention", "shared scan", "Laplacian")
        ),
    ],
)
def test_sampled_rows(name, mode):
    apply, params = NETWORKS[name]
    curvature = plan(apply, params, mode=mode, num_samples=3)
    u, same, matrix = dense_rows(curvature, params, X)
    assert len(u) == N * (3 if mode == "fisher_gradients" else 1)
    np.testing.assert_allclose(u, same, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-8, atol=1e-12)
    if mode == "fisher_empirical":
        each = jax.vmap(lambda x: jax.grad(squares(apply))(params, x[None]))(X)
        g = np.concatenate([x.reshape(N, -1) for x in jax.tree.leaves(each)], 1)
        np.testing.assert_allclose(u.T @ u, g.T @ g / N, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_many_samples_have_the_exact_matrix_as_their_mean():
    curvature = plan(mlp, DENSE, classes, mode="fisher_gradients", num_samples=1000)
    statistics = curvature.value_grad_and_statistics(DENSE, X, rng=jax.random.key(1))[2]
    drawn = sample_space.sampled(statistics)
    rows = sample_space.products(curvature, DENSE, (X,), drawn)
    _, restore = jax.flatten_util.ravel_pytree(DENSE)
    exact = fisher(mlp, DENSE, classes)
    pushed = jax.vmap(lambda v: rows.push(jax.tree.leaves(restore(v))))(
        jnp.eye(len(exact))
    )
    found = pushed @ pushed.T
    np.testing.assert_allclose(found, exact, atol=0.1 * np.abs(exact).max())


def test_centred_rows_have_no_mean_over_the_cases():
    curvature = plan(mlp, DENSE, centered=True)
    u, same, matrix = dense_rows(curvature, DENSE, X)
    plain, _, _ = dense_rows(plan(mlp, DENSE), DENSE, X)
    parts = plain.reshape(N, C, -1)
    expected = (parts - parts.mean(0)).reshape(plain.shape)
    np.testing.assert_allclose(same, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(u, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-9, atol=1e-12)


def poisson(p, inside, wall):
    """Two batches of different lengths, and the Laplacian by products."""

    def second(x):
        total = 0.0
        for i in range(D):
            e = jnp.broadcast_to(jnp.eye(D)[i], x.shape)
            slope = lambda x, e=e: jax.jvp(lambda x: mlp(p, x), (x,), (e,))[1]  # noqa: E731
            total = total + jax.jvp(slope, (x,), (e,))[1]
        return total

    return second(inside), mlp(p, wall)


@pytest.mark.slow
@pytest.mark.parametrize("by_hessian", [False, True])
def test_losses_of_batches_of_two_lengths(by_hessian):
    wall = models.array(11, 3, D)

    def outputs(p, inside, wall):
        first, second = poisson(p, inside, wall)
        return (laplacian(p, inside) if by_hessian else first), second

    def loss_fn(p, inside, wall):
        first, second = outputs(p, inside, wall)
        return sum(
            squared_error(z, jnp.ones_like(z)).sum(-1).mean() for z in (first, second)
        )

    curvature = plan_of(loss_fn, DENSE, X, wall)
    u, same, matrix = dense_rows(curvature, DENSE, X, wall)
    np.testing.assert_allclose(u, same, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-9, atol=1e-11)
    flat, restore = jax.flatten_util.ravel_pytree(DENSE)
    exact = 0.0
    for i in range(2):
        take = lambda v, i=i: outputs(restore(v), X, wall)[i]  # noqa: E731
        j = jax.jacobian(take)(flat)
        exact = exact + 2 * np.einsum("nop,noq->pq", j, j) / len(j)
    np.testing.assert_allclose(u.T @ u, exact, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------ the optimizer


def natural(apply, params, loss, lam):
    """`(F + λ)⁻¹ g`, dense."""
    g = jax.flatten_util.ravel_pytree(jax.grad(loss(apply))(params, X))[0]
    matrix = fisher(apply, params, loss)
    return np.linalg.solve(matrix + lam * np.eye(len(g)), g), matrix, np.asarray(g)


@pytest.mark.parametrize("name", marked(["mlp", "normed", "tied"]))
@pytest.mark.parametrize("loss", [squares, classes])
@pytest.mark.parametrize("lam", [1e-1, 1e-6])
def test_the_update_is_the_damped_natural_gradient(name, loss, lam):
    apply, params = NETWORKS[name]
    curvature = plan(apply, params, loss)
    tx = natural_gradient(curvature, 0.5, damping=lam)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    moved, state, _ = step(params, tx.init(params), jax.random.key(0), X)
    found = jax.tree.map(lambda a, b: (a - b) / 0.5, params, moved)
    expected, _, _ = natural(apply, params, loss, lam)
    found = jax.flatten_util.ravel_pytree(found)[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-8 * scale / min(1, lam * 1e5))
    assert int(state.fallbacks) == int(state.skipped_updates) == 0


def test_spring_stays_near_the_last_direction():
    """`φ = μ φ' + (F + λ)⁻¹ (g - μ F φ')`, and μ = 0 is the plain natural gradient."""
    curvature, lam, mu = plan(mlp, DENSE), 1e-2, 0.9
    tx = natural_gradient(curvature, 0.3, lam, Spring(mu))
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state, last = DENSE, tx.init(DENSE), 0.0
    for i in range(3):
        _, matrix, g = natural(mlp, params, squares, lam)
        right = g - mu * (matrix @ last if i else 0.0)
        phi = np.linalg.solve(matrix + lam * np.eye(len(g)), right) + mu * last
        moved, state, _ = step(params, state, jax.random.key(i), X)
        found = jax.flatten_util.ravel_pytree(state.direction)[0]
        np.testing.assert_allclose(found, phi, rtol=1e-7, atol=1e-9)
        change = jax.tree.map(lambda a, b: a - b, moved, params)
        own = jax.flatten_util.ravel_pytree(change)[0]
        np.testing.assert_allclose(own, -0.3 * phi, rtol=1e-6, atol=1e-9)
        params, last = moved, phi
    zero = natural_gradient(curvature, 0.3, lam, Spring(0.0))
    plain = natural_gradient(curvature, 0.3, lam)
    results = [
        jax.jit(kfac_jax.make_step(curvature, t))(
            DENSE, t.init(DENSE), jax.random.key(0), X
        )[0]
        for t in (zero, plain)
    ]
    models.assert_trees_close(*results, rtol=1e-12)


def test_the_quadratic_model_steps_to_the_minimum_along_the_direction():
    """Of a squared loss F is the Gauss-Newton matrix, so the rate is near one."""
    curvature = plan(mlp, DENSE)
    tx = natural_gradient(curvature, kfac_jax.QuadraticModel(), damping=1e-3)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state, first = step(DENSE, tx.init(DENSE), jax.random.key(0), X)
    np.testing.assert_allclose(state.learning_rate, 1.0, rtol=1e-6)
    for i in range(30):
        params, state, value = step(params, state, jax.random.key(i), X)
    assert value < 1e-3 * first


def test_masks_and_weights_count_in_rows_and_errors():
    """The oracle is the masked, weighted loss in plain JAX; λ is tiny."""
    mask = jnp.asarray([1.0, 0.0, 1.0, 0.5, 1.0])
    labels = jnp.asarray([0, 1, 1, 0, 1])

    def registered(p, x, labels, mask):
        z = mlp(p, x)
        targets = jax.lax.stop_gradient(mask[:, None] * z)
        kfac_jax.register_softmax_cross_entropy_loss(z, labels, mask=mask, weight=0.3)
        kfac_jax.register_squared_error_loss(jnp.sin(z), targets)
        return of_outputs(jnp.concatenate([z, jnp.sin(z)], 1), targets)

    def outputs(p):
        z = mlp(p, X)
        return jnp.concatenate([z, jnp.sin(z)], 1)

    def of_outputs(z, targets):
        first = optax.softmax_cross_entropy_with_integer_labels(z[:, :C], labels)
        second = jnp.square(z[:, C:] - targets).sum(-1)
        return (0.3 * mask * first + second).mean()

    args = X, labels, mask
    curvature = kfac_jax.make_curvature(
        registered,
        DENSE,
        *args,
        structure=SampleSpace(),
        estimation_mode="ggn_exact",
        on_rest="error",
    )
    flat, restore = jax.flatten_util.ravel_pytree(DENSE)
    z = outputs(DENSE)
    targets = mask[:, None] * z[:, :C]
    h = jax.hessian(lambda z: of_outputs(z, targets))(z).reshape(z.size, z.size)
    j = jax.jacobian(lambda v: outputs(restore(v)).reshape(-1))(flat)
    exact = np.asarray(j.T @ h @ j)
    u, same, matrix = dense_rows(curvature, DENSE, *args)
    np.testing.assert_allclose(u, same, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(u.T @ u, exact, rtol=1e-9, atol=1e-12)
    errors = sample_space.products(curvature, DENSE, args, []).errors
    slope = jax.grad(lambda z: of_outputs(z, targets))(z)
    np.testing.assert_allclose(u.T @ errors, j.T @ slope.reshape(-1), atol=1e-12)


def test_a_norm_constraint_limits_the_length_in_the_curvature():
    curvature = plan(mlp, DENSE)
    tx = natural_gradient(curvature, 1.0, damping=1e-3, norm_constraint=1e-3)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    moved, state, _ = step(DENSE, tx.init(DENSE), jax.random.key(0), X)
    change = jax.tree.map(lambda a, b: a - b, moved, DENSE)
    d = jax.flatten_util.ravel_pytree(change)[0]
    np.testing.assert_allclose(d @ fisher(mlp, DENSE, squares) @ d, 1e-3, rtol=1e-6)
    assert float(state.learning_rate) < 1


def updates_in(params, x, lam, **options):
    """Of one step with a fixed λ, and the dense solution in float64."""

    def loss_fn(p, x):
        size = sum(jnp.square(w.astype(jnp.float32)).sum() for w in p.values())
        z = p["w"].astype(x.dtype)
        z = jnp.tanh(x @ z + p["b"].astype(x.dtype)) @ p["o"].astype(x.dtype)
        z = z.astype(jnp.float32)
        penalty = 0.5 * options.get("l2", 0.0) * size
        return squared_error(z, jnp.ones_like(z)).sum(-1).mean() + penalty

    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        curvature = plan_of(loss_fn, params, x, **options)
        tx = natural_gradient(curvature, 1.0, damping=lam)
        _, grads, statistics = curvature.value_grad_and_statistics(params, x)
        updates, _ = jax.jit(tx.update)(
            grads, tx.init(params), params, statistics=statistics, args=(x,)
        )
    wide = {k: jnp.asarray(np.asarray(v, np.float64)) for k, v in params.items()}
    x, l2 = jnp.asarray(np.asarray(x, np.float64)), options.get("l2", 0.0)
    flat, restore = jax.flatten_util.ravel_pytree(wide)
    f = fisher(mlp, wide, squares, x) + (lam + l2) * np.eye(len(flat))
    g = jax.grad(lambda v: squares(mlp)(restore(v), x))(flat) + l2 * flat
    found = [np.asarray(updates[k], float).ravel() for k in sorted(updates)]
    return np.concatenate(found), -np.linalg.solve(f, np.asarray(g))


NARROW = {k: np.asarray(v, np.float32) for k, v in DENSE.items()}
NARROW_X = np.asarray(models.array(3, 4, D), np.float32)  # fewer rows than parameters


@pytest.mark.parametrize("l2", [0.0, 1e-4, 1e-2])
def test_a_penalty_of_any_size_is_not_taken_for_rounding(l2):
    params = jax.tree.map(jnp.asarray, NARROW)
    found, expected = updates_in(params, jnp.asarray(NARROW_X), 1e-4, l2=l2)
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("narrow", ["w", "o", "wbo", "data"])
def test_rounding_of_half_precision_is_not_divided_by_the_damping(narrow):
    """Of some parameters, all of them, or of what is computed with them."""
    half = {k: jnp.bfloat16 if k in narrow else jnp.float32 for k in NARROW}
    if narrow == "data":
        half = dict.fromkeys(NARROW, jnp.float32)
    params = {k: jnp.asarray(v, half[k]) for k, v in NARROW.items()}
    x = jnp.asarray(NARROW_X, jnp.bfloat16 if narrow == "data" else jnp.float32)
    found, expected = updates_in(params, x, 1e-2)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("cases", "positions", "inputs", "expected"),
    [(10_000, 1, 50_000, True), (64, 256, 1000, False), (8, 4, 10, True)],
)
def test_integers_go_in_pairs_if_these_fit_or_cost_less(
    cases, positions, inputs, expected
):
    x = jax.ShapeDtypeStruct((cases, positions), int)
    dy = jax.ShapeDtypeStruct((1, cases, positions, 64), float)
    rows = layer_rows.LayerRows(x, dy, 0, inputs)
    assert rows.of_integers
    assert gram_matrix.is_pairwise(rows) == expected


def test_long_sequences_of_integers_take_no_pairs_of_positions(monkeypatch):
    """Products of all pairs of positions would be the square of their number."""

    def network(p, x):
        ids = (10 * jnp.abs(x)).astype(int) % 6
        return jnp.tanh(p["e"][ids]).sum(1) @ p["o"]

    params = {"e": models.array(0, 6, 3), "o": models.array(1, 3, 2)}
    curvature = plan(network, params)
    pairs = curvature.gram(params, X)
    monkeypatch.setattr(gram_matrix, "LARGEST", 100)
    np.testing.assert_allclose(curvature.gram(params, X), pairs, rtol=1e-12, atol=1e-14)
    assert "By gradients of cases: e." in str(plan(network, params))


def test_with_spring_a_norm_constraint_limits_the_length():
    """Of which F does not see what other batches have left."""
    curvature = plan(mlp, DENSE)
    options = {"damping": 1e-3, "momentum": Spring(0.9), "norm_constraint": 1e-3}
    tx = natural_gradient(curvature, 1.0, **options)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    moved, state, _ = step(DENSE, tx.init(DENSE), jax.random.key(0), X)
    change = jax.tree.map(lambda a, b: a - b, moved, DENSE)
    d = jax.flatten_util.ravel_pytree(change)[0]
    np.testing.assert_allclose(d @ d, 1e-3, rtol=1e-9)
    assert float(state.learning_rate) < 1


def test_schedules_l2_chains_scans_and_seeds():
    def loss(apply):
        def loss_fn(p, x):
            size = sum(jnp.square(w).sum() for w in jax.tree.leaves(p))
            return squares(apply)(p, x) + 0.5e-3 * size

        return loss_fn

    curvature = plan(mlp, DENSE, loss, l2=1e-3, mode="fisher_gradients")
    rate = lambda n: 0.3 * 0.9 ** n.astype(float)  # noqa: E731
    tx = optax.chain(
        optax.clip_by_global_norm(10.0),
        natural_gradient(
            curvature, rate, lambda n: 1.0 + 1.0 / (1.0 + n.astype(float)), Spring(0.5)
        ),
    )
    step = kfac_jax.make_step(curvature, tx)

    def run(seed):
        def body(carry, key):
            params, state, value = step(*carry, key, X)
            return (params, state), value

        keys = jax.random.split(jax.random.key(seed), 20)
        return jax.lax.scan(body, (DENSE, tx.init(DENSE)), keys)

    (params, _), values = jax.jit(jax.vmap(run))(jnp.arange(2))
    assert np.isfinite(jax.tree.leaves(params)[0]).all()
    assert (values[:, -1] < 0.7 * values[:, 0]).all()


def test_a_matrix_without_a_cholesky_factor_is_solved_by_eigenvalues():
    from kfac_jax.linalg._solve import clipped_solve

    m = jnp.diag(jnp.asarray([1.0, -0.5, 2.0]))
    found, fails = jax.jit(clipped_solve)(m, jnp.asarray(0.1), jnp.ones(3))
    assert bool(fails)
    np.testing.assert_allclose(found, 1 / np.asarray([1.1, 0.1, 2.1]), rtol=1e-12)


def test_no_array_has_an_entry_for_each_row_and_parameter():
    """Peak memory is that of T and of the largest layer, not of the Jacobian."""
    widths = (32, 32, 32, 32, 32, 4)
    params = [
        models.array(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    x = models.array(9, 16, 32)

    def apply(p, x):
        for w in p[:-1]:
            x = jnp.tanh(x @ w)
        return x @ p[-1]

    curvature = plan(apply, params, x=x)
    compiled = jax.jit(functools.partial(curvature.gram, params)).lower(x).compile()
    size = sum(w.size for w in params)
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 4 * size * 8 / 2


# ---------------------------------------------------------------------------- refusals


def test_layers_have_no_blocks_in_the_report():
    curvature = plan(mlp, DENSE)
    assert all(layer.block is None for layer in curvature.layers)
    assert "Kronecker" not in str(curvature) and "Sample space" in str(curvature)


def test_what_does_not_fit():
    curvature, other = plan(mlp, DENSE), kfac_jax.make_curvature(squares(mlp), DENSE, X)
    with pytest.raises(ValueError, match="natural_gradient is of the sample"):
        natural_gradient(other)
    with pytest.raises(ValueError, match="gram is of the sample space"):
        other.gram(DENSE, X)
    with pytest.raises(
        ValueError, match="kfac needs blocks, which a plan of the sample"
    ):
        kfac_jax.kfac(curvature)
    with pytest.raises(
        ValueError, match=r"expected QuadraticModel\(\) without options"
    ):
        natural_gradient(curvature, kfac_jax.QuadraticModel(fraction=0.5))
    with pytest.raises(ValueError, match="must be positive in the sample space"):
        natural_gradient(curvature, damping=0)
    with pytest.raises(TypeError, match=r"momentum must be kfac_jax.Spring\(μ\) or 0"):
        natural_gradient(curvature, momentum=0.9)
    with pytest.raises(ValueError, match=r"decay \(μ\) must be in \[0, 1\)"):
        Spring(1.0)
    with pytest.raises(TypeError, match="centered"):
        SampleSpace(centered=1)
    for name, call in {
        "init_factors": lambda: curvature.init_factors(DENSE),
        "zero_statistics": lambda: curvature.zero_statistics(DENSE),
        "at": lambda: curvature.at(DENSE, X),
    }.items():
        with pytest.raises(ValueError, match=f"{name} is of factors, which"):
            call()
    tx = natural_gradient(curvature)
    with pytest.raises(ValueError, match="each step needs its own rows"):
        kfac_jax.make_step(curvature, tx, statistics_every=2)
    statistics = curvature.value_grad_and_statistics(DENSE, X)[2]
    with pytest.raises(ValueError, match="multiplies by the batch's Jacobian: pass"):
        tx.update(DENSE, tx.init(DENSE), DENSE, statistics=statistics)
    of_factors = other.value_grad_and_statistics(DENSE, X, rng=jax.random.key(0))[2]
    with pytest.raises(ValueError, match="must be of a plan of the sample space; got"):
        tx.update(DENSE, tx.init(DENSE), DENSE, statistics=of_factors, args=(X,))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="keeps no factors that devices could have"):
        natural_gradient(curvature, devices=kfac_jax.OverMesh(mesh, state_axes="a"))
    with pytest.raises(ValueError, match="samples; pass a key as rng=key"):
        plan(mlp, DENSE, mode="fisher_gradients").gram(DENSE, X)


def test_cases_that_depend_on_each_other_are_refused():
    def mixing(p, x):
        h = x @ p["w"]
        return (h @ h.T) @ x

    with pytest.warns(UserWarning, match="Which examples"):
        curvature = plan(mixing, {"w": DENSE["w"]})
    with pytest.raises(ValueError, match="which outputs belong to one case"):
        curvature.gram({"w": DENSE["w"]}, X)


@pytest.mark.filterwarnings("ignore:Means over the batch:UserWarning")
def test_a_batch_norms_means_are_constants_here_too():
    def normed(p, x, keep=lambda x: x):
        h = x @ p["w"]
        return jnp.tanh((h - keep(h.mean(0))) * p["b"]) @ p["o"]

    curvature = plan(normed, DENSE)
    u, same, matrix = dense_rows(curvature, DENSE, X)
    np.testing.assert_allclose(u, same, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-9, atol=1e-12)
    kept = functools.partial(normed, keep=jax.lax.stop_gradient)
    np.testing.assert_allclose(u.T @ u, fisher(kept, DENSE, squares), atol=1e-12)


def test_a_loss_with_a_gradient_of_its_own():
    """As the energy of a wavefunction, whose rows are centred and without targets."""

    def own_gradient(p, x):
        def surrogate(p):
            z = mlp(p, x)[:, :1]
            kfac_jax.register_normal_predictive_distribution(z, variance=0.25)
            energy = jax.lax.stop_gradient(jnp.sin(3 * z[:, 0]))
            return 2 * ((energy - energy.mean()) * z[:, 0]).mean()

        return jax.value_and_grad(surrogate)(p)

    curvature = plan_of(
        own_gradient, DENSE, X, mode="fisher_exact", centered=True, has_aux=True
    )
    (_, grads), statistics = curvature.value_and_statistics(DENSE, X)
    flat, restore = jax.flatten_util.ravel_pytree(DENSE)
    o = jax.jacobian(lambda v: mlp(restore(v), X)[:, 0])(flat)
    u = 2 * (o - o.mean(0)) / N**0.5
    matrix = curvature.gram(DENSE, X)
    np.testing.assert_allclose(matrix, u @ u.T, rtol=1e-9, atol=1e-12)
    for lam, tolerance in ((1e-1, 1e-8), (1e-9, 1e-5)):
        tx = natural_gradient(curvature, 1.0, damping=lam)
        updates, _ = tx.update(
            grads, tx.init(DENSE), DENSE, statistics=statistics, args=(X,)
        )
        found = -jax.flatten_util.ravel_pytree(updates)[0]
        g = jax.flatten_util.ravel_pytree(grads)[0]
        e = np.linalg.lstsq(u.T, g)[0]
        expected = u.T @ np.linalg.solve(u @ u.T + lam * np.eye(N), e)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=tolerance * scale)


def test_cases_that_cannot_be_evaluated_one_by_one_are_refused():
    """Targets of the whole batch that the loss closes over."""

    def loss_fn(p, x):
        return squared_error(laplacian(p, x), jnp.ones((N, 1))).sum(-1).mean()

    curvature = plan_of(loss_fn, DENSE, X)
    match = "cases cannot be evaluated one by one: A normal distribution expects"
    with pytest.raises(ValueError, match=match):
        curvature.gram(DENSE, X)
    with pytest.raises(ValueError, match="The sample space needs the gradient of each"):
        curvature.gram(DENSE, X)


def test_outputs_as_wide_as_the_batch_is_long_are_not_evaluated_one_by_one():
    """Of one case there is one output where each has N of them."""

    def loss_fn(p, x):
        step = lambda c, _: (2 * c, jnp.tanh(x * c[None]))  # noqa: E731
        z = jax.lax.scan(step, p, length=1)[1][0]
        wide = jnp.concatenate([z, 2 * z, 3 * z], axis=1)[:, : len(x)]
        return squared_error(wide).sum(-1).mean()

    p = jnp.linspace(0.5, 1.0, X.shape[1])
    curvature = plan_of(loss_fn, p, X)
    match = r"of one case the registered outputs have shapes \[\(1, 1\)\]"
    with pytest.raises(ValueError, match=match):
        curvature.gram(p, X)


@pytest.mark.filterwarnings("ignore:Means over the batch:UserWarning")
@pytest.mark.parametrize(
    ("place", "match"),
    [
        (lambda x: x - x.mean(0)[None], r"they may meet in the mean at .*test_sample"),
        (
            lambda x: x * jnp.arange(1.0, len(x) + 1)[:, None],
            r"mul at .*test_sample.* takes values by the cases' places",
        ),
    ],
)
def test_cases_that_meet_in_data_alone_are_not_evaluated_one_by_one(place, match):
    """Of a single case the data less their mean are zero, and its number is 1."""

    def loss_fn(p, x):
        step = lambda c, _: (2 * c, jnp.tanh(place(x) * c[None]))  # noqa: E731
        return squared_error(jax.lax.scan(step, p, length=1)[1][0]).sum(-1).mean()

    p = jnp.linspace(0.5, 1.0, X.shape[1])
    curvature = plan_of(loss_fn, p, X)
    with pytest.raises(ValueError, match=match):
        curvature.gram(p, X)


# ----------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("mlp", ["By products of inputs and of output gradients: w+b, o."]),
        ("shared scan", ["By gradients of cases: u."]),
        (
            "cut",
            [
                "By products of inputs and of output gradients: w[:,0:3].",
                "By the gradients of cases that are evaluated one by one: w[:,3:6].",
            ],
        ),
    ],
)
def test_the_report_says_how_rows_are_multiplied(name, ways):
    report = plan(*NETWORKS[name]).report()
    size = f"({N} cases with {NETWORKS[name][0](NETWORKS[name][1], X).shape[-1]} each)"
    assert size in report
    for way in ways:
        assert way in report, report


def test_the_work_of_products_is_that_of_the_program():
    """Counted in the matrix products of T by themselves."""
    params = {"w": models.array(0, 40, 40), "o": models.array(1, 40, 2)}
    x = models.array(2, 16, 40)
    curvature = plan(lambda p, x: jnp.tanh(x @ p["w"]) @ p["o"], params, x=x)
    rows = 2 * len(x)
    expected = rows**2 * ((40 + 40) + (40 + 2))
    assert f"takes {rows**2 * 8 / 1024:.1f} KiB; its products are" in str(curvature)
    assert f"products are {expected:.2g} multiply-adds" in str(curvature)
    assert f"factorisation {rows**3 / 6:.2g}" in str(curvature)


def test_a_matrix_that_may_not_fit_is_told_before_it_is_made():
    shape = jax.ShapeDtypeStruct((40_000, D), X.dtype)
    with pytest.warns(UserWarning, match="Use fewer cases, a sampled mode") as caught:
        plan(mlp, DENSE, x=shape)
    assert "T has 80000 rows (40000 cases with 2 each)" in str(caught[0].message)
    assert "takes 47.7 GiB" in str(caught[0].message)
    assert caught[0].filename == __file__  # where the plan is made


def test_the_report_says_why_there_is_no_matrix():
    def mixing(p, x):
        h = x @ p["w"]
        return (h @ h.T) @ x

    with pytest.warns(UserWarning, match="Which examples"):
        curvature = plan(mixing, {"w": DENSE["w"]})
    assert "there is no T. The sample space needs to know which" in str(curvature)


@pytest.mark.parametrize("apply", [mlp, shared_scan], ids=["products", "gradients"])
def test_a_large_matrix_is_made_in_pieces(apply, monkeypatch):
    """Of which those on one side of the diagonal are the others' transposes."""
    params = {"u": models.array(5, D, D)} if apply is shared_scan else DENSE
    x = models.array(0, 11, D)
    curvature = plan(apply, params, x=x)
    whole = curvature.gram(params, x)
    monkeypatch.setattr(gram_matrix, "LEAST", 1)
    pieces = curvature.gram(params, x)
    np.testing.assert_allclose(pieces, whole, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(pieces, pieces.T, rtol=1e-12, atol=1e-14)
    pair = str(jax.make_jaxpr(curvature.gram)(params, x))
    assert pair.count("transpose[permutation=(1, 0)]") >= 6
