"""A small classifier, ways to optimize it, and faults to put into one of its steps.

Faults are data: what a step is given holds zeros to add to activations and gradients,
so one program of each configuration serves all faults.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax
from tests.helpers import models

CASES, INPUTS, CLASSES = 96, 6, 3
STEPS = 120
LATEST = 20
"""Faults come before this step."""

HUGE = (1e30, 1e38, -1e38)
VALUES = (np.nan, np.inf, -np.inf, *HUGE)


class Inputs(NamedTuple):
    """What one step is given; also the batch, without `gradient`."""

    x: np.ndarray  # [n, 6]
    y: np.ndarray  # [n, 3], probabilities
    mask: np.ndarray  # [n]
    spike: np.ndarray  # [n, 8], added to the second layer's outputs
    gradient: Any  # like the parameters, added to the gradient


# ----------------------------------------------------------------------- the model


def forward(params, x, spike):
    """Six to sixteen to eight to three, and a detour of 1×1 factors."""
    h = jax.nn.relu(models.dense(params["first"], x))
    h = jnp.tanh(models.dense(params["second"], h)) + spike
    narrow = models.dense(params["narrow"], h) @ params["gain"]["w"]
    z = models.dense(params["head"], h)
    return z + jnp.pad(narrow, ((0, 0), (0, CLASSES - 1)))


def loss_fn(params, x, y, mask, spike):
    z = forward(params, x, spike)
    kfac_jax.register_softmax_cross_entropy_loss(z, y, mask)
    return (-(y * jax.nn.log_softmax(z)).sum(-1) * mask).mean()


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {
        "first": (INPUTS, 16),
        "second": (16, 8),
        "narrow": (8, 1),
        "head": (8, CLASSES),
    }
    params = {
        name: {
            "w": rng.normal(size=(n, m)) / np.sqrt(n),
            "b": 0.1 * rng.normal(size=m),
        }
        for name, (n, m) in sizes.items()
    }
    params["gain"] = {"w": np.ones((1, 1))}
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


@functools.cache
def make_inputs(dtype=jnp.float32):
    """All cases, without any fault; the labels' entropy is the lowest loss."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(CASES, INPUTS)).astype(np.float32)
    spike = np.zeros((CASES, 8), np.float32)
    y = np.array(jax.nn.softmax(x @ rng.normal(size=(INPUTS, CLASSES))))
    gradient = jax.tree.map(np.zeros_like, jax.device_get(make_params()))
    found = Inputs(x, y, np.ones(CASES, np.float32), spike, gradient)
    return jax.tree.map(lambda a: np.asarray(a, dtype), found)


# ------------------------------------------------------------------ configurations


def fixed(curvature, **options):
    """Given rates, and a limit to how far a step goes where it finds no curvature."""
    more = {"inverse_every": 5, "norm_constraint": 1e-2} | options
    return kfac_jax.kfac(curvature, 0.1, 0.9, 1e-2, **more)


def adaptive(curvature, **options):
    return kfac_jax.kfac(
        curvature,
        kfac_jax.QuadraticModel(),
        None,
        kfac_jax.LevenbergMarquardt(1.0, every=2),
        **{"inverse_every": 5} | options,
    )


