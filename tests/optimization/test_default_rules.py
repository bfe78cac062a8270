"""What `kfac` does where nothing is chosen, `make_step` and `health`."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax import LevenbergMarquardt, QuadraticModel, Refine
from kfac_jax.optimization import transform
from kfac_jax.rules import Solution
from tests.helpers import models
from tests.helpers.models import PAPER_MODEL, array, traced_once

KEY = jax.random.key(0)
AXIS = kfac_jax.OverAxis("batch")


@functools.cache
def problem():
    params = models.dense_params(0, 3, 5, 4)
    return models.problem("softmax", params=params, x=array(50, 16, 3))


@functools.cache
def plan(mode="fisher_exact", **options):
    p = problem()
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode=mode, **options
    )


def run(step, tx, steps=4, params=None, args=None):
    """Parameters, states and values after each of some steps."""
    params = problem().params if params is None else params
    args = problem().args if args is None else args
    state, found = tx.init(params), []
    for k in range(steps):
        params, state, value = step(params, state, jax.random.key(k), *args)
        found.append((params, state, value))
    return found


# ----------------------------------------------------------- limits of the model's step


def plane(seed):
    """A positive definite matrix `[2, 2]` and a slope, in numpy."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 2))
    return root @ root.T + 0.1 * np.eye(2), rng.normal(size=2)


def model_change(matrix, slope, step):
    return slope @ step + 0.5 * step @ matrix @ step


def minimum(function, low=-1e3, high=1e3):
    """Of a convex function of a number, by golden sections."""
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(120):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if function(a) < function(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("seed", range(12))
def test_momentum_is_clipped_and_the_rate_best_for_it(seed):
    matrix, slope = plane(seed)
    given = jnp.asarray(matrix), jnp.asarray(slope), None
    alpha, mu, change = QuadraticModel(largest_momentum=0.5).solve(*given)
    _, free = np.linalg.solve(matrix, -slope)
    np.testing.assert_allclose(mu, np.clip(free, 0.0, 0.5), rtol=1e-10)
    best = minimum(lambda a: model_change(matrix, slope, np.array([a, float(mu)])))
    np.testing.assert_allclose(alpha, best, rtol=1e-5, atol=1e-7)
    expected = model_change(matrix, slope, np.array([alpha, mu]))
    np.testing.assert_allclose(change, expected, rtol=1e-10)


def test_the_seeds_reach_both_limits_of_momentum_and_neither():
    free = [np.linalg.solve(m, -s)[1] for m, s in map(plane, range(12))]
    assert any(mu < 0 for mu in free)
    assert any(mu > 0.5 for mu in free)
    assert any(0 < mu < 0.5 for mu in free)


@pytest.mark.parametrize("seed", range(4))
def test_without_limits_the_closed_form(seed):
    matrix, slope = plane(seed)
    given = jnp.asarray(matrix), jnp.asarray(slope), None
    expected = np.linalg.solve(matrix, -slope)
    solution = PAPER_MODEL.solve(*given)
    np.testing.assert_allclose(solution[:2], expected, rtol=1e-10)
    within = 0 <= expected[1] <= 1e6
    other = QuadraticModel(largest_momentum=1e6).solve(*given)
    assert np.allclose(other[:2], expected, rtol=1e-10) == within


def test_a_given_momentum_is_not_clipped():
    matrix, slope = map(jnp.asarray, plane(0))
    one = jnp.asarray(1.0)
    found = QuadraticModel(largest_momentum=0.1).solve(matrix, slope, one)
    models.assert_trees_equal(found, PAPER_MODEL.solve(matrix, slope, one))


def solution(length):
    """A step that minimises the model, with M(0) - M(δ) = length², and its slope."""
    change = -jnp.square(jnp.asarray(length, float))
    return Solution(jnp.asarray(0.3), jnp.asarray(0.8), change), 2 * change


def limited(length, mean, step, rule=QuadraticModel()):  # noqa: B008
    given, slope = solution(length)
    return rule.limit(given, slope, jnp.asarray(mean, float), jnp.asarray(step))


@pytest.mark.parametrize("step", range(5))
def test_the_first_steps_are_of_any_length(step):
    found, scale, mean = limited(100.0, 1.0, step)
    models.assert_trees_equal(found, solution(100.0)[0])
    assert scale == 1.0
    np.testing.assert_allclose(mean, 0.95 + 0.05 * 100.0, rtol=1e-12)


def test_the_first_length_is_the_first_mean():
    assert limited(7.0, 0.0, 0)[2] == 7.0


@pytest.mark.parametrize("mean", [1e-6, 1.0, 1e6])
def test_a_step_ten_times_the_mean_becomes_twice_the_mean(mean):
    found, scale, after = limited(10 * mean, mean, 5)
    np.testing.assert_allclose(scale, 0.2, rtol=1e-12)
    np.testing.assert_allclose(found.learning_rate, 0.2 * 0.3, rtol=1e-12)
    np.testing.assert_allclose(found.momentum, 0.2 * 0.8, rtol=1e-12)
    # the mean sees no more than twice what is allowed
    np.testing.assert_allclose(after, (0.95 + 0.05 * 4) * mean, rtol=1e-12)


def test_a_step_within_the_limit_is_not_scaled():
    found, scale, mean = limited(1.99, 1.0, 5)
    assert scale == 1.0
    models.assert_trees_equal(found, solution(1.99)[0])
    np.testing.assert_allclose(mean, 0.95 + 0.05 * 1.99, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_change_is_that_of_the_model_at_the_scaled_step(seed):
    matrix, slope = plane(seed)
    rule = QuadraticModel(longest=1.5)
    free = rule.solve(jnp.asarray(matrix), jnp.asarray(slope), jnp.asarray(0.4))
    step = np.array(free[:2])
    length = np.sqrt(max(-float(free.change), 0.0))
    mean = jnp.asarray(0.1 * length)
    found, scale, _ = rule.limit(free, slope @ step, mean, jnp.asarray(9))
    np.testing.assert_allclose(scale, 0.15 if length else 1.0, rtol=1e-12)
    np.testing.assert_allclose(found[:2], float(scale) * step, rtol=1e-12)
    expected = model_change(matrix, slope, np.array(found[:2]))
    np.testing.assert_allclose(found.change, expected, rtol=1e-10)


@pytest.mark.parametrize("length", [1e8, 1e300, float("inf")])
def test_the_mean_does_not_follow_one_step_far(length):
    _, _, mean = limited(length, 1.0, 20)
    assert 0.95 <= mean <= 1.15 + 1e-12


@pytest.mark.parametrize("step", [0, 3, 5, 100])
@pytest.mark.parametrize("length", [float("nan"), float("inf")])
def test_a_length_that_is_not_finite_takes_no_step_and_leaves_the_mean(length, step):
    given, slope = solution(length)
    rule = QuadraticModel()
    _, scale, mean = rule.limit(given, slope, jnp.asarray(0.7), jnp.asarray(step))
    assert scale == 0.0
    assert mean == 0.7


def test_without_a_limit_there_is_no_mean():
    found, scale, mean = limited(1e9, 1.0, 50, PAPER_MODEL)
    models.assert_trees_equal(found, solution(1e9)[0])
    assert (scale, mean) == (1.0, 0.0)


def test_steps_that_did_not_move_do_not_stop_those_after():
    """Where nothing moved yet, no length is known, whenever that is."""
    found, scale, mean = limited(3.0, 0.0, 50)
    models.assert_trees_equal(found, solution(3.0)[0])
    assert (scale, mean) == (1.0, 3.0)


@pytest.mark.parametrize("bad", [1, 5, 7])
def test_a_run_that_starts_with_batches_that_are_not_finite_trains(bad):
    p, tx = problem(), kfac_jax.kfac(plan())
    step = jax.jit(kfac_jax.make_step(plan(), tx))
    params, state = p.params, tx.init(p.params)
    before = float(p.loss_fn(params, *p.args))
    for k in range(bad + 10):
        x = p.x * jnp.nan if k < bad else p.x
        params, state, value = step(params, state, KEY, x, p.y)
    assert int(state.info.skipped_updates) == bad
    assert float(value) < 0.9 * before


@pytest.mark.parametrize(
    "options",
    [
        {"largest_momentum": -0.1},
        {"largest_momentum": float("nan")},
        {"longest": 0.5},
        {"longest": float("inf")},
    ],
)
def test_limits_out_of_range(options):
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} must be finite and at lea"
    ):
        QuadraticModel(**options)


