"""Losses: optax's values, documented registered values, and factors of the Fisher."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import losses
from kfac_jax.distributions import (
    Bernoulli,
    Categorical,
    Convex,
    Normal,
    NormalWithVariance,
    RegisteredLoss,
)
from tests.helpers import models, oracles

SAMPLES = 20_000
MC_TOLERANCE = 0.06  # of the largest entry, about 5 / √(samples · cases)

Z = models.array(0, 5, 4)
LABELS = models.classes(1, 4, 5)
SOFT = jax.nn.softmax(models.array(2, 5, 4))
BITS = models.classes(3, 2, 5, 4).astype(float)
TARGETS = models.array(4, 5, 4)
WHERE = jnp.asarray(np.arange(20).reshape(5, 4) % 4 != (np.arange(5)[:, None] % 4))


def _hidden_label(where):
    """Labels among the classes that take part."""
    return jnp.argmax(where * models.array(5, 5, 4) - 9.0 * (1 - where), -1)


VALUES = {
    "integer": (
        losses.softmax_cross_entropy_with_integer_labels,
        optax.losses.softmax_cross_entropy_with_integer_labels,
        (Z, LABELS),
        {},
    ),
    "integer, sequence": (
        losses.softmax_cross_entropy_with_integer_labels,
        optax.losses.softmax_cross_entropy_with_integer_labels,
        (Z.reshape(5, 2, 2), LABELS.repeat(2).reshape(5, 2) // 2),
        {},
    ),
    "integer, axis": (
        losses.softmax_cross_entropy_with_integer_labels,
        optax.losses.softmax_cross_entropy_with_integer_labels,
        (Z.reshape(5, 4, 1), LABELS.reshape(5, 1)),
        {"axis": 1},
    ),
    "integer, where": (
        losses.softmax_cross_entropy_with_integer_labels,
        optax.losses.softmax_cross_entropy_with_integer_labels,
        (Z, _hidden_label(WHERE.astype(float))),
        {"where": WHERE},
    ),
    "soft": (
        losses.softmax_cross_entropy,
        optax.losses.softmax_cross_entropy,
        (Z, SOFT),
        {},
    ),
    "soft, axis": (
        losses.softmax_cross_entropy,
        optax.losses.softmax_cross_entropy,
        (Z.reshape(5, 4, 1), SOFT.reshape(5, 4, 1)),
        {"axis": -2},
    ),
    "soft, where": (
        losses.softmax_cross_entropy,
        optax.losses.softmax_cross_entropy,
        (Z, jnp.where(WHERE, SOFT, 0.0)),
        {"where": WHERE},
    ),
    "sigmoid": (
        losses.sigmoid_binary_cross_entropy,
        optax.losses.sigmoid_binary_cross_entropy,
        (Z, BITS),
        {},
    ),
    "squared": (losses.squared_error, optax.losses.squared_error, (Z, TARGETS), {}),
    "squared, no targets": (losses.squared_error, optax.losses.squared_error, (Z,), {}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_and_gradients_equal_optax(name):
    ours, theirs, args, options = VALUES[name]
    np.testing.assert_allclose(
        ours(*args, **options), theirs(*args, **options), rtol=1e-13
    )
    rest = args[1:]
    for_ours = jax.grad(lambda z: ours(z, *rest, **options).sum())(args[0])
    for_theirs = jax.grad(lambda z: theirs(z, *rest, **options).sum())(args[0])
    np.testing.assert_allclose(for_ours, for_theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", VALUES)
def test_the_returned_loss_is_the_registered_one(name):
    """`make_curvature` compares both on concrete arrays and would raise."""
    ours, _, (z, *rest), options = VALUES[name]

    def loss_fn(params, z, *rest):
        values = ours(z * jnp.broadcast_to(params, z.shape), *rest, **options)
        return values.sum() / len(z)

    kfac_jax.make_curvature(
        loss_fn, jnp.ones(z.shape[-1:]), z, *rest, on_unmatched="ignore"
    )
    with pytest.raises(ValueError, match=r"ratio returned/registered = 2"):
        kfac_jax.make_curvature(
            lambda *a: 2.0 * loss_fn(*a),
            jnp.ones(z.shape[-1:]),
            z,
            *rest,
            on_unmatched="ignore",
        )


def test_a_mean_over_positions_makes_them_cases():
    w, x, labels = jnp.ones((3, 5)), jnp.ones((4, 6, 3)), jnp.zeros((4, 6), int)
    loss = losses.softmax_cross_entropy_with_integer_labels

    def over_positions(w, x, labels):
        return loss(x @ w, labels).mean()

    def of_positions(w, x, labels):
        return loss((x @ w).reshape(-1, 5), labels.reshape(-1)).mean()

    with pytest.raises(ValueError, match="A mean over positions, too, makes each"):
        kfac_jax.make_curvature(over_positions, w, x, labels)
    kfac_jax.make_curvature(of_positions, w, x, labels)


# ---------------------------------------------------------- distributions by themselves

ONE = jnp.ones(())
MASK = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])


def _nll(distribution, z, *data):
    return distribution.negative_log_likelihood(
        z[None], tuple(d[None] for d in data)
    ).sum()


DISTRIBUTIONS = {
    "categorical": (Categorical(), LABELS),
    "categorical, soft": (Categorical(), SOFT),
    "bernoulli": (Bernoulli(), BITS),
    "normal": (Normal(0.5), TARGETS),
    "normal, wide": (Normal(3.0), TARGETS),
    "convex": (Convex(models.log_cosh), TARGETS),
}
VARIANTS = {"plain": (None, ONE), "mask and weight": (MASK, 2.5 * ONE)}


def _case(name, variant):
    distribution, data = DISTRIBUTIONS[name]
    mask, weight = VARIANTS[variant]
    loss = RegisteredLoss(distribution, Z, (data,), mask, weight)
    factor = weight / len(Z) * (jnp.ones(5) if mask is None else mask)
    hessians = oracles.output_hessians(lambda z, y: _nll(distribution, z, y), Z, data)
    return loss, data, np.asarray(factor), hessians * np.asarray(factor)[:, None, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_value_and_target_gradient(name, variant):
    loss, data, factor, _ = _case(name, variant)
    each = jax.vmap(lambda z, y: _nll(loss.distribution, z, y))
    np.testing.assert_allclose(loss.value(), (factor * each(Z, data)).sum(), rtol=1e-13)
    gradients = jax.grad(lambda z: each(z, data).sum())(Z)
    np.testing.assert_allclose(
        loss.target_gradient(), np.sqrt(factor)[:, None] * gradients, rtol=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_roots_multiply_to_the_hessian(name, variant):
    loss, _, _, expected = _case(name, variant)
    basis = jnp.broadcast_to(jnp.eye(4)[:, None, :], (4, 5, 4))
    b = np.asarray(jax.vmap(loss.multiply_root)(basis)).transpose(1, 2, 0)
    bt = np.asarray(jax.vmap(loss.multiply_root_transpose)(basis)).transpose(1, 2, 0)
    np.testing.assert_allclose(b, bt.transpose(0, 2, 1), atol=1e-14)
    np.testing.assert_allclose(b @ bt, expected, atol=1e-13)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_have_mean_zero_and_the_fisher_as_covariance(name, variant):
    loss, _, _, expected = _case(name, variant)
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    u = np.asarray(jax.jit(jax.vmap(loss.sample_gradient))(keys))
    covariance = np.einsum("kni,knj->nij", u, u) / SAMPLES
    atol = MC_TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(covariance, expected, atol=atol)
    np.testing.assert_allclose(u.mean(0), 0.0, atol=0.05 * np.abs(u).max())


def _mean_and_log_variance_fisher(z):
    """`E_y` of the Hessian: y = μ ± σ have the first moments that it depends on."""

    def nll(z, y):
        mean, s = z
        return 0.5 * s + 0.5 * (y - mean) ** 2 * jnp.exp(-s)

    spread = jnp.exp(0.5 * z[1])
    return sum(jax.hessian(nll)(z, z[0] + sign * spread) for sign in (-1, 1)) / 2


def test_a_learned_variance_end_to_end():
    """Values, samples' covariance, and the exact Fisher of a net with two heads."""
    x, targets = models.array(1, 6, 3), models.array(2, 6, 2)
    params = {"a": models.array(3, 3, 2), "b": 0.3 * models.array(4, 3, 2)}
    nll = losses.normal_negative_log_likelihood

    def loss_fn(params, x, targets):
        values = nll(x @ params["a"], x @ params["b"], targets)
        return values.sum(-1).mean()

    mean, s = x @ params["a"], x @ params["b"]
    log_pdf = jax.scipy.stats.norm.logpdf(targets, mean, jnp.exp(0.5 * s))
    np.testing.assert_allclose(
        nll(mean, s, targets), -log_pdf - 0.5 * np.log(2 * np.pi), rtol=1e-12
    )

    z = jnp.stack([mean, s], -1)
    fisher = jax.vmap(jax.vmap(_mean_and_log_variance_fisher))(z)
    loss = RegisteredLoss(NormalWithVariance(), z, (targets,), None, ONE)
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    u = np.asarray(jax.jit(jax.vmap(loss.sample_gradient))(keys)) * 6**0.5
    covariance = np.einsum("knoi,knoj->noij", u, u) / SAMPLES
    atol = MC_TOLERANCE * np.abs(fisher).max()
    np.testing.assert_allclose(covariance, fisher, atol=atol)

    _, factors = models.exact_factors(
        loss_fn, params, x, targets, blocks=kfac_jax.blocks.Full()
    )
    for name, entry in (("a", 0), ("b", 1)):
        expected = (
            np.einsum("ni,no,nj,op->iojp", x, fisher[..., entry, entry], x, np.eye(2))
            / 6
        )
        np.testing.assert_allclose(
            factors[name]["full"], expected.reshape(6, 6), rtol=1e-11, atol=1e-14
        )


