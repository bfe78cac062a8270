"""`kfac` and `scale_by_kfac` as optax transformations, under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from tests.helpers.models import assert_trees_close, assert_trees_equal, traced_once

ADAPTIVE = (
    kfac_jax.QuadraticModel(),
    None,
    kfac_jax.LevenbergMarquardt(1.0, every=2),
)


def loss_fn(params, x, y):
    first, second = params["first"], params["second"]
    h = x @ first["w"]
    h = jnp.tanh(h + jnp.broadcast_to(first["b"], h.shape))
    logits = h @ second["w"]
    logits = logits + jnp.broadcast_to(second["b"], logits.shape)
    losses = kfac_jax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean()


def make_params(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    params = {
        "first": {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)},
        "second": {"w": rng.normal(size=(4, 5)), "b": rng.normal(size=5)},
    }
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def make_batch(seed, dtype=float, cases=8):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(cases, 3)), rng.integers(0, 5, cases)
    return jnp.asarray(x, dtype), jnp.asarray(y)


def make_batches(count):
    return jax.tree.map(lambda *b: jnp.stack(b), *map(make_batch, range(count)))


@functools.cache
def plan(dtype=float):
    return kfac_jax.make_curvature(
        loss_fn, make_params(0, dtype), *make_batch(0, dtype)
    )


@functools.cache
def gathered(seed=0):
    """Parameters, gradient and statistics that most tests start from."""
    compute = jax.jit(plan().value_grad_and_statistics)
    params = make_params()
    _, grads, statistics = compute(params, *make_batch(seed), rng=jax.random.key(seed))
    return params, grads, statistics


def full_step(tx, params, state, batch, key, curvature=None):
    value, grads, statistics = (curvature or plan()).value_grad_and_statistics(
        params, *batch, rng=key
    )
    updates, state = tx.update(
        grads, state, params, statistics=statistics, value=value, args=batch
    )
    return optax.apply_updates(params, updates), state


def run(tx, steps=3):
    """Updates from the same gradients and statistics, and the state after them."""
    params, grads, statistics = gathered()
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = update(grads, state, params, statistics=statistics)
    return updates, state


@functools.cache
def reference():
    """Three updates of `kfac` with its defaults but damping."""
    return run(kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None))


# ------------------------------------------------------------------------- combinations


def test_kfac_is_a_chain_of_its_parts():
    chain = optax.chain(
        kfac_jax.scale_by_kfac(plan(), 0.2),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )
    assert isinstance(chain, optax.GradientTransformationExtraArgs)
    assert_trees_close(run(chain)[0], reference()[0])


def test_chain_after_weight_decay_and_clipping():
    params, grads, _ = gathered()
    inner = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    decayed = optax.chain(optax.add_decayed_weights(0.01), inner)
    by_hand = jax.tree.map(lambda g, p: g + 0.01 * p, grads, params)
    expected, _ = inner.update(
        by_hand, inner.init(params), params, statistics=gathered()[2]
    )
    assert_trees_close(run(decayed, 1)[0], expected)
    clipped = run(optax.chain(inner, optax.clip(1e-3)), 1)[0]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(clipped)) == 1e-3


@pytest.mark.parametrize("prefix", [False, True])
def test_masked_freezes_a_layer(prefix):
    """Also where the mask is a prefix of the parameters, as optax allows."""
    mask = {"first": False, "second": True}
    if not prefix:
        mask = {name: {"w": keep, "b": keep} for name, keep in mask.items()}
    inner = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    frozen = jax.tree.map(lambda m: not m, mask)
    tx = optax.chain(
        optax.masked(inner, mask), optax.masked(optax.set_to_zero(), frozen)
    )
    updates, _ = run(tx)
    assert_trees_close(updates["second"], reference()[0]["second"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["first"]))


def test_masked_within_a_layer_keeps_the_rest_of_it():
    """A hidden bias counts as zero in its layer's gradient and gets no update."""
    mask = {"first": {"w": True, "b": False}, "second": {"w": True, "b": True}}
    params, grads, statistics = gathered()
    inner = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    updates, _ = run(optax.masked(inner, mask), 1)
    without = {**grads, "first": {**grads["first"], "b": 0 * grads["first"]["b"]}}
    expected, _ = inner.update(
        without, inner.init(params), params, statistics=statistics
    )
    assert_trees_close(updates["first"]["w"], expected["first"]["w"])
    assert_trees_close(updates["first"]["b"], grads["first"]["b"])


@pytest.mark.parametrize("prefix", [False, True])
def test_partition_gives_each_layer_its_own_transformation(prefix):
    labels = {"first": "sgd", "second": "kfac"}
    if not prefix:
        labels = {name: {"w": label, "b": label} for name, label in labels.items()}
    inner = {
        "sgd": optax.sgd(0.5),
        "kfac": kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None),
    }
    updates, _ = run(optax.partition(inner, labels))
    grads = gathered()[1]
    assert_trees_close(updates["second"], reference()[0]["second"])
    assert_trees_close(
        updates["first"], jax.tree.map(lambda g: -0.5 * g, grads["first"])
    )


