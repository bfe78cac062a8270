"""Numbers and schedules: each hyperparameter may be either, by one rule."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax._utils import schedules
from tests.helpers import models

STEPS = 5
FIXED = {"learning_rate": 0.1, "momentum": 0.5, "damping": 0.2}
RATES = [0.1, 0.2, 0.05, 0.0, 0.1]
MOMENTA = [0.9, 0.0, 0.5, 1.0, 0.5]
DAMPINGS = [0.2, 0.1, 0.4, 1.0, 0.05]
DECAYS = [0.5, 0.1, 0.0, 0.3, 0.7]
PERIODS = [4, 4, 4, 3, 5]


@functools.cache
def problem():
    return models.problem("softmax", params=models.dense_params(0, 3, 5, 4))


@functools.cache
def plan():
    p = problem()
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_empirical"
    )


def kfac(**options):
    return kfac_jax.kfac(plan(), **options)


def scale(**options):
    return optax.chain(
        kfac_jax.scale_by_kfac(plan(), **options), optax.scale_by_learning_rate(0.1)
    )


def refresh(inverse_every):
    return kfac(**FIXED, inverse_every=kfac_jax.RefreshSchedule(inverse_every))


def average(decay):
    return optax.chain(kfac(**FIXED), kfac_jax.average_iterates(decay, start=None))


# how to make a transformation, and what its hyperparameters are at each step
CASES = {
    "kfac": (
        kfac,
        {
            "learning_rate": RATES,
            "momentum": MOMENTA,
            "damping": DAMPINGS,
            "norm_constraint": [1e-3, 1e-5, 1e-2, 1e-4, 1.0],
            "decay": DECAYS,
            "inverse_every": PERIODS,
        },
    ),
    "kfac, QuadraticModel": (
        functools.partial(kfac, learning_rate=kfac_jax.QuadraticModel()),
        {"momentum": MOMENTA, "damping": DAMPINGS, "decay": DECAYS},
    ),
    "scale_by_kfac": (
        scale,
        {"damping": DAMPINGS, "decay": DECAYS, "inverse_every": PERIODS},
    ),
    "RefreshSchedule": (refresh, {"inverse_every": PERIODS}),
    "average_iterates": (average, {"decay": DECAYS}),
}


def schedule(values):
    """Of the step, which is traced."""
    return lambda step: jnp.asarray(values)[step]


def run(make, values_at):
    """Parameters and states after each step, with what is chosen for each."""

    @jax.jit
    def step(values, params, state):
        step = kfac_jax.make_step(plan(), make(**values))
        return step(params, state, jax.random.key(0), *problem().args)[:2]

    params = problem().params
    found = [(params, make(**values_at(0)).init(params))]
    for k in range(STEPS):
        found.append(step(values_at(k), *found[-1]))
    return found[1:]


def without_next_damping(state):
    """A schedule leaves the next step's λ in the state."""
    return jax.tree.map(
        lambda x: x._replace(damping=()) if isinstance(x, kfac_jax.KFACState) else x,
        state,
        is_leaf=lambda x: isinstance(x, kfac_jax.KFACState),
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_a_constant_schedule_is_the_number(case):
    make, values = CASES[case]
    numbers = {name: each[0] for name, each in values.items()}
    constant = {name: optax.constant_schedule(x) for name, x in numbers.items()}
    found = run(lambda: make(**constant), lambda k: {})
    expected = run(lambda: make(**numbers), lambda k: {})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_a_schedule_is_the_run_with_its_numbers(case):
    make, values = CASES[case]
    scheduled = {name: schedule(each) for name, each in values.items()}
    found = run(lambda: make(**scheduled), lambda k: {})
    numbers = run(make, lambda k: {name: each[k] for name, each in values.items()})
    for (params, state), (theirs, other) in zip(found, numbers, strict=True):
        models.assert_trees_close(params, theirs)
        models.assert_trees_close(
            without_next_damping(state), without_next_damping(other)
        )


def test_statistics_by_a_schedule():
    """Steps 0, 2 and 4 at first, then each."""
    tx, params = kfac(**FIXED), problem().params

    def batches(every):
        step = jax.jit(kfac_jax.make_step(plan(), tx, statistics_every=every))
        state, found = tx.init(params), []
        for _ in range(8):
            _, state, _ = step(params, state, jax.random.key(0), *problem().args)
            found.append(int(state.batches))
        return found

    assert batches(optax.constant_schedule(3)) == batches(3)
    changing = batches(lambda step: jnp.where(step < 5, 2, 1))
    assert changing == [1, 1, 2, 2, 3, 4, 5, 6]


def test_schedules_of_optax_and_injected_ones():
    """Traced once; without optax's own promotions of types it cannot be."""
    schedules = {
        "learning_rate": optax.cosine_decay_schedule(0.1, 10),
        "momentum": optax.linear_schedule(0.5, 0.9, 10),
        "damping": optax.exponential_decay(1.0, 10, 0.1),
        "norm_constraint": optax.constant_schedule(1e-3),
        "decay": optax.linear_schedule(0.5, 0.95, 10),
        "inverse_every": optax.piecewise_constant_schedule(2, {5: 2}),
    }
    p = problem()

    def after_three_steps(tx):
        step = jax.jit(models.traced_once(kfac_jax.make_step(plan(), tx)))
        params, state = p.params, tx.init(p.params)
        for _ in range(3):
            params, state, _ = step(params, state, jax.random.key(0), *p.args)
        return params, state

    with jax.numpy_dtype_promotion("standard"):
        params, state = after_three_steps(kfac(**schedules))
        injected = optax.inject_hyperparams(kfac_jax.kfac)(plan(), **schedules)
        theirs, other = after_three_steps(injected)
    np.testing.assert_allclose(state.info.damping, 0.1 ** (2 / 10), rtol=1e-6)
    chex.assert_trees_all_close(params, theirs, rtol=1e-5)
    np.testing.assert_allclose(other.hyperparams["decay"], 0.59, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: kfac(decay="0.9"),
            TypeError,
            "decay must be a number or a sch",
        ),
        (
            lambda: kfac(decay=float),
            TypeError,
            "decay must be a number",
        ),
        (
            lambda: kfac(decay=1.0),
            ValueError,
            r"decay \(ε\) must be in \[0.0, 1",
        ),
        (
            lambda: kfac(inverse_every="2"),
            TypeError,
            "inverse_every must be a number of steps, a schedule or RefreshSchedule; ",
        ),
        (
            lambda: kfac(damping=kfac_jax.LevenbergMarquardt),
            TypeError,
            "damping must be a number, schedule or rule; got ",
        ),
    ],
)
def test_what_is_neither(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_one_function_evaluates_both():
    assert schedules.at(0.5, 3) == 0.5
    assert schedules.at(lambda step: step + 1, 3) == 4