# ---------------------------------------------------------------- limits of the damping


def test_damping_never_falls_below_its_part_of_the_curvature():
    rule = LevenbergMarquardt(1.0, relative_minimum=1e-2)
    for curvature in (1e-3, 1.0, 1e5):
        damping = jnp.asarray(1e6)
        for _ in range(200):
            damping = rule.update(damping, 1.0, curvature)
        np.testing.assert_allclose(damping, 1e-2 * curvature, rtol=1e-12)
    raised = rule.update(1e-9, 0.5, 1.0)  # in between ρ leaves it, and the limit acts
    np.testing.assert_allclose(raised, 1e-2, rtol=1e-12)


@pytest.mark.parametrize("curvature", [0.0, float("nan"), float("inf")])
def test_a_curvature_that_is_not_known_limits_nothing(curvature):
    rule = LevenbergMarquardt(1.0, relative_minimum=1e-2, relative_maximum=1.0)
    plain = LevenbergMarquardt(1.0)
    for damping in (1e-9, 1e9):
        for rho in (1.0, 0.5, 0.0):
            expected = plain.update(damping, rho)
            assert rule.update(damping, rho, curvature) == expected
            assert rule.clip(expected, curvature) == expected


@pytest.mark.parametrize("options", [{"minimum": 0.5}, {"maximum": 1e-6}])
def test_absolute_limits_come_before_relative_ones(options):
    rule = LevenbergMarquardt(1.0, relative_minimum=1e-3, **options)
    (limit,) = options.values()
    np.testing.assert_allclose(rule.update(0.01, 1.0, 1.0), limit, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"relative_minimum": -1.0},
        {"relative_minimum": float("nan")},
        {"relative_minimum": float("inf")},
        {"relative_minimum": 1.0, "relative_maximum": 1.0},
        {"relative_maximum": float("nan")},
    ],
)
def test_relative_limits_out_of_range(options):
    message = "Need 0 ≤ relative_minimum < relative_maximum, multiples of the curvature"
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**options)


