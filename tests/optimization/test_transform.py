"""`kfac` and `scale_by_kfac` against the paper's formulas, written naively in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from tests.helpers import models
from tests.helpers.models import PAPER_MODEL, traced_once

SIZES = (3, 4, 2)
L2 = 0.03  # η
CASES = 8


def network(params, x):
    first, second = params["first"], params["second"]
    h = jnp.tanh(x @ first["w"] + first["b"][None])
    return h @ second["w"] + second["b"][None]


def loss_fn(params, x, y):
    return kfac_jax.losses.squared_error(network(params, x), y).sum(-1).mean()


def penalized_loss_fn(params, x, y):
    penalty = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
    return loss_fn(params, x, y) + L2 / 2 * penalty


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    i, h, o = SIZES
    return jax.tree.map(
        jnp.asarray,
        {
            "first": {"w": rng.normal(size=(i, h)), "b": rng.normal(size=h)},
            "second": {"w": rng.normal(size=(h, o)), "b": rng.normal(size=o)},
        },
    )


def make_batch(seed, cases=CASES):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(cases, SIZES[0])), rng.normal(size=(cases, SIZES[2]))
    return jnp.asarray(x), jnp.asarray(y)


@functools.cache
def plan(l2=0.0):
    return kfac_jax.make_curvature(
        penalized_loss_fn if l2 else loss_fn,
        make_params(),
        *make_batch(0),
        estimation_mode="fisher_exact",
        l2=l2,
    )


@functools.cache
def compiled(l2=0.0):
    """The jitted `value_grad_and_statistics` of `plan(l2)`."""
    return jax.jit(plan(l2).value_grad_and_statistics)


def make_step(curvature, tx):
    """A jitted step that also returns what went into and came out of the update."""

    @jax.jit
    def step(params, state, *args):
        value, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state, (value, grads, updates)

    return step


# ------------------------------------------------------------------------------- oracle


class Naive:
    """Algorithm 2 without its sections 4.3 and 6.6, for the network above."""

    def __init__(self, params, *, l2=0.0, decay=0.95, inverse_every=20):
        self.w = [
            np.vstack([params[n]["w"], params[n]["b"]]) for n in ("first", "second")
        ]
        self.l2, self.decay, self.inverse_every = l2, decay, inverse_every
        self.k = 0
        self.factors = [(0.0, 0.0), (0.0, 0.0)]
        self.inverses = [None, None]
        self.delta = [np.zeros_like(w) for w in self.w]

    def gradients(self, x, y):
        n = len(x)
        one = np.ones((n, 1))
        a0 = np.hstack([x, one])
        h = np.tanh(a0 @ self.w[0])
        a1 = np.hstack([h, one])
        z = a1 @ self.w[1]
        dz = 2 * (z - y) / n
        ds = (dz @ self.w[1][:-1].T) * (1 - h**2)
        gradients = [a0.T @ ds + self.l2 * self.w[0], a1.T @ dz + self.l2 * self.w[1]]
        # -log N(y | z, 1/2) has the Fisher 2 I in z, whatever y
        jacobians = [
            np.einsum("nh,ho->noh", 1 - h**2, self.w[1][:-1]),
            np.broadcast_to(np.eye(2), (n, 2, 2)),
        ]
        statistics = [
            (a.T @ a / n, 2 * np.einsum("noh,noi->hi", j, j) / n)
            for a, j in zip((a0, a1), jacobians, strict=True)
        ]
        return gradients, statistics

    def direction(self, x, y, damping):
        """Δ = -F̃⁻¹ ∇h, after the moving averages and inverses have moved on."""
        self.k += 1
        gradients, statistics = self.gradients(np.asarray(x), np.asarray(y))
        epsilon = min(1 - 1 / self.k, self.decay)
        self.factors = [
            tuple(
                epsilon * old + (1 - epsilon) * new
                for old, new in zip(f, s, strict=True)
            )
            for f, s in zip(self.factors, statistics, strict=True)
        ]
        if self.k <= 3 or self.k % self.inverse_every == 0:
            gamma = np.sqrt(damping + self.l2)
            for i, (a, g) in enumerate(self.factors):
                pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
                self.inverses[i] = (
                    np.linalg.inv(a + pi * gamma * np.eye(len(a))),
                    np.linalg.inv(g + gamma / pi * np.eye(len(g))),
                )
        directions = [
            -a @ v @ g for (a, g), v in zip(self.inverses, gradients, strict=True)
        ]
        return gradients, directions

    def move(self, directions, alpha, mu):
        self.delta = [
            alpha * d + mu * d0 for d, d0 in zip(directions, self.delta, strict=True)
        ]
        self.w = [w + d for w, d in zip(self.w, self.delta, strict=True)]

    def tree(self, matrices):
        return {
            name: {"w": m[:-1], "b": m[-1]}
            for name, m in zip(("first", "second"), matrices, strict=True)
        }


assert_trees_close = functools.partial(models.assert_trees_close, rtol=1e-10)


def dense_fisher(params, x):
    """(2/N) JᵀJ in the order of ravel_pytree: the exact Fisher of a squared error."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda p: network(unravel(p), x).reshape(-1))(flat)
    return 2 * np.asarray(jacobian.T @ jacobian) / len(x)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# --------------------------------------------------------------------- the whole update


