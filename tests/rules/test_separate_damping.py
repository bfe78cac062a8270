"""γ apart from λ (section 6.6), for every block and under JAX's transformations.

What it computes is compared with the paper's algorithm in `test_algorithm.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import blocks
from tests.helpers.models import PAPER_MODEL, array, assert_trees_close, traced_once

BLOCKS = {
    "Kronecker": blocks.Kronecker(),
    "Eigen": blocks.Eigen(),
    "TNT": blocks.TNT(),
    "Diagonal": blocks.Diagonal(),
    "Full": blocks.Full(),
}
NEVER = 10**6


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["a"])
    return kfac_jax.losses.squared_error(h @ params["b"], y).sum(-1).mean()


PARAMS = {"a": array(0, 3, 4), "b": array(1, 4, 2)}


def make_batch(seed):
    return array(10 + seed, 8, 3), array(30 + seed, 8, 2)


@functools.cache
def plan(kind="Kronecker", l2=0.0):
    def penalized(params, x, y):
        squares = sum(jnp.vdot(p, p) for p in params.values())
        return loss_fn(params, x, y) + l2 / 2 * squares

    return kfac_jax.make_curvature(
        penalized if l2 else loss_fn,
        PARAMS,
        *make_batch(0),
        blocks=BLOCKS[kind],
        estimation_mode="fisher_exact",
        l2=l2,
    )


def full_step(curvature, tx, params, state, x, y):
    value, grads, statistics = curvature.value_grad_and_statistics(
        params, x, y, factors=state.factors
    )
    updates, state = tx.update(
        grads, state, params, statistics=statistics, value=value, args=(x, y)
    )
    return optax.apply_updates(params, updates), state


def make_step(curvature, tx):
    return jax.jit(traced_once(functools.partial(full_step, curvature, tx)))


def separate(initial=None, every=2, inverse_every=1, damping=0.1, **options):
    rule = kfac_jax.SeparateDamping(initial, every=every, **options)
    return kfac_jax.kfac(
        plan(),
        PAPER_MODEL,
        None,
        damping,
        factored_damping=rule,
        inverse_every=inverse_every,
    )


# ---------------------------------------------------------------------- what γ does


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", BLOCKS)
def test_gamma_squared_takes_the_place_of_the_damping_in_every_block(kind):
    gamma, params = 0.7, PARAMS
    curvature = plan(kind)
    rule = kfac_jax.SeparateDamping(gamma, every=NEVER)
    tx = kfac_jax.kfac(
        curvature, PAPER_MODEL, None, 0.1, factored_damping=rule, inverse_every=1
    )
    tied = kfac_jax.kfac(curvature, PAPER_MODEL, None, gamma**2, inverse_every=1)
    _, state = make_step(curvature, tx)(params, tx.init(params), *make_batch(1))
    _, other = make_step(curvature, tied)(params, tied.init(params), *make_batch(1))
    assert_trees_close(state.inverses, other.inverses)
    np.testing.assert_allclose(state.info.factored_damping, gamma, rtol=1e-12)
    np.testing.assert_allclose(state.info.damping, 0.1, rtol=1e-12)
    assert abs(float(state.info.learning_rate - other.info.learning_rate)) > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_candidate_that_would_lower_the_model_most_is_kept(kind):
    """Each candidate alone, as a γ that stays, from the same state."""
    curvature, gamma, factor = plan(kind), 0.8, 0.3

    def kfac(initial, every):
        rule = kfac_jax.SeparateDamping(initial, every=every, factor=factor)
        return kfac_jax.kfac(
            curvature, PAPER_MODEL, None, 0.05, factored_damping=rule, inverse_every=1
        )

    tx, still = kfac(gamma, 2), kfac(gamma, NEVER)
    step, fixed = make_step(curvature, tx), make_step(curvature, still)
    params, state = step(PARAMS, tx.init(PARAMS), *make_batch(1))
    np.testing.assert_allclose(state.factored_damping, gamma, rtol=1e-12)
    candidates = [gamma, gamma * factor, gamma / factor]
    alone = [
        fixed(params, state._replace(factored_damping=jnp.asarray(c)), *make_batch(2))
        for c in candidates
    ]
    changes = [float(each[1].info.quadratic_change) for each in alone]
    best = int(np.argmin(changes))
    moved, after = step(params, state, *make_batch(2))
    np.testing.assert_allclose(after.factored_damping, candidates[best], rtol=1e-12)
    np.testing.assert_allclose(after.info.quadratic_change, changes[best], rtol=1e-8)
    assert_trees_close(moved, alone[best][0], rtol=1e-8, atol=1e-10)
    assert_trees_close(after.inverses, alone[best][1].inverses, rtol=1e-8)


def test_gamma_starts_at_the_root_of_the_whole_damping():
    def initial(tx):
        return float(tx.init(PARAMS).factored_damping)

    def adapted(rule, damping, l2=0.0):
        return kfac_jax.kfac(
            plan(l2=l2), PAPER_MODEL, None, damping, factored_damping=rule
        )

    rule = kfac_jax.SeparateDamping()
    assert initial(adapted(rule, 0.25)) == 0.5
    assert initial(adapted(rule, jnp.asarray(0.25))) == 0.5
    assert initial(adapted(rule, lambda k: 0.25 + k.astype(float))) == 0.5
    assert initial(adapted(rule, kfac_jax.LevenbergMarquardt(4.0))) == 2.0
    np.testing.assert_allclose(initial(adapted(rule, 0.25, 0.11)), 0.6, rtol=1e-12)
    np.testing.assert_allclose(initial(adapted(rule, 0.0, 0.09)), 0.3, rtol=1e-12)
    assert initial(adapted(kfac_jax.SeparateDamping(0.125), 0.0)) == 0.125


def test_tied_gamma_is_nan_and_costs_nothing():
    """The state's field goes through as it came: no equation makes or reads it."""
    for tx in (
        kfac_jax.kfac(plan(), PAPER_MODEL, None, 0.1),
        kfac_jax.scale_by_kfac(plan()),
    ):
        state = tx.init(PARAMS)
        statistics = plan().zero_statistics(PARAMS)

        def update(state, tx=tx, statistics=statistics):
            args = {"value": jnp.ones(()), "args": make_batch(0)}
            return tx.update(PARAMS, state, PARAMS, statistics=statistics, **args)[1]

        assert np.isnan(state.factored_damping)
        assert np.isnan(state.info.factored_damping)
        jaxpr = jax.make_jaxpr(update)(state).jaxpr
        places = jax.tree.unflatten(
            jax.tree.structure(state), range(len(jax.tree.leaves(state)))
        )
        for place in (places.factored_damping, places.info.factored_damping):
            variable = jaxpr.invars[place]
            assert jaxpr.outvars[place] is variable
            assert not any(variable in e.invars for e in jaxpr.eqns)


