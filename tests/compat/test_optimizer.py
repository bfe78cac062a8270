"""`Optimizer`, called in the ways of the programs that were written for it."""

import copy
import inspect
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from tests.compat.optimizer_problem import (
    ADAPTIVE,
    BATCH,
    EXACT,
    KEY,
    LABELS,
    PARAMS,
    RATES,
    VALUE_AND_GRAD,
    X,
    batches,
    loss_fn,
    train,
)
from tests.helpers import models

# --------------------------------------------------------------- against the native API


@pytest.mark.sampled(2)
@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_are_those_of_the_native_transformation(adaptive):
    """The moving average, written out, in place of the front's running weight."""
    steps, ema, given = batches(7), 0.95, {} if adaptive else RATES
    options = ADAPTIVE if adaptive else {}
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD, inverse_update_period=3, **EXACT, **options
    )
    params, _, stats = train(optimizer, PARAMS, steps, **given)

    curvature = kfac_jax.make_curvature(
        loss_fn, PARAMS, BATCH, estimation_mode="fisher_exact"
    )
    gather = jax.jit(curvature.value_grad_and_statistics)
    factors = curvature.init_factors(PARAMS)
    own, velocity, total = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), []
    damping = 1.0
    for i, batch in enumerate(steps):
        value, grads, seen = gather(own, batch)
        total.append(curvature.update_factors(factors, seen, 1, 0.0))
        weights = np.array([ema ** (i - j) for j in range(i + 1)])
        mean = jax.tree.map(
            lambda *x, w=weights: (
                sum(a * b for a, b in zip(w, x, strict=True)) / w.sum()
            ),
            *total,
        )
        lam = damping if adaptive else RATES["damping"]
        if i % 3 == 0:
            frozen = curvature.approximation(mean), lam
        down = jax.tree.map(jnp.negative, frozen[0].solve(grads, damping=frozen[1]))
        alpha, mu = RATES["learning_rate"], RATES["momentum"]
        if adaptive:
            basis = [down, velocity][: 2 if i else 1]
            plane = np.asarray(curvature.quadratic_form(own, basis, batch))
            gram = [[optax.tree.vdot(u, v) for u in basis] for v in basis]
            slope = np.array([optax.tree.vdot(grads, v) for v in basis])
            rates = np.linalg.solve(plane + lam * np.array(gram), -slope)
            change = slope @ rates + rates @ plane @ rates / 2
            alpha, mu = (*rates, 0.0)[:2]
            np.testing.assert_allclose(stats[i]["quad_model_change"], change)
        velocity = jax.tree.map(
            lambda d, v, a=alpha, m=mu: a * d + m * v, down, velocity
        )
        own = optax.apply_updates(own, velocity)
        for name, x in ("loss", value), ("learning_rate", alpha), ("momentum", mu):
            np.testing.assert_allclose(stats[i][name], x, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(stats[i]["damping"], lam)
        if adaptive and i == 4:
            rho = (loss_fn(own, batch) - value) / change
            np.testing.assert_allclose(stats[i]["rho"], rho, rtol=1e-6)
            damping *= {True: 0.9**5, False: 1.0}[bool(rho > 0.75)]
    models.assert_trees_close(params, own)


def test_prediction_by_the_approximation_where_rates_are_given():
    """With given rates ρ is of the approximate curvature, or on demand of the exact."""
    found = {}
    for exact in (False, True):
        optimizer = kfac_jax.Optimizer(
            VALUE_AND_GRAD,
            use_adaptive_damping=True,
            initial_damping=0.5,
            damping_adaptation_interval=1,
            always_use_exact_qmodel_for_damping_adjustment=exact,
            **EXACT,
        )
        rates = {"learning_rate": 0.1, "momentum": 0.0}
        params, state, (stats,) = train(optimizer, PARAMS, [BATCH], **rates)
        delta = jax.tree.map(jnp.subtract, params, PARAMS)
        if exact:
            moved = optimizer.curvature.matvec(PARAMS, delta, BATCH)
        else:
            factors = state.estimator_state.factors
            moved = optimizer.curvature.approximation(factors).matvec(delta)
        grads = jax.grad(loss_fn)(PARAMS, BATCH)
        change = optax.tree.vdot(delta, moved) / 2 + optax.tree.vdot(delta, grads)
        np.testing.assert_allclose(stats["quad_model_change"], change, rtol=1e-8)
        rho = (loss_fn(params, BATCH) - loss_fn(PARAMS, BATCH)) / change
        np.testing.assert_allclose(stats["rho"], rho, rtol=1e-6)
        np.testing.assert_allclose(stats["new_loss"], loss_fn(params, BATCH))
        found[exact] = float(change)
    assert abs(found[True] / found[False] - 1) > 1e-3


# --------------------------------------------------------------------- how it is called


PUBLISHED = {  # parameters in the order of release 0.0.8
    "": """
    value_and_grad_func l2_reg regularized_parameters_path_exclusions value_func_has_aux
    value_func_has_state value_func_has_rng value_func_for_estimator
    use_adaptive_learning_rate learning_rate_schedule use_adaptive_momentum
    momentum_schedule use_adaptive_damping damping_schedule initial_damping
    use_initial_damping_calibration min_damping max_damping
    include_damping_in_quad_change damping_adaptation_interval damping_adaptation_decay
    damping_lower_threshold damping_upper_threshold
    always_use_exact_qmodel_for_damping_adjustment precon_damping_mult
    precon_damping_schedule use_step_rejection reject_damping_increase_factor
    norm_constraint num_burnin_steps estimation_mode custom_estimator_ctor curvature_ema
    curvature_update_period inverse_update_period use_exact_inverses batch_process_func
    register_only_generic patterns_to_skip use_automatic_registration
    auto_register_kwargs layer_tag_to_block_ctor multi_device debug invalid_metric_value
    batch_size_extractor pmap_axis_name forbid_setting_attributes_after_finalize
    modifiable_attribute_exceptions include_norms_in_stats
    include_per_param_norms_in_stats include_registered_loss_in_stats
    distributed_precon_apply distributed_inverses num_estimator_samples
    should_vmap_estimator_samples norm_to_scale_identity_weight_per_block precon_power
    exact_quad_model_matrix_type
    """,
    "init": "self params rng batch func_state",
    "step": """
    self params state rng data_iterator batch func_state learning_rate momentum damping
    global_step_int
    """,
}
DEFAULTS = {
    "min_damping": 1e-8,
    "max_damping": float("inf"),
    "damping_adaptation_interval": 5,
    "damping_adaptation_decay": 0.9,
    "damping_lower_threshold": 0.25,
    "damping_upper_threshold": 0.75,
    "num_burnin_steps": 10,
    "curvature_ema": 0.95,
    "curvature_update_period": 1,
    "inverse_update_period": 5,
    "norm_constraint": None,
    "multi_device": False,
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_parameters_have_the_published_names_order_and_defaults(method):
    function = getattr(kfac_jax.Optimizer, method) if method else kfac_jax.Optimizer
    parameters = inspect.signature(function).parameters
    assert list(parameters) == PUBLISHED[method].split()
    kinds = {p.kind for p in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if not method:
        assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


def test_everything_by_position_and_everything_by_keyword():
    by_position = kfac_jax.Optimizer(VALUE_AND_GRAD, 0.0, num_burnin_steps=0)
    state = by_position.init(PARAMS, KEY, BATCH, None)
    a, _, _ = by_position.step(PARAMS, state, KEY, iter([BATCH]), None, None, 1, 0, 1)
    by_keyword = kfac_jax.Optimizer(
        value_and_grad_func=VALUE_AND_GRAD, l2_reg=0.0, num_burnin_steps=0
    )
    state = by_keyword.init(params=PARAMS, rng=KEY, batch=BATCH, func_state=None)
    b, state, stats = by_keyword.step(
        params=PARAMS,
        state=state,
        rng=KEY,
        data_iterator=iter([BATCH]),
        learning_rate=jnp.float32(1.0),
        momentum=np.zeros(()),
        damping=1.0,
        global_step_int=0,
    )
    models.assert_trees_equal(a, b)
    assert int(stats["step"]) == int(state.step_counter) == 1
    assert int(stats["data_seen"]) == int(stats["batch_size"]) == 16
    assert isinstance(by_keyword, kfac_jax.optimizer.Optimizer)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("aux", "state", "rng"), list(itertools.product([False, True], repeat=3))
)
def test_every_signature_of_the_function(aux, state, rng):
    def function(params, *arguments):
        *others, batch = arguments
        loss = loss_fn(params, batch)
        more = {"mean": batch[0].mean()}
        count = others.pop(0) + 1 if state else None
        if rng:
            more["noise"] = jax.random.uniform(others.pop(0))
        assert not others
        if state:
            return loss, (count, more) if aux else count
        return (loss, more) if aux else loss

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(function, has_aux=aux or state),
        value_func_has_aux=aux,
        value_func_has_state=state,
        value_func_has_rng=rng,
        **EXACT,
    )
    counter = jnp.zeros((), jnp.int32) if state else None
    start = optimizer.init(PARAMS, KEY, BATCH, counter)
    result = optimizer.step(
        PARAMS, start, KEY, batch=BATCH, func_state=counter, **RATES
    )
    assert len(result) == (4 if state else 3)
    stats = result[-1]
    np.testing.assert_allclose(stats["loss"], loss_fn(PARAMS, BATCH))
    if state:
        assert int(result[2]) == 1
    if aux:
        np.testing.assert_allclose(stats["aux"]["mean"], X.mean())
        assert ("noise" in stats["aux"]) == rng
    assert ("aux" in stats) == aux


def test_it_compiles_once_and_donates_nothing():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return VALUE_AND_GRAD(params, batch)

    optimizer = kfac_jax.Optimizer(counted, **EXACT)
    state = optimizer.init(PARAMS, KEY, BATCH)
    after = state, PARAMS
    counts = []
    for momentum in (0, 0.5, np.float32(0.5), jnp.zeros(())):
        rates = RATES | {"momentum": momentum}
        after = optimizer.step(after[-1], after[0], KEY, batch=BATCH, **rates)[1::-1]
        counts.append(len(traces))
    assert counts[0] == counts[-1]
    again, _, _ = train(optimizer, PARAMS, [BATCH], state, **RATES)
    assert not jax.tree.reduce(lambda a, x: a or x.is_deleted(), (PARAMS, state), False)
    models.assert_trees_equal(again, train(optimizer, PARAMS, [BATCH], **RATES)[0])


def test_inside_the_callers_jit_and_scan():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT, **ADAPTIVE)
    steps = batches(3)
    params, _, stats = train(optimizer, PARAMS, steps)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)

    @jax.jit
    def run(params, stacked):
        def body(carry, batch):
            params, state, stats = optimizer.step(*carry, KEY, batch=batch)
            return (params, state), stats["loss"]

        first = jax.tree.map(lambda x: x[0], stacked)
        state = optimizer.init(params, KEY, first)
        return jax.lax.scan(body, (params, state), stacked)

    (scanned, _), losses = run(PARAMS, stacked)
    models.assert_trees_close(scanned, params)
    np.testing.assert_allclose(losses, [s["loss"] for s in stats])