def test_a_learned_variance_of_other_shape_is_refused():
    with pytest.raises(ValueError, match="targets of one shape; got"):
        losses.normal_negative_log_likelihood(Z, Z, Z[:, :1])


def test_register_loss_refuses_what_is_no_distribution_or_other_cases():
    with pytest.raises(TypeError, match="expects a kfac_jax"):
        kfac_jax.register_loss("normal", Z)
    with pytest.raises(ValueError, match="one leading axis of cases"):
        kfac_jax.register_loss(Normal(), Z, TARGETS[:2])


def test_convex_cross_entropy_equals_categorical():
    def case(z, y):
        return jax.nn.logsumexp(z) - z[y]

    def loss_fn(params, x, y, convex):
        z = x @ params
        if convex:
            return losses.convex(case, z, y).mean()
        return losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    w = models.array(0, 3, 4)
    x, y = models.array(1, 6, 3), models.classes(2, 4, 6)
    pair = [
        models.exact_factors(lambda *a, c=c: loss_fn(*a, c), w, x, y)[1]["params"]
        for c in (True, False)
    ]
    for name in pair[0]:
        np.testing.assert_allclose(pair[0][name], pair[1][name], atol=1e-13)


def _scaled_log_cosh(scale, z, y):
    return scale * models.log_cosh(z, y)


