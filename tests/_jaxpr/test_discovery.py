"""What discovery makes of the ways in which programs use their parameters."""

import functools
import re
import warnings

import equinox
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

B, S, I, O = 4, 3, 2, 5  # noqa: E741 (the letters of the layouts)
X, SEQUENCE = models.array(0, B, I), models.array(1, B, S, I)


def _loss(apply):
    """Any network as a loss: the squared error of its sine to zero."""

    def loss_fn(params, *args):
        z = jnp.sin(apply(params, *args))
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    return loss_fn


def _plan(apply, params, *args, **options):
    return kfac_jax.make_curvature(_loss(apply), params, *args, **options)


def _kinds(curvature):
    return {layer.name: layer.kind for layer in curvature.layers}


# ---------------------------------------------------------- one weight, one dot_general

IO, OI = (I, O), (O, I)
DENSE = {
    "x @ w": (lambda w, x: x @ w, IO, X),
    "x @ w.T": (lambda w, x: x @ w.T, OI, X),
    "w on the left": (lambda w, x: (w @ x.T).T, OI, X),
    "sequence": (lambda w, x: x @ w, IO, SEQUENCE),
    "bsi,io": (lambda w, x: jnp.einsum("bsi,io->bso", x, w), IO, SEQUENCE),
    "bsi,oi": (lambda w, x: jnp.einsum("bsi,oi->bos", x, w), OI, SEQUENCE),
    "bi,ihd->bhd": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (I, 3, 2), X),
    "bi,hid->bhd": (lambda w, x: jnp.einsum("bi,hid->bhd", x, w), (3, I, 2), X),
    "bsi,sio (two contracted)": (
        lambda w, x: jnp.einsum("bsi,sio->bo", x, w),
        (S, I, O),
        SEQUENCE,
    ),
    "reshaped": (lambda w, x: x @ w.reshape(I, O), (I * O,), X),
    "split heads": (
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(I, 2, 2)),
        (I, 4),
        X,
    ),
    "squeezed": (lambda w, x: x @ w[0], (1, I, O), X),
    "times 2.0": (lambda w, x: x @ (w * 2.0), IO, X),
    "over jnp.sqrt(3.)": (lambda w, x: x @ (w / jnp.sqrt(3.0)), IO, X),
    "negative": (lambda w, x: x @ -w, IO, X),
    "swapped einsum": (lambda w, x: jnp.einsum("io,bi->ob", w, x).T, IO, X),
    "vmap": (lambda w, x: jax.vmap(lambda x: x @ w)(x), IO, X),
    "vmap, w @ x": (lambda w, x: jax.vmap(lambda x: w @ x)(x), OI, X),
}


def _dense_case(name):
    apply, shape, x = DENSE[name]
    return (lambda p, x: apply(p["w"], x)), {"w": models.array(2, *shape)}, x


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", DENSE)
def test_any_dot_general_is_a_dense_layer(name):
    """With one layer, the Fisher is `E[x xᵀ ⊗ dy dyᵀ]`: compare the full block."""
    apply, params, x = _dense_case(name)
    plan = _plan(apply, params, x)
    (layer,) = plan.layers
    assert layer.kind == "dense" and layer.uses == 1 and not layer.reason
    assert isinstance(layer.block, blocks.Kronecker)

    def outputs(params):
        z = jnp.sin(apply(params, x))
        return z.reshape(len(z), -1)

    curvature, factors = models.exact_factors(
        _loss(apply), params, x, blocks=blocks.Full()
    )
    expected = oracles.ggn(outputs, lambda z: (z**2).sum(), params)
    found = curvature.approximation(factors).to_dense()
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["over jnp.sqrt(3.)", "times 2.0", "split heads", "bsi,oi"]
)
def test_kronecker_factors_are_those_of_the_canonical_layer(name):
    apply, params, x = _dense_case(name)
    curvature, factors = models.exact_factors(_loss(apply), params, x)
    a = np.asarray(factors["w"]["input"])
    scale = {"over jnp.sqrt(3.)": 1 / 3, "times 2.0": 4.0}.get(name, 1.0)
    rows = np.asarray(x).reshape(-1, I)
    np.testing.assert_allclose(a, scale * rows.T @ rows / len(rows), rtol=1e-12)
    trace = sum(np.trace(f) for f in [a]) * np.trace(factors["w"]["output"])
    np.testing.assert_allclose(curvature.approximation(factors).trace(), trace)


def test_batched_experts_are_independent_layers():
    e = 3
    params = {"w": models.array(0, e, I, O)}
    x = models.array(1, e, B, I)

    def loss_fn(params, x):
        z = jnp.einsum("ebi,eio->ebo", x, params["w"])
        return squared_error(jnp.sin(z).transpose(1, 0, 2)).sum((1, 2)).mean()

    curvature, factors = models.exact_factors(loss_fn, params, x)
    (layer,) = curvature.layers
    assert layer.factor_shapes == {"input": (e, I, I), "output": (e, O, O)}
    each = np.asarray(x)
    expected = np.einsum("ebi,ebj->eij", each, each) / B
    np.testing.assert_allclose(factors["w"]["input"], expected, rtol=1e-12)