@pytest.mark.parametrize(
    ("l2", "norm_constraint"),
    [
        (0.0, None),
        (L2, None),
        (0.0, 1e-3),
        (0.0, lambda k: jnp.where(k < 6, 1e-3, 2e-4)),
    ],
)
def test_steps_follow_the_papers_formulas(l2, norm_constraint):
    """Averages, π, damping with λ + η, T3, momentum and the norm, over 12 steps."""
    alpha, mu, damping = 0.05, 0.9, 0.2
    tx = kfac_jax.kfac(
        plan(l2),
        alpha,
        mu,
        damping,
        norm_constraint=norm_constraint,
        decay=0.8,
        inverse_every=5,
    )
    params = make_params()
    naive = Naive(params, l2=l2, decay=0.8, inverse_every=5)
    state, step = tx.init(params), make_step(plan(l2), tx)
    for k in range(1, 13):
        batch = make_batch(k)
        params, state, (_, grads, updates) = step(params, state, *batch)
        gradients, directions = naive.direction(*batch, damping)
        rate = alpha
        if norm_constraint is not None:
            pairs = zip(gradients, directions, strict=True)
            squared = -(alpha**2) * sum((g * d).sum() for g, d in pairs)
            limit = norm_constraint
            limit = float(limit(k - 1)) if callable(limit) else limit
            assert squared > limit  # so the constraint is active here
            rate = alpha * np.sqrt(limit / squared)
        naive.move(directions, rate, mu)
        assert_trees_close(grads, naive.tree(gradients))
        assert_trees_close(updates, naive.tree(naive.delta))
        assert_trees_close(params, naive.tree(naive.w))
        assert_trees_close(state.velocity, updates)
        assert_trees_close(
            [
                state.factors[n][f]
                for n in ("first", "second")
                for f in ("input", "output")
            ],
            [f for pair in naive.factors for f in pair],
        )
        np.testing.assert_allclose(state.info.learning_rate, rate, rtol=1e-10)
        assert int(state.step) == k
    # due at 1, 2, 3, 5 and 10
    assert int(state.info.inverse_refreshes) == 5
    assert int(state.info.skipped_updates) == 0


def test_inactive_norm_constraint_changes_nothing():
    params, batch = make_params(), make_batch(1)
    updates = []
    for limit in (None, 1e9):
        tx = kfac_jax.kfac(plan(), 0.1, 0.9, 1e-3, norm_constraint=limit)
        step = make_step(plan(), tx)
        updates.append(step(params, tx.init(params), *batch)[2][2])
    assert_trees_close(*updates)