def test_damping_never_rises_above_its_part_of_the_curvature():
    rule = LevenbergMarquardt(1.0, relative_maximum=10.0)
    for curvature in (1e-3, 1.0, 1e5):
        damping = jnp.asarray(1e-6)
        for _ in range(200):
            damping = rule.update(damping, -1.0, curvature)
        np.testing.assert_allclose(damping, 10.0 * curvature, rtol=1e-12)


@pytest.mark.parametrize(
    ("rho", "alpha", "factor"),
    [
        (1.0, 0.3, 0.2),  # K-FAC's model and the exact one agree, and the loss follows
        (1.0, 0.29, 0.5),
        (1.0, 0.0, 0.5),
        (1.0, float("nan"), 0.5),
        (0.5, 1.0, 1.0),
        (0.0, 1.0, 2.0),
        (float("nan"), 1.0, 2.0),
    ],
)
def test_damping_falls_faster_where_the_exact_model_agrees(rho, alpha, factor):
    rule = LevenbergMarquardt(factor=0.5, trusted_factor=0.2, trusted_rate=0.3)
    np.testing.assert_allclose(rule.update(3.0, rho, 0.0, alpha), 3 * factor, rtol=1e-6)
    limited = LevenbergMarquardt(
        factor=0.5, trusted_factor=0.2, trusted_rate=0.3, relative_minimum=1.0
    )
    found = limited.update(3.0, rho, 2.5, alpha)
    np.testing.assert_allclose(found, max(3 * factor, 2.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trusted_factor": 0.0}, r"trusted_factor must be in \(0, ω1\].*ω1 = 0.774"),
        ({"trusted_factor": 0.8}, r"trusted_factor must be in \(0, ω1\].*got 0.8"),
        ({"trusted_rate": 0.0}, r"trusted_rate \(α\) must be positive; got 0.0"),
        ({"trusted_rate": float("nan")}, r"trusted_rate \(α\) must be positive"),
    ],
)
def test_trust_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**options)


@pytest.mark.parametrize(
    ("rate", "factor"), [(QuadraticModel(), 0.1), (0.1, 0.5), (Refine(steps=2), 0.5)]
)
def test_only_the_models_rate_for_the_own_direction_makes_damping_fall_faster(
    rate, factor
):
    """A given α says nothing of Δ, nor does that of a refined one, which is 1."""
    rule = LevenbergMarquardt(
        100.0, every=1, factor=0.5, trusted_factor=0.1, trusted_rate=1e-3
    )
    tx = kfac_jax.kfac(plan(), rate, damping=rule, norm_constraint=None)
    ((_, state, _),) = run(jax.jit(kfac_jax.make_step(plan(), tx)), tx, 1)
    assert state.info.rho > 0.75 and state.info.learning_rate > 1e-3
    np.testing.assert_allclose(state.damping, 100 * factor, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, QuadraticModel()])
def test_curvature_along_steps_is_measured_and_limits_the_damping(rate):
    """With a given rate only where ρ is measured: every fifth step."""
    p = problem()
    rule = LevenbergMarquardt(1e-4, relative_minimum=0.5)
    tx = kfac_jax.kfac(plan(), rate, None, rule)
    found = run(jax.jit(kfac_jax.make_step(plan(), tx)), tx, 11)
    modelled = isinstance(rate, QuadraticModel)
    assert all((float(s.curvature) > 0) == modelled for _, s, _ in found[:4])
    curvatures = [float(s.curvature) for _, s, _ in found]
    for k in (5, 10):
        damping, curvature = float(found[k - 1][1].damping), curvatures[k - 1]
        np.testing.assert_allclose(damping, 0.5 * curvature, rtol=1e-12)
    # a mean of Rayleigh quotients of the Fisher
    matrix = jax.jit(plan().matvec)
    unit = [jax.tree.map(jnp.zeros_like, p.params)]
    flat, unravel = jax.flatten_util.ravel_pytree(unit[0])
    for params, _, _ in found[:1]:
        columns = [
            jax.flatten_util.ravel_pytree(matrix(params, unravel(e), *p.args))[0]
            for e in np.eye(len(flat))
        ]
        largest = np.linalg.eigvalsh(np.stack(columns)).max()
    assert 0 < max(curvatures) < 3 * largest


def regression(dtype="float32"):
    """A network that fits its targets until rounding decides."""
    x, w = array(0, 32, 4), array(1, 4, 2)
    params = {"w1": array(2, 4, 8) / 3, "w2": array(3, 8, 2) / 4}

    def loss_fn(p, x, y):
        z = jnp.tanh(x @ p["w1"]) @ p["w2"]
        return kfac_jax.losses.squared_error(z, y).sum(-1).mean()

    cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
    return loss_fn, *cast((params, x, jnp.tanh(x @ w), jnp.tanh(x @ w[:, ::-1])))