def test_low_precision_weights_of_a_mixed_precision_model():
    params = {"w": models.array(0, I, O).astype(jnp.float32)}

    def apply(params, x):
        return (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(float)

    (layer,) = _plan(apply, params, X).layers
    assert layer.kind == "dense" and layer.dtype == "float32"
    _, factors = models.exact_factors(_loss(apply), params, X)
    rows = np.asarray(X.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(
        factors["w"]["input"], rows.T @ rows / B, rtol=1e-6, atol=1e-7
    )


# ----------------------------------------------------------------------------- the bias


def _affine(add):
    return lambda p, x: add(x @ p["w"], p["b"])


BIAS = {
    "wide": (lambda y, b: y + jnp.broadcast_to(b, y.shape), (O,), X),
    "[1, o]": (lambda y, b: y + b, (1, O), X),
    "b + y": (lambda y, b: jnp.broadcast_to(b, y.shape) + y, (O,), X),
    "sequence": (lambda y, b: y + b[None, None], (O,), SEQUENCE),
    "after transposition": (lambda y, b: (y.T + b[:, None]).T, (O,), X),
    "after reshape": (
        lambda y, b: (y.reshape(B, 1, O) + b[None, None]).reshape(B, O),
        (O,),
        X,
    ),
    "under vmap": (lambda y, b: jax.vmap(lambda y: y + b)(y), (O,), X),
    "reshaped itself": (lambda y, b: y + b.reshape(1, O), (O, 1), X),
}


def _exact_of_one_affine(apply, params, x):
    def outputs(params):
        z = jnp.sin(apply(params, x))
        return z.reshape(len(z), -1)

    return oracles.ggn(outputs, lambda z: (z**2).sum(), params)


@pytest.mark.parametrize("name", BIAS)
def test_bias_joins_its_weight(name):
    add, shape, x = BIAS[name]
    params = {"w": models.array(0, I, O), "b": models.array(1, *shape)}
    apply = _affine(add)
    curvature, factors = models.exact_factors(
        _loss(apply), params, x, blocks=blocks.Full()
    )
    (layer,) = curvature.layers
    assert layer.params == ("w", "b") and layer.homogeneous
    assert layer.shape.inputs == I + 1
    np.testing.assert_allclose(
        curvature.approximation(factors).to_dense(),
        _exact_of_one_affine(apply, params, x),
        atol=1e-12,
    )
    _, factors = models.exact_factors(_loss(apply), params, x)
    a = np.asarray(factors["w+b" if "w+b" in factors else layer.name]["input"])
    np.testing.assert_allclose(a[-1, -1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(
        a[-1, :-1], np.asarray(x).reshape(-1, I).mean(0), rtol=1e-11
    )


NO_BIAS = {
    "y is used twice": lambda p, x: (lambda y: (y + p["b"]) * y)(x @ p["w"]),
    "b is used twice": lambda p, x: (x @ p["w"] + p["b"]) * p["b"],
    "subtracted": lambda p, x: x @ p["w"] - p["b"],
    "after a product with data": lambda p, x: (x @ p["w"]) * x[:, :1] + p["b"],
    "after an activation": lambda p, x: jnp.tanh(x @ p["w"]) + p["b"],
}


@pytest.mark.parametrize("name", NO_BIAS)
def test_bias_does_not_join(name):
    def apply(params, x):
        wide = {"w": params["w"], "b": jnp.broadcast_to(params["b"], (B, O))}
        if name == "after a product with data":
            y = x @ wide["w"]
            return y * jnp.broadcast_to(x[:, :1], y.shape) + wide["b"]
        return NO_BIAS[name](wide, x)

    params = {"w": models.array(0, I, O), "b": models.array(1, O)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = _plan(apply, params, X)
    weight = next(layer for layer in plan.layers if "w" in layer.params)
    assert weight.params == ("w",) and weight.kind == "dense"
    assert not weight.homogeneous


def test_two_biases_and_a_bias_shared_by_two_weights():
    params = {
        "v": models.array(0, I, O),
        "w": models.array(1, I, O),
        "b": models.array(2, O),
    }

    def apply(p, x):
        b = jnp.broadcast_to(p["b"], (B, O))
        return jnp.tanh(x @ p["v"] + b) + jnp.tanh(x @ p["w"] + b)

    plan = _plan(apply, params, X)
    by_name = {layer.name: layer for layer in plan.layers}
    assert {name: layer.params for name, layer in by_name.items()} == {
        name: (name,) for name in ("v", "w", "b")
    }
    assert by_name["v"].kind == by_name["w"].kind == "dense"
    assert by_name["b"].uses == 2 and by_name["b"].kind == "shift"
    assert isinstance(by_name["b"].block, blocks.Diagonal)


# ---------------------------------------------------------- scale, shift and other uses


def _wide(p, x):
    return jnp.broadcast_to(p, x.shape)


OTHERS = {
    "scale": (lambda p, x: x * _wide(p, x), (I,), {"params": "scale"}),
    "scale on the left": (lambda p, x: _wide(p, x) * x, (I,), {"params": "scale"}),
    "scalar scale": (lambda p, x: _wide(p, x) * x, (), {"params": "scale"}),
    "shift": (lambda p, x: x + _wide(p, x), (I,), {"params": "shift"}),
    "subtracted": (lambda p, x: x - _wide(p, x), (I,), {"params": "shift"}),
    "generic": (
        lambda p, x: x @ kfac_jax.register_generic(p),
        (I, O),
        {"params": "generic"},
    ),
    "unused": (lambda p, x: x, (I,), {"params": "unused"}),
    "its gradient is stopped": (
        lambda p, x: x + jax.lax.stop_gradient(_wide(p, x)),
        (I,),
        {"params": "unused"},
    ),
    "rounded to integers": (
        lambda p, x: x * _wide(p.astype(int).astype(float), x),
        (I,),
        {"params": "unused"},
    ),
    "compared": (
        lambda p, x: jnp.where(x > _wide(p, x), x, 0.0),
        (I,),
        {"params": "unused"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds(name):
    apply, shape, kinds = OTHERS[name]
    plan = _plan(apply, models.array(0, *shape), X)
    assert _kinds(plan) == kinds
    expected = blocks.Identity if "unused" in kinds.values() else blocks.Diagonal
    assert isinstance(plan.layers[0].block, expected)


@pytest.mark.parametrize(
    "name", ["scale", "scale on the left", "scalar scale", "shift", "subtracted"]
)
def test_elementwise_blocks_are_exact(name):
    apply, shape, _ = OTHERS[name]
    p = models.array(0, *shape)
    curvature, factors = models.exact_factors(_loss(apply), p, X)
    expected = _exact_of_one_affine(apply, p, X)
    found = oracles.vector(curvature.approximation(factors).diagonal())
    np.testing.assert_allclose(found, np.diag(expected), atol=1e-13)


def test_scale_and_shift_make_one_layer_and_its_blocks_are_exact():
    params = {"norm": {"scale": models.array(0, I), "shift": models.array(1, I)}}

    def apply(p, x):
        return x * _wide(p["norm"]["scale"], x) + _wide(p["norm"]["shift"], x)

    curvature, factors = models.exact_factors(
        _loss(apply), params, X, blocks=blocks.Full()
    )
    assert _kinds(curvature) == {"norm": "scale_and_shift"}
    np.testing.assert_allclose(
        curvature.approximation(factors).to_dense(),
        _exact_of_one_affine(apply, params, X),
        atol=1e-13,
    )


def _chosen_by_the_carry(p, x):
    def step(carry, _):
        i, z = carry
        entry = jax.lax.dynamic_index_in_dim(p, i, keepdims=False)
        return ((i * i + 2) % 3, jnp.sin(z * entry)), None

    return jax.lax.scan(step, (1, x), length=I)[0][1]


UNMATCHED = {
    "chosen by the carry": (_chosen_by_the_carry, r"consumed by `dynamic_slice`"),
    "while": (
        lambda p, x: jax.lax.while_loop(
            lambda c: c[0] < 1, lambda c: (c[0] + 1, c[1] * _wide(p, x)), (0, x)
        )[1],
        r"enters `while`, which has no reverse mode: use scan",
    ),
    "carry of a scan": (
        lambda p, x: jax.lax.scan(lambda c, x: (c * 2.0, c * x), p, x)[1],
        r"carry of a scan",
    ),
}


def _unmatched_loss(name):
    return _loss(UNMATCHED[name][0])


@pytest.mark.parametrize("name", UNMATCHED)
def test_what_no_layer_covers_is_refused_with_reason_and_line(name):
    p = models.array(0, I)
    reason = UNMATCHED[name][1]
    with pytest.warns(UserWarning, match=reason) as caught:
        plan = kfac_jax.make_curvature(_unmatched_loss(name), p, X)
    assert "test_discovery.py:" in str(caught[0].message)
    assert caught[0].filename == __file__
    (layer,) = plan.layers
    assert layer.kind == "unmatched" and isinstance(layer.block, blocks.Diagonal)
    assert re.search(reason, layer.reason) and re.search(reason, plan.report())
    with pytest.raises(ValueError, match=reason):
        kfac_jax.make_curvature(_unmatched_loss(name), p, X, on_unmatched="error")
    ignored = kfac_jax.make_curvature(
        _unmatched_loss(name), p, X, on_unmatched="ignore"
    )
    assert isinstance(ignored.layers[0].block, blocks.Identity)
    assert re.search(reason, ignored.report())


def test_a_generic_diagonal_of_the_empirical_fisher_is_unbiased():
    """The data's gradients have a mean, which must not enter the diagonal."""

    def loss_fn(p, x, y):
        z = x @ kfac_jax.register_generic(p)
        return kfac_jax.losses.squared_error(z, y).sum(-1).mean()

    p, y = models.array(0, I, O), models.array(3, B, O) + 2.0
    plan = kfac_jax.make_curvature(loss_fn, p, X, y, estimation_mode="fisher_empirical")

    def one(key):
        sums = plan.value_grad_and_statistics(p, X, y, rng=key)[2]
        return sums.layers["params"]["diagonal"] / sums.weight.astype(float)

    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(jax.jit(jax.vmap(one))(keys)).reshape(4000, I, O)
    each = 2 * np.einsum("bi,bo->bio", X, np.asarray(X) @ p - y)
    error = np.abs(draws.mean(0) - np.square(each).mean(0))
    deviation = draws.std(0) / 4000**0.5
    assert np.all(error < 5 * deviation), "further than five standard errors"


def test_a_generic_diagonal_is_unbiased():
    """`N · ḡ²` of the sampled batch gradient has the Fisher's diagonal as its mean."""

    def apply(p, x):
        return x @ kfac_jax.register_generic(p)

    p = models.array(0, I, O)
    plan = _plan(apply, p, X)
    samples = 4000

    def one(key):
        sums = plan.value_grad_and_statistics(p, X, rng=key)[2]
        return sums.layers["params"]["diagonal"] / sums.weight.astype(float)

    keys = jax.random.split(jax.random.key(0), samples)
    found = jax.jit(lambda keys: jax.vmap(one)(keys).mean(0))(keys)
    expected = np.diag(_exact_of_one_affine(apply, p, X))
    tolerance = 5 * np.sqrt(2 / samples)  # of a χ² with one degree of freedom
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=tolerance)


# ------------------------------------------------------------------------ stop_gradient

stop = jax.lax.stop_gradient


def _power_iteration(p, x):
    """A spectral norm as it is often computed: in a loop, without its gradient."""
    step = lambda c: (c[0] + 1, p["w"] @ (c[1] @ p["w"]))  # noqa: E731
    _, u = jax.lax.while_loop(lambda c: c[0] < 3, step, (0, jnp.ones(I)))
    return x @ p["v"] * stop(jnp.linalg.norm(u))


STOPPED = {  # networks in which no gradient reaches "w" [I, I]
    "weight": lambda p, x: x @ stop(p["w"]) @ p["v"],
    "all of a tree": lambda p, x: x @ stop(p)["w"] @ p["v"],
    "view": lambda p, x: x @ (2.0 * stop(p["w"].T.reshape(-1))).reshape(I, I) @ p["v"],
    "layer": lambda p, x: stop(jnp.tanh(x @ p["w"])) @ p["v"],
    "function of it": lambda p, x: x @ stop(jnp.exp(p["w"])) @ p["v"],
    "scale": lambda p, x: x @ p["v"] * stop(jnp.linalg.norm(p["w"])),
    "mask": lambda p, x: x @ p["v"] * stop((p["w"] > 0).astype(float).sum()),
    "carry": lambda p, x: (
        x @ stop(jax.lax.scan(lambda c, _: (c @ c, None), p["w"], length=2)[0]) @ p["v"]
    ),
    "in scan": lambda p, x: (
        jax.lax.scan(lambda h, _: (jnp.tanh(h @ stop(p["w"])), None), x, length=2)[0]
        @ p["v"]
    ),
    "scanned over": lambda p, x: (
        jax.lax.scan(lambda h, w: (h * stop(_wide(w, h)), None), x, p["w"])[0] @ p["v"]
    ),
    "in remat": lambda p, x: jax.checkpoint(lambda w: x @ stop(w))(p["w"]) @ p["v"],
    "in cond": lambda p, x: (
        jax.lax.cond(x[0, 0] > 0, lambda w: x @ stop(w), lambda w: x, p["w"]) @ p["v"]
    ),
    "in jit": lambda p, x: jax.jit(lambda w: x @ stop(w))(p["w"]) @ p["v"],
    "while": _power_iteration,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", STOPPED)
def test_a_parameter_that_no_gradient_reaches_is_unused(name):
    params = {"v": models.array(0, I, O), "w": models.array(1, I, I)}
    curvature, factors = models.exact_factors(
        _loss(STOPPED[name]), params, X, on_unmatched="error"
    )
    assert _kinds(curvature) == {"v": "dense", "w": "unused"}
    fixed = params["w"]
    _, expected = models.exact_factors(
        _loss(lambda p, x: STOPPED[name]({**p, "w": fixed}, x)),
        {"v": params["v"]},
        X,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        factors["v"],
        expected["v"],
    )


def test_a_parameter_that_no_gradient_reaches_stays_as_it_is():
    params = {"v": models.array(0, I, O), "w": models.array(1, I, I)}
    curvature = _plan(STOPPED["layer"], params, X, on_unmatched="error")
    tx = kfac_jax.kfac(curvature, learning_rate=0.1, momentum=0.9, damping=0.1)

    @jax.jit
    def step(params, state, key):
        _, grads, statistics = curvature.value_grad_and_statistics(params, X, rng=key)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return grads, updates, state

    state = tx.init(params)
    for k in range(2):
        grads, updates, state = step(params, state, jax.random.key(k))
        assert not grads["w"].any() and not updates["w"].any()
        assert grads["v"].any() and updates["v"].any()


@pytest.mark.parametrize(
    "apply",
    [
        lambda w, x: x @ w + jnp.cos(x @ stop(w)),
        lambda w, x: stop(jnp.tanh(x @ w)) * (x @ w),
        lambda w, x: stop(jnp.exp(w)).sum() * (x @ w),
    ],
)
def test_of_a_parameter_used_both_ways_only_the_use_with_a_gradient_counts(apply):
    w = models.array(0, I, I)
    curvature, factors = models.exact_factors(
        _loss(apply), w, X, on_unmatched="error", blocks=blocks.Full()
    )
    assert [(x.kind, x.uses) for x in curvature.layers] == [("dense", 1)]
    np.testing.assert_allclose(
        curvature.approximation(factors).to_dense(),
        _exact_of_one_affine(apply, w, X),
        atol=1e-12,
    )


def test_a_derivative_rule_may_give_a_gradient_where_its_function_stops_it():
    straight = jax.custom_vjp(lambda w, x: x @ stop(w))
    straight.defvjp(
        lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T)
    )
    w = models.array(0, I, O)
    with pytest.warns(UserWarning, match="consumed by `stop_gradient`"):
        plan = _plan(straight, w, X)
    assert _kinds(plan) == {"params": "unmatched"}


# ------------------------------------------------------------------------- several uses


def test_a_weight_used_twice_sums_over_its_uses():
    w = models.array(0, I, I)

    def apply(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    plan = _plan(apply, w, X)
    assert [(x.kind, x.uses) for x in plan.layers] == [("dense", 2)]
    _, factors = models.exact_factors(_loss(apply), w, X)
    first, second = np.asarray(X), np.tanh(np.asarray(X @ w))
    expected = (first.T @ first + second.T @ second) / (2 * B)
    np.testing.assert_allclose(factors["params"]["input"], expected, rtol=1e-12)


def test_weight_and_bias_used_twice_stay_joined():
    params = {"w": models.array(0, I, I), "b": models.array(1, I)}

    def apply(p, x):
        for _ in range(2):
            x = jnp.tanh(x @ p["w"] + _wide(p["b"], x))
        return x

    plan = _plan(apply, params, X)
    assert [(x.params, x.uses) for x in plan.layers] == [(("w", "b"), 2)]


@pytest.mark.parametrize("block", [blocks.Diagonal(), blocks.Full()])
@pytest.mark.parametrize("form", ["unrolled", "scan"])
def test_blocks_that_sum_within_an_example_sum_over_all_uses(form, block):
    """Either exact, `Σ_b (Σ_uses x dy)²`, or refused: never `Σ_uses Σ_b (x dy)²`."""
    w = models.array(0, I, I)

    def apply(w, x):
        if form == "unrolled":
            return jnp.tanh(jnp.tanh(x @ w) @ w)
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=2)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        curvature, factors = models.exact_factors(_loss(apply), w, X, blocks=block)
    (layer,) = curvature.layers
    if layer.reason:
        assert "use" in layer.reason
        return

    def outputs(w):
        return jnp.sin(jnp.tanh(jnp.tanh(X @ w) @ w))

    expected = oracles.ggn(outputs, lambda z: (z**2).sum(), w)
    found = np.asarray(curvature.approximation(factors).to_dense())
    if isinstance(block, blocks.Diagonal):
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "apply",
    [
        lambda w, x: (x @ w).reshape(-1, 2) @ w.reshape(2, 8),
        lambda w, x: x @ w + w[jnp.argmax(x, axis=1)],
    ],
    ids=["split otherwise", "dense and a table"],
)
def test_uses_that_are_different_maps_share_a_block(apply):
    w, x = models.array(0, 4, 4), models.array(1, B, 4)
    plan, factors = models.exact_factors(_loss(apply), w, x, blocks=blocks.Full())
    (layer,) = plan.layers
    assert layer.uses == 2
    expected = oracles.ggn(lambda w: jnp.sin(apply(w, x)), lambda z: (z**2).sum(), w)
    found = plan.approximation(factors).to_dense()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_penalty_or_a_metric_is_no_use():
    w = models.array(0, I, O)

    def loss_fn(w, x):
        penalty = 0.05 * jnp.vdot(w, w)
        return squared_error(x @ w).sum(-1).mean() + penalty, jnp.linalg.norm(w)

    plan = kfac_jax.make_curvature(loss_fn, w, X, has_aux=True, l2=0.1)
    assert [(x.kind, x.uses) for x in plan.layers] == [("dense", 1)]


# ------------------------------------------------------------------------- control flow

STACK = {"w": models.array(0, 3, I, I), "b": models.array(1, 3, I)}


def _scan_layers(params, x, body=lambda f: f):
    def layer(h, p):
        return jnp.tanh(h @ p["w"] + _wide(p["b"], h)), None

    return jax.lax.scan(body(layer), x, params)[0]


def _unrolled_layers(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i] + _wide(params["b"][i], x))
    return x


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "block", [blocks.Kronecker(), blocks.Diagonal(), blocks.Full()]
)
@pytest.mark.parametrize("body", [lambda f: f, jax.checkpoint, jax.jit])
def test_stacked_scan_weights_are_a_batch_of_layers(body, block):
    apply = functools.partial(_scan_layers, body=body)
    curvature, factors = models.exact_factors(_loss(apply), STACK, X, blocks=block)
    (layer,) = curvature.layers
    assert layer.kind == "dense" and layer.shape.stacked == (3,) and layer.homogeneous
    separate = {f"layer{i}": {k: v[i] for k, v in STACK.items()} for i in range(3)}
    _, expected = models.exact_factors(
        _loss(lambda p, x: jnp.tanh(models.mlp(p, x))), separate, X, blocks=block
    )
    for name, found in factors[layer.name].items():
        parts = [expected[f"layer{i}"][name] for i in range(3)]
        np.testing.assert_allclose(found, jnp.stack(parts), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shared", ["b", "w"])
def test_a_scan_over_one_of_weight_and_bias(shared):
    """Stacked weights with one bias, and the reverse, must not be joined."""
    params = {k: (v[0] if k == shared else v) for k, v in STACK.items()}

    def apply(params, x):
        stacked = {k: v for k, v in params.items() if k != shared}

        def layer(h, p):
            p = {**params, **p}
            return jnp.tanh(h @ p["w"] + _wide(p["b"], h)), None

        return jax.lax.scan(layer, x, stacked)[0]

    curvature, factors = models.exact_factors(
        _loss(apply), params, X, on_unmatched="error"
    )
    assert {x.params for x in curvature.layers} == {("w",), ("b",)}
    op = curvature.approximation(factors)
    v = oracles.random_like(params, 0)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(), op.solve(v, 0.1), v)


def test_recurrent_weights_in_scan_share_over_time():
    params = {
        "input": models.array(0, I, 3),
        "hidden": models.array(1, 3, 3),
        "bias": models.array(2, 3),
    }

    def cell(p, h, x):
        return jnp.tanh(x @ p["input"] + h @ p["hidden"] + _wide(p["bias"], h))

    def scanned(p, x):
        h = jnp.zeros((B, 3))
        return jax.lax.scan(lambda h, x: (cell(p, h, x), None), h, x.swapaxes(0, 1))[0]

    def unrolled(p, x):
        h = jnp.zeros((B, 3))
        for t in range(S):
            h = cell(p, h, x[:, t])
        return h

    plan, found = models.exact_factors(
        _loss(scanned), params, SEQUENCE, on_unmatched="error"
    )
    kinds = _kinds(plan)
    assert kinds["input"] == kinds["hidden"] == "dense"
    _, expected = models.exact_factors(
        _loss(unrolled), params, SEQUENCE, on_unmatched="error"
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), found, expected
    )
    assert found["hidden"]["output"].any()


P = jax.sharding.PartitionSpec
MESH = models.mesh(2, "data")
NET = models.dense_params(3, I, 3, 1)


@functools.cache
def _bare_net():
    return models.exact_factors(_loss(models.mlp), NET, X)


@pytest.mark.parametrize("name", models.WRAPPERS)
def test_same_layers_and_factors_inside_other_transformations(name):
    plan, factors = _bare_net()
    apply = models.WRAPPERS[name](lambda p, x: models.mlp(p, x))
    found_plan, found = models.exact_factors(_loss(apply), NET, X, on_unmatched="error")
    same = [
        (a.name, a.kind, a.block, a.shape, a.layouts, a.params) for a in plan.layers
    ]
    assert same == [
        (a.name, a.kind, a.block, a.shape, a.layouts, a.params)
        for a in found_plan.layers
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), found, factors
    )


def test_a_layer_in_both_branches_counts_twice():
    def apply(w, x):
        return jax.lax.cond(
            x.sum() > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x @ w)
        )

    plan = _plan(apply, models.array(0, I, O), X)
    assert [(x.kind, x.uses) for x in plan.layers] == [("dense", 2)]


def test_a_closed_over_tracer_is_no_constant():
    """A plan made inside `jit`, whose loss closes over a traced scalar."""
    w = models.array(0, I, O)

    @jax.jit
    def trace_of_the_input_factor(temperature):
        apply = lambda w, x: x @ (w * jnp.exp(temperature))  # noqa: E731
        _, factors = models.exact_factors(_loss(apply), w, X)
        return jnp.trace(factors["params"]["input"])

    expected = np.exp(0.6) * np.square(X).sum() / B
    np.testing.assert_allclose(trace_of_the_input_factor(jnp.asarray(0.3)), expected)


# ---------------------------------------------------------------------------- libraries


class _Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        kinds = dict(param_dtype=float)
        x = jnp.tanh(flax.linen.Dense(3, name="first", **kinds)(x))
        return flax.linen.Dense(1, name="last", **kinds)(x)


def _linen():
    module = _Linen()
    params = module.init(jax.random.key(0), X)["params"]
    return (lambda p, x: module.apply({"params": p}, x)), params


class _Nnx(flax.nnx.Module):
    def __init__(self, rngs):
        self.first = flax.nnx.Linear(I, 3, rngs=rngs, param_dtype=float)
        self.last = flax.nnx.Linear(3, 1, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def _nnx():
    graph, params = flax.nnx.split(_Nnx(flax.nnx.Rngs(0)), flax.nnx.Param)
    return (lambda p, x: flax.nnx.merge(graph, p)(x)), params


def _equinox():
    module = equinox.nn.MLP(I, 1, 3, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = equinox.partition(module, equinox.is_inexact_array)
    return (lambda p, x: jax.vmap(equinox.combine(p, static))(x)), params


def _raw():
    return models.mlp, NET


@pytest.mark.parametrize("library", [_raw, _linen, _nnx, _equinox])
def test_every_library_gives_two_joint_dense_layers(library):
    apply, params = library()
    curvature, factors = models.exact_factors(
        _loss(apply), params, X, on_unmatched="error", blocks=blocks.Full()
    )
    assert [(x.kind, x.homogeneous) for x in curvature.layers] == [("dense", True)] * 2
    assert [x.shape.matrix for x in curvature.layers] == [(I + 1, 3), (4, 1)]
    exact = _exact_of_one_affine(apply, params, X)
    found = np.asarray(curvature.approximation(factors).to_dense())
    mask = found != 0
    np.testing.assert_allclose(found[mask], exact[mask], atol=1e-12)
    assert mask.sum() >= 9**2 + 4**2 - 9**2 // 2


# --------------------------------------------------------------------- blocks= and tags

PAIR = models.dense_params(5, I, 3, O)


def _choice(spec):
    plan = _plan(models.mlp, PAIR, X, blocks=spec)
    return [None if x.block is None else type(x.block).__name__ for x in plan.layers]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, ["Kronecker", "Kronecker"]),
        (blocks.Diagonal(), ["Diagonal", "Diagonal"]),
        ({"dense": blocks.Full()}, ["Full", "Full"]),
        ({"layer1": blocks.Diagonal()}, ["Kronecker", "Diagonal"]),
        ({"layer0/w": None}, [None, "Kronecker"]),
        ({"layer[01]/b": blocks.Full()}, ["Full", "Full"]),
        ({"layer0": None, "dense": blocks.Full()}, [None, "Full"]),
        ({"dense": blocks.Full(), "layer0": None}, ["Full", "Full"]),
        (
            lambda layer: None if layer.shape.outputs == O else layer.block,
            ["Kronecker", None],
        ),
    ],
)
def test_choice_of_blocks(spec, expected):
    assert _choice(spec) == expected


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ({"layer7": None}, ValueError, r"key 'layer7'.*Layers: layer0, layer1"),
        ({"scale": None}, ValueError, "key 'scale'.*Kinds: dense"),
        ({"dense": "full"}, TypeError, "got 'full' for layer 'layer0'"),
        (lambda layer: blocks.Full, TypeError, "blocks must give a Block"),
        ("full", TypeError, "blocks must be a Block, a mapping"),
    ],
)
def test_bad_choices_are_refused(spec, error, match):
    with pytest.raises(error, match=match):
        _choice(spec)