def test_scale_by_kfac_is_the_preconditioned_gradient():
    damping = 0.2
    tx = kfac_jax.scale_by_kfac(plan(L2), damping, decay=0.8, inverse_every=5)
    params = make_params()
    naive = Naive(params, l2=L2, decay=0.8, inverse_every=5)
    state, step = tx.init(params), make_step(plan(L2), tx)
    for k in range(1, 7):
        _, state, (_, _, updates) = step(params, state, *make_batch(k))
        _, directions = naive.direction(*make_batch(k), damping)
        assert_trees_close(updates, naive.tree([-d for d in directions]))
    assert state.velocity == ()


def test_schedules_are_evaluated_at_each_step():

    def rate(count):
        return 0.1 / (1.0 + jnp.asarray(count, float))

    def mu(count):
        return jnp.where(count < 2, 0.5, 0.75)

    def damping(count):
        return 0.7 ** jnp.asarray(count, float)

    tx = kfac_jax.kfac(plan(), rate, mu, damping, norm_constraint=None)
    params = make_params()
    naive = Naive(params)
    state, step = tx.init(params), make_step(plan(), tx)
    for k in range(6):
        np.testing.assert_allclose(state.damping, damping(k), rtol=1e-12)
        params, state, _ = step(params, state, *make_batch(k))
        _, directions = naive.direction(*make_batch(k), float(damping(k)))
        naive.move(directions, float(rate(k)), float(mu(k)))
        info = state.info
        np.testing.assert_allclose(info.damping, damping(k), rtol=1e-12)
        np.testing.assert_allclose(info.learning_rate, rate(k), rtol=1e-12)
        np.testing.assert_allclose(info.momentum, mu(k), rtol=1e-12)
        assert_trees_close(params, naive.tree(naive.w))


def test_zero_momentum_forgets_the_previous_update():
    tx = kfac_jax.kfac(plan(), 0.1, 0.0, 0.2)
    step = make_step(plan(), tx)
    params = make_params()
    _, state, _ = step(params, tx.init(params), *make_batch(1))
    other = state._replace(velocity=jax.tree.map(lambda v: v + 7.0, state.velocity))
    assert_trees_close(
        step(params, state, *make_batch(2))[0], step(params, other, *make_batch(2))[0]
    )


def test_l2_is_added_to_the_damping():
    """A plan with penalty η and damping λ preconditions like one with damping λ + η."""
    params, batch = make_params(), make_batch(1)
    _, grads, statistics = compiled()(params, *batch)
    results = []
    for curvature, damping in ((plan(), 0.2 + L2), (plan(L2), 0.2)):
        tx = kfac_jax.scale_by_kfac(curvature, damping)
        update = jax.jit(tx.update)
        results.append(update(grads, tx.init(params), params, statistics=statistics)[0])
    assert_trees_close(*results)


def test_period_of_the_inverses_is_traced():
    """One compilation serves every T3, and the last three of 6 steps differ with it."""
    params = make_params()
    _, grads, statistics = compiled()(params, *make_batch(0))

    @jax.jit
    @traced_once
    def run(every):
        tx = kfac_jax.scale_by_kfac(plan(), 0.2, inverse_every=every)

        def body(state, _):
            updates, state = tx.update(grads, state, params, statistics=statistics)
            return state, updates

        return jax.lax.scan(body, tx.init(params), None, length=6)[0].info

    refreshes = [int(run(jnp.asarray(t)).inverse_refreshes) for t in (1, 2, 4, 100)]
    assert refreshes == [6, 5, 4, 3]
    assert run._cache_size() <= 1  # or 0, where JAX has forgotten it


# ---------------------------------------------------------------------- quadratic model