def test_damping_stays_bounded_after_convergence_and_a_new_task_is_learnt():
    """Where the loss stops falling by rounding, ρ says nothing."""
    with jax.enable_x64(False):
        loss_fn, params, x, y, other = regression()
        curvature = kfac_jax.make_curvature(
            loss_fn, params, x, y, estimation_mode="fisher_exact"
        )
        tx = kfac_jax.kfac(curvature)
        step = kfac_jax.make_step(curvature, tx)

        @functools.partial(jax.jit, static_argnames="steps")
        def train(params, state, y, steps):
            def body(carry, _):
                params, state, value = step(*carry, KEY, x, y)
                return (params, state), (value, state.damping)

            return jax.lax.scan(body, (params, state), None, length=steps)

        (params, state), (losses, dampings) = train(params, tx.init(params), y, 3000)
        assert losses[-1] < 1e-3 * losses[0]
        assert dampings.max() <= 100.0
        _, (losses, dampings) = train(params, state, other, 3000)
        assert losses[-1] < 0.02 * losses[0]
        assert dampings.max() <= 100.0
        assert np.isfinite(losses).all()


# -------------------------------------------------------------------------- given rates


def test_the_defaults_are_those_that_are_written():
    tx = kfac_jax.kfac(plan())
    damping = LevenbergMarquardt(
        0.1, relative_minimum=1e-4, relative_maximum=10.0, trusted_factor=1 / 3
    )
    model = QuadraticModel(largest_momentum=0.95, longest=2.0)
    # (no limit of λ is met in a few steps)
    assert (transform.QUADRATIC_MODEL, transform.DAMPING) == (model, damping)
    written = kfac_jax.kfac(plan(), model, None, damping)
    models.assert_trees_equal(
        *(run(jax.jit(kfac_jax.make_step(plan(), t)), t, 12) for t in (tx, written))
    )


def test_momentum_is_nine_tenths_with_a_given_rate():
    updates = []
    for momentum in (None, 0.9):
        tx = kfac_jax.kfac(plan(), 0.1, momentum, 0.1)
        updates.append(run(jax.jit(kfac_jax.make_step(plan(), tx)), tx))
    models.assert_trees_equal(*updates)
    assert updates[0][-1][1].info.momentum == 0.9


@pytest.mark.parametrize("with_value", [True, False])
def test_auto_limits_a_step_by_the_size_of_the_loss(with_value):
    p = problem()
    value, grads, statistics = plan().value_grad_and_statistics(p.params, *p.args)
    given = {"statistics": statistics} | ({"value": value} if with_value else {})

    def update(limit):
        tx = kfac_jax.kfac(plan(), 10.0, 0.0, 1e-3, norm_constraint=limit)
        return tx.update(grads, tx.init(p.params), p.params, **given)

    size = abs(float(value)) if with_value else 1.0
    found, state = update("auto")
    models.assert_trees_close(found, update(0.003 * size)[0])
    free, _ = update(None)
    alpha = float(state.info.learning_rate)
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, free, grads))) / 10.0
    np.testing.assert_allclose(-(alpha**2) * slope, 0.003 * size, rtol=1e-9)
    np.testing.assert_allclose(state.info.step_scale, alpha / 10.0, rtol=1e-12)
    assert state.info.step_scale < 1


def test_auto_takes_the_size_of_a_negative_loss():
    p = problem()
    _, grads, statistics = plan().value_grad_and_statistics(p.params, *p.args)
    tx = kfac_jax.kfac(plan(), 10.0, 0.0, 1e-3)
    updates = [
        tx.update(grads, tx.init(p.params), statistics=statistics, value=value)[0]
        for value in (jnp.asarray(2.0), jnp.asarray(-2.0))
    ]
    models.assert_trees_equal(*updates)


# ---------------------------------------------------------------------------- make_step


def by_hand(curvature, tx):
    def step(params, state, key, *args):
        factors = kfac_jax.optimization.make_step.kfac_state(state).factors
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=key, factors=factors
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state, value

    return step


