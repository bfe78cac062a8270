"""Parameters that are tagged generic: their diagonal is exact in exact modes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax.losses import softmax_cross_entropy_with_integer_labels
from kfac_jax.statistics import alone
from kfac_jax.statistics.exact_diagonals import MOST_ENTRIES
from tests.helpers import models, oracles

N = 8
X = models.array(0, N, 3)
LABELS = models.classes(1, 4, N)


def _jastrow(params, h, x):
    """One number inside of a smooth function, and one used at two places."""
    alpha, r = params["alpha"], jnp.linalg.norm(x, axis=-1, keepdims=True)
    ratio = alpha[None] ** 2 / (alpha[None] + r)
    return h - 0.25 * ratio * jnp.tanh(h) + jnp.sin(alpha[None]) ** 3


def _mapped(params, h, x):
    """A vector through a function of its own."""
    return h * jax.nn.softplus(params["alpha"])[None] ** jnp.array([[1.0, 2, 1, 2]])


def _scanned(params, h, x):
    """In each step of a loop."""

    def step(h, _):
        return jnp.sin(h * jnp.exp(params["alpha"])[None]), None

    return jax.lax.scan(step, h, None, length=3)[0]


def _ruled(params, h, x):
    """Through a function with a rule of its own."""
    smooth = jax.custom_jvp(lambda a: jnp.log1p(jnp.exp(a)))
    smooth.defjvp(lambda p, t: (smooth(*p), jax.nn.sigmoid(*p) * t[0]))
    return h / smooth(params["alpha"])[None] ** 2


NETWORKS = {
    "jastrow": (_jastrow, 1),
    "mapped": (_mapped, 4),
    "scanned": (_scanned, 4),
    "custom rule": (_ruled, 1),
}


def _problem(kind):
    outer, size = NETWORKS[kind]
    params = models.dense_params(0, 3, 4) | {"alpha": jnp.linspace(0.9, 1.3, size)}

    def outputs(params, x):
        params = params | {"alpha": kfac_jax.register_generic(params["alpha"])}
        return outer(params, models.dense(params["layer0"], x), x)

    def loss_fn(params, x, labels, mask=None):
        z = outputs(params, x)
        if mask is None:
            return softmax_cross_entropy_with_integer_labels(z, labels).mean()
        z = kfac_jax.register_softmax_cross_entropy_loss(z, labels, mask=mask)
        return jnp.sum(jax.nn.logsumexp(z, -1)) / len(z)

    return params, outputs, loss_fn


def _case(z, label):
    return jax.nn.logsumexp(z) - z[label]


def _plan(loss_fn, params, *args, **options):
    return kfac_jax.make_curvature(
        loss_fn, params, *args, estimation_mode="fisher_exact", **options
    )


def _diagonal(curvature, params, *args, rng=None):
    compute = functools.partial(models.statistics_to_factors, curvature)
    return jax.jit(compute)(params, *args, rng=rng)["alpha"]["diagonal"].reshape(-1)


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_the_exact_fishers(kind):
    params, outputs, loss_fn = _problem(kind)
    found = _diagonal(_plan(loss_fn, params, X, LABELS), params, X, LABELS)
    exact = oracles.ggn(lambda p: outputs(p, X), _case, params, LABELS)
    alpha = np.diag(oracles.block(exact, params, "alpha"))
    np.testing.assert_allclose(found, alpha, rtol=1e-10)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("narrow", ["parameter", "loss"])
def test_of_another_precision_than_the_loss(kind, narrow):
    """Factors have their parameter's, as everywhere."""
    outer, size = NETWORKS[kind]
    params = models.dense_params(0, 3, 4) | {"alpha": jnp.linspace(0.9, 1.3, size)}
    if narrow == "parameter":
        params["alpha"] = params["alpha"].astype("float32")

    def outputs(params, x):
        alpha = kfac_jax.register_generic(params["alpha"])
        wide = params | {"alpha": alpha.astype("float64")}
        return outer(wide, models.dense(params["layer0"], x), x)

    def loss_fn(params, x, labels):
        z = outputs(params, x)
        z = z.astype("float32") if narrow == "loss" else z
        return softmax_cross_entropy_with_integer_labels(z, labels).mean()

    curvature = _plan(loss_fn, params, X, LABELS)
    found = _diagonal(curvature, params, X, LABELS)
    assert found.dtype == params["alpha"].dtype
    params["alpha"] = params["alpha"].astype("float64")
    exact = oracles.ggn(lambda p: outputs(p, X), _case, params, LABELS)
    alpha = np.diag(oracles.block(exact, params, "alpha"))
    np.testing.assert_allclose(found, alpha, rtol=1e-5)