@pytest.mark.parametrize("momentum", [0.9, None])
def test_quadratic_model_minimises_over_the_plane(momentum):
    """α, or α and μ, solve the paper's system with the dense exact Fisher and λ + η."""
    damping = 0.3
    tx = kfac_jax.kfac(plan(L2), PAPER_MODEL, momentum, damping)
    params = make_params()
    state, step = tx.init(params), make_step(plan(L2), tx)
    naive = Naive(params, l2=L2)
    for k in range(1, 6):
        x, y = make_batch(k)
        _, directions = naive.direction(x, y, damping)
        d, d0 = flat(naive.tree(directions)), flat(state.velocity)
        matrix = dense_fisher(params, x)
        matrix += (damping + L2) * np.eye(len(matrix))
        params, state, (_, grads, updates) = step(params, state, x, y)
        g = flat(grads)
        if momentum is None:
            basis = np.stack([d, d0])
            coefficients = np.linalg.pinv(basis @ matrix @ basis.T) @ -(basis @ g)
        else:
            alpha = -(g @ d + momentum * d0 @ matrix @ d) / (d @ matrix @ d)
            coefficients = np.array([alpha, momentum])
        info = state.info
        np.testing.assert_allclose(
            [info.learning_rate, info.momentum], coefficients, rtol=1e-8, atol=1e-12
        )
        delta = flat(updates)
        np.testing.assert_allclose(delta, coefficients @ np.stack([d, d0]), rtol=1e-7)
        change = g @ delta + 0.5 * delta @ matrix @ delta
        np.testing.assert_allclose(info.quadratic_change, change, rtol=1e-8)
        if momentum is None:  # section 6.5
            np.testing.assert_allclose(change, 0.5 * g @ delta, rtol=1e-8)
        naive.move(directions, *coefficients)


def test_fraction_takes_the_products_on_part_of_the_batch():
    damping = 0.3
    model = kfac_jax.QuadraticModel(fraction=0.25)
    tx = kfac_jax.kfac(plan(), model, None, damping)
    params, (x, y) = make_params(), make_batch(1)
    _, directions = Naive(params).direction(x, y, damping)
    _, state, (_, grads, _) = make_step(plan(), tx)(params, tx.init(params), x, y)
    d = flat(Naive(params).tree(directions))

    def rate(cases):
        fisher = dense_fisher(params, x[:cases])
        return -flat(grads) @ d / (d @ fisher @ d + damping * d @ d)

    np.testing.assert_allclose(state.info.learning_rate, rate(2), rtol=1e-9)
    assert abs(rate(2) - rate(8)) > 1e-3