CLOSURES = {  # ways to close over an array that is traced with the loss function
    "parameter": lambda p, x, y: losses.convex(
        lambda z, y: _scaled_log_cosh(p["s"], z, y), x @ p["w"], y
    ),
    "function of data": lambda p, x, y: losses.convex(
        lambda z, y: _scaled_log_cosh(jnp.abs(x).max(), z, y), x @ p["w"], y
    ),
    "in vmap": lambda p, x, y: jax.vmap(
        lambda x, y, s: losses.convex(
            lambda z, y: _scaled_log_cosh(s, z, y), (x @ p["w"])[None], y[None]
        ).sum()
    )(x, y, jnp.ones(len(x))),
    "in jit": lambda p, x, y: jax.jit(
        lambda s: losses.convex(lambda z, y: _scaled_log_cosh(s, z, y), x @ p["w"], y)
    )(p["s"]),
}


def _convex_problem():
    params = {"w": models.array(0, 3, 4), "s": jnp.asarray(1.5)}
    return params, models.array(1, 6, 3), models.array(2, 6, 4)


@pytest.mark.parametrize("name", CLOSURES)
def test_a_convex_loss_that_closes_over_a_traced_array_is_refused(name):
    p, x, y = _convex_problem()

    def loss_fn(p, x, y):
        return CLOSURES[name](p, x, y).mean()

    assert jnp.isfinite(loss_fn(p, x, y))  # without K-FAC there is nothing wrong
    with pytest.raises(ValueError, match=r"closes over an array .*Pass it as data"):
        kfac_jax.make_curvature(loss_fn, p, x, y)


