"""Refreshes in turn, and stale ones, against steps that are composed by hand."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_jax
from kfac_jax.optimization.refresh import shares
from kfac_jax.plan.group import layers_of, names_of
from tests.devices import device_problem
from tests.helpers import models

RULES = {  # without a damping of its own for γ, whose refreshes have other periods
    name: {key: x for key, x in rule.items() if key != "factored_damping"}
    for name, rule in device_problem.RULES.items()
}


@functools.cache
def problem():
    return models.problem("softmax", params=models.dense_params(0, 3, 8, 8, 6, 4))


@functools.cache
def plan(**options):
    p = problem()
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact", **options
    )


def plan_of(blocks):
    p = problem()
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, blocks=blocks, estimation_mode="fisher_exact"
    )


def make_step(curvature, schedule, rules="fixed"):
    tx = kfac_jax.kfac(curvature, inverse_every=schedule, **RULES[rules])

    @jax.jit
    def step(params, state):
        args = problem().args
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, factors=state.factors
        )
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return jax.tree.map(jnp.add, params, updates), state

    return tx, step


def states(curvature, schedule, count, rules="fixed"):
    """The states after each step, and the parameters."""
    tx, step = make_step(curvature, schedule, rules)
    params, state = problem().params, tx.init(problem().params)
    found = [(params, state)]
    for _ in range(count):
        found.append(step(*found[-1]))
    return found


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_one_share_is_all_at_once():
    by_number = states(plan(), 3, 7)
    by_schedule = states(plan(), kfac_jax.RefreshSchedule(3), 7)
    jax.tree.map(np.testing.assert_array_equal, by_number[-1], by_schedule[-1])


def test_each_share_has_its_turn():
    """Four layers in two shares: at steps 4 and 8 one of them, at 6 the other."""
    schedule = kfac_jax.RefreshSchedule(4, shares=2)
    first, second = ([x.name for x in group] for group in shares(plan().groups, 2))
    found = states(plan(), schedule, 9)
    for k in range(1, 10):
        old, new = found[k - 1][1].inverses, found[k][1].inverses
        changed = {name for name in old if not same(old[name], new[name])}
        expected = {4: {*first}, 6: {*second}, 8: {*first}}.get(k, set())
        assert changed == ({*first, *second} if k <= 3 else expected)
        count = min(k, 3) + sum(k >= turn for turn in (4, 6, 8))
        assert found[k][1].info.inverse_refreshes == count


def test_phase_and_warm_up():
    """At steps 1, 4 and 7 only, or with a warm-up of two at step 2, too."""
    for warm_up, turns in ((0, [1, 4, 7]), (2, [1, 2, 4, 7])):
        schedule = kfac_jax.RefreshSchedule(3, phase=1, warm_up=warm_up)
        found = states(plan(), schedule, 7)
        refreshed = [
            k
            for k in range(1, 8)
            if not same(found[k - 1][1].inverses, found[k][1].inverses)
        ]
        assert refreshed == turns
    for name in ("phase", "warm_up"):
        with pytest.raises(ValueError, match="must be an integer ≥ 0; got -1"):
            kfac_jax.RefreshSchedule(3, **{name: -1})


def test_a_share_is_refreshed_as_all_would_be():
    """At step 6 the second share is what a refresh of everything gives there."""
    found = states(plan(), kfac_jax.RefreshSchedule(4, shares=2), 6)
    _, step = make_step(plan(), 1)
    everything = step(*found[5])[1].inverses
    for layer in layers_of(shares(plan().groups, 2)[1]):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12),
            found[6][1].inverses[layer.name],
            everything[layer.name],
        )


def test_linked_layers_stay_together():
    curvature = plan(structure=kfac_jax.BlockTridiagonal())
    divided = shares(curvature.groups, 3)
    assert max(len(x.names) for x in curvature.groups) > 1
    assert sorted(names_of(curvature.groups)) == sorted(
        name for share in divided for name in names_of(share)
    )


def test_bases_take_turns_too():
    """One of four layers at a time turns its basis, or inverts."""
    blocks = {"layer0": kfac_jax.blocks.Eigen(), "layer2": kfac_jax.blocks.Eigen()}
    found = states(plan_of(blocks), kfac_jax.RefreshSchedule(4, shares=4), 8)
    assert found[-1][1].info.skipped_updates == 0
    turned = []
    for k in (4, 5, 6, 7):
        old, new = found[k - 1][1], found[k][1]
        for name in old.factors:
            if name in blocks:
                key = "output_basis"  # the inputs, and so their basis, are the same
                pair = old.factors[name][key], new.factors[name][key]
            else:
                pair = old.inverses[name], new.inverses[name]
            if not same(*pair):
                turned.append(name)
    assert sorted(turned) == ["layer0", "layer1", "layer2", "layer3"]


@pytest.mark.parametrize("rules", RULES)
def test_stale_inverses_are_those_of_the_step_before(rules):
    schedule = kfac_jax.RefreshSchedule(2, stale=True)
    found = states(plan(), schedule, 5, rules)
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    assert not same(found[1][0], found[2][0])
    if rules == "adaptive":
        losses = [float(state.info.loss) for _, state in found[1:]]
        assert losses[-1] < losses[0]
        return
    for k in range(1, 5):
        (params, state), (_, after) = found[k], found[k + 1]
        grads = plan().value_and_grad(params, *problem().args)[1]
        direction = {
            layer.name: layer.from_matrix(
                -state.inverses[layer.name]["input"]
                @ layer.to_matrix([grads[layer.name]["w"], grads[layer.name]["b"]])
                @ state.inverses[layer.name]["output"]
            )
            for layer in plan().layers
        }
        for name, (w, b) in direction.items():
            for key, x in (("w", w), ("b", b)):
                expected = 0.1 * x + 0.9 * state.velocity[name][key]
                np.testing.assert_allclose(
                    after.velocity[name][key], expected, rtol=1e-9, atol=1e-12
                )


def test_stale_refreshes_do_not_hold_up_the_update():
    """Nothing that the update is made of depends on the new inverses."""
    tx, _ = make_step(plan(), kfac_jax.RefreshSchedule(2, stale=True))
    p = problem()

    def update(state, grads):
        statistics = plan().value_grad_and_statistics(p.params, *p.args)[2]
        return tx.update(grads, state, p.params, statistics=statistics)[0]

    text = jax.jit(update).lower(tx.init(p.params), p.params).compile().as_text()
    fresh = make_step(plan(), 2)[0]

    def other(state, grads):
        statistics = plan().value_grad_and_statistics(p.params, *p.args)[2]
        return fresh.update(grads, state, p.params, statistics=statistics)[0]

    reference = jax.jit(other).lower(fresh.init(p.params), p.params).compile()
    assert re.search("potrf|cholesky", reference.as_text(), re.IGNORECASE)
    assert not re.search("potrf|cholesky", text, re.IGNORECASE)


def test_the_schedule_is_traced():
    curvature = plan()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(every):
        tx = kfac_jax.kfac(
            curvature,
            inverse_every=kfac_jax.RefreshSchedule(every, shares=2),
            **RULES["fixed"],
        )
        state = tx.init(problem().params)
        for _ in range(2):
            _, grads, statistics = curvature.value_grad_and_statistics(
                problem().params, *problem().args
            )
            _, state = tx.update(grads, state, statistics=statistics)
        return state.info.inverse_refreshes

    assert run(4) == run(5) == 2


@given(
    costs=st.lists(st.integers(1, 10**9), min_size=1, max_size=30),
    every=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_each_share_has_one_turn_in_each_period(costs, every, data):
    count = data.draw(st.integers(1, every))
    schedule = kfac_jax.RefreshSchedule(every, shares=count)
    start = data.draw(st.integers(1, 100))
    turns = np.stack([schedule.turns(k) for k in range(start, start + every)])
    np.testing.assert_array_equal(turns.sum(0), 1)
    assert turns.sum(1).max() <= 1


def step_costs(curvature, schedule, steps):
    """Multiply-adds of steps, from the plan: model, statistics, inverses, product."""
    layers = curvature.layers
    each = curvature.totals.gradient_cost + curvature.totals.statistics_cost
    for layer in layers:
        i, o = layer.shape.inputs, layer.shape.outputs
        each += i * o * (i + o)
    divided = shares(curvature.groups, schedule.shares)
    work = np.array([sum(x.inversion_cost for x in share) for share in divided])
    turns = np.stack([schedule.turns(k) for k in steps])
    return each + turns @ work


def test_staggered_steps_of_the_autoencoder_take_about_equally_long():
    """The paper's, 784-1000-500-250-30 and back, with the demo's 500 cases."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    shapes = {
        f"layer{i}": {
            "w": jax.ShapeDtypeStruct((n, m), jnp.float32),
            "b": jax.ShapeDtypeStruct((m,), jnp.float32),
        }
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }
    x = jax.ShapeDtypeStruct((500, 784), jnp.float32)

    def loss_fn(params, x):
        z = models.mlp(params, x)
        losses = kfac_jax.losses.sigmoid_binary_cross_entropy(z, x)
        return losses.sum(-1).mean()

    curvature = kfac_jax.make_curvature(loss_fn, shapes, x)
    steps = range(21, 41)
    at_once = step_costs(curvature, kfac_jax.RefreshSchedule(20), steps)
    in_turn = step_costs(curvature, kfac_jax.RefreshSchedule(20, shares=8), steps)
    assert at_once.max() > 1.3 * np.median(at_once)
    assert in_turn.max() <= 1.3 * np.median(in_turn)
    np.testing.assert_allclose(at_once.sum(), in_turn.sum(), rtol=1e-12)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_shares_are_counted(count):
    with pytest.raises(ValueError, match="shares must be an integer"):
        kfac_jax.RefreshSchedule(20, shares=count)


def test_more_shares_than_steps():
    with pytest.raises(ValueError, match="at most one share"):
        kfac_jax.RefreshSchedule(4, shares=5)


def test_stale_is_a_flag():
    with pytest.raises(TypeError, match="stale must be a bool"):
        kfac_jax.RefreshSchedule(4, stale=1)


def test_separate_damping_needs_one_share():
    rules = RULES["adaptive"] | {"factored_damping": kfac_jax.SeparateDamping()}
    with pytest.raises(ValueError, match="RefreshSchedule with one share, got 2"):
        kfac_jax.kfac(
            plan(), inverse_every=kfac_jax.RefreshSchedule(20, shares=2), **rules
        )