SAMPLED = {"mode": "fisher_gradients"}
TRANSFORMATIONS = {
    "kfac": kfac_jax.kfac,
    "given rates": lambda c: kfac_jax.kfac(c, 0.1, 0.9, 1e-2),
    "scale_by_kfac": lambda c: optax.chain(
        kfac_jax.scale_by_kfac(c), optax.scale_by_learning_rate(0.1)
    ),
    "weight decay": lambda c: optax.chain(
        kfac_jax.kfac(c), optax.add_decayed_weights(-1e-3)
    ),
    "scale": lambda c: optax.chain(kfac_jax.kfac(c), optax.scale(1.0)),
    "injected": lambda c: optax.inject_hyperparams(kfac_jax.kfac)(
        c, learning_rate=0.1, damping=1e-2
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", TRANSFORMATIONS)
def test_a_step_is_the_three_calls(kind):
    curvature = plan(**SAMPLED)
    tx = TRANSFORMATIONS[kind](curvature)
    step = jax.jit(traced_once(kfac_jax.make_step(curvature, tx)))
    found = run(step, tx)
    expected = run(jax.jit(by_hand(curvature, tx)), tx)
    models.assert_trees_equal(found, expected)
    assert found[-1][2] < found[0][2]


def test_a_neutral_chain_changes_nothing():
    curvature = plan(**SAMPLED)
    runs = []
    for kind in ("kfac", "scale"):
        tx = TRANSFORMATIONS[kind](curvature)
        runs.append(run(jax.jit(kfac_jax.make_step(curvature, tx)), tx)[-1][0])
    models.assert_trees_equal(*runs)


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_of_a_loss_with_auxiliary_data(every):
    p = problem()

    def with_aux(params, x, y):
        return p.loss_fn(params, x, y), {"predictions": models.mlp(params, x)}

    curvature = kfac_jax.make_curvature(
        with_aux, p.params, *p.args, has_aux=True, estimation_mode="fisher_exact"
    )
    tx = kfac_jax.kfac(curvature)
    make = functools.partial(kfac_jax.make_step, statistics_every=every)
    found = run(jax.jit(make(curvature, tx)), tx)
    expected = run(jax.jit(make(plan(), kfac_jax.kfac(plan()))), tx)
    assert found[0][2][1]["predictions"].shape == (16, 4)
    losses = [value[0] for _, _, value in found]
    np.testing.assert_allclose(losses, [v for _, _, v in expected], rtol=1e-10)


def test_statistics_of_every_third_step():
    tx = kfac_jax.kfac(plan())
    step = jax.jit(kfac_jax.make_step(plan(), tx, statistics_every=3))
    found = run(step, tx, 8)
    states = [tx.init(problem().params)] + [state for _, state, _ in found]
    changed = [
        not all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(old.factors), jax.tree.leaves(new.factors), strict=True
            )
        )
        for old, new in itertools.pairwise(states)
    ]
    assert [k for k, x in enumerate(changed) if x] == [0, 3, 6]
    assert [int(s.batches) for s in states[1:]] == [1, 1, 1, 2, 2, 2, 3, 3]
    values = [float(value) for _, _, value in found]
    assert values[-1] < values[0]
    assert int(states[-1].info.skipped_updates) == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("rates", [(), (0.5, 0.9, 1e-2)])
def test_rare_statistics_are_those_of_calls_by_hand(rates, products):
    block = kfac_jax.blocks.Kronecker(gradient_products=products)
    curvature, tx = plan(blocks=block), kfac_jax.kfac(plan(blocks=block), *rates)

    def by_hand(params, state, key, *args, due):
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=key
        )
        if not due:
            value, grads = curvature.value_and_grad(params, *args)
            statistics = curvature.zero_statistics(params)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state, value

    calls = {due: jax.jit(functools.partial(by_hand, due=due)) for due in (True, False)}

    def expected(params, state, key, *args):
        return calls[int(state.step) % 2 == 0](params, state, key, *args)

    step = jax.jit(kfac_jax.make_step(curvature, tx, statistics_every=2))
    for found, other in zip(run(step, tx, 5), run(expected, tx, 5), strict=True):
        models.assert_trees_close(found[0], other[0])


def test_steps_in_a_scan():
    tx = kfac_jax.kfac(plan(**SAMPLED))
    step = kfac_jax.make_step(plan(**SAMPLED), tx, statistics_every=2)
    p, keys = problem(), jax.vmap(jax.random.key)(jnp.arange(4))

    @jax.jit
    def scanned(params, state):
        def body(carry, key):
            params, state, value = step(*carry, key, *p.args)
            return (params, state), value

        return jax.lax.scan(body, (params, state), keys)

    (params, state), values = scanned(p.params, tx.init(p.params))
    found = run(jax.jit(step), tx)
    models.assert_trees_close(params, found[-1][0])
    models.assert_trees_close(state.info, found[-1][1].info)
    np.testing.assert_allclose(values, [v for _, _, v in found], rtol=1e-10)