@pytest.mark.parametrize("where", ["outside", "in jit", "as data"])
def test_a_convex_loss_may_close_over_what_outlives_the_trace(where):
    p, x, y = _convex_problem()
    scale = 1.5

    def plain(p, x, y, scale=scale):
        return losses.convex(
            lambda z, y: _scaled_log_cosh(scale, z, y), x @ p["w"], y
        ).mean()

    def as_data(p, x, y):
        s = jnp.broadcast_to(p["s"], (len(x),))
        case = lambda z, y, s: _scaled_log_cosh(s, z, y)  # noqa: E731
        return losses.convex(case, x @ p["w"], y, s).mean()

    def found(scale):
        fixed = lambda p, x, y: plain(p, x, y, scale)  # noqa: E731
        loss_fn = as_data if where == "as data" else fixed
        return models.exact_factors(loss_fn, p, x, y)[1]["w"]

    _, expected = models.exact_factors(plain, p, x, y)
    compute = jax.jit(found) if where == "in jit" else found
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        compute(jnp.asarray(scale)),
        expected["w"],
    )


def test_a_convex_loss_that_is_not_convex_is_reported():
    p, x, y = _convex_problem()

    def loss_fn(p, x, y):
        case = lambda z, y: -jnp.cos(z - y).sum()  # noqa: E731
        return losses.convex(case, x @ p["w"], y).mean()

    with pytest.warns(UserWarning, match="not convex .* its negative curvature") as w:
        plan = kfac_jax.make_curvature(loss_fn, p, x, y, estimation_mode="fisher_exact")
    assert w[0].filename == __file__
    factors = models.statistics_to_factors(plan, p, x, y)
    curvature = np.maximum(np.cos(np.asarray(x @ p["w"] - y)), 0)
    np.testing.assert_allclose(
        factors["w"]["output"], np.diag(curvature.mean(0)), atol=1e-14
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("distance", [0.0, 3.0, 30.0])
def test_rounding_does_not_make_a_convex_loss_look_otherwise(distance, dtype):
    """Far from its minimum the curvature of log cosh is the rounding of 1 - 1."""
    p, x, y = jax.tree.map(lambda a: a.astype(dtype), _convex_problem())

    def loss_fn(p, x, y):
        return losses.convex(models.log_cosh, x @ p["w"], y).mean()

    kfac_jax.make_curvature(loss_fn, p, x, y + dtype(distance))


def test_the_hessian_of_half_precision_outputs_is_taken_in_single():
    z = Z.astype(jnp.bfloat16)
    loss = RegisteredLoss(Categorical(), z, (LABELS,), None, ONE)
    assert loss.value().dtype == jnp.float32
    assert loss.multiply_root(z).dtype == jnp.bfloat16
    assert loss.multiply_root_transpose(z).dtype == jnp.float32
    assert loss.sample_gradient(jax.random.key(0)).dtype == jnp.bfloat16


# ------------------------------------------------------------- several losses and masks


def _two_heads(params, x, y, t):
    h = jnp.tanh(x @ params["w"])
    first, second = h @ params["a"], h @ params["b"]
    one = losses.softmax_cross_entropy_with_integer_labels(first, y, weight=0.3).mean()
    two = losses.squared_error(second, t, weight=2.0).sum(-1).mean()
    return 0.3 * one + 2.0 * two


def test_several_weighted_losses_add_up():
    params = {
        "w": models.array(0, 3, 2),
        "a": models.array(1, 2, 3),
        "b": models.array(2, 2, 1),
    }
    x, y, t = models.array(3, 5, 3), models.classes(4, 3, 5), models.array(5, 5, 1)
    curvature, factors = models.exact_factors(
        _two_heads, params, x, y, t, blocks=kfac_jax.blocks.Full()
    )
    hidden = lambda p: jnp.tanh(x @ p["w"])  # noqa: E731
    first = oracles.ggn(
        lambda p: hidden(p) @ p["a"], lambda z, y: jax.nn.logsumexp(z) - z[y], params, y
    )
    second = oracles.ggn(
        lambda p: hidden(p) @ p["b"], lambda z, t: ((z - t) ** 2).sum(), params, t
    )
    expected = 0.3 * first + 2.0 * second
    for name in params:
        found = factors[name]["full"]
        np.testing.assert_allclose(
            found, oracles.block(expected, params, name), atol=1e-12
        )
    v = oracles.random_like(params, 0)
    product = jax.jit(curvature.matvec)(params, v, x, y, t)
    np.testing.assert_allclose(
        oracles.vector(product), expected @ oracles.vector(v), rtol=1e-11
    )


def _masked_loss(params, x, y, mask):
    z = x @ params
    kfac_jax.register_softmax_cross_entropy_loss(
        z, y, mask=mask, weight=len(mask) / mask.sum()
    )
    values = optax.losses.softmax_cross_entropy_with_integer_labels(z, y)
    return (mask * values).sum() / mask.sum()


def test_masked_rows_count_neither_in_a_nor_in_g():
    """With the documented weight, the factors are those of the unmasked cases alone."""
    w = models.array(0, 3, 4)
    x, y = models.array(1, 6, 3), models.classes(2, 4, 6)
    mask = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    kept = np.flatnonzero(mask)
    _, found = models.exact_factors(_masked_loss, w, x, y, mask)
    _, expected = models.exact_factors(
        _masked_loss, w, x[kept], y[kept], jnp.ones(len(kept))
    )
    for name in ("input", "output"):
        np.testing.assert_allclose(
            found["params"][name], expected["params"][name], rtol=1e-12
        )
    a = np.asarray(x)[kept]
    np.testing.assert_allclose(
        found["params"]["input"], a.T @ a / len(kept), rtol=1e-12
    )


def test_a_mask_over_positions_inside_a_case():
    """`[b, s, classes]` registered as is: a sum over positions, a mean over cases."""

    def loss_fn(w, x, y, mask):
        z = x @ w
        kfac_jax.register_softmax_cross_entropy_loss(z, y, mask=mask)
        values = optax.losses.softmax_cross_entropy_with_integer_labels(z, y)
        return (mask * values).sum(-1).mean()

    w, x = models.array(0, 2, 3), models.array(1, 4, 3, 2)
    y, mask = models.classes(2, 3, 4, 3), models.classes(3, 2, 4, 3).astype(float)
    _, factors = models.exact_factors(
        loss_fn, w, x, y, mask, blocks=kfac_jax.blocks.Full()
    )

    def nll(z, y, m):
        return (
            m * (jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[:, None], 1)[:, 0])
        ).sum()

    expected = oracles.ggn(lambda w: x @ w, nll, w, y, mask)
    np.testing.assert_allclose(factors["params"]["full"], expected, atol=1e-12)