def test_masked_cases_do_not_count():
    params, outputs, loss_fn = _problem("mapped")
    mask = jnp.array([1.0, 0, 1, 1, 0, 1, 1, 1])
    shown = np.flatnonzero(mask)
    shapes = jax.eval_shape(lambda *args: args, params, X, LABELS, mask)
    found = _diagonal(_plan(loss_fn, *shapes), params, X, LABELS, mask)
    exact = oracles.ggn(lambda p: outputs(p, X[shown]), _case, params, LABELS[shown])
    alpha = np.diag(oracles.block(exact, params, "alpha")) * len(shown) / N
    np.testing.assert_allclose(found, alpha, rtol=1e-10)


def _wide(size, *, centred=False, smooth=jnp.exp):
    """A parameter of that many entries which is tagged."""
    alpha = jnp.linspace(-1.0, 1.0, size)
    params = models.dense_params(0, 3, 4) | {"alpha": alpha}

    def outputs(params, x):
        z = models.dense(params["layer0"], x - x.mean(0)[None] if centred else x)
        curve = jnp.linspace(0.5, 2.0, size)
        alpha = smooth(kfac_jax.register_generic(params["alpha"]) * curve)
        return z * jnp.mean(alpha) ** 2 + alpha[None, :4]

    def loss_fn(params, x, labels):
        z = outputs(params, x)
        return softmax_cross_entropy_with_integer_labels(z, labels).mean()

    return params, outputs, loss_fn


def _exact_of_alpha(params, outputs):
    exact = oracles.ggn(lambda p: outputs(p, X), _case, params, LABELS)
    return np.diag(oracles.block(exact, params, "alpha"))


@pytest.mark.parametrize("largest", [alone.LARGEST, 250, 350])
def test_large_parameters_take_one_case_after_the_other(largest, monkeypatch):
    """All at once, or by chunks of two and of three."""
    monkeypatch.setattr(alone, "LARGEST", largest)
    params, outputs, loss_fn = _wide(100)
    found = _diagonal(_plan(loss_fn, params, X, LABELS), params, X, LABELS)
    np.testing.assert_allclose(found, _exact_of_alpha(params, outputs), rtol=1e-10)


@pytest.mark.parametrize("entries, same", [(MOST_ENTRIES, True), (100, False)])
def test_large_parameters_are_estimated_where_cases_meet(entries, same):
    """In data alone, which no layer's examples show."""
    params, outputs, loss_fn = _wide(entries, centred=True)
    curvature = _plan(loss_fn, params, X, LABELS)
    keys = jax.random.split(jax.random.key(0), 4000)
    compute = functools.partial(models.statistics_to_factors, curvature)
    many = jax.jit(jax.vmap(lambda key: compute(params, X, LABELS, rng=key)))(keys)
    found = many["alpha"]["diagonal"].reshape(len(keys), -1)
    assert bool((found[0] == found[1]).all()) == same
    exact = _exact_of_alpha(params, outputs)
    np.testing.assert_allclose(found.mean(0), exact, rtol=0.2, atol=0.02 * exact.max())