@pytest.mark.parametrize("every", [1, 2])
def test_steps_of_several_seeds_at_once(every):
    curvature = plan(**SAMPLED)
    tx = kfac_jax.kfac(curvature)
    step = kfac_jax.make_step(curvature, tx, statistics_every=every)
    several = jax.tree.map(
        lambda *x: jnp.stack(x), *(models.dense_params(s, 3, 5, 4) for s in (0, 7, 14))
    )
    params, state = several, jax.vmap(tx.init)(several)
    mapped = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)))
    for k in range(3):
        keys = jax.vmap(lambda s, k=k: jax.random.fold_in(KEY, 10 * k + s))
        params, state, values = mapped(
            params, state, keys(jnp.arange(3)), *problem().args
        )
    one = jax.jit(step)
    for s in range(3):
        alone = jax.tree.map(lambda x, s=s: x[s], several)
        own = tx.init(alone)
        for k in range(3):
            key = jax.random.fold_in(KEY, 10 * k + s)
            alone, own, value = one(alone, own, key, *problem().args)
        models.assert_trees_close(
            jax.tree.map(lambda x, s=s: x[s], params), alone, atol=1e-9
        )
        np.testing.assert_allclose(values[s], value, rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kfac_jax.health(state).ok


def test_donated_arguments():
    tx = kfac_jax.kfac(plan())
    step = kfac_jax.make_step(plan(), tx)
    expected = run(jax.jit(step), tx)[-1]
    donating = jax.jit(traced_once(step), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, problem().params)
    state = tx.init(params)
    for k in range(4):
        before = jax.tree.leaves(params)[0]
        params, state, value = donating(
            params, state, jax.random.key(k), *problem().args
        )
        assert before.is_deleted()
    models.assert_trees_equal((params, state, value), expected)


def test_eigen_blocks_get_the_factors():
    """Without them the batch's own basis would be computed in every call."""
    curvature = plan(**SAMPLED, blocks=kfac_jax.blocks.Eigen())
    tx = kfac_jax.kfac(curvature)
    step = kfac_jax.make_step(curvature, tx)
    models.assert_trees_equal(
        run(jax.jit(step), tx), run(jax.jit(by_hand(curvature, tx)), tx)
    )
    arguments = problem().params, tx.init(problem().params), KEY, *problem().args

    def without(params, state, key, *args):
        return curvature.value_grad_and_statistics(params, *args, rng=key)[2]

    def decompositions(function):
        text = str(jax.make_jaxpr(function)(*arguments))
        return text.count(" eigh[")

    own = decompositions(without)
    assert own > 0
    refreshes = decompositions(
        lambda params, state, key, *args: tx.update(
            params,
            state,
            params,
            statistics=curvature.zero_statistics(params),
            value=jnp.ones(()),
            args=args,
        )
    )
    assert decompositions(step) == refreshes


# ------------------------------------------------------------------- on several devices


def over_pmap(step, devices):
    mapped = jax.pmap(
        step,
        "batch",
        in_axes=(None, None, None, 0, 0),
        devices=jax.devices()[:devices],
    )

    def split(params, state, key, *args):
        args = [x.reshape(devices, -1, *x.shape[1:]) for x in args]
        params, state, value = models.on_host(mapped(params, state, key, *args))
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return first(params), first(state), value.mean()

    return split


def over_shard_map(step, devices, **options):
    def inside(*args):
        params, state, value = step(*args)
        return params, state, jax.lax.pmean(value, "batch")

    return jax.jit(
        jax.shard_map(
            inside,
            mesh=models.mesh(devices, "batch"),
            in_specs=(P(), P(), P(), P("batch"), P("batch")),
            out_specs=P(),
            **options,
        )
    )


ROUTES = {
    "pmap": over_pmap,
    "shard_map": over_shard_map,
    "shard_map, unchecked": functools.partial(over_shard_map, check_vma=False),
}


@pytest.mark.sampled(2)
@models.EIGHT_DEVICES
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("rates", [(), (0.5, 0.9, 1e-2)])
def test_steps_on_devices_are_those_of_one(route, every, rates):
    tx = kfac_jax.kfac(plan(), *rates, inverse_every=2)
    alone = kfac_jax.make_step(plan(), tx, statistics_every=every)
    expected = run(jax.jit(alone), tx, 6)
    shared = kfac_jax.kfac(plan(), *rates, inverse_every=2, devices=AXIS)
    step = kfac_jax.make_step(plan(), shared, statistics_every=every, devices=AXIS)
    found = run(ROUTES[route](step, 2), shared, 6)
    models.assert_trees_close(found, expected)


@models.EIGHT_DEVICES
def test_steps_on_devices_that_keep_rows_are_those_of_one():
    tx = kfac_jax.kfac(plan(), inverse_every=2)
    expected = run(jax.jit(kfac_jax.make_step(plan(), tx)), tx)
    rows = kfac_jax.OverAxis("batch", state_axes="batch")
    shared = kfac_jax.kfac(plan(), inverse_every=2, devices=rows)
    step = kfac_jax.make_step(plan(), shared, devices=rows)

    def inside(*args):
        params, state, value = step(*args)
        return params, state, jax.lax.pmean(value, "batch")

    lies, batch = kfac_jax.state_specs(rows), P("batch")
    mapped = functools.partial(jax.shard_map, mesh=models.mesh(2, "batch"))
    split = mapped(
        inside, in_specs=(P(), lies, P(), batch, batch), out_specs=(P(), lies, P())
    )
    init = jax.jit(mapped(shared.init, in_specs=P(), out_specs=lies))
    found = run(jax.jit(split), shared._replace(init=init))
    for after, wanted in zip(found, expected, strict=True):
        models.assert_trees_close((after[0], after[2]), (wanted[0], wanted[2]))


@pytest.mark.sampled(3)
@models.EIGHT_DEVICES
@pytest.mark.parametrize("route", ROUTES)
def test_samples_differ_between_devices(route):
    """Both devices have the same cases, so with the same samples they'd be as one."""
    curvature = plan(**SAMPLED)
    p = problem()
    half = p.x[:8], p.y[:8]
    twice = tuple(jnp.concatenate([a, a]) for a in half)
    shared = kfac_jax.kfac(curvature, devices=AXIS)
    step = kfac_jax.make_step(curvature, shared, devices=AXIS)
    found = run(ROUTES[route](step, 2), shared, 1, args=twice)[0][1].factors
    state, keys = shared.init(p.params), [jax.random.fold_in(KEY, i) for i in range(2)]
    parts = [
        curvature.value_grad_and_statistics(p.params, *half, rng=key)[2] for key in keys
    ]
    assert not np.array_equal(
        *(
            jax.tree.leaves(curvature.update_factors(state.factors, s, 1))[-1]
            for s in parts
        )
    )
    both = jax.tree.map(lambda a, b: a + b, *parts)
    expected = curvature.update_factors(state.factors, both, 1)
    models.assert_trees_close(found, expected)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("tx", [None, 0.1, kfac_jax.kfac, (lambda: None,)])
def test_what_is_no_transformation(tx):
    with pytest.raises(TypeError, match=r"tx must be an optax transformation.*got"):
        kfac_jax.make_step(plan(), tx)


def test_what_is_no_plan():
    with pytest.raises(TypeError, match="curvature must be a plan from make_curvature"):
        kfac_jax.make_step(problem().loss_fn, kfac_jax.kfac(plan()))


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None, "2"])
def test_what_is_no_number_of_steps(every):
    with pytest.raises(ValueError, match=r"statistics_every must be an integer ≥ 1"):
        kfac_jax.make_step(plan(), kfac_jax.kfac(plan()), statistics_every=every)


