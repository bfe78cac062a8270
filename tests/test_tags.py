"""Tags are the identity in value and gradient, transformed or compiled."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import kfac_jax
from tests.helpers import models

X = models.array(0, 8, 3)
W = models.array(1, 3, 2)
B = models.array(2, 2)
Y = models.classes(3, 2, 8)


def _tagged(w, x, y):
    """Uses every tag."""
    b = kfac_jax.register_generic(B)
    z = x @ w + jnp.broadcast_to(b, (*x.shape[:-1], 2))
    z = kfac_jax.register_dense(z, x, w, b)
    z = kfac_jax.register_scale_and_shift(z * 1.0, z, scale=b, shift=b)
    z = kfac_jax.register_softmax_cross_entropy_loss(z, y)
    z = kfac_jax.register_sigmoid_cross_entropy_loss(z)
    return kfac_jax.register_squared_error_loss(z)


def _plain(w, x, y):
    return x @ w + jnp.broadcast_to(B, (*x.shape[:-1], 2))


def _loss(network):
    return lambda w, x, y: jnp.sin(network(w, x, y)).sum()


def _custom_jvp(f):
    wrapped = jax.custom_jvp(lambda w, x: f(w, x, Y))

    @wrapped.defjvp
    def rule(primals, tangents):
        return jax.jvp(lambda w, x: f(w, x, Y), primals, tangents)

    return lambda w, x, y: wrapped(w, x)


def _scan(f):
    def scanned(w, x, y):
        def body(total, xy):
            return total + f(w, xy[0][None], xy[1][None]), None

        return jax.lax.scan(body, jnp.zeros(()), (x, y))[0]

    return scanned


MESH = models.mesh(8, "batch")


def _shard_map(f):
    def local(w, x, y):
        return jax.lax.psum(f(w, x, y), "batch")

    batch = PartitionSpec("batch")
    return jax.shard_map(
        local,
        mesh=MESH,
        in_specs=(PartitionSpec(), batch, batch),
        out_specs=PartitionSpec(),
    )


def _pmap(f):
    def mapped(w, x, y):
        g = jax.pmap(f, in_axes=(None, 0, 0))
        return g(w, x[:, None], y[:, None]).sum()

    return mapped


TRANSFORMATIONS = {
    "bare": lambda f: f,
    "jit": jax.jit,
    "nested jit": lambda f: jax.jit(jax.jit(f)),
    "vmap": lambda f: lambda w, x, y: jax.vmap(f, (None, 0, 0))(w, x, y).sum(),
    "vmap parameters": lambda f: (
        lambda w, x, y: jax.vmap(f, (0, None, None))(jnp.stack([w, 2 * w]), x, y).sum()
    ),
    "scan": _scan,
    "remat": jax.checkpoint,
    "custom_jvp": _custom_jvp,
    "shard_map": _shard_map,
    "pmap": _pmap,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=models.EIGHT_DEVICES if name == "pmap" else ())
        for name in TRANSFORMATIONS
    ],
)
def test_value_and_gradient_are_unchanged(name):
    expected = TRANSFORMATIONS[name](_loss(_plain))
    found = TRANSFORMATIONS[name](_loss(_tagged))
    np.testing.assert_allclose(found(W, X, Y), expected(W, X, Y), rtol=1e-14)
    np.testing.assert_allclose(
        jax.grad(found)(W, X, Y), jax.grad(expected)(W, X, Y), rtol=1e-14
    )


def test_forward_and_second_derivatives_are_unchanged():
    tangent = models.array(5, 3, 2)
    for derive in (
        lambda f: jax.jvp(lambda w: f(w, X, Y), (W,), (tangent,))[1],
        lambda f: jax.hessian(f)(W, X, Y),
        lambda f: jax.linearize(lambda w: f(w, X, Y), W)[1](tangent),
    ):
        np.testing.assert_allclose(
            derive(_loss(_tagged)), derive(_loss(_plain)), rtol=1e-13
        )


def _operations(f):
    """Counts the operations of the compiled gradient."""
    compiled = jax.jit(jax.value_and_grad(f)).lower(W, X, Y).compile().as_text()
    found = Counter(re.findall(r"= \S+ ([\w-]+)\(", compiled))
    del found["parameter"]  # of fusions, which are cut at other places
    return found


def test_nothing_is_left_once_compiled():
    plain = _operations(_loss(_plain))
    assert sum(plain.values()) > 3
    assert _operations(_loss(_tagged)) == plain


def test_tagged_program_can_be_exported_and_evaluated_from_its_jaxpr():
    closed = jax.make_jaxpr(_loss(_tagged))(W, X, Y)
    (value,) = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, W, X, Y)
    np.testing.assert_allclose(value, _loss(_plain)(W, X, Y), rtol=1e-14)


METADATA = {
    "window_strides": (1, 1),
    "padding": [[1, 1]],
    "anything": {"a": 1},
    "nested": ([1, 1], {"a": (1,)}),
    "array": np.ones(2),
    "jax array": (jnp.ones(2),),
}


@pytest.mark.parametrize(
    "register",
    [
        lambda **kw: kfac_jax.register_dense(X @ W, X, W, **kw),
        lambda **kw: kfac_jax.register_scale_and_shift(X * 2.0, X, jnp.ones(3), **kw),
        lambda **kw: kfac_jax.register_conv2d(
            jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), **kw
        ),
    ],
)
def test_unknown_keyword_arguments_are_kept_as_metadata(register):
    """As they are where they are hashable, as JAX wants; others as their text."""
    plain, found = register(), jax.jit(lambda: register(**METADATA))()
    np.testing.assert_allclose(found, plain, rtol=1e-14)
    (equation,) = (
        e
        for e in jax.make_jaxpr(lambda: register(**METADATA))().eqns
        if e.primitive.name == "kfac_layer"
    )
    kept = dict(equation.params["metadata"])
    assert kept.pop("window_strides") == (1, 1)
    assert kept == {k: repr(v) for k, v in METADATA.items() if k != "window_strides"}
    hash(equation.params["metadata"])


def test_metadata_may_be_traced_without_being_kept():
    tagged = lambda x, t: kfac_jax.register_dense(x @ W, x, W, temperature=t)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(tagged)(X, 1.0), jax.jit(jnp.matmul)(X, W))


def test_registering_returns_its_first_operand_and_keeps_its_type():
    z = jnp.ones((4, 2), jnp.bfloat16)
    for register in (
        kfac_jax.register_softmax_cross_entropy_loss,
        kfac_jax.register_sigmoid_cross_entropy_loss,
        kfac_jax.register_squared_error_loss,
        kfac_jax.register_normal_predictive_distribution,
        kfac_jax.register_generic,
    ):
        out = register(z)
        assert out.dtype == z.dtype
        np.testing.assert_array_equal(out, z)


def test_aliases_are_the_same_functions():
    assert (
        kfac_jax.register_categorical_predictive_distribution
        is kfac_jax.register_softmax_cross_entropy_loss
    )
    assert (
        kfac_jax.register_multi_bernoulli_predictive_distribution
        is kfac_jax.register_sigmoid_cross_entropy_loss
    )


# --------------------------------------------------------------- registered per example


def _softmax(z, y):
    z = kfac_jax.register_softmax_cross_entropy_loss(z, y)
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]


def _squared(z, y):
    kfac_jax.register_squared_error_loss(z, y)
    return jnp.square(z - y).sum(-1)


def _factors(loss_fn, params, x, y):
    return models.exact_factors(loss_fn, params, x, y)[1]


@pytest.mark.parametrize("register", [_softmax, _squared])
def test_registered_in_a_vmapped_loss_as_in_a_batched_one(register):
    params = {"w": models.array(1, 3, 4), "v": models.array(2, 4, 2)}
    y = Y if register is _softmax else models.array(4, 8, 2)

    def per_example(params, x, y):
        one = lambda x, y: register(jnp.tanh(x @ params["w"]) @ params["v"], y)  # noqa: E731
        return jax.vmap(one)(x, y).mean()

    def batched(params, x, y):
        return register(jnp.tanh(x @ params["w"]) @ params["v"], y).mean()

    found = _factors(per_example, params, X, y)
    expected = _factors(batched, params, X, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), found, expected)


def test_registered_layer_in_a_vmapped_loss_as_detected():
    params = {"w": models.array(1, 3, 4), "b": models.array(2, 4)}
    target = models.array(4, 8, 4)

    def loss_fn(params, x, y, tag):
        def one(x, y):
            z = x @ params["w"] + params["b"]
            if tag:
                z = kfac_jax.register_dense(z, x, params["w"], params["b"])
            return kfac_jax.losses.squared_error(jnp.sin(z), y).sum()

        return jax.vmap(one)(x, y).mean()

    found, expected = (
        _factors(lambda *a, tag=tag: loss_fn(*a, tag), params, X, target)
        for tag in (True, False)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), found, expected)