def test_adaptive_rules_refuse_masked_parameters_clearly():
    """They would need the whole update, of which a mask shows a part."""
    mask = {"first": {"w": False, "b": False}, "second": {"w": True, "b": True}}
    params, grads, statistics = gathered()
    tx = optax.masked(kfac_jax.kfac(plan(), *ADAPTIVE), mask)
    with pytest.raises(ValueError, match="mask"):
        tx.update(
            grads,
            tx.init(params),
            params,
            statistics=statistics,
            value=1.0,
            args=make_batch(0),
        )


def test_injected_hyperparameters_change_without_compiling_again():
    tx = optax.inject_hyperparams(kfac_jax.kfac)(
        plan(), learning_rate=0.1, momentum=0.5, damping=0.2, decay=0.9, inverse_every=1
    )
    params, grads, statistics = gathered()
    update = jax.jit(traced_once(tx.update))
    state = tx.init(params)
    for rate, damping in ((0.1, 0.2), (0.05, 0.2), (0.05, 3.0)):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        state.hyperparams["damping"] = jnp.asarray(damping)
        before = state.inner_state
        updates, state = update(grads, state, params, statistics=statistics)
        plain = kfac_jax.kfac(plan(), rate, 0.5, damping, decay=0.9, inverse_every=1)
        expected, after = plain.update(grads, before, params, statistics=statistics)
        assert_trees_close(updates, expected)
        assert_trees_close(state.inner_state.info, after.info)
    assert update._cache_size() <= 1  # or 0, where JAX has forgotten it


def test_injected_schedules_and_norm_constraint():
    tx = optax.inject_hyperparams(kfac_jax.kfac)(
        plan(),
        learning_rate=optax.linear_schedule(0.1, 0.0, 2),
        damping=0.2,
        norm_constraint=1e-4,
    )
    _, state = run(tx, 3)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.0, atol=1e-7)
    np.testing.assert_allclose(state.inner_state.info.learning_rate, 0.0, atol=1e-7)
    assert np.all([np.isfinite(x).all() for x in jax.tree.leaves(state.hyperparams)])


def test_multi_steps_averages_gradients_and_steps_once():
    """Statistics add up by themselves: pass the sum with the last micro-batch."""
    with jax.numpy_dtype_promotion("standard"):  # optax divides by an int32
        check_multi_steps()


def check_multi_steps():
    inner = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    tx = optax.MultiSteps(inner, 2)
    params, grads, statistics = gathered()
    none = plan().zero_statistics(params)
    update = jax.jit(tx.update)
    state = tx.init(params)
    first = jax.tree.map(lambda g: 3 * g, grads)
    updates, state = update(first, state, params, statistics=none)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(state.inner_opt_state.step) == 0
    second = jax.tree.map(lambda g: -g, grads)
    updates, state = update(second, state, params, statistics=statistics)
    assert int(state.inner_opt_state.step) == 1
    expected, inner_state = inner.update(
        grads, inner.init(params), params, statistics=statistics
    )
    # optax weighs the mean in float32
    assert_trees_close(updates, expected, rtol=1e-6)
    assert_trees_close(state.inner_opt_state, inner_state, rtol=1e-6)


def test_apply_if_finite_keeps_the_inner_state():
    inner = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    tx = optax.apply_if_finite(inner, 3)
    params, grads, statistics = gathered()
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params, statistics=statistics)
    nan = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, after = update(nan, state, params, statistics=statistics)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(after.total_notfinite) in (0, 1)  # kfac's own guard may come first
    updates, after = update(grads, after, params, statistics=statistics)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_flax_nnx_optimizer():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 5, rngs=rngs, param_dtype=float)

        def __call__(self, x):
            return self.layer(x)

    model = Model(nnx.Rngs(0))
    graph, start = nnx.split(model, nnx.Param)

    def nnx_loss(params, x, y):
        logits = nnx.merge(graph, params)(x)
        losses = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits, y).mean()

    batch = make_batch(0)
    curvature = kfac_jax.make_curvature(nnx_loss, start, *batch)
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 0.2, norm_constraint=None)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        params = nnx.state(model, nnx.Param)
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *batch, rng=key
        )
        optimizer.update(model, grads, statistics=statistics, value=value)
        return value

    # nnx updates the model's variables in place, and `start` is made of them
    expected = jax.tree.map(jnp.copy, start)
    state = tx.init(expected)
    plain = jax.jit(functools.partial(full_step, tx, curvature=curvature))
    for i in range(3):
        key = jax.random.key(i)
        step(model, optimizer, key)
        expected, state = plain(expected, state, batch, key)
    assert_trees_close(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(expected)
    )
    assert int(optimizer.opt_state.step[...]) == 3