@pytest.mark.slow
def test_burn_in_takes_batches_of_its_own_that_count_alike():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD, 0.0, estimation_mode="fisher_exact", num_burnin_steps=3
    )
    steps = batches(6)
    iterator = iter(steps)
    state = optimizer.init(PARAMS, KEY, BATCH)
    params, state, stats = optimizer.step(PARAMS, state, KEY, iterator, **RATES)
    np.testing.assert_allclose(stats["loss"], loss_fn(PARAMS, steps[3]))
    assert int(stats["data_seen"]) == 16
    curvature = optimizer.curvature
    zeros = curvature.init_factors(PARAMS)
    each = [
        curvature.update_factors(
            zeros, curvature.value_and_statistics(PARAMS, batch)[1], 1
        )
        for batch in steps[:4]
    ]
    weights = np.array([0.95, 0.95, 0.95, 1.0])
    expected = jax.tree.map(lambda *x: np.average(x, 0, weights), *each)
    models.assert_trees_close(state.estimator_state.factors, expected)
    _, state, stats = optimizer.step(params, state, KEY, iterator, **RATES)
    np.testing.assert_allclose(stats["loss"], loss_fn(params, steps[4]))
    # with a batch there is no burn-in, whatever the default
    plain = kfac_jax.Optimizer(VALUE_AND_GRAD, 0.0)
    _, state, _ = train(plain, PARAMS, [BATCH], **RATES)
    assert int(state.estimator_state.batches) == 1