def test_a_layer_block_for_a_parameter_without_one_is_refused():
    with pytest.raises(
        ValueError, match=r"'params' \(generic\) has no inputs and outputs"
    ):
        _plan(
            OTHERS["generic"][0],
            models.array(0, I, O),
            X,
            blocks={"params": blocks.Full()},
        )


def test_a_tag_wins_over_detection():
    """Here only the tag knows that two products are one layer with a wide input."""
    w = models.array(0, I, O)

    def apply(w, x, tag):
        y = x[:, :1] @ w[:1] + x[:, 1:] @ w[1:]
        return kfac_jax.register_dense(y, x, w) if tag else y

    tagged = _plan(lambda w, x: apply(w, x, True), w, X)
    assert [(x.kind, x.uses) for x in tagged.layers] == [("dense", 1)]
    parts = _plan(lambda w, x: apply(w, x, False), w, X).layers
    assert [x.name for x in parts] == ["params[0]", "params[1]"] and I == 2
    found = models.exact_factors(_loss(lambda w, x: apply(w, x, True)), w, X)[1]
    expected = models.exact_factors(_loss(lambda w, x: x @ w), w, X)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), found, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_tagged_and_detected_layers_agree(bias):
    params = models.dense_params(7, I, O, bias=bias)["layer0"]

    def apply(p, x, tag):
        y = models.dense(p, x)
        return kfac_jax.register_dense(y, x, p["w"], p.get("b")) if tag else y

    pair = [
        models.exact_factors(_loss(lambda p, x, t=t: apply(p, x, t)), params, SEQUENCE)
        for t in (True, False)
    ]
    assert pair[0][0].layers[0].params == pair[1][0].layers[0].params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-12), pair[0][1], pair[1][1]
    )


