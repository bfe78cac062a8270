"""`Optimizer`, called in the ways of the programs that were written for it."""

import copy
import functools
import inspect
import itertools
import pickle
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import nnx

import kfac_jax

X, LABELS = models.array(0, 16, 3), jnp.arange(16) % 4
BATCH = (X, LABELS)
PARAMS = models.dense_params(1, 3, 5, 4)
KEY = jax.random.key(0)
RATES = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1e-2}
ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 1.0,
}
EXACT = {"l2_reg": 0.0, "estimation_mode": "fisher_exact", "num_burnin_steps": 0}


def cross_entropy(z, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).mean()


def loss_fn(params, batch):
    x, labels = batch
    z = models.mlp(params, x)
    kfac_jax.register_categorical_predictive_distribution(z, labels)
    return cross_entropy(z, labels)


VALUE_AND_GRAD = jax.value_and_grad(loss_fn)


def train(optimizer, params, batches, state=None, **rates):
    """Steps on batches; returns parameters, state and the stats of all steps."""
    if state is None:
        state = optimizer.init(params, KEY, batches[0])
    every = []
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(KEY, i)
        params, state, stats = optimizer.step(params, state, key, batch=batch, **rates)
        every.append(stats)
    return params, state, every


def batches(count, size=16):
    return [(models.array(10 + i, size, 3), LABELS[:size]) for i in range(count)]


# --------------------------------------------------------------- against the native API


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


# ---------------------------------------------------------------------- several devices


def spread(tree, devices):
    return jax.tree.map(lambda x: jnp.reshape(x, (devices, -1, *x.shape[1:])), tree)


def replicated(tree, devices):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), tree)


@pytest.mark.parametrize("momentum", ["number", "replicated", "adaptive"])
def test_devices_are_like_one(momentum):
    devices = jax.local_device_count()
    size = 2 * devices
    steps = batches(4, size)
    options = ADAPTIVE if momentum == "adaptive" else {"norm_constraint": 1e-2}
    rates = {} if momentum == "adaptive" else RATES | {"momentum": 0}

    def function(params, batch):
        return loss_fn(params, batch), {"mean": batch[0].mean()}

    function = jax.value_and_grad(function, has_aux=True)
    options |= EXACT | {"value_func_has_aux": True}
    one = kfac_jax.Optimizer(function, **options)
    params, _, expected = train(one, PARAMS, steps, **rates)
    many = kfac_jax.Optimizer(
        function, multi_device=True, pmap_axis_name="devices", **options
    )
    if momentum == "replicated":
        rates = replicated(jax.tree.map(jnp.asarray, rates), devices)
    own, keys = replicated(PARAMS, devices), jax.random.split(KEY, devices)
    steps = [spread(batch, devices) for batch in steps]
    state = many.init(own, keys, steps[0])
    for batch, one_device in zip(steps, expected, strict=True):
        own, state, stats = many.step(own, state, keys, batch=batch, **rates)
        assert set(stats) == set(one_device)
        for name, value in stats.items():
            if value is None:
                assert one_device[name] is None
            else:
                x, y = jax.tree.leaves(value), jax.tree.leaves(one_device[name])
                want = np.broadcast_to(y[0], (devices,))
                np.testing.assert_allclose(x[0], want, rtol=1e-8, atol=1e-12)
    models.assert_trees_close(own, replicated(params, devices))
    assert state.step_counter.shape == state.damping.shape == (devices,)


def test_burn_in_on_devices():
    devices = jax.local_device_count()
    many = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        0.0,
        estimation_mode="fisher_exact",
        num_burnin_steps=1,
        multi_device=True,
    )
    steps = [spread(batch, devices) for batch in batches(2, 2 * devices)]
    own, keys = replicated(PARAMS, devices), jax.random.split(KEY, devices)
    state = many.init(own, keys, steps[0])
    _, state, _ = many.step(own, state, keys, iter(steps), **RATES)
    one = kfac_jax.Optimizer(
        VALUE_AND_GRAD, 0.0, estimation_mode="fisher_exact", num_burnin_steps=1
    )
    start = one.init(PARAMS, KEY, BATCH)
    iterator = iter(batches(2, 2 * devices))
    _, expected, _ = one.step(PARAMS, start, KEY, iterator, **RATES)
    models.assert_trees_close(
        state.estimator_state.factors,
        replicated(expected.estimator_state.factors, devices),
    )