def _by_number(x):
    return x * jnp.broadcast_to(jnp.arange(1.0, len(x) + 1)[:, None], x.shape)


def _noisy(x):
    return x + jax.random.normal(jax.random.key(5), x.shape)


def _keys_of_cases(x):
    keys = jax.random.split(jax.random.key(5), len(x))
    return jax.vmap(lambda x, key: x + jax.random.normal(key, x.shape))(x, keys)


def _mapped_with_numbers(x):
    numbers = jnp.arange(1.0, len(x) + 1)
    return jax.lax.map(lambda both: both[0] * both[1], (x, numbers))


def _started_with_noise(x):
    noise = jax.random.normal(jax.random.key(5), x.shape)
    return jax.lax.scan(lambda c, _: (c + x, None), noise, length=2)[0]


def _closed_over(x):
    return X * (1.0 + 0.0 * x.shape[0])


def _uniform(x):
    """The same for all cases: each can be evaluated by itself."""
    scale = jnp.exp(jnp.broadcast_to(jnp.linspace(0.5, 1.0, 3), x.shape))
    return x * scale + jnp.zeros_like(x)


@pytest.mark.parametrize(
    "place, is_exact",
    [
        (_by_number, False),
        (_noisy, False),
        (_keys_of_cases, False),
        (_mapped_with_numbers, False),
        (_started_with_noise, False),
        (_closed_over, False),
        (_uniform, True),
    ],
)
def test_cases_with_a_place_in_the_batch_are_not_evaluated_alone(place, is_exact):
    """A batch of one would have another number, or noise: that was wrong in silence."""
    params, outputs, _ = _wide(100)

    def loss_fn(params, x, labels):
        z = outputs(params, place(x))
        return softmax_cross_entropy_with_integer_labels(z, labels).mean()

    curvature = _plan(loss_fn, params, X, LABELS)
    pair = [
        _diagonal(curvature, params, X, LABELS, rng=jax.random.key(i)) for i in range(2)
    ]
    assert bool((pair[0] == pair[1]).all()) == is_exact
    told = "Diagonals estimated with random signs, as cases cannot be evaluated"
    assert (told in str(curvature)) != is_exact
    if is_exact:
        exact = _exact_of_alpha(params, lambda p, x: outputs(p, place(x)))
        np.testing.assert_allclose(pair[0], exact, rtol=1e-10)