def test_tagged_scale_and_shift_agrees_with_the_detected():
    params = {"scale": models.array(0, I), "shift": models.array(1, I)}

    def apply(p, x, tag):
        y = x * _wide(p["scale"], x) + _wide(p["shift"], x)
        if tag:
            y = kfac_jax.register_scale_and_shift(y, x, p["scale"], p["shift"])
        return y

    pair = [
        models.exact_factors(_loss(lambda p, x, t=t: apply(p, x, t)), params, SEQUENCE)
        for t in (True, False)
    ]
    assert (
        _kinds(pair[0][0]) == _kinds(pair[1][0]) == {"scale+shift": "scale_and_shift"}
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-12), pair[0][1], pair[1][1]
    )


def test_a_tagged_convolution_is_the_one_its_output_comes_from():
    def apply(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["w"], (2, 1), "SAME", dimension_numbers=dims
        )
        y = y + jnp.broadcast_to(params["b"], y.shape)
        if tagged:
            y = kfac_jax.register_conv2d(y, x, params["w"], params["b"], padding="SAME")
        return y

    params = {"w": models.array(0, 3, 3, 1, 2), "b": models.array(2, 2)}
    x = models.array(1, 2, 4, 4, 1)
    tagged = False
    bare = _plan(apply, params, x)
    tagged = True
    plan = _plan(apply, params, x)
    assert [layer.kind for layer in plan.layers] == ["conv"]
    assert plan.layers[0].params == ("w", "b")
    found, expected = (
        models.statistics_to_factors(each, params, x, rng=jax.random.key(0))
        for each in (plan, bare)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(close, found, expected)


def test_a_convolution_tag_on_something_else_is_not_believed():
    def apply(w, x):
        return kfac_jax.register_conv2d(x * jnp.exp(w).sum(), x, w)

    plan = _plan(apply, models.array(0, 3, 3, 1, 2), models.array(1, 2, 4, 4, 1))
    assert [layer.kind for layer in plan.layers] == ["scale"]


SHARDED = [getattr(kfac_jax.blocks, n)() for n in ("Kronecker", "Full", "Eigen", "TNT")]


def _sharded(check_vma):
    def apply(params, x):
        inside = jax.shard_map(
            models.mlp,
            mesh=MESH,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return inside(params, x)

    return apply


@pytest.mark.sampled(2)
@pytest.mark.parametrize("block", SHARDED, ids=lambda block: type(block).__name__)
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_statistics_are_those_of_the_whole_batch(block, check_vma):
    size = 4 * MESH.devices.size
    x, y = models.array(1, size, 3), models.array(2, size, 2)
    net = models.dense_params(0, 3, 4, 2)
    results = []
    for apply in (models.mlp, _sharded(check_vma)):

        def loss_fn(params, x, y, apply=apply):
            z = apply(params, x)
            return kfac_jax.losses.squared_error(z, y).sum(-1).mean()

        plan = kfac_jax.make_curvature(
            loss_fn, net, x, y, estimation_mode="ggn_exact", blocks=block
        )
        assert [layer.kind for layer in plan.layers] == ["dense", "dense"]
        assert all(layer.block == block for layer in plan.layers)
        # any basis: that of the batch itself is not unique in the null space
        factors = jax.tree.map(lambda f: f[..., ::-1], plan.init_factors(net))
        compute = functools.partial(plan.value_grad_and_statistics, factors=factors)
        results.append(jax.jit(compute)(net, x, y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *results
    )


def test_parameters_that_enter_shard_map_in_parts_are_reported():
    def apply(w, x):
        inside = jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "data"),
            mesh=MESH,
            in_specs=(P("data"), P(None, "data")),
            out_specs=P(),
        )
        return inside(w, x)

    size = MESH.devices.size
    with pytest.warns(UserWarning, match="enters a shard_map in parts"):
        _plan(apply, models.array(0, size, 2), models.array(1, 3, size))


def test_a_loss_inside_shard_map_is_refused():
    def loss_fn(w, x):
        def inside(w, x):
            z = kfac_jax.register_squared_error_loss(x @ w)
            return jax.lax.pmean((z**2).sum(-1).mean(), "data")

        return jax.shard_map(
            inside, mesh=MESH, in_specs=(P(), P("data")), out_specs=P()
        )(w, x)

    w, x = models.array(0, 3, 2), models.array(1, MESH.devices.size, 3)
    with pytest.raises(ValueError, match="inside `shard_map`"):
        plan = kfac_jax.make_curvature(loss_fn, w, x)
        plan.value_grad_and_statistics(w, x, rng=jax.random.key(0))


def test_a_program_without_a_registered_loss_is_refused():
    with pytest.raises(ValueError, match="No loss is registered"):
        kfac_jax.make_curvature(lambda w, x: (x @ w).sum(), models.array(0, I, O), X)


# ------------------------------------------------------------------------------ one-hot


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "block",
    [kfac_jax.blocks.Kronecker(), kfac_jax.blocks.Full(), kfac_jax.blocks.Diagonal()],
)
def test_one_hot_products_are_embeddings_with_the_same_curvature(block):
    ids = jnp.array([[0, 1, 1, 6, 5], [2, 1, 4, 3, 0]])
    params = {"table": models.array(0, 7, 3), "head": models.array(1, 3, 2)}
    ones = jnp.ones((*ids.shape, 1))
    one_hot = lambda ids: jax.nn.one_hot(ids, 7)  # noqa: E731
    ways = {
        "embedding": lambda w, ids: one_hot(ids) @ w,
        "mapped": lambda w, ids: jax.vmap(lambda i: one_hot(i) @ w)(ids),
        "dense": lambda w, ids: (one_hot(ids) * ones) @ w,  # hidden from discovery
    }
    found = []
    for name, embed in ways.items():

        def loss_fn(params, ids, embed=embed):
            z = jnp.tanh(embed(params["table"], ids)).mean(1) @ params["head"]
            return kfac_jax.losses.squared_error(z).sum(-1).mean()

        plan = kfac_jax.make_curvature(
            loss_fn, params, ids, estimation_mode="ggn_exact", blocks={"table": block}
        )
        kind = {layer.name: layer.kind for layer in plan.layers}["table"]
        assert kind == ("dense" if name == "dense" else "embedding")
        _, _, statistics = plan.value_grad_and_statistics(params, ids)
        factors = plan.update_factors(plan.init_factors(params), statistics, step=1)
        found.append(np.asarray(plan.approximation(factors).to_dense()))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-12, atol=1e-15)