# ---------------------------------------------------------------- parameters and losses


class Dense(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (
            lambda p: [[*p["layer0"].values()], [*p["layer1"].values()]],
            lambda q: {
                name: {"w": w, "b": b}
                for name, (w, b) in zip(("layer0", "layer1"), q, strict=True)
            },
        ),
        (
            lambda p: {name: Dense(**part) for name, part in p.items()},
            lambda q: {name: part._asdict() for name, part in q.items()},
        ),
        (
            lambda p: nnx.State(jax.tree.map(lambda x: nnx.Param(jnp.asarray(x)), p)),
            nnx.to_pure_dict,
        ),
        (
            lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), p),
            lambda q: q,
        ),
    ],
    ids=["lists", "named tuples", "nnx.State", "float32"],
)
def test_parameters_of_any_tree(wrap, unwrap):
    start = wrap(PARAMS)
    dtype = jax.tree.leaves(start)[0].dtype

    def function(params, batch):
        return loss_fn(unwrap(params), (batch[0].astype(dtype), batch[1]))

    optimizer = kfac_jax.Optimizer(jax.value_and_grad(function), **EXACT)
    params, state, stats = train(optimizer, start, [BATCH] * 2, **RATES)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert jax.tree.structure(state.velocities) == jax.tree.structure(start)
    assert [x.dtype for x in jax.tree.leaves(params)] == [
        x.dtype for x in jax.tree.leaves(start)
    ]
    assert stats[1]["loss"] < stats[0]["loss"]
    assert {layer.kind for layer in optimizer.curvature.layers} == {"dense"}


def wavefunction(params, x):
    """Log ψ of one walker, with the same weights for each of its two particles."""
    h = jnp.tanh(models.dense(params["layer0"], x.reshape(2, 3)))
    return (h.sum(0) @ params["layer1"]["w"]).sum() - 0.5 * jnp.square(x).sum()


def energy(axis):
    """As usual, the gradient is not that of the value, and the tag is in a rule."""
    many = jax.vmap(wavefunction, (None, 0))

    def mean(x):
        return jax.lax.pmean(x.mean(), axis) if axis else x.mean()

    def local(params, x):
        slope = jax.vmap(jax.grad(wavefunction, 1), (None, 0))(params, x)
        return 0.5 * jnp.square(slope).sum(-1) + jnp.square(x).sum(-1)

    @jax.custom_jvp
    def total(params, key, walkers):
        del key
        each = local(params, walkers)
        return mean(each), {"local": each}

    @total.defjvp
    def rule(primals, tangents):
        params, _, walkers = primals
        loss, aux = total(*primals)
        psi, slope = jax.jvp(many, (params, walkers), (tangents[0], tangents[2]))
        kfac_jax.register_normal_predictive_distribution(psi[:, None])
        gradient = jnp.dot(slope, aux["local"] - loss) / len(walkers)
        return (loss, aux), (gradient, jax.tree.map(jnp.zeros_like, aux))

    return total


