"""Faults at one step of a training run: refused, counted, and trained on from there.

The table is `fault_problem.FAULTS` by its `CONFIGURATIONS`. What has to be refused is
told by what the step was made of, its gradient and statistics, looked at in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from tests.reliability import fault_problem
from tests.reliability.fault_problem import (
    CONFIGURATIONS,
    FAULTS,
    STEPS,
    kfac_state,
    make_inputs,
)

CLOSE = 1.03
"""The loss at the end, over that of a run that lacks the step, if that was refused."""


def is_finite(tree):
    return all(np.isfinite(np.asarray(x, float)).all() for x in jax.tree.leaves(tree))


def assert_finite(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, float)).all(), jax.tree_util.keystr(path)


def assert_sane(state):
    """Everything that the next step reads."""
    assert_finite((state.factors, state.inverses, state.velocity, state.damping))
    assert state.damping > 0
    assert state.info.skipped_updates <= state.step
    assert state.batches <= state.step


def can_be_squared(tree):
    """And is finite, in float32."""
    with np.errstate(over="ignore"):
        squares = [np.square(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree)]
        return bool(np.isfinite(sum(x.sum() for x in squares)))


def is_same(found, expected):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def trees(curvature):
    """By layer, the layers that are refused with it."""
    return {name: set(x.names) for x in curvature.groups for name in x.names}


def refused_layers(name, statistics):
    """Those of which something is not finite, and those linked to them."""
    bad = [layer for layer, part in statistics.items() if not is_finite(part)]
    together = trees(fault_problem.plan(name))
    return set().union(*[together[layer] for layer in bad])


def averages(part):
    """What statistics enter; a refresh may turn a basis, and what is in it."""
    own = {k: x for k, x in part.items() if not k.endswith("_basis")}
    return {k: x for k, x in own.items() if k != "moments" or len(own) == len(part)}


def check_step(name, before, after):
    """Whether what could not be used was refused, and nothing else; returns what."""
    (params, whole), old = before, kfac_state(before[1])
    new = kfac_state(after.state)
    assert_finite(after.params)
    assert_sane(new)
    waits = name == "stale" and old.batches == 0  # for its first inverses
    bad_gradient = not (is_finite if waits else can_be_squared)(after.grads)
    bad_loss = not can_be_squared(after.loss)
    if name == "apply_if_finite" and not is_finite(after.grads):
        assert is_same(new, old)
        assert is_same(after.params, params)
        assert after.state.total_notfinite == whole.total_notfinite + 1
        return "update"
    layers = refused_layers(name, after.statistics)
    if bad_loss or not np.any(after.mask):
        layers = set(after.statistics)
    for layer in layers:
        assert is_same(averages(new.factors[layer]), averages(old.factors[layer]))
    still = is_same(new.velocity, old.velocity) and name != "scale_by_kfac"
    if (bad_loss or bad_gradient) and name != "scale_by_kfac":
        assert still
    if still:
        assert is_same(after.params, params)
    informed = len(layers) < len(after.statistics)
    assert new.step == old.step + 1
    assert int(new.batches) == int(old.batches) + informed
    if not informed:
        for layer, part in new.factors.items():
            assert is_same(averages(part), averages(old.factors[layer]))
    check_damping(name, old, new, after)
    np.testing.assert_equal(np.asarray(new.info.loss), np.asarray(after.loss, float))
    skipped = int(new.info.skipped_updates - old.info.skipped_updates)
    assert skipped in (0, 1)
    nothing = not any(np.any(x) for x in jax.tree.leaves((after.grads, old.velocity)))
    if layers or bad_loss or bad_gradient or (still and not waits and not nothing):
        assert skipped == 1
    if skipped == 0:
        return ""
    return "update" if still or bad_loss or bad_gradient else "statistics"


def check_damping(name, old, new, after):
    if name not in ("adaptive", "separate damping", "tridiagonal"):
        assert new.damping == old.damping
        return
    omega = 0.95**2
    assert old.damping * omega * 0.999 <= new.damping <= old.damping / omega * 1.001
    if not can_be_squared((after.loss, after.grads)):
        assert new.damping == old.damping
    if name == "separate damping":
        assert np.isfinite(new.factored_damping)
        assert new.factored_damping > 0


def check(name, fault, at_step):
    before, after, end = fault_problem.run(name, FAULTS[fault], at_step)
    refused = check_step(name, before, after)
    assert_sane(kfac_state(end[1]))
    found = fault_problem.final_loss(name, end[0])
    expected = fault_problem.clean(name)[1]
    print(f"{name}; {fault}; {at_step}; {refused}; {found / expected:.4f}")
    if refused == "update" and FAULTS[fault].before is None:
        old, new = kfac_state(before[1]), kfac_state(after.state)
        counted = int(new.step) > int(old.step)
        lacking = fault_problem.without(name, at_step, counted)
        same = is_same((new.factors, new.inverses), (old.factors, old.inverses))
        if same and name != "scale_by_kfac":
            assert is_same(end[0], lacking)
        assert found <= CLOSE * fault_problem.final_loss(name, lacking)
    elif name not in fault_problem.UNGUARDED:
        assert found <= FAULTS[fault].close * expected
    return refused


def place(name, fault):
    """A step of the first, drawn once for each."""
    rng = np.random.default_rng(list(f"{name}/{fault}".encode()))
    return int(rng.integers(1, fault_problem.LATEST))


FAST = ("fixed rates",)


def table():
    for name in CONFIGURATIONS:
        marks = [] if name in FAST else [pytest.mark.slow, pytest.mark.full]
        for fault in FAULTS:
            yield pytest.param(name, fault, marks=marks, id=f"{name}-{fault}")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "fault"), list(table()))
def test_a_fault_is_refused_and_training_reaches_the_same_loss(name, fault):
    check(name, fault, place(name, fault))


MOST = [x for x in FAULTS if not x.startswith(("inf", "-inf", "1e+30", "-1e+38"))]
"""One value that is not finite and one huge one."""


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("at_step", [0, 4])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("fault", MOST)
def test_a_fault_at_the_start_or_at_a_refresh(name, fault, at_step):
    check(name, fault, at_step)


FAST_FAULTS = (
    "nan in one example",
    "nan in one label",
    "inf in one activation",
    "1e+30 in one example",
    "nan in a layer's gradient",
    "an empty mask",
    "a tenfold loss",
    "an indefinite factor",
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["adaptive", "eigen"])
@pytest.mark.parametrize("fault", FAST_FAULTS)
def test_the_same_in_short_for_other_configurations(name, fault):
    check(name, fault, 9)


# ------------------------------------------------------------------ what is refused


def test_the_faults_do_what_they_say():
    """Or else nothing would have been tested: by the fault, what is refused."""
    found = {
        fault: check_step(
            "fixed rates", *fault_problem.run("fixed rates", change, 9)[:2]
        )
        for fault, change in FAULTS.items()
    }
    expected = {fault: change.refused for fault, change in FAULTS.items()}
    wrong = {f: x for f, x in found.items() if expected[f] not in (x, None)}
    assert not wrong


@pytest.mark.parametrize("name", ["fixed rates", "adaptive", "tridiagonal", "full"])
def test_a_failed_cholesky_keeps_the_inverses_of_that_layer(name):
    """And only those, with what they are linked to; it is counted until it is over."""
    (_, old), after, end = fault_problem.run(name, FAULTS["an indefinite factor"], 9)
    old, new = kfac_state(old), kfac_state(after.state)
    together = trees(fault_problem.plan(name))["second"]
    failed = int(name != "full")  # which has no such factor
    for layer, part in new.inverses.items():
        kept = is_same(part, old.inverses[layer])
        assert kept == (failed == 1 and layer in together), layer
    assert new.info.skipped_updates - old.info.skipped_updates == failed
    assert kfac_state(end[1]).info.skipped_updates >= failed


# ------------------------------------------------------------- faults in every step

EVERY_STEP = (
    "nan in all inputs",
    "inf in one example",
    "nan in all labels",
    "nan in a layer's gradient",
)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(
            name,
            fault,
            marks=[] if name in ("fixed rates", "adaptive") else [pytest.mark.slow],
        )
        for name in CONFIGURATIONS
        for fault in EVERY_STEP
        if name != "scale_by_kfac"  # its momentum is another transformation's
    ],
)
def test_a_fault_in_every_step_leaves_parameters_and_momentum(name, fault):
    _, step = fault_problem.stepper(name)
    rng = np.random.default_rng(0)
    params, state = fault_problem.clean(name)[0][10]
    inputs = FAULTS[fault].inputs(make_inputs(), rng)
    at, old, count = (params, state), kfac_state(state), 30
    for number in range(count):
        at = step(*at, inputs, 10 + number)[:2]
    new = kfac_state(at[1])
    assert is_same(at[0], params)
    assert is_same(new.velocity, old.velocity)
    assert_sane(new)
    if name == "apply_if_finite":  # lets five through
        assert at[1].total_notfinite - state.total_notfinite == count
    else:
        assert new.info.skipped_updates - old.info.skipped_updates == count
    assert new.damping == old.damping
    for number in range(10, STEPS):
        at = step(*at, make_inputs(), number)[:2]
    found = fault_problem.final_loss(name, at[0])
    assert found <= CLOSE * fault_problem.clean(name)[1]


# ---------------------------------------------------------------------- degenerate

FEATURES = {
    "constant features": lambda x: np.where(np.arange(6) < 3, np.float32(1), x),
    "features that are zero": lambda x: x * np.float32(np.arange(6) < 3),
    "features twice": lambda x: np.concatenate([x[:, :3], x[:, :3]], 1),
    "one example repeated": lambda x: np.broadcast_to(x[:1], x.shape).copy(),
    "inputs that are zero": np.zeros_like,
    "condition 1e12": lambda x: (
        x * np.float32(10) ** np.arange(-3, 3, dtype=np.float32)
    ),
    "condition 1e24": lambda x: (
        x * np.float32(100) ** np.arange(-3, 3, dtype=np.float32)
    ),
}
DEAD = {"4 dead units": 4, "only dead units": 8}
DAMPINGS = (1e-2, 1e-30, 0.0)


@functools.cache
def damped_stepper(name):
    """Like `fault_problem.stepper`, but λ is an argument, so that it is data too."""
    curvature = fault_problem.plan(name)
    every = kfac_jax.RefreshSchedule(4, shares=2) if name == "staggered" else 5
    carried = fault_problem.CONFIGURATIONS[name].carried

    def make(damping):
        if name in ("adaptive", "tridiagonal"):
            return fault_problem.adaptive(curvature)
        return kfac_jax.kfac(
            curvature, 0.1, 0.9, damping, norm_constraint=1e-2, inverse_every=every
        )

    @jax.jit
    def step(params, state, inputs, number, damping):
        tx = make(damping)
        return fault_problem.make_step(curvature, tx, carried)(
            params, state, inputs, number
        )

    def start(params, damping):
        state = make(damping).init(params)
        return state._replace(damping=jnp.asarray(damping, float))

    return start, step


def degenerate(what):
    """Parameters and inputs of a whole run."""
    params, inputs = fault_problem.make_params(), make_inputs()
    if what in DEAD:
        b = params["first"]["b"].at[: DEAD[what]].set(-100.0)
        params = params | {"first": params["first"] | {"b": b}}
        return params, inputs
    x = np.asarray(FEATURES[what](inputs.x), np.float32)
    return params, inputs._replace(x=x)


@pytest.mark.slow
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("what", [*FEATURES, *DEAD])
@pytest.mark.parametrize(
    "name", ["fixed rates", "adaptive", "eigen", "tridiagonal", "staggered", "full"]
)
def test_degenerate_factors_train(name, what, damping):
    """Finite throughout; and where rounding is damped at all, the loss falls.

    With λ = 0 in float32 what is inverted is rounding, and no loss is promised. Fixed
    rates wander where features differ by 1e5, so the last loss alone says nothing.
    """
    start, step = damped_stepper(name)
    params, inputs = degenerate(what)
    at, losses = (params, start(params, damping)), []
    for number in range(STEPS):
        after = step(*at, inputs, number, damping)
        at = after[:2]
        losses.append(float(after.loss))
        assert_finite(at[0])
        state = kfac_state(at[1])
        assert_finite((state.factors, state.inverses, state.velocity, state.damping))
    skipped = int(state.info.skipped_updates)
    print(
        f"{name}; {what}; λ={damping}; {losses[0]:.4f} to {losses[-1]:.4f}; {skipped}"
    )
    if damping >= 1e-2:
        assert np.median(losses[STEPS // 2 :]) < losses[0]