# -------------------------------------------------- parameters that meet data unusually


def _token(params, x):
    token = jnp.tile(params["token"], [len(x), 1, 1])
    return models.mixing(params["net"], jnp.concatenate([token, x], 1))


def _stretched_scale(params, x):
    """As layer norms do: the scale first meets a statistic without features."""
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1.0)
    y = x * (inverse * jnp.broadcast_to(params["scale"], (1, 1, 3)))
    return models.mixing(params["net"], y)


UNUSUAL = {
    "token": (_token, "shift", {"token": models.array(5, 1, 1, 3)}),
    "scale": (_stretched_scale, "scale", {"scale": models.array(6, 3)}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", [kfac_jax.blocks.Full(), kfac_jax.blocks.Diagonal()])
@pytest.mark.parametrize("name", UNUSUAL)
def test_tokens_and_stretched_scales_are_exact(name, block):
    apply, kind, own = UNUSUAL[name]
    params = {"net": models.dense_params(0, 3, 4, 2), **own}
    x = models.array(7, 4, 2, 3)
    outputs = lambda params: apply(params, x).reshape(len(x), -1)  # noqa: E731

    def loss_fn(params, x):
        z = apply(params, x).reshape(len(x), -1)
        return kfac_jax.losses.squared_error(z).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn, params, x, estimation_mode="ggn_exact", blocks={name: block}
    )
    (layer,) = (layer for layer in plan.layers if layer.name == name)
    assert (layer.kind, layer.block) == (kind, block)
    nll = lambda z: kfac_jax.losses.squared_error(z).sum()  # noqa: E731
    expected = oracles.block(oracles.ggn(outputs, nll, params), params, name)
    if block == kfac_jax.blocks.Diagonal():
        expected = np.diag(np.diag(expected))
    factors = models.statistics_to_factors(plan, params, x)
    found = oracles.block(
        np.asarray(plan.approximation(factors).to_dense()), params, name
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


def test_a_token_repeated_outside_of_the_checkpoint_that_joins_it():
    def apply(token, x):
        inside = jax.checkpoint(lambda t, x: jnp.concatenate([t, x], 1) ** 2)
        return inside(jnp.tile(token, [len(x), 1, 1]), x).sum(1)

    token, x = models.array(5, 1, 1, 3), models.array(7, 4, 2, 3)
    plan, factors = models.exact_factors(_loss(apply), token, x, blocks=blocks.Full())
    assert [layer.kind for layer in plan.layers] == ["shift"]
    expected = oracles.ggn(
        lambda t: jnp.sin(apply(t, x)), lambda z: (z**2).sum(), token
    )
    found = plan.approximation(factors).to_dense()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


# ------------------------------------------------------------------- mutable arrays


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="JAX has no mutable arrays yet")
def test_outputs_read_from_mutable_arrays_are_refused():
    """Their slices would leave out what is written: parameters would seem unused."""

    def loss_fn(params, x):
        state = jax.new_ref(jnp.tanh(x @ params["a"]))
        state[...] = jnp.tanh(state[...] @ params["b"])
        return squared_error(state[...]).sum(-1).mean()

    params = {"a": models.array(0, 3, 3), "b": models.array(1, 3, 3)}
    with pytest.raises(ValueError, match=r"mutable array.*test_discovery\.py:\d+"):
        kfac_jax.make_curvature(loss_fn, params, models.array(2, 4, 3))


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="JAX has no mutable arrays yet")
def test_mutable_arrays_beside_the_registered_output_do_no_harm():
    def loss_fn(params, x):
        z = x @ params
        seen = jax.new_ref(jnp.zeros(()))
        seen[...] += jax.lax.stop_gradient(z).sum()
        return squared_error(z).sum(-1).mean() + 0.0 * seen[...]

    plan = kfac_jax.make_curvature(
        loss_fn, models.array(0, 3, 2), models.array(1, 4, 3)
    )
    assert [layer.kind for layer in plan.layers] == ["dense"]