# ------------------------------------------------------------------- when it moves


def test_gamma_moves_every_t2_steps_only_and_within_its_limits():
    tx = separate(0.3, every=3, inverse_every=3, factor=0.5, minimum=0.25, maximum=0.5)
    step = make_step(plan(), tx)
    params, state, seen = PARAMS, tx.init(PARAMS), [0.3]
    for k in range(1, 13):
        params, state = step(params, state, *make_batch(k))
        seen.append(float(state.factored_damping))
        assert 0.25 <= seen[-1] <= 0.5
        assert seen[-1] == seen[-2] or k % 3 == 0
        assert float(state.info.factored_damping) == seen[-1]
    assert len(set(seen)) > 1
    assert int(state.info.inverse_refreshes) == 3 + 3  # at 1, 2, 3, and 6, 9, 12


def test_a_traced_period_of_the_inverses_need_not_divide_that_of_gamma():
    """They are refreshed then, too: γ is never another than that of the inverses."""
    tx = separate(0.3, every=5, inverse_every=jnp.asarray(100), factor=0.5)
    step = make_step(plan(), tx)
    params, state = PARAMS, tx.init(PARAMS)
    refreshes = []
    for k in range(1, 11):
        params, state = step(params, state, *make_batch(k))
        refreshes.append(int(state.info.inverse_refreshes))
    assert refreshes == [1, 2, 3, 3, 4, 4, 4, 4, 4, 5]


