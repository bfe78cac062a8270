"""Weights and states that are computed: equilibria, hypernetworks, norms."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tests.helpers import models
from tests.helpers.model_kinds._kind import (
    KEY,
    Kind,
    N,
    dense,
    equinox,
    linear,
    linen,
    maker,
    regression,
)


def _cell(p: Any, z: Array, x: Array) -> Array:
    return jnp.tanh(z @ p["w"] + x @ p["u"] + p["b"])


def _iterate(step: Callable[[Array], Array], start: Array) -> Array:
    def unfinished(carry):
        z, before, count = carry
        return (jnp.abs(z - before).max() > 1e-12) & (count < 100)

    def again(carry):
        z, _, count = carry
        return step(z), z, count + 1

    return jax.lax.while_loop(unfinished, again, (step(start), start, 0))[0]


@jax.custom_vjp
def _fixed_point(p: Any, x: Array) -> Array:
    return _iterate(lambda z: _cell(p, z, x), jnp.zeros((len(x), p["w"].shape[0])))


def _fixed_point_forward(p, x):
    z = _fixed_point(p, x)
    return z, (p, x, z)


def _fixed_point_backward(saved, g):
    p, x, z = saved
    _, by_z = jax.vjp(lambda z: _cell(p, z, x), z)
    u = _iterate(lambda u: g + by_z(u)[0], g)
    return jax.vjp(lambda p, x: _cell(p, z, x), p, x)[1](u)


_fixed_point.defvjp(_fixed_point_forward, _fixed_point_backward)


def _by_root(p: Any, x: Array) -> Array:
    """Implicit differentiation by `custom_root`, of each example."""

    def one(x):
        step = lambda z: _cell(p, z, x)  # noqa: E731
        return jax.lax.custom_root(
            lambda z: step(z) - z,
            jnp.zeros(p["w"].shape[0]),
            lambda _, start: _iterate(step, start),
            lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y),
        )

    return jax.vmap(one)(x)


def _one_step(p: Any, x: Array) -> Array:
    """The gradient of the last step only (Fung et al. 2021)."""
    fixed = jax.lax.stop_gradient((p, x))
    return _cell(
        p, _iterate(lambda z: _cell(fixed[0], z, fixed[1]), jnp.zeros_like(x)), x
    )


EQUILIBRIA = {
    "custom_vjp": _fixed_point,
    "custom_root": _by_root,
    "last step": _one_step,
}


def equilibrium(how: str) -> Kind:
    """A deep equilibrium model between two dense layers."""
    new, d = maker(12), 3
    cell = {"w": 0.4 * new(d, d), "u": new(d, d), "b": 0.1 * new(d)}
    params = {"in": linear(new, 2, d), "cell": cell, "out": linear(new, d, 2)}

    def apply(p, x):
        h = jnp.tanh(dense(p["in"], x))
        return dense(p["out"], EQUILIBRIA[how](p["cell"], h))

    return regression(apply, params, models.array(0, N, 2))


def hypernetwork(conditional: bool) -> Kind:
    """Weights of a net come from another, of an embedding or of a context."""
    new, d, e = maker(13), 3, 2
    sizes = (d * d, d)
    params = {
        "trunk": linear(new, e, 3),
        "heads": [linear(new, 3, size) for size in sizes],
        "out": linear(new, d, 2),
    }
    if not conditional:
        params["embeddings"] = new(2, e)

    def generate(p, context):
        h = jnp.tanh(dense(p["trunk"], context))
        w, b = (dense(head, h) for head in p["heads"])
        return w.reshape(*context.shape[:-1], d, d), b

    def apply(p, x, context):
        if conditional:
            w, b = generate(p, context)
            x = jnp.tanh(jnp.einsum("ni,nio->no", x, w) + b)
        else:
            for embedding in p["embeddings"]:
                w, b = generate(p, embedding)
                x = jnp.tanh(x @ w + b)
        return dense(p["out"], x)

    return regression(apply, params, models.array(0, N, d), models.array(1, N, e))


class WeightNorm(nn.Module):
    """Normed layers of linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Conv(5, (3,)))(x))
        return nn.WeightNorm(nn.Dense(4))(x.mean(1))


def weight_norm() -> Kind:
    x = models.array(0, N, 4, 2)
    return regression(*linen(WeightNorm(), x), x)


class EquinoxWeightNorm(eqx.Module):
    """Normed layers of equinox."""

    first: eqx.nn.WeightNorm
    second: eqx.nn.WeightNorm

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def equinox_weight_norm() -> Kind:
    one, two = jax.random.split(KEY)
    net = EquinoxWeightNorm(
        eqx.nn.WeightNorm(eqx.nn.Linear(3, 6, key=one)),
        eqx.nn.WeightNorm(eqx.nn.Linear(6, 4, key=two)),
    )
    return regression(*equinox(net), models.array(0, N, 3))