def test_devices_that_are_none():
    with pytest.raises(TypeError, match=r"devices must be None, kfac_jax.OverAxis"):
        kfac_jax.make_step(plan(), kfac_jax.kfac(plan()), devices="batch")


def test_a_state_without_kfac():
    p = problem()
    step = kfac_jax.make_step(plan(), kfac_jax.kfac(plan()))
    for state in (None, optax.adam(0.1).init(p.params), p.params):
        with pytest.raises(TypeError, match=r"Expected the state of kfac.*got"):
            step(p.params, state, KEY, *p.args)
        with pytest.raises(TypeError, match=r"Expected the state of kfac.*got"):
            kfac_jax.health(state)


# ------------------------------------------------------------------------------- health


def healthy(state):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kfac_jax.health(state)
    assert isinstance(found, kfac_jax.Health)
    return found == (True, "")


def with_info(**info):
    """A state after ten steps."""
    state = kfac_jax.kfac(plan()).init(problem().params)
    known = {"loss": 1.0, "lowest_loss": 1.0}
    numbers = {name: jnp.asarray(x, float) for name, x in (known | info).items()}
    if "skipped_updates" in numbers:
        numbers["skipped_updates"] = numbers["skipped_updates"].astype(jnp.int32)
    return state._replace(
        step=jnp.asarray(10, jnp.int32), info=state.info._replace(**numbers)
    )


def test_a_run_is_well_at_its_start_and_while_it_trains():
    tx = kfac_jax.kfac(plan())
    assert healthy(tx.init(problem().params))
    for _, state, _ in run(jax.jit(kfac_jax.make_step(plan(), tx)), tx):
        assert healthy(state)
    assert healthy(with_info(loss=90.0))
    assert healthy(with_info(loss=-1.0, lowest_loss=-5.0))
    assert healthy(with_info(skipped_updates=5))


def test_without_values_a_run_is_not_blamed():
    p, tx = problem(), kfac_jax.scale_by_kfac(plan())
    _, grads, statistics = plan().value_grad_and_statistics(p.params, *p.args)
    _, state = tx.update(grads, tx.init(p.params), statistics=statistics)
    assert healthy(state)