def test_gamma_stays_without_statistics():
    tx = separate(0.3, every=1)
    value, grads, _ = plan().value_grad_and_statistics(PARAMS, *make_batch(1))
    none = plan().zero_statistics(PARAMS)
    _, state = tx.update(
        grads,
        tx.init(PARAMS),
        PARAMS,
        statistics=none,
        value=value,
        args=make_batch(1),
    )
    assert float(state.factored_damping) == 0.3
    assert int(state.info.inverse_refreshes) == 0


def test_gamma_stays_where_no_candidate_has_a_finite_model():
    tx = separate(0.3, every=1)
    value, grads, statistics = plan().value_grad_and_statistics(PARAMS, *make_batch(1))
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    updates, state = tx.update(
        bad,
        tx.init(PARAMS),
        PARAMS,
        statistics=statistics,
        value=value,
        args=make_batch(1),
    )
    assert float(state.factored_damping) == 0.3
    assert int(state.info.skipped_updates) == 1
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, updates))


def test_a_candidate_without_finite_inverses_loses():
    """One whose γ² underflows leaves singular factors, here those of one case."""
    one = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), make_batch(1))
    tx = separate(1.0, every=1, factor=1e-200)
    _, state = make_step(plan(), tx)(PARAMS, tx.init(PARAMS), *one)
    assert float(state.factored_damping) in (1.0, 1e200)
    assert int(state.info.skipped_updates) == 0


# ------------------------------------------------------------------ transformations

STEPS = 5


@functools.cache
def looped(initial=0.3):
    tx = separate(initial)
    step = make_step(plan(), tx)
    params, state = PARAMS, tx.init(PARAMS)
    for k in range(STEPS):
        params, state = step(params, state, *make_batch(k))
    assert step._cache_size() <= 1  # or 0, where JAX has forgotten it
    return params, state


def batches():
    return jax.tree.map(lambda *b: jnp.stack(b), *map(make_batch, range(STEPS)))


def scanned(initial):
    tx = separate()

    def body(carry, batch):
        return full_step(plan(), tx, *carry, *batch), None

    state = tx.init(PARAMS)._replace(factored_damping=jnp.asarray(initial))
    return jax.lax.scan(body, (PARAMS, state), batches())[0]


def test_scan_and_vmap_over_initial_values():
    assert_trees_close(jax.jit(scanned)(0.3), looped(0.3), rtol=1e-7)
    both = jax.jit(jax.vmap(scanned))(jnp.array([0.3, 2.0]))
    for i, initial in enumerate((0.3, 2.0)):
        mine = jax.tree.map(lambda x, i=i: x[i], both)
        assert_trees_close(mine, looped(initial), rtol=1e-7)


def test_donated_buffers():
    tx = separate(0.3)
    step = jax.jit(functools.partial(full_step, plan(), tx), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    for k in range(STEPS):
        params, state = step(params, state, *make_batch(k))
    assert_trees_close((params, state), looped(0.3), rtol=1e-7)


@pytest.mark.slow
def test_debug_nans_and_leaks():
    tx = separate(0.3)
    with jax.debug_nans(True), jax.checking_leaks():
        step = make_step(plan(), tx)
        params, state = step(PARAMS, tx.init(PARAMS), *make_batch(0))
        step(params, state, *make_batch(1))


def test_state_has_the_same_types_after_an_update():
    tx = separate()
    state = jax.eval_shape(tx.init, PARAMS)
    after = jax.eval_shape(
        functools.partial(full_step, plan(), tx), PARAMS, state, *make_batch(0)
    )[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