def test_a_loss_registered_inside_scan_sums_over_steps():
    def loss_fn(w, x, y):
        def step(total, xy):
            x, y = xy
            values = losses.squared_error(jnp.sin(x @ w), y)
            return total + values.sum(-1).mean(), None

        return jax.lax.scan(step, jnp.zeros(()), (x.swapaxes(0, 1), y.swapaxes(0, 1)))[
            0
        ]

    w, x, y = models.array(0, 2, 2), models.array(1, 4, 3, 2), models.array(2, 4, 3, 2)
    curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    v = oracles.random_like(w, 0)
    expected = oracles.ggn(
        lambda w: jnp.sin(x @ w), lambda z, y: ((z - y) ** 2).sum(), w, y
    )
    np.testing.assert_allclose(
        oracles.vector(jax.jit(curvature.matvec)(w, v, x, y)),
        expected @ oracles.vector(v),
        rtol=1e-12,
    )


# ------------------------------------------------------------------------- scale checks


def _scaled(factor):
    def loss_fn(w, x, y):
        return factor * losses.squared_error(x @ w, y).sum(-1).mean()

    return loss_fn


@pytest.mark.parametrize(
    ("factor", "ratio"), [(6.0, "6"), (0.5, "0.5"), (-1.0, "-1"), (1 / 6, "0.166667")]
)
def test_a_wrong_scale_is_refused_with_the_ratio(factor, ratio):
    w, x, y = models.array(0, 3, 2), models.array(1, 6, 3), models.array(2, 6, 2)
    with pytest.raises(
        ValueError, match=f"registered = {ratio}: |registered = {ratio}\\."
    ):
        kfac_jax.make_curvature(_scaled(factor), w, x, y)