@pytest.mark.parametrize(
    ("info", "cause", "numbers"),
    [
        ({"loss": np.nan}, r"was finite and is not: the run diverged", "loss is nan"),
        ({"loss": np.inf}, r"was finite.*raise damping", "loss is inf"),
        (
            {"loss": 1000.0},
            r"more than a hundred times.*too long",
            r"is 1e\+03; .* 1\.",
        ),
        ({"skipped_updates": 6}, r"Most updates refused", "After 10 steps, 6 of which"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_amiss_is_told(info, cause, numbers, wrapped):
    state = with_info(**info)
    state = (optax.EmptyState(), state) if wrapped else state
    with pytest.warns(UserWarning, match=cause) as caught:
        found = kfac_jax.health(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not found.ok
    assert re.search(numbers, found.message) and re.search(cause, found.message)


def test_a_loop_shows_each_warning_once():
    """By Python's default filter, as the text of a warning holds no numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for i in range(5):
            kfac_jax.health(with_info(loss=1000.0 + i))
    assert len(caught) == 1


def test_the_worst_of_several_seeds_counts():
    states = [with_info(), with_info(loss=np.nan), with_info()]
    state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    with pytest.warns(UserWarning, match="the run diverged"):
        found = kfac_jax.health(state)
    assert "the loss is nan" in found.message
    assert healthy(jax.tree.map(lambda x: x[::2], state))


def test_a_loss_that_becomes_nan_in_training():
    p, tx = problem(), kfac_jax.kfac(plan())
    step = jax.jit(kfac_jax.make_step(plan(), tx))
    params, state, _ = step(p.params, tx.init(p.params), KEY, *p.args)
    params, state, _ = step(params, state, KEY, p.x * jnp.nan, p.y)
    with pytest.warns(UserWarning, match="the run diverged"):
        assert not kfac_jax.health(state).ok
    _, state, _ = step(params, state, KEY, *p.args)
    assert healthy(state)


def test_a_loss_that_rises_is_seen_without_kfacs_own_rates():
    tx = optax.chain(kfac_jax.scale_by_kfac(plan()), optax.scale(-1e4))
    found = run(jax.jit(kfac_jax.make_step(plan(), tx)), tx, 4)
    with pytest.warns(UserWarning, match="more than a hundred times"):
        assert not kfac_jax.health(found[-1][1]).ok


def test_mean_loss_and_its_lowest_value_are_kept():
    tx = kfac_jax.kfac(plan(), 30.0, 0.0, 1e-3, norm_constraint=None)
    found = run(jax.jit(kfac_jax.make_step(plan(), tx)), tx, 30)
    values = np.array([float(value) for _, _, value in found])
    means = [values[0]]
    for count, value in enumerate(values[1:], 2):
        means.append(means[-1] + max(1 / count, 0.05) * (value - means[-1]))
    assert (np.diff(means) > 0).any()
    infos = [state.info for _, state, _ in found]
    np.testing.assert_allclose([x.mean_loss for x in infos], means, rtol=1e-5)
    lowest = np.minimum.accumulate([x.mean_loss for x in infos])
    np.testing.assert_array_equal([x.lowest_loss for x in infos], lowest)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_of_zero_or_nan_does_not_end_a_run(bad, first):
    """As of a batch that a mask hides: the norm constraint is by the lowest loss."""
    curvature, params, batch = plan(), problem().params, problem().args
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 1e-2)
    state = tx.init(params)
    values = [bad, None, None] if first else [None, bad, None]
    for value in values:
        true, grads, statistics = curvature.value_grad_and_statistics(
            params, *batch, rng=jax.random.key(0)
        )
        value = true if value is None else value
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value
        )
        assert np.isfinite(optax.tree.norm(updates))
    assert state.info.lowest_loss == true  # parameters were not moved
    assert state.info.mean_loss == true
    assert optax.tree.norm(updates) > 0


def test_a_traced_state_is_refused():
    state = kfac_jax.kfac(plan()).init(problem().params)
    with pytest.raises(TypeError, match="the state is traced: expected a call outside"):
        jax.jit(lambda state: kfac_jax.health(state).ok)(state)


# --------------------------------------------------------------------- small batches


@functools.cache
def classification():
    """Ten noisy classes, and a network, in single precision."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(10, 40))
    y = rng.integers(0, 10, 2000)
    x = np.maximum(centers[y] + 1.5 * rng.normal(size=(2000, 40)), 0.0)
    params = {
        "layer0": {"w": rng.normal(size=(40, 30)) / 4, "b": np.zeros(30)},
        "layer1": {"w": rng.normal(size=(30, 10)) / 5, "b": np.zeros(10)},
    }
    return jax.tree.map(np.float32, params), np.float32(x), np.int32(y)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("rates", "batch"),
    [
        ((), 32),
        ((), 128),
        ((0.1, 0.9, 1e-3), 32),
        ((0.1, 0.9, 1e-3), 128),
    ],
)
def test_small_batches_do_not_explode(rates, batch):
    with jax.enable_x64(False):
        params, x, y = jax.tree.map(jnp.asarray, classification())

        def loss_fn(params, x, y):
            z = models.mlp(params, x, jax.nn.relu)
            cross_entropy = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
            return cross_entropy(z, y).mean()

        curvature = kfac_jax.make_curvature(loss_fn, params, x[:batch], y[:batch])
        tx = kfac_jax.kfac(curvature, *rates)
        step = kfac_jax.make_step(curvature, tx)
        draws = np.random.default_rng(1).integers(0, 2000, (100, batch))

        @jax.jit
        def train(params, state, draws):
            def body(carry, inputs):
                draw, key = inputs
                params, state, value = step(*carry, key, x[draw], y[draw])
                return (params, state), value

            return jax.lax.scan(
                body, (params, state), (draws, jax.random.split(KEY, 100))
            )

        before = float(loss_fn(params, x, y))
        (params, state), losses = train(params, tx.init(params), jnp.asarray(draws))
        assert np.isfinite(losses).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        assert losses.max() < 3 * losses[0]
        assert losses[-10:].mean() < 0.8 * losses[0]
        assert float(loss_fn(params, x, y)) < 0.8 * before
        assert healthy(state)
