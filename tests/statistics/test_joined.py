"""Parameters joined before use: each has the statistics of its own part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

B, I, O, P = 6, 4, 3, 2  # noqa: E741 (the letters of the layouts)
X = models.array(9, B, I)
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def loss_of(apply):
    def loss_fn(params, x):
        z = jnp.sin(apply(params, x))
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    return loss_fn


def planned(apply, params, x=X, **options):
    return kfac_jax.make_curvature(
        loss_of(apply), params, x, estimation_mode="ggn_exact", **options
    )


def factors_of(plan, params, x=X):
    statistics = plan.value_grad_and_statistics(params, x)[2]
    return plan.update_factors(plan.init_factors(params), statistics, step=1)


def halves(y):
    return jnp.tanh(y[:, :O]) * y[:, O:].sum(1, keepdims=True)


def outputs_joined(p, x):
    return halves(x @ jnp.concatenate([p["v"], p["w"]], axis=1))


def outputs_apart(p, x):
    return halves(jnp.concatenate([x @ p["v"], x @ p["w"]], axis=1))


def inputs_joined(p, x):
    return jnp.tanh(x @ jnp.concatenate([p["v"], p["w"]], axis=0))


def inputs_apart(p, x):
    return jnp.tanh(x[:, :1] @ p["v"] + x[:, 1:] @ p["w"])


def transposed(p, x):
    both = jnp.concatenate([p["v"].T, p["w"].T], axis=0) * 2.0
    return halves(x @ (both / 2.0).T)


def nested(p, x):
    three = jnp.concatenate([jnp.concatenate([p["v"]], axis=1), p["w"]], axis=1)
    return halves(x @ three)


def biases_joined(p, x):
    b = jnp.concatenate([p["v"][0], p["w"][0]])
    return halves(jnp.outer(x[:, 0], jnp.ones(O + P)) + b[None])


def biases_apart(p, x):
    y = jnp.outer(x[:, 0], jnp.ones(O + P))
    parts = [y[:, :O] + p["v"], y[:, O:] + p["w"]]
    return halves(jnp.concatenate(parts, axis=1))


def scanned(apply):
    def run(p, x):
        def body(h, _):
            return h + apply(p, h).sum(1, keepdims=True), None

        return jax.lax.scan(jax.checkpoint(body), x, None, length=2)[0]

    return run


OUT = {"v": models.array(0, I, O), "w": models.array(1, I, P)}
IN = {"v": models.array(0, 1, O), "w": models.array(1, I - 1, O)}
BIAS = {"v": models.array(0, 1, O), "w": models.array(1, 1, P)}
EQUAL = {  # the same function written with joined and with separate parameters
    "outputs": (outputs_joined, outputs_apart, OUT),
    "inputs": (inputs_joined, inputs_apart, IN),
    "views": (transposed, outputs_apart, OUT),
    "nested": (nested, outputs_apart, OUT),
    "biases": (biases_joined, biases_apart, BIAS),
    "scanned": (scanned(outputs_joined), scanned(outputs_apart), OUT),
    "jit": (jax.jit(outputs_joined), outputs_apart, OUT),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("block", ["Kronecker", "Diagonal", "Full", "Eigen"])
@pytest.mark.parametrize("name", EQUAL)
def test_joined_parameters_have_the_factors_of_separate_ones(name, block):
    joined, apart, params = EQUAL[name]
    blocks = getattr(kfac_jax.blocks, block)()
    plans = [
        planned(apply, params, on_unmatched="error", blocks=blocks)
        for apply in (joined, apart)
    ]
    described = [
        [(layer.name, layer.kind, layer.uses, layer.shape) for layer in plan.layers]
        for plan in plans
    ]
    assert described[0] == described[1]
    ours, theirs = (factors_of(plan, params) for plan in plans)
    for layer, factors in theirs.items():
        for key, factor in factors.items():
            if "basis" not in key:
                close(ours[layer][key], factor, err_msg=f"{layer} {key}")


def test_a_parameter_joined_with_itself_is_used_twice():
    w = models.array(0, I, O)
    plan = planned(lambda w, x: jnp.tanh(x @ jnp.concatenate([w, w], axis=1)), w)
    apart = planned(lambda w, x: jnp.tanh(jnp.concatenate([x @ w, x @ w], axis=1)), w)
    (layer,) = plan.layers
    assert (layer.kind, layer.uses) == ("dense", 2)
    ours, theirs = (factors_of(p, w)[layer.name] for p in (plan, apart))
    for key, factor in theirs.items():
        close(ours[key], factor)


def test_a_slice_of_outputs_does_not_share_its_bias_with_the_weight():
    params = {"w": OUT["v"], "b": jnp.ones(2)}
    plan = planned(lambda p, x: (x @ p["w"])[:, :2] + p["b"][None], params)
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"b": "shift", "w": "dense"}