def chained(curvature):
    return optax.chain(
        kfac_jax.scale_by_kfac(curvature, 1e-2, inverse_every=5),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A plan's options, what transformation it gets, and the type of everything."""

    make: Callable[[Any], Any] = fixed
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32
    carried: bool = False


EIGEN = {"blocks": kfac_jax.blocks.Eigen()}
WARM = {"blocks": kfac_jax.blocks.Eigen(warm_start=True)}
SEPARATE = {"factored_damping": kfac_jax.SeparateDamping(every=5)}

CONFIGURATIONS = {
    "defaults": Configuration(lambda c: kfac_jax.kfac(c)),
    "fixed rates": Configuration(),
    "adaptive": Configuration(adaptive),
    "separate damping": Configuration(lambda c: adaptive(c, **SEPARATE)),
    "eigen": Configuration(plan=EIGEN, carried=True),
    "eigen, warm": Configuration(plan=WARM, carried=True),
    "tridiagonal": Configuration(
        adaptive, plan={"structure": kfac_jax.BlockTridiagonal()}
    ),
    "staggered": Configuration(
        lambda c: fixed(c, inverse_every=kfac_jax.RefreshSchedule(4, shares=2))
    ),
    "stale": Configuration(
        lambda c: fixed(c, inverse_every=kfac_jax.RefreshSchedule(4, stale=True))
    ),
    "fraction": Configuration(plan={"statistics_fraction": 0.5}),
    "exact": Configuration(plan={"estimation_mode": "fisher_exact"}),
    "full": Configuration(plan={"blocks": kfac_jax.blocks.Full()}),
    "diagonal": Configuration(plan={"blocks": kfac_jax.blocks.Diagonal()}),
    "TNT": Configuration(plan={"blocks": kfac_jax.blocks.TNT()}),
    "no norm constraint": Configuration(lambda c: fixed(c, norm_constraint=None)),
    "scale_by_kfac": Configuration(chained),
    "apply_if_finite": Configuration(lambda c: optax.apply_if_finite(fixed(c), 5)),
    "bfloat16": Configuration(dtype=jnp.bfloat16),
    "float16": Configuration(dtype=jnp.float16),
}


@functools.cache
def plan(name):
    """Parameters are float32; what the model computes in is the configuration's."""
    configuration = CONFIGURATIONS[name]
    inputs = make_inputs()
    return kfac_jax.make_curvature(
        loss_in(configuration.dtype), make_params(), *inputs[:4], **configuration.plan
    )


@functools.cache
def loss_in(dtype):
    """Mixed precision: parameters and the loss in float32, the model in `dtype`."""
    if dtype == jnp.float32:
        return loss_fn

    def lowered(params, x, y, mask, spike):
        low = jax.tree.map(lambda a: a.astype(dtype), (params, x, spike))
        z = forward(*low).astype(jnp.float32)
        kfac_jax.register_softmax_cross_entropy_loss(z, y, mask)
        return (-(y * jax.nn.log_softmax(z)).sum(-1) * mask).mean()

    return lowered


class After(NamedTuple):
    """What a step leaves, and what it was made of."""

    params: Any
    state: Any
    loss: jax.Array
    grads: Any
    statistics: Any
    mask: Any


def make_step(curvature, tx, carried=False):
    @jax.jit
    def step(params, state, inputs, number):
        args = inputs[:4]
        more = {"factors": kfac_state(state).factors} if carried else {}
        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=jax.random.fold_in(jax.random.key(0), number), **more
        )
        grads = jax.tree.map(jnp.add, grads, inputs.gradient)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        params = optax.apply_updates(params, updates)
        return After(params, state, value, grads, statistics.layers, inputs.mask)

    return step


@functools.cache
def stepper(name):
    configuration = CONFIGURATIONS[name]
    tx = configuration.make(plan(name))
    return tx, make_step(plan(name), tx, configuration.carried)


def kfac_state(state):
    """The `KFACState` in a state of optax."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kfac_jax.KFACState))
    (found,) = [x for x in leaves if isinstance(x, kfac_jax.KFACState)]
    return found


def with_kfac_state(state, new):
    """A state of optax with another `KFACState` in it."""
    old = kfac_state(state)
    swap = functools.partial(jax.tree.map, lambda s: new if s is old else s)
    return swap(state, is_leaf=lambda x: isinstance(x, kfac_jax.KFACState))


@functools.cache
def clean(name):
    """Parameters and state before each of the first steps, and the loss at the end."""
    tx, step = stepper(name)
    params = make_params()
    at, found = (params, tx.init(params)), []
    for number in range(STEPS):
        if number <= LATEST:
            found.append(at)
        at = tuple(step(*at, make_inputs(), number)[:2])
    return found, final_loss(name, at[0])


@functools.cache
def without(name, at_step, counted):
    """The end of a run that lacks one step, which kfac may nevertheless count."""
    _, step = stepper(name)
    params, state = clean(name)[0][at_step]
    old = kfac_state(state)
    if counted:
        state = with_kfac_state(state, old._replace(step=old.step + 1))
    at = params, state
    for number in range(at_step + 1, STEPS):
        at = step(*at, make_inputs(), number)[:2]
    return at[0]


def final_loss(name, params):
    return float(evaluate(loss_in(CONFIGURATIONS[name].dtype), params))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(loss, params):
    return loss(params, *map(jnp.asarray, make_inputs()[:4]))


# -------------------------------------------------------------------------- faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change to one step's inputs, or to parameters and state before it.

    `refused` says what cannot be used: "update" and, with it or without, perhaps some
    layers' "statistics", or "" for nothing; None where it depends on the configuration.
    """

    inputs: Callable[[Inputs, np.random.Generator], Inputs] | None = None
    before: Callable[[str, Any, Any], tuple[Any, Any]] | None = None
    refused: str | None = "update"
    more: int = 0  # steps that the run is longer by
    close: float = 1.1  # the loss at the end, over the fault-free one, if not refused