def test_some_by_their_entries_and_others_by_case():
    """The smallest have a push for each entry; a step's cost is bounded."""
    params = models.dense_params(0, 3, 4)
    names = [f"p{i}" for i in range(4)]
    params |= {name: jnp.full(12, 0.5) for name in names}

    def outputs(params, x):
        z = models.dense(params["layer0"], x)
        for i, name in enumerate(names, 1):
            p = kfac_jax.register_generic(params[name])
            z = jnp.sin(z * jnp.mean(jnp.exp(p)) ** i)
        return z

    def loss_fn(params, x, labels):
        z = outputs(params, x)
        return softmax_cross_entropy_with_integer_labels(z, labels).mean()

    curvature = _plan(loss_fn, params, X, LABELS)
    factors = models.statistics_to_factors(curvature, params, X, LABELS)
    exact = oracles.ggn(lambda p: outputs(p, X), _case, params, LABELS)
    for name in names:
        wanted = np.diag(oracles.block(exact, params, name))
        found = factors[name]["diagonal"].reshape(-1)
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_on_a_mesh_it_is_that_of_one_device(axis_type):
    params, _, loss_fn = _problem("jastrow")
    curvature = _plan(loss_fn, params, X, LABELS)
    expected = _diagonal(curvature, params, X, LABELS)
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((4,), ("batch",), (kind,))
    with jax.set_mesh(mesh):
        x, labels = (jax.device_put(a, P("batch")) for a in (X, LABELS))
        found = _diagonal(curvature, jax.device_put(params, P()), x, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_without_a_forward_mode_it_is_exact_too():
    @jax.custom_vjp
    def smooth(a):
        return jnp.exp(a)

    smooth.defvjp(lambda a: (jnp.exp(a), jnp.exp(a)), lambda e, t: (e * t,))
    params, _, loss_fn = _wide(8, smooth=smooth)
    _, outputs, _ = _wide(8)
    found = _diagonal(_plan(loss_fn, params, X, LABELS), params, X, LABELS)
    np.testing.assert_allclose(found, _exact_of_alpha(params, outputs), rtol=1e-10)


@pytest.mark.parametrize("problem", [lambda: _problem("jastrow"), lambda: _wide(100)])
def test_devices_add_theirs_up(problem):
    params, _, loss_fn = problem()
    curvature = _plan(loss_fn, params, X, LABELS)
    _, _, expected = curvature.value_grad_and_statistics(params, X, LABELS)

    def part(params, x, labels):
        return curvature.value_grad_and_statistics(params, x, labels)[2]

    mapped = jax.shard_map(
        part,
        mesh=models.mesh(4, "batch"),
        in_specs=(P(), P("batch"), P("batch")),
        out_specs=P(),
    )
    found = jax.jit(mapped)(params, X, LABELS)
    scale = float(expected.weight / found.weight)
    np.testing.assert_allclose(
        scale * found.layers["alpha"]["diagonal"],
        expected.layers["alpha"]["diagonal"],
        rtol=1e-10,
    )


def test_one_pull_back_says_all_where_an_example_has_one_output():
    """As many products as where one sample is pulled back; inputs are in it, too."""
    params = models.dense_params(0, 3, 4, 1) | {"alpha": jnp.ones(1)}

    def loss_fn(params, x):
        z = models.mlp({k: v for k, v in params.items() if k != "alpha"}, x)
        z = jnp.sin(z * jnp.exp(kfac_jax.register_generic(params["alpha"]))[None])
        return kfac_jax.losses.squared_error(z).sum(-1).mean()

    curvature = _plan(loss_fn, params, X)
    sampled = dataclasses.replace(curvature, estimation_mode="fisher_gradients")
    key = jax.random.key(0)
    counts = [
        jax.jit(plan.value_grad_and_statistics)
        .lower(params, X, rng=key)
        .compile()
        .as_text()
        .count(" dot(")
        for plan in (curvature, sampled)
    ]
    assert counts[0] == counts[1]
    factors = models.statistics_to_factors(curvature, params, X)
    rows = np.concatenate([np.asarray(X), np.ones((N, 1))], 1)
    np.testing.assert_allclose(factors["layer0"]["input"], rows.T @ rows / N)


def test_the_optimizers_first_update_does_not_depend_on_the_key():
    params, _, loss_fn = _problem("jastrow")
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(lambda p, batch: loss_fn(p, *batch)),
        l2_reg=0.0,
        estimation_mode="fisher_exact",
        num_burnin_steps=0,
    )
    state = optimizer.init(params, jax.random.key(0), (X, LABELS))
    rates = {"learning_rate": 0.1, "momentum": 0.0, "damping": 1e-3}
    pair = [
        optimizer.step(params, state, key, batch=(X, LABELS), **rates)[0]
        for key in jax.random.split(jax.random.key(0))
    ]
    models.assert_trees_equal(*pair)


def test_losses_of_batches_of_different_lengths_are_estimated_and_it_is_said():
    params, outputs, _ = _wide(100)

    def loss_fn(params, *batches):
        total = jnp.zeros(())
        for x, labels in zip(batches[::2], batches[1::2], strict=True):
            z = outputs(params, x)
            total += softmax_cross_entropy_with_integer_labels(z, labels).mean()
        return total

    curvature = _plan(loss_fn, params, X, LABELS, X[:4], LABELS[:4])
    assert "(the losses are of [4, 8] cases)" in str(curvature)