def test_on_a_quadratic_the_iterates_are_preconditioned_conjugate_gradients():
    """Section 7. The penalty keeps the block from being exact, so it iterates."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 5)) * np.array([3.0, 2.0, 1.0, 0.5, 0.2])
    y, eta = rng.normal(size=(20, 3)), 0.5

    def quadratic(w, x, y):
        loss = kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
        return loss + eta / 2 * jnp.vdot(w, w)

    w = jnp.asarray(rng.normal(size=(5, 3)))
    curvature = kfac_jax.make_curvature(
        quadratic, w, x, y, estimation_mode="fisher_exact", l2=eta
    )
    tx = kfac_jax.kfac(curvature, PAPER_MODEL, None, 0.0)
    state, step = tx.init(w), make_step(curvature, tx)

    a, g = x.T @ x / 20, 2 * np.eye(3)
    pi = np.sqrt((np.trace(a) / 5) / 2)
    inverse_a = np.linalg.inv(a + pi * np.sqrt(eta) * np.eye(5))
    inverse_g = np.linalg.inv(g + np.sqrt(eta) / pi * np.eye(3))

    def hessian(v):
        return 2 * x.T @ (x @ v) / 20 + eta * v

    expected = np.asarray(w)
    r = 2 * x.T @ y / 20 - hessian(expected)
    z = inverse_a @ r @ inverse_g
    p = z
    for k in range(5):
        alpha = (r * z).sum() / (p * hessian(p)).sum()
        expected = expected + alpha * p
        new_r = r - alpha * hessian(p)
        new_z = inverse_a @ new_r @ inverse_g
        p = new_z + (new_r * new_z).sum() / (r * z).sum() * p
        r, z = new_r, new_z
        w, state, _ = step(w, state, x, y)
        np.testing.assert_allclose(w, expected, rtol=1e-7, atol=1e-9, err_msg=str(k))
        assert k > 0 or np.abs(r).max() > 1e-4  # one step is not enough
    # five distinct eigenvalues: finished after five steps
    np.testing.assert_allclose(
        jax.grad(quadratic)(w, x, y), np.zeros((5, 3)), atol=1e-7
    )


# ------------------------------------------------------------------ Levenberg-Marquardt


@pytest.mark.parametrize("learning_rate", [0.1, kfac_jax.QuadraticModel()])
def test_damping_is_adapted_every_fifth_step_from_rho_on_the_same_batch(learning_rate):
    rule = kfac_jax.LevenbergMarquardt(2.0)
    momentum = None if isinstance(learning_rate, kfac_jax.QuadraticModel) else 0.5
    tx = kfac_jax.kfac(plan(L2), learning_rate, momentum, rule)
    params = make_params()
    state, step = tx.init(params), make_step(plan(L2), tx)
    damping, measured = 2.0, []
    for k in range(1, 11):
        x, y = make_batch(k)
        before = params
        params, state, (value, grads, updates) = step(params, state, x, y)
        np.testing.assert_allclose(state.info.damping, damping, rtol=1e-12)
        if k % 5 == 0:
            delta = flat(updates)
            matrix = dense_fisher(before, x)
            matrix += (damping + L2) * np.eye(len(matrix))
            model = flat(grads) @ delta + 0.5 * delta @ matrix @ delta
            after = penalized_loss_fn(params, x, y)
            rho = float((after - value) / model)
            measured.append(rho)
            np.testing.assert_allclose(state.info.rho, rho, rtol=1e-7)
            np.testing.assert_allclose(state.info.quadratic_change, model, rtol=1e-7)
            damping = float(rule.update(damping, rho))
        elif not measured:
            assert np.isnan(state.info.rho)
        else:
            np.testing.assert_allclose(state.info.rho, measured[-1], rtol=1e-7)
        np.testing.assert_allclose(state.damping, damping, rtol=1e-12)
    assert damping != 2.0


def adapt_once(loss, w, rate, *args):
    """One update with T1 = 1 of a linear model; returns the state after it."""
    curvature = kfac_jax.make_curvature(loss, w, *args, estimation_mode="fisher_exact")
    rule = kfac_jax.LevenbergMarquardt(1.0, every=1)
    tx = kfac_jax.kfac(curvature, rate, 0.0, rule, norm_constraint=None)
    return make_step(curvature, tx)(w, tx.init(w), *args)[1]


def test_a_step_that_raises_the_loss_raises_the_damping():
    """Also where the model foresaw it, so ρ > 0: a raised loss counts as ρ = -∞."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(8, 3))), jnp.zeros((8, 2))

    def linear(w, x, y):
        return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()

    w = jnp.asarray(rng.normal(size=(3, 2)))
    good, bad = (adapt_once(linear, w, rate, x, y) for rate in (0.5, 10.0))
    np.testing.assert_allclose(good.damping, 0.95, rtol=1e-12)
    assert float(bad.info.quadratic_change) > 0  # the model foresees the rise
    np.testing.assert_allclose(bad.damping, 1 / 0.95, rtol=1e-12)


def test_a_loss_that_becomes_nan_raises_the_damping():
    def cliff(w, x, y):
        loss = kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
        return loss + jnp.where(w[0, 0] < 0.99, jnp.nan, 0.0)

    state = adapt_once(cliff, jnp.ones((3, 2)), 0.5, jnp.eye(3), jnp.zeros((3, 2)))
    np.testing.assert_allclose(state.damping, 1 / 0.95, rtol=1e-12)
    assert not np.isfinite(state.info.rho)


def test_damping_stays_within_its_bounds_over_steps():
    rule = kfac_jax.LevenbergMarquardt(1.0, every=1, minimum=0.9)
    tx = kfac_jax.kfac(plan(), 0.01, 0.0, rule)
    params = make_params()
    state, step = tx.init(params), make_step(plan(), tx)
    for k in range(5):
        params, state, _ = step(params, state, *make_batch(k))
    np.testing.assert_allclose(state.damping, 0.9, rtol=1e-12)


# --------------------------------------------------------------------------- statistics


