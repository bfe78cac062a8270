"""Second moments of inputs alone, and what preconditions by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import blocks, losses
from tests.helpers import models

N = 12
X = models.array(0, N, 5)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 6, (N, 4)))
IMAGES = models.array(2, N, 6, 6, 2)
PARAMS = models.dense_params(3, 5, 4, 3)

make = functools.partial(kfac_jax.make_curvature, estimation_mode="inputs")


def unregistered(params, x):
    return jnp.square(models.mlp(params, x)).mean()


def homogeneous(x):
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def moment(rows):
    return np.asarray(rows).T @ np.asarray(rows) / len(rows)


def factors_of(loss_fn, params, *args, **options):
    curvature = make(loss_fn, params, *args, **options)
    value, grads, statistics = curvature.value_grad_and_statistics(params, *args)
    expected = jax.value_and_grad(loss_fn)(params, *args)
    models.assert_trees_close((value, grads), expected, rtol=1e-9, atol=1e-12)
    start = curvature.init_factors(params)
    return curvature.update_factors(start, statistics, 1)


def test_no_loss_must_be_registered():
    found = factors_of(unregistered, PARAMS, X)
    hidden = jnp.tanh(models.dense(PARAMS["layer0"], X))
    np.testing.assert_allclose(found["layer0"]["input"], moment(homogeneous(X)))
    np.testing.assert_allclose(found["layer1"]["input"], moment(homogeneous(hidden)))
    assert {*found["layer0"]} == {"input"}


def test_a_convolution_has_its_patches():
    kernel = models.array(4, 3, 3, 2, 3)

    def loss_fn(kernel, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", None, None, dims)
        return jnp.tanh(y).sum((1, 2, 3)).mean()

    (found,) = factors_of(loss_fn, kernel, IMAGES).values()
    rows = [  # features: channels, then places
        IMAGES[n, i : i + 3, j : j + 3].transpose(2, 0, 1).reshape(-1)
        for n in range(N)
        for i in range(4)
        for j in range(4)
    ]
    np.testing.assert_allclose(found["input"], moment(jnp.stack(rows)), rtol=1e-9)


def test_a_table_has_frequencies_and_masked_tokens_do_not_count():
    params = {"table": models.array(5, 6, 3), "w": models.array(6, 3, 2)}
    mask = jnp.arange(4) < 3

    def loss_fn(p, ids):
        z = jnp.tanh(p["table"][ids]) @ p["w"]
        return jnp.where(mask[None], jnp.square(z).sum(-1), 0.0).mean()

    found = factors_of(loss_fn, params, IDS)
    kept = np.asarray(IDS)[:, :3].reshape(-1)
    frequencies = np.bincount(kept, minlength=6) / len(kept)
    np.testing.assert_allclose(found["table"]["input_diagonal"], frequencies)
    hidden = jnp.tanh(params["table"][kept])
    np.testing.assert_allclose(found["w"]["input"], moment(hidden), rtol=1e-9)


def test_layers_of_a_scan_have_their_own():
    stack = jnp.stack([models.array(i, 5, 5) for i in range(3)])

    def loss_fn(stack, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jnp.square(jax.lax.scan(body, x, stack)[0]).mean()

    (found,) = factors_of(loss_fn, stack, X).values()
    x = X
    for w, own in zip(stack, found["input"], strict=True):
        np.testing.assert_allclose(own, moment(x), rtol=1e-9)
        x = jnp.tanh(x @ w)


def test_batch_norm_keeps_the_gradient_of_one_pass():
    def loss_fn(params, x):
        h = models.dense(params["layer0"], x)
        h = (h - h.mean(0)[None]) / jnp.sqrt(h.var(0) + 1e-3)[None]
        return jnp.square(models.dense(params["layer1"], jnp.tanh(h))).mean()

    found = factors_of(loss_fn, PARAMS, X)
    np.testing.assert_allclose(found["layer0"]["input"], moment(homogeneous(X)))


def test_it_costs_no_further_backward_pass():
    """The gradient's products, and one for each layer's inputs."""
    curvature = make(unregistered, PARAMS, X)

    def products(function):
        text = str(jax.make_jaxpr(function)(PARAMS, X))
        return text.count("dot_general[")

    own = products(curvature.value_grad_and_statistics)
    assert own == products(jax.value_and_grad(unregistered)) + 2
    moments = N * (6 * 6 + 5 * 5)
    assert curvature.totals.statistics_cost == moments


def test_weights_inside_of_a_function_with_a_rule_have_the_rules_gradient():
    @jax.custom_vjp
    def layer(w, x):
        return jnp.tanh(x @ w)

    def forward(w, x):
        return layer(w, x), (w, x)

    def backward(saved, dy):
        pull = jax.vjp(lambda w, x: jnp.tanh(x @ w), *saved)[1]
        return pull(dy)

    layer.defvjp(forward, backward)
    w = models.array(7, 5, 3)
    (found,) = factors_of(lambda w, x: jnp.square(layer(w, x)).mean(), w, X).values()
    np.testing.assert_allclose(found["input"], moment(X))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_registered_losses_count_their_cases(fraction):
    """Masks tell how many cases a batch counts for, in `over` and across batches."""
    mask = jnp.arange(N) < 7

    def loss_fn(p, x, mask):
        z = models.mlp(p, x)
        kfac_jax.register_squared_error_loss(z, jnp.zeros_like(z))
        return jnp.where(mask, jnp.square(z).sum(-1), 0.0).mean() * (N / 7)

    curvature = make(loss_fn, PARAMS, X, mask, statistics_fraction=fraction)
    value, grads, statistics = curvature.value_grad_and_statistics(PARAMS, X, mask)
    expected = jax.value_and_grad(loss_fn)(PARAMS, X, mask)
    models.assert_trees_close((value, grads), expected, rtol=1e-9, atol=1e-12)
    factors = curvature.update_factors(curvature.init_factors(PARAMS), statistics, 1)
    kept = min(7, int(N * fraction))
    np.testing.assert_allclose(
        factors["layer0"]["input"], moment(homogeneous(X[:kept])), rtol=1e-9
    )


def test_the_operator_of_a_data_set_counts_cases():
    curvature = make(unregistered, PARAMS, X)
    whole = curvature.at(PARAMS, X)
    parts = curvature.over(PARAMS, [(X[:8],), (X[8:],)])
    np.testing.assert_allclose(parts.to_dense(), whole.to_dense(), rtol=1e-9)
    v = jax.tree.map(jnp.ones_like, PARAMS)
    models.assert_trees_close(
        whole.matvec(whole.solve(v, 0.3)),
        jax.tree.map(lambda x, y: x - 0.3 * y, v, whole.solve(v, 0.3)),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("limit", [None, 3])
def test_powers_are_those_of_dense_algebra(power, limit):
    params = PARAMS | {"scale": jnp.ones(5)}

    def loss_fn(p, x):
        return unregistered({n: p[n] for n in PARAMS}, x * p["scale"][None])

    curvature = make(loss_fn, params, X, blocks=None if limit is None else rule(limit))
    tx = kfac_jax.scale_by_inputs(curvature, power, 0.2)
    _, grads, statistics = curvature.value_grad_and_statistics(params, X)
    updates, state = tx.update(grads, tx.init(params), params, statistics=statistics)
    hidden = jnp.tanh(models.dense(PARAMS["layer0"], X))
    for name, rows in (("layer0", X), ("layer1", hidden)):
        a = moment(homogeneous(rows))
        if limit is not None:
            a = np.diag(np.diag(a))
        w, u = np.linalg.eigh(a + 0.2 * np.trace(a) / len(a) * np.eye(len(a)))
        g = np.vstack([grads[name]["w"], grads[name]["b"][None]])
        expected = (u * w**power) @ u.T @ g
        found = np.vstack([updates[name]["w"], updates[name]["b"][None]])
        np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_array_equal(updates["scale"], grads["scale"])
    assert state.info.skipped_updates == 0


def rule(limit):
    def block(layer):
        return blocks.InputOnly(max_factor_dim=limit) if layer.tagged else None

    return lambda layer: blocks.Identity() if layer.kind == "scale" else block(layer)


def narrow(tree):
    """What is the same with and without 64 bits."""
    return jax.tree.map(
        lambda x: np.asarray(x).astype("i4" if x.dtype == int else "f4"), tree
    )


def test_newton_muon_is_a_chain(user_settings):
    start, x = narrow((PARAMS, X))
    curvature = make(unregistered, start, x)
    axes = kfac_jax.muon_dimension_numbers(curvature)
    tx = optax.chain(
        kfac_jax.scale_by_inputs(curvature),
        optax.contrib.muon(0.05, muon_weight_dimension_numbers=axes),
    )
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    params, state, found = start, tx.init(start), []
    for i in range(15):
        params, state, value = step(params, state, jax.random.key(i), x)
        found.append(float(value))
    assert found[-1] < 0.5 * found[0]


def test_muon_knows_inputs_and_outputs(user_settings):
    params = {
        "heads": models.array(0, 5, 2, 3),
        "back": models.array(1, 2, 3, 5),
        "kernel": models.array(2, 3, 3, 2, 4),
        "table": models.array(3, 6, 5),
        "stack": models.array(4, 3, 5, 5),
        "bias": jnp.zeros(5),
        "transposed": models.array(5, 2, 5),
    }

    def loss_fn(p, x, ids, images):
        x = x + p["table"][ids].mean(1)
        x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]
        heads = jnp.einsum("ni,iho->nho", x, p["heads"])
        x = jnp.einsum("nho,hoi->ni", jnp.tanh(heads), p["back"]) + p["bias"][None]
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            images, p["kernel"], (1, 1), "SAME", None, None, dims
        )
        return jnp.square(x @ p["transposed"].T).mean() + jnp.tanh(y).mean()

    params, *args = narrow((params, X, IDS, IMAGES))
    curvature = make(loss_fn, params, *args)
    found = kfac_jax.muon_dimension_numbers(curvature)
    numbers = optax.contrib.MuonDimensionNumbers
    assert found == {
        "heads": numbers((0,), (1, 2)),
        "back": numbers((0, 1), (2,)),
        "kernel": numbers((0, 1, 2), (3,)),
        "table": None,
        "stack": numbers((1,), (2,)),
        "bias": None,
        "transposed": numbers((1,), (0,)),
    }
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=found)
    grads = jax.grad(loss_fn)(params, *args)
    tx.update(grads, tx.init(params), params)


def test_muon_knows_the_axes_of_parts_in_their_parameters(user_settings):
    """Parts that are cut from an axis that the program has in another shape."""
    params = {"rows": models.array(0, 8, 4), "columns": models.array(1, 4, 8)}

    def loss_fn(p, x):
        rows = p["rows"].reshape(2, 4, 4)
        columns = p["columns"].reshape(4, 2, 4)
        for i in range(2):
            x = jnp.tanh(jnp.tanh(x @ rows[i]) @ columns[:, i])
        return jnp.square(x).mean()

    params, x = narrow((params, models.array(2, N, 4)))
    curvature = make(loss_fn, params, x)
    assert all(layer.boxes for layer in curvature.layers)
    found = kfac_jax.muon_dimension_numbers(curvature)
    numbers = optax.contrib.MuonDimensionNumbers((0,), (1,))
    assert found == {"rows": numbers, "columns": numbers}


def test_a_plan_with_other_statistics_is_refused():
    def loss_fn(p, x):
        z = jnp.tanh(x @ p["a"]) @ p["b"]
        return losses.squared_error(z, jnp.zeros((N, 3))).sum(-1).mean()

    params = {"a": models.array(0, 5, 4), "b": models.array(1, 4, 3)}
    mixed = {"a": blocks.InputOnly(), "b": blocks.Kronecker()}
    curvature = kfac_jax.make_curvature(loss_fn, params, X, blocks=mixed)
    with pytest.raises(ValueError, match="and no other statistics: expected a plan"):
        kfac_jax.scale_by_inputs(curvature)


def test_what_needs_output_gradients_is_refused():
    def with_loss(p, x):
        return losses.squared_error(models.mlp(p, x), jnp.zeros((N, 3))).sum(-1).mean()

    match = "gathers no output gradients: expected blocks"
    with pytest.raises(ValueError, match=match):
        make(unregistered, PARAMS, X, blocks=blocks.Kronecker())
    match = "gathers no output gradients: expected structure"
    with pytest.raises(ValueError, match=match):
        make(unregistered, PARAMS, X, structure=kfac_jax.BlockTridiagonal())
    curvature = make(with_loss, PARAMS, X)
    with pytest.raises(ValueError, match="kfac chooses its steps by the curvature of"):
        kfac_jax.kfac(curvature)
    other = kfac_jax.make_curvature(with_loss, PARAMS, X)
    with pytest.raises(ValueError, match="scale_by_inputs needs layers with"):
        kfac_jax.scale_by_inputs(other)
    with pytest.raises(ValueError, match=r"power \(p\) must be in"):
        kfac_jax.scale_by_inputs(curvature, 0.5)


def test_parameters_without_a_layer_keep_their_gradient_and_are_told():
    params = {"w": models.array(0, 5, 3), "c": models.array(1, 3, 3)}

    def loss_fn(p, x):
        return jnp.square(x @ p["w"] @ jnp.linalg.inv(p["c"])).mean()

    with pytest.warns(UserWarning, match="no layer covers no block of inputs"):
        curvature = make(loss_fn, params, X)
    tx = kfac_jax.scale_by_inputs(curvature)
    _, grads, statistics = curvature.value_grad_and_statistics(params, X)
    updates, _ = tx.update(grads, tx.init(params), params, statistics=statistics)
    np.testing.assert_array_equal(updates["c"], grads["c"])
    assert not np.allclose(updates["w"], grads["w"])


def test_inputs_of_a_sampled_mode_are_the_same():
    def with_loss(p, x):
        return losses.squared_error(models.mlp(p, x), jnp.zeros((N, 3))).sum(-1).mean()

    found = []
    for mode in ("inputs", "fisher_gradients", "fisher_exact"):
        curvature = kfac_jax.make_curvature(
            with_loss, PARAMS, X, estimation_mode=mode, blocks=blocks.InputOnly()
        )
        key = jax.random.key(0)
        found.append(curvature.at(PARAMS, X, rng=key).to_dense())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-9)