def spoil(field, value, where):
    """Puts a value into an array: in all of it, in one example, or in one entry."""

    def change(inputs, rng):
        x = np.array(getattr(inputs, field))
        row, column = (rng.integers(n) for n in x.shape)
        index = {"all": np.s_[:], "example": np.s_[row], "entry": np.s_[row, column]}
        x[index[where]] = value
        return inputs._replace(**{field: x})

    return change


def spoil_example(value):
    def change(inputs, rng):
        row = rng.integers(CASES)
        x, y = np.array(inputs.x), np.array(inputs.y)
        x[row], y[row] = value, value
        return inputs._replace(x=x, y=y)

    return change


def spoil_gradient(layer, value):
    def change(inputs, rng):
        w = np.array(inputs.gradient[layer]["w"])
        w[rng.integers(w.shape[0]), rng.integers(w.shape[1])] = value
        gradient = inputs.gradient | {layer: inputs.gradient[layer] | {"w": w}}
        return inputs._replace(gradient=gradient)

    return change


def constant(inputs, rng):
    """Every example is the same: all factors have rank one."""
    return inputs._replace(
        x=np.broadcast_to(inputs.x[:1], inputs.x.shape).copy(),
        y=np.broadcast_to(inputs.y[:1], inputs.y.shape).copy(),
    )


def tenfold(name, params, state):
    """Moves the last layer to where the loss is ten times as high."""
    loss = loss_in(CONFIGURATIONS[name].dtype)
    target = 10 * float(evaluate(loss, params))
    rng = np.random.default_rng(3)
    kick = rng.normal(size=params["head"]["w"].shape).astype(np.float32)

    def moved(scale):
        w = params["head"]["w"] + np.float32(scale) * kick
        return params | {"head": params["head"] | {"w": w}}

    low, high = 0.0, 64.0
    assert float(evaluate(loss, moved(high))) > target
    for _ in range(30):
        middle = (low + high) / 2
        if float(evaluate(loss, moved(middle))) < target:
            low = middle
        else:
            high = middle
    return moved(high), state


def indefinite(name, params, state):
    """One layer's input factor gets an eigenvalue below zero: its Cholesky fails."""
    del name
    old = kfac_state(state)
    factors = old.factors
    for layer, part in factors.items():
        if layer == "second" and "input" in part:
            x = np.array(part["input"])
            x[0, 0] = -np.trace(x)
            factors = factors | {layer: part | {"input": jnp.asarray(x)}}
    return params, with_kfac_state(state, old._replace(factors=factors))


UNGUARDED = ("defaults", "no norm constraint", "scale_by_kfac")
"""Given rates, and steps that are as long as they come out."""

FAULTS = {
    **{
        f"{value} in {place}": Fault(change, refused=None if harmless else "update")
        for value in VALUES
        for place, (change, harmless) in {
            "all inputs": (spoil("x", value, "all"), value in HUGE),
            "all labels": (spoil("y", value, "all"), False),
            "one example": (spoil_example(value), False),
            "one input": (spoil("x", value, "entry"), value in HUGE),
            "one label": (spoil("y", value, "entry"), False),
            "one activation": (spoil("spike", value, "entry"), False),
            "a layer's activations": (spoil("spike", value, "all"), False),
            "a layer's gradient": (spoil_gradient("second", value), False),
            "a 1×1 layer's gradient": (spoil_gradient("gain", value), False),
        }.items()
    },
    "an empty mask": Fault(
        lambda i, _: i._replace(mask=0 * i.mask), refused="statistics"
    ),
    "inputs that are zero": Fault(lambda i, _: i._replace(x=0 * i.x), refused=""),
    "one example repeated": Fault(constant, refused=""),
    "a tenfold loss": Fault(lambda i, _: i._replace(y=10 * i.y), refused=""),
    # limited steps of given rates come back slowly, adaptive rules at once
    "parameters of a tenfold loss": Fault(
        before=tenfold, refused="", more=STEPS, close=1.15
    ),
    "an indefinite factor": Fault(before=indefinite, refused=None),
}


def run(name, fault, at_step):
    """A run with a fault at a step: what was before, what that step left, the end."""
    _, step = stepper(name)
    rng = np.random.default_rng(zlib.crc32(f"{name}/{at_step}".encode()))
    params, state = clean(name)[0][at_step]
    if fault.before is not None:
        params, state = fault.before(name, params, state)
    inputs = make_inputs()
    if fault.inputs is not None:
        inputs = fault.inputs(inputs, rng)
    faulty = step(params, state, inputs, at_step)
    at = faulty[:2]
    for number in range(at_step + 1, STEPS + fault.more):
        at = step(*at, make_inputs(), number)[:2]
    return (params, state), faulty, at
