"""Recurrent nets and state space models."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp

from tests.helpers import models
from tests.helpers.model_kinds._kind import (
    KEY,
    Kind,
    N,
    classifier,
    dense,
    equinox,
    haiku,
    kernel,
    linear,
    linen,
    maker,
    regression,
)


class LinenRnn(nn.Module):
    """One of linen's cells."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(self.cell(3, param_dtype=float))(x)[:, -1])


def linen_rnn(cell: type[nn.RNNCellBase]) -> Kind:
    x = models.array(0, N, 5, 2)
    return classifier(*linen(LinenRnn(cell), x), x)


def haiku_rnn(make: Callable[[int], hk.RNNCore]) -> Kind:
    def function(x):
        core = make(5)
        states, _ = hk.dynamic_unroll(
            core, x, core.initial_state(len(x)), time_major=False
        )
        return hk.Linear(2)(states[:, -1])

    x = models.array(0, N, 5, 2)
    return classifier(*haiku(function, x), x)


class EquinoxRnn(eqx.Module):
    """A cell under scan and vmap."""

    cell: Any
    head: eqx.nn.Linear

    def __call__(self, x):
        state = jnp.zeros(3)
        if isinstance(self.cell, eqx.nn.LSTMCell):
            state = (state, state)
        step = lambda state, x: (self.cell(x, state), None)  # noqa: E731
        state, _ = jax.lax.scan(step, state, x)
        return self.head(state[0] if isinstance(state, tuple) else state)


def equinox_rnn(cell: type[eqx.Module]) -> Kind:
    one, two = jax.random.split(KEY)
    net = EquinoxRnn(cell(2, 3, key=one), eqx.nn.Linear(3, 2, key=two))
    return classifier(*equinox(net), models.array(0, N, 5, 2))


def learned_start() -> Kind:
    """A recurrent net whose first state is a parameter."""
    new, d = maker(17), 3
    params = {
        "start": new(d),
        "w": new(2, d),
        "u": new(d, d),
        "b": 0.1 * new(d),
        "head": linear(new, d, 2),
    }

    def apply(p, x):
        def step(h, x):
            return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None

        start = jnp.broadcast_to(p["start"], (len(x), d))
        return dense(p["head"], jax.lax.scan(step, start, x.swapaxes(0, 1))[0])

    return classifier(apply, params, models.array(0, N, 5, 2))


def _combine(left, right):
    (a, x), (b, y) = left, right
    return b * a, b * x + y


def s4d(how: str) -> Kind:
    """A diagonal state space `h' = A h + B u`, discretised, `y = C h + D u`."""
    new, d, n, t = maker(4), 3, 2, 5
    params = {
        "inputs": linear(new, 2, d),
        "A_log": jnp.log(0.5 + jnp.arange(n) + 0.1 * jnp.arange(d)[:, None]),
        "log_dt": jnp.log(jnp.linspace(0.1, 0.5, d)),
        "B": 1.0 + new(d, n),
        "C": new(d, n),
        "D": jnp.ones(d),
        "mix": linear(new, d, 2 * d),
        "head": linear(new, d, 2),
    }

    def apply(p, x):
        u = dense(p["inputs"], x)  # [b, t, d]
        a, dt = -jnp.exp(p["A_log"]), jnp.exp(p["log_dt"])[:, None]
        decay = jnp.exp(dt * a)
        b = (decay - 1.0) / a * p["B"]
        if how == "associative_scan":
            inputs = b * u[..., None]
            decays = jnp.broadcast_to(decay, inputs.shape)
            _, states = jax.lax.associative_scan(_combine, (decays, inputs), axis=1)
            y = (states * p["C"]).sum(-1)
        elif how == "vmapped associative_scan":

            def one(u):  # the decays have no axis of examples
                elements = decay * jnp.ones((t, d, n)), b * u[..., None]
                return jax.lax.associative_scan(_combine, elements)[1]

            y = (jax.vmap(one)(u) * p["C"]).sum(-1)
        elif how == "scan":

            def step(h, u):
                h = decay * h + b * u[..., None]
                return h, jnp.einsum("bdn,dn->bd", h, p["C"])

            start = jnp.zeros((len(x), d, n))
            y = jax.lax.scan(step, start, u.swapaxes(0, 1))[1].swapaxes(0, 1)
        else:  # the kernel of the same convolution
            powers = jnp.exp((dt * a)[..., None] * jnp.arange(t))
            k = jnp.einsum("dn,dnt->dt", p["C"] * b, powers)
            spectrum = jnp.fft.rfft(u, 2 * t, axis=1) * jnp.fft.rfft(k.T, 2 * t, axis=0)
            y = jnp.fft.irfft(spectrum, 2 * t, axis=1)[:, :t]
        y = jax.nn.gelu(y + p["D"] * u)
        left, right = jnp.split(dense(p["mix"], y), 2, axis=-1)
        return dense(p["head"], (u + left * jax.nn.sigmoid(right)).mean(1))

    return classifier(apply, params, models.array(0, N, t, 2))


def mamba() -> Kind:
    """A selective state space: step, B and C are of the input."""
    new, d, n, rank = maker(5), 4, 2, 1
    params = {
        "in": new(2, 2 * d),
        "conv": kernel(new, 1, 1, d) | {"w": new(3, 1, d)},
        "x": new(d, rank + 2 * n),
        "dt": linear(new, rank, d),
        "A_log": jnp.log(jnp.broadcast_to(jnp.arange(1.0, n + 1), (d, n))),
        "D": jnp.ones(d),
        "out": new(d, 2),
    }

    def apply(p, inputs):
        x, gate = jnp.split(inputs @ p["in"], 2, axis=-1)
        x = jax.lax.conv_general_dilated(
            x,
            p["conv"]["w"],
            (1,),
            [(2, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=d,
        )
        x = jax.nn.silu(x + p["conv"]["b"])
        low, b, c = jnp.split(x @ p["x"], [rank, rank + n], axis=-1)
        dt = jax.nn.softplus(dense(p["dt"], low))  # [b, t, d]
        a = -jnp.exp(p["A_log"])

        def step(h, at):
            x, dt, b, c = at
            h = jnp.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[:, None]
            return h, (h * c[:, None]).sum(-1)

        times_first = [jnp.moveaxis(v, 1, 0) for v in (x, dt, b, c)]
        _, y = jax.lax.scan(step, jnp.zeros((len(x), d, n)), times_first)
        y = jnp.moveaxis(y, 0, 1) + p["D"] * x
        return (y * jax.nn.silu(gate)) @ p["out"]

    return regression(apply, params, models.array(0, N, 5, 2))