def test_variables_of_flax_that_the_loss_writes_may_be_arguments(user_settings):
    """Rules evaluate the loss in a branch of its own, statistics in a derivative's."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 5, rngs=rngs)
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] = self.calls[...] + 1
            return self.layer(x)

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, rest, x, y):
        model = nnx.merge(graph, params, rest)
        loss = kfac_jax.losses.squared_error(model(x), y).sum(-1).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    batch = jnp.ones((4, 3)), jnp.zeros((4, 5))
    curvature = kfac_jax.make_curvature(
        loss_fn, params, rest, *batch, has_aux=True, batch_argnums=(1, 2)
    )
    tx = kfac_jax.kfac(curvature)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    key, state = jax.random.key(0), tx.init(params)
    _, _, (_, after) = step(params, state, key, rest, *batch)
    assert rest["calls"][...] == 0 and after["calls"][...] == 1


# ------------------------------------------------------------------ JAX transformations


def make_keys(seed=0):
    return jax.random.split(jax.random.key(seed), 4)


@functools.cache
def adaptive_step():
    """The jitted adaptive step that several tests share."""
    return jax.jit(functools.partial(full_step, kfac_jax.kfac(plan(), *ADAPTIVE)))


@functools.cache
def adaptive_run(seed=0, steps=4):
    """Parameters and state after a python loop of adaptive steps."""
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)
    params = make_params(seed)
    state = tx.init(params)
    keys = make_keys(seed)
    for i in range(steps):
        params, state = adaptive_step()(params, state, make_batch(i), keys[i])
    return params, state


def test_scan_over_an_epoch_equals_a_loop():
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)

    @jax.jit
    def epoch(params, state, batches, keys):
        def body(carry, inputs):
            return full_step(tx, *carry, *inputs), None

        return jax.lax.scan(body, (params, state), (batches, keys))[0]

    params = make_params()
    keys = make_keys()
    actual = epoch(params, tx.init(params), make_batches(4), keys)
    assert_trees_close(actual, adaptive_run())


def test_vmap_over_seeds_equals_a_loop():
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)
    runs = [adaptive_run(seed) for seed in range(3)]
    params = jax.tree.map(lambda *p: jnp.stack(p), *map(make_params, range(3)))
    keys = [make_keys(seed) for seed in range(3)]
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(functools.partial(full_step, tx), in_axes=(0, 0, None, 0)))
    for i in range(4):
        step_keys = jnp.stack([k[i] for k in keys])
        params, state = step(params, state, make_batch(i), step_keys)
    expected = jax.tree.map(lambda *p: jnp.stack(p), *runs)
    assert_trees_close((params, state), expected, rtol=1e-7)


@pytest.mark.parametrize("options", [(0.1, 0.9, 0.2), ADAPTIVE])
def test_25_steps_compile_once(options):
    """The state after a step has the types of the state before it, weak ones too."""
    tx = kfac_jax.kfac(plan(), *options)

    @jax.jit
    @traced_once
    def step(*args):
        return full_step(tx, *args)

    params = make_params()
    state = tx.init(params)
    for i in range(25):
        params, state = step(params, state, make_batch(i), jax.random.key(i))
    assert step._cache_size() <= 1  # or 0, where JAX has forgotten it
    assert int(state.step) == 25


def test_buffers_can_be_donated():
    """Parameters and state are donated, and no two leaves share a buffer."""
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)
    donating = jax.jit(functools.partial(full_step, tx), donate_argnums=(0, 1))
    params = make_params()
    state = tx.init(params)
    leaves = jax.tree.leaves((params, state))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    keys = make_keys()
    for i in range(4):
        old = jax.tree.leaves((params, state.factors, state.inverses, state.velocity))
        params, state = donating(params, state, make_batch(i), keys[i])
        assert all(leaf.is_deleted() for leaf in old)
    assert_trees_close((params, state), adaptive_run())


def test_the_library_itself_never_donates():
    params, grads, statistics = gathered()
    tx = kfac_jax.kfac(plan(), 0.1, 0.9, 0.2, norm_constraint=None)
    state = tx.init(params)
    tx.update(grads, state, params, statistics=statistics)
    given = jax.tree.leaves((params, grads, statistics, state))
    assert not any(leaf.is_deleted() for leaf in given)


@pytest.mark.parametrize("kind", ["scale_by_kfac", "kfac"])
def test_update_leaves_its_inputs_alone(kind):
    params, grads, statistics = gathered()
    tx = getattr(kfac_jax, kind)(plan(), damping=0.2)
    state = tx.init(params)
    given = (grads, state, params, statistics)
    copies = jax.tree.map(np.array, given)
    ids = [id(leaf) for leaf in jax.tree.leaves(given)]
    factors, keys = state.factors, list(state.factors)
    more = {"value": jnp.ones(()), "args": make_batch(0)}
    tx.update(grads, state, params, statistics=statistics, **more)
    assert [id(leaf) for leaf in jax.tree.leaves(given)] == ids
    assert state.factors is factors and list(factors) == keys
    assert_trees_equal(jax.tree.map(np.array, given), copies)


@pytest.mark.slow
def test_disable_jit_gives_the_same():
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)
    params = make_params()
    state = tx.init(params)
    with jax.disable_jit():
        after = full_step(tx, params, state, make_batch(0), make_keys()[0])
    assert_trees_close(after, adaptive_run(0, 1), rtol=1e-7)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("options", [(0.1, 0.9, 0.2), ADAPTIVE])
def test_debug_nans_finds_none(options, compiled):
    """What was not computed is NaN in Info, but is no result of a computation."""
    tx = kfac_jax.kfac(plan(), *options)
    with jax.debug_nans(True):
        params = make_params()
        state = tx.init(params)
        step = functools.partial(full_step, tx)
        step = jax.jit(step) if compiled else step
        for i in range(2):
            params, state = step(params, state, make_batch(i), jax.random.key(i))
    assert int(state.step) == 2


@pytest.mark.slow
def test_no_tracer_leaks():
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)
    params = make_params()
    state = tx.init(params)
    with jax.checking_leaks():
        step = jax.jit(functools.partial(full_step, tx))
        params, state = step(params, state, make_batch(0), jax.random.key(0))

        @jax.jit
        def planned_inside(params, batch):
            curvature = kfac_jax.make_curvature(loss_fn, params, *batch)
            inner = kfac_jax.kfac(curvature, 0.1, 0.9, 0.2, norm_constraint=None)
            return full_step(
                inner, params, inner.init(params), batch, jax.random.key(0), curvature
            )

        planned_inside(params, make_batch(0))
    assert int(state.step) == 1


def test_init_works_on_shapes_and_inside_jit():
    tx = kfac_jax.kfac(plan(), *ADAPTIVE)
    params = make_params()
    shapes = jax.eval_shape(tx.init, params)
    assert_trees_equal(jax.jit(tx.init)(params), tx.init(params))
    assert jax.tree.structure(shapes) == jax.tree.structure(tx.init(params))


def signature(tree):
    return jax.tree.map(
        lambda a: (a.shape, a.dtype, bool(getattr(a, "weak_type", False))), tree
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize(
    "kind", ["scale_by_kfac", "kfac", "fixed", "constrained", "adaptive", "separate"]
)
def test_state_keeps_its_structure_and_types(dtype, x64, kind):
    if dtype == jnp.float64 and not x64:
        pytest.skip("float64 needs x64")
    with jax.enable_x64(x64):
        params, batch = make_params(0, dtype), make_batch(0, dtype)
        curvature = kfac_jax.make_curvature(loss_fn, params, *batch)
        tx = {
            "scale_by_kfac": kfac_jax.scale_by_kfac(curvature),
            "kfac": kfac_jax.kfac(curvature),
            "fixed": kfac_jax.kfac(curvature, optax.constant_schedule(0.1), 0.9, 1e-3),
            "constrained": kfac_jax.kfac(curvature, 0.1, norm_constraint=1e-3),
            "adaptive": kfac_jax.kfac(curvature, *ADAPTIVE),
            "separate": kfac_jax.kfac(
                curvature, *ADAPTIVE, factored_damping=kfac_jax.SeparateDamping()
            ),
        }[kind]
        key = jax.random.key(0)

        def update(params, state):
            value, grads, statistics = curvature.value_grad_and_statistics(
                params, *batch, rng=key
            )
            return tx.update(
                grads, state, params, statistics=statistics, value=value, args=batch
            )

        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(update, params, state)
        assert signature(after) == signature(state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert signature(updates) == signature(params)
        wide = {str(leaf.dtype) for leaf in jax.tree.leaves(state.factors)}
        assert wide == {"float64" if dtype == jnp.float64 else "float32"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_parameters_take_finite_steps_that_help(dtype):
    curvature = plan(dtype)
    tx = kfac_jax.kfac(curvature, *ADAPTIVE)
    params, batch = make_params(0, dtype), make_batch(0, dtype)
    start = float(loss_fn(params, *batch))
    step = jax.jit(functools.partial(full_step, tx, curvature=curvature))
    state = tx.init(params)
    for i in range(5):
        params, state = step(params, state, batch, jax.random.key(i))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert float(loss_fn(params, *batch)) < 0.7 * start
    assert int(state.info.skipped_updates) == 0