@pytest.mark.parametrize("multi_device", [False, True])
def test_a_neural_wavefunction(multi_device):
    walkers = models.array(30, 16, 6)
    params = {
        "layer0": PARAMS["layer0"],
        "layer1": {"w": models.array(31, 5, 1)},
    }
    axis = "devices" if multi_device else None
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(energy(axis), argnums=0, has_aux=True),
        l2_reg=0.0,
        norm_constraint=1e-3,
        value_func_has_aux=True,
        value_func_has_rng=True,
        learning_rate_schedule=lambda t: 0.05 / (1 + t.astype(float) / 10000),
        curvature_ema=0.95,
        inverse_update_period=1,
        min_damping=1e-4,
        num_burnin_steps=0,
        register_only_generic=False,
        estimation_mode="fisher_exact",
        pmap_axis_name="devices",
        multi_device=multi_device,
    )
    devices = jax.local_device_count() if multi_device else 1
    keys, momentum, damping = KEY, jnp.zeros(()), jnp.asarray(1e-3)
    own = params
    if multi_device:
        keys = jax.random.split(KEY, devices)
        own, momentum, damping = replicated((own, momentum, damping), devices)
        walkers = spread(walkers, devices)
    own, _, stats = optimizer.step(
        params=own,
        state=optimizer.init(own, keys, walkers),
        rng=keys,
        batch=walkers,
        momentum=momentum,
        damping=damping,
    )
    kinds = {layer.name: layer.kind for layer in optimizer.curvature.layers}
    assert kinds == {"layer0": "dense", "layer1/w": "dense"}

    # the same by hand: F of the registered outputs, the gradient of the program
    x = walkers.reshape(-1, 6)
    _, grads = jax.value_and_grad(energy(None), has_aux=True)(params, KEY, x)
    curvature = optimizer.curvature
    factors = curvature.init_factors(params)

    def registered(params, x):
        psi = jax.vmap(wavefunction, (None, 0))(params, x)
        kfac_jax.register_normal_predictive_distribution(psi[:, None])
        return psi.sum()

    plain = kfac_jax.make_curvature(
        registered,
        params,
        x,
        estimation_mode="fisher_exact",
        blocks=kfac_jax.blocks.Kronecker(exact_scalars=True),
    )
    _, _, seen = plain.value_grad_and_statistics(params, x)
    operator = plain.approximation(plain.update_factors(factors, seen, 1))
    step = operator.solve(grads, damping=1e-3)
    length = optax.tree.vdot(step, grads) * 0.05**2
    scale = 0.05 * np.sqrt(min(1.0, 1e-3 / float(length)))
    expected = jax.tree.map(lambda p, s: p - scale * s, params, step)
    if multi_device:
        own = jax.tree.map(lambda x: x[-1], models.on_host(own))
    models.assert_trees_close(own, expected)
    np.testing.assert_allclose(
        np.ravel(stats["scaled_grad_norm_sq"])[0], length, rtol=1e-8
    )


def test_tags_that_are_thrown_away_do_no_harm():
    def function(params, batch):
        x, labels = batch
        w, b = params["layer0"]["w"], params["layer0"]["b"]
        y = models.dense(params["layer0"], x)
        kfac_jax.register_dense(y, x, w, b, variant="repeated_dense", note=[1])
        z = models.dense(params["layer1"], jnp.tanh(y))
        kfac_jax.register_softmax_cross_entropy_loss(z, labels)
        return cross_entropy(z, labels)

    tagged = kfac_jax.Optimizer(jax.value_and_grad(function), **EXACT)
    plain = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    models.assert_trees_close(
        train(tagged, PARAMS, [BATCH], **RATES)[0],
        train(plain, PARAMS, [BATCH], **RATES)[0],
    )


def test_another_function_for_the_curvature():
    def estimator(params, batch):
        z = models.mlp(params, batch[0])
        kfac_jax.register_squared_error_loss(z)
        return z.sum()

    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD, value_func_for_estimator=estimator, **EXACT
    )
    _, state, stats = train(optimizer, PARAMS, [BATCH], **RATES)
    np.testing.assert_allclose(stats[0]["loss"], loss_fn(PARAMS, BATCH))
    # squared errors have the Fisher 2 I of each case
    factor = state.estimator_state.factors["layer1"]["output"]
    np.testing.assert_allclose(factor, 2 * np.eye(4), atol=1e-12)


def test_generic_blocks_only():
    for options in (
        {"register_only_generic": True},
        {"auto_register_kwargs": {"register_only_generic": True}},
    ):
        optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT, **options)
        _, _, stats = train(optimizer, PARAMS, [BATCH] * 2, **RATES)
        assert {layer.kind for layer in optimizer.curvature.layers} == {"generic"}
        assert stats[1]["loss"] < stats[0]["loss"]


def test_batches_are_processed_and_measured():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        batch_process_func=lambda batch: batch["data"],
        batch_size_extractor=lambda batch: batch["size"],
        debug=True,
        **EXACT,
    )
    batch = {"data": BATCH, "size": 5}
    _, _, stats = train(optimizer, PARAMS, [batch], **RATES)
    assert int(stats[0]["data_seen"]) == 5