def test_a_declared_penalty_is_part_of_the_registered_loss():
    def without(params, x, y):
        return _scaled(1.0)(params["w"], x, y)

    def loss_fn(params, x, y):
        penalty = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
        return without(params, x, y) + 0.05 * penalty

    params, x, y = (
        {"w": models.array(0, 3, 2)},
        models.array(1, 6, 3),
        models.array(2, 6, 2),
    )
    kfac_jax.make_curvature(loss_fn, params, x, y, l2=0.1)
    with pytest.warns(UserWarning, match="declare a penalty with `l2`"):
        kfac_jax.make_curvature(loss_fn, params, x, y)
    with pytest.warns(UserWarning, match=r"l2=0\.2"):
        kfac_jax.make_curvature(loss_fn, params, x, y, l2=0.2)
    with pytest.warns(UserWarning, match="The loss lacks the penalty that l2=0.1"):
        kfac_jax.make_curvature(without, params, x, y, l2=0.1)


def test_without_targets_or_concrete_arrays_the_scale_is_not_checked():
    def loss_fn(w, x):
        z = x @ w
        kfac_jax.register_squared_error_loss(z)
        return 7.0 * jnp.square(z).sum(-1).mean()

    w, x, y = models.array(0, 3, 2), models.array(1, 6, 3), models.array(2, 6, 2)
    kfac_jax.make_curvature(loss_fn, w, x)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (w, x, y))
    kfac_jax.make_curvature(_scaled(7.0), *shapes)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at LAPACK's calls")
def test_roots_of_a_convex_loss_take_one_case_at_a_time_on_cpus():
    """Two batched LAPACK calls blocked a loop of adaptive steps for ever."""
    loss = Convex(lambda z: jax.nn.logsumexp(z) + 0.5 * z @ z)
    z, v = models.array(3, 6, 4), models.array(4, 6, 4)
    root = jax.jit(lambda v: loss.multiply_root_transpose(z, (), v))
    (call,) = re.findall(
        r"custom_call @lapack_\w*syevd.* : \((.*?)\)", root.lower(v).as_text()
    )
    assert re.match(r"tensor<(1x)?4x4xf64>", call)
    p = jax.nn.softmax(z)
    product = p * v - p * (p * v).sum(-1, keepdims=True) + v
    found = loss.multiply_root(z, (), root(v))
    np.testing.assert_allclose(found, product, atol=1e-12)