def test_statistics_without_weight_leave_factors_alone():
    tx = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2)
    update = jax.jit(tx.update)
    params = make_params()
    _, grads, statistics = compiled()(params, *make_batch(1))
    none = plan().zero_statistics(params)
    _, state = update(grads, tx.init(params), params, statistics=statistics)
    _, after = update(grads, state, params, statistics=none)
    jax.tree.map(np.testing.assert_array_equal, after.factors, state.factors)
    assert int(after.step) == 2
    assert int(after.info.skipped_updates) == 0


def test_first_statistics_that_say_something_replace_the_zeros():
    """Whenever they come: ε = 1 - 1/k counts the batches that went into the factors."""
    tx = kfac_jax.scale_by_kfac(plan(), 0.2)
    update = jax.jit(tx.update)
    params = make_params()
    _, grads, statistics = compiled()(params, *make_batch(1))
    none = plan().zero_statistics(params)
    _, at_once = update(grads, tx.init(params), params, statistics=statistics)
    state = tx.init(params)
    for given in (none, none, statistics):
        _, state = update(grads, state, params, statistics=given)
    assert_trees_close(state.factors, at_once.factors)


def test_statistics_of_micro_batches_add_up_to_those_of_the_batch():
    tx = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2)
    update = jax.jit(tx.update)
    params, (x, y) = make_params(), make_batch(1)
    _, grads, whole = compiled()(params, x, y)
    parts = [
        compiled()(params, x[half], y[half]) for half in (slice(0, 4), slice(4, 8))
    ]
    summed = jax.tree.map(lambda a, b: a + b, parts[0][2], parts[1][2])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1])
    expected = update(grads, tx.init(params), params, statistics=whole)
    actual = update(mean, tx.init(params), params, statistics=summed)
    assert_trees_close(actual[0], expected[0])
    assert_trees_close(actual[1].factors, expected[1].factors)


# --------------------------------------------------------------------------------- info


def test_info_has_fixed_fields_and_nan_where_nothing_was_computed():
    assert kfac_jax.Info._fields == (
        "loss",
        "damping",
        "factored_damping",
        "learning_rate",
        "momentum",
        "step_scale",
        "mean_loss",
        "lowest_loss",
        "rho",
        "quadratic_change",
        "inverse_refreshes",
        "skipped_updates",
    )
    assert kfac_jax.KFACState._fields == (
        "step",
        "batches",
        "cases",
        "factors",
        "inverses",
        "damping",
        "length",
        "curvature",
        "factored_damping",
        "velocity",
        "info",
    )
    tx = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    params = make_params()
    state = tx.init(params)
    assert np.isnan(state.info[:10]).all()
    assert state.info[10:] == (0, 0)
    value, grads, statistics = compiled()(params, *make_batch(1))
    for given in (None, value, (value, "aux")):
        _, after = tx.update(grads, state, params, statistics=statistics, value=given)
        h = np.nan if given is None else float(value)
        expected = [h, 0.2, np.nan, 0.1, 0.9, 1, h, h, np.nan, np.nan, 1, 0]
        np.testing.assert_allclose(after.info, expected, rtol=1e-12)


def test_adaptive_rules_accept_a_loss_function_with_auxiliary_data():
    def with_aux(params, x, y):
        return loss_fn(params, x, y), {"prediction": network(params, x)}

    params, batch = make_params(), make_batch(1)
    curvature = kfac_jax.make_curvature(
        with_aux, params, *batch, has_aux=True, estimation_mode="fisher_exact"
    )
    results = []
    for c in (plan(), curvature):
        rule = kfac_jax.LevenbergMarquardt(1.0, every=1)
        tx = kfac_jax.kfac(c, kfac_jax.QuadraticModel(), None, rule)
        results.append(make_step(c, tx)(params, tx.init(params), *batch))
    (params_0, state_0, _), (params_1, state_1, (value, _, _)) = results
    assert_trees_close(params_1, params_0)
    assert_trees_close(state_1.info, state_0.info)
    assert value[1]["prediction"].shape == (CASES, SIZES[2])