def test_norms():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        include_norms_in_stats=True,
        include_per_param_norms_in_stats=True,
        norm_constraint=1e-4,
        invalid_metric_value=-1.0,
        **EXACT,
    )
    params, state, (stats,) = train(optimizer, PARAMS, [BATCH], **RATES)
    grads = jax.grad(loss_fn)(PARAMS, BATCH)
    np.testing.assert_allclose(stats["grad_norm"], optax.tree.norm(grads))
    np.testing.assert_allclose(stats["param_norm"], optax.tree.norm(params))
    np.testing.assert_allclose(stats["update_norm"], optax.tree.norm(state.velocities))
    np.testing.assert_allclose(stats["precon_grad_norm"] * 0.1, stats["update_norm"])
    norm = jnp.linalg.norm(grads["layer1"]["w"])
    np.testing.assert_allclose(stats["grad_norm(layer1/w)"], norm)
    assert stats["learning_rate"] == 0.1
    assert stats["rho"] == stats["new_loss"] == -1.0
    # α² Δᵀ∇h, of which the update has what the constraint leaves
    delta = jax.tree.map(jnp.subtract, params, PARAMS)
    constrained = -0.1 * optax.tree.vdot(delta, grads)
    square = stats["scaled_grad_norm_sq"]
    np.testing.assert_allclose(constrained, np.sqrt(1e-4 * square))
    assert square > 1e-4


def test_printing_tells_what_each_parameter_got():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    assert "its plan is made by the first init or step" in repr(optimizer)
    with pytest.raises(ValueError, match="The plan is made when arguments are first"):
        _ = optimizer.curvature
    optimizer.init(PARAMS, KEY, BATCH)
    assert "layer0/w" in repr(optimizer)
    assert optimizer.curvature.loss_fn(PARAMS, BATCH)[0] == loss_fn(PARAMS, BATCH)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_exact_inverses": True}, "does not offer use_exact_inverses"),
        ({"use_step_rejection": True}, "does not offer use_step_rejection"),
        ({"precon_power": -0.5}, "approximation(factors).power"),
        ({"custom_estimator_ctor": object}, "does not offer custom_estimator_ctor"),
        ({"precon_damping_mult": 2.0}, "SeparateDamping"),
        ({"regularized_parameters_path_exclusions": "b"}, "l2_reg=0"),
        ({"use_adaptive_momentum": True}, "with a given learning rate"),
        ({"use_adaptive_damping": True}, "needs initial_damping"),
        (ADAPTIVE | {"norm_constraint": 1.0}, "limits a given learning rate"),
        (ADAPTIVE | {"momentum_schedule": lambda t: 0.9}, "at most one way to choose"),
        ({"auto_register_kwargs": {"patterns": ()}}, "are no options of it"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kfac_jax.Optimizer(VALUE_AND_GRAD, **(EXACT | options))


def test_a_number_is_no_schedule():
    with pytest.raises(TypeError, match="must be a function of the step, or None"):
        kfac_jax.Optimizer(VALUE_AND_GRAD, learning_rate_schedule=0.1)


def test_unneeded_options_are_accepted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac_jax.Optimizer(
            VALUE_AND_GRAD,
            distributed_inverses=False,
            distributed_precon_apply=False,
            should_vmap_estimator_samples=True,
            auto_register_kwargs={"graph_patterns": ()},
        )
    with pytest.warns(UserWarning, match="has no patterns to skip"):
        kfac_jax.Optimizer(VALUE_AND_GRAD, patterns_to_skip=("scale_and_shift",))


def test_each_rate_in_one_way():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD, learning_rate_schedule=lambda t: 0.1, **EXACT
    )
    step = functools.partial(optimizer.step, PARAMS, None, KEY)
    with pytest.raises(ValueError, match="one of data_iterator and batch; got neither"):
        step()
    with pytest.raises(ValueError, match="one of data_iterator and batch; got both"):
        step(iter([BATCH]), BATCH)
    with pytest.raises(ValueError, match="Nothing chooses the momentum"):
        step(batch=BATCH, damping=1.0)
    with pytest.raises(ValueError, match="expected step without learning_rate="):
        step(batch=BATCH, **RATES)


def test_a_batch_without_cases_needs_an_extractor():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    state = optimizer.init(PARAMS, KEY, BATCH)
    with pytest.raises(ValueError, match="leading axis of cases"):
        optimizer.step(PARAMS, state, KEY, batch={"size": 3, "z": BATCH}, **RATES)