def test_schedules_get_the_step_before_and_the_data_seen():
    seen = []

    def rate(step, data_seen):
        seen.append((step, data_seen))
        return 0.5 / (1 + step.astype(float)) + data_seen.astype(float)

    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        learning_rate_schedule=rate,
        momentum_schedule=lambda step: 0.1 * step.astype(float),
        damping_schedule=lambda *args: 1.0 + args[0].astype(float),
        **EXACT,
    )
    _, _, stats = train(optimizer, PARAMS, [BATCH] * 3)
    np.testing.assert_allclose(
        [s["learning_rate"] for s in stats], [0.5, 16.25, 32 + 1 / 6], rtol=1e-6
    )
    np.testing.assert_allclose([s["momentum"] for s in stats], [0, 0.1, 0.2])
    np.testing.assert_allclose([s["damping"] for s in stats], [1, 2, 3])
    assert len(seen) == 1


def test_curvature_update_period():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, curvature_update_period=2, **EXACT)
    _, state, _ = train(optimizer, PARAMS, [BATCH] * 5, **RATES)
    assert int(state.estimator_state.batches) == 3
    assert int(state.estimator_state.info.inverse_refreshes) == 1


def test_a_state_is_pickled_and_goes_on_in_a_new_optimizer():
    def optimizer():
        return kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT, **ADAPTIVE)

    steps = batches(6)
    straight, _, _ = train(optimizer(), PARAMS, steps)
    params, state, _ = train(optimizer(), PARAMS, steps[:3])
    assert isinstance(state, kfac_jax.Optimizer.State)
    params, state = pickle.loads(pickle.dumps((params, state)))
    assert {
        "velocities",
        "estimator_state",
        "damping",
        "data_seen",
        "step_counter",
    } == {*state._fields}
    resumed, _, _ = train(optimizer(), params, steps[3:], copy.deepcopy(state))
    models.assert_trees_equal(resumed, straight)


def test_an_update_that_is_not_finite_is_not_made():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    bad = (X.at[0, 0].set(jnp.nan), LABELS)
    params, state, stats = train(optimizer, PARAMS, [bad], **RATES)
    models.assert_trees_equal(params, PARAMS)
    assert np.isnan(stats[0]["loss"])
    assert int(state.estimator_state.info.skipped_updates) == 1
    params, _, stats = train(optimizer, params, [BATCH] * 2, state, **RATES)
    assert stats[1]["loss"] < stats[0]["loss"]
