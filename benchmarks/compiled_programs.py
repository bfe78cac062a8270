"""The programs whose compiled cost is recorded, and how their cost is counted.

A model's programs are

* its ordinary steps: XLA counts the most expensive branch of a conditional, which would
  always be the refresh, so that these are compiled with no refresh due;
* the refresh of all inverses, alone;
* the whole step as users compile it, donated. It is also run.

Of the wavefunction of the published kind it is the step of `Optimizer`, which donates
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.monitoring
import jax.numpy as jnp
import optax
import walkers_model
from compiled_check import Row
from compiled_text import instructions, library_calls
from models import MODELS, Model, plan

import kfac_jax
from kfac_jax.devices import ALONE
from kfac_jax.optimization import preconditioner
from kfac_jax.optimization.refresh import refresh_share

RUN = 3  # steps: the second and third must not compile
COUNTED = 25  # steps of the small model, whose refreshes are counted
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
PARTS = ("flops", "bytes", "temporaries", "instructions")  # multiples of the gradient's
SMALL = "small net, batch 64"
WALKERS = "published wavefunction, batch 128"
NAMES = (*MODELS, SMALL, WALKERS)
PROGRAMS = ("ordinary step", "refresh", "whole step")
FIXED_RATES = {
    "learning_rate": 1e-3,
    "momentum": 0.9,
    "damping": 1.0,
    "norm_constraint": None,
}


class Optimizer(NamedTuple):
    """A plan and what is done with it."""

    plan: Mapping[str, Any] = MappingProxyType({})
    kfac: Mapping[str, Any] = MappingProxyType(FIXED_RATES)
    programs: tuple[str, ...] = PROGRAMS  # what is compiled


CONFIGURATIONS = {
    "fixed rates": Optimizer(),
    "adaptive rules": Optimizer(
        kfac={
            "learning_rate": kfac_jax.QuadraticModel(),
            "momentum": None,
            "damping": kfac_jax.LevenbergMarquardt(1.0),
        },
        programs=("ordinary step", "whole step"),
    ),
    "Eigen": Optimizer(plan={"blocks": kfac_jax.blocks.Eigen()}),
    "staggered": Optimizer(
        kfac=FIXED_RATES | {"inverse_every": kfac_jax.RefreshSchedule(20, shares=4)},
        programs=("whole step",),
    ),
}
"""What is measured of the small net."""


def small_net() -> Model:
    """An autoencoder small enough to be compiled with many options."""
    sizes = (32, 48, 16, 48, 32)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        {"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}
        for key, (n, m) in zip(keys[1:], pairwise(sizes), strict=True)
    ]
    return Model(_small_loss, params, (jax.random.normal(keys[0], (64, sizes[0])),))


def _small_loss(params: Any, inputs: jax.Array) -> jax.Array:
    x = inputs
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        x = x if i == len(params) - 1 else jnp.tanh(x)
    return kfac_jax.losses.squared_error(x, inputs).sum(-1).mean()


def measure(name: str) -> dict[str, Row]:
    """The costs of a model's programs, those of `PARTS` as multiples of the gradient's.

    Args:
        name: one of `NAMES`.

    Returns:
        By program.
    """
    if name == WALKERS:
        unit, rows = _walkers()
        return _multiples(rows, unit)
    model = small_net() if name == SMALL else MODELS[name]()
    gradient = jax.jit(jax.value_and_grad(model.loss_fn))
    unit = cost(gradient.lower(model.params, *model.args).compile())
    if name != SMALL:
        rows = _programs(model, Optimizer(), RUN)
        part = Optimizer({"statistics_fraction": 1 / 8})
        rows["ordinary step, statistics of 1/8"] = _ordinary(Case(model, part))
    else:
        rows = {
            f"{label}: {program}": row
            for label, optimizer in CONFIGURATIONS.items()
            for program, row in _programs(model, optimizer, COUNTED).items()
        }
    return _multiples(rows, unit)


def _multiples(rows: Mapping[str, Row], unit: Row) -> dict[str, Row]:
    """`PARTS` in multiples of the gradient's."""
    return {
        program: {
            key: round(value / max(unit[key], 1.0) if key in PARTS else value, 4)
            for key, value in row.items()
        }
        for program, row in rows.items()
    }


def _walkers() -> tuple[Row, dict[str, Row]]:
    """The cost of the energy's gradient, and of a step for each period of inverses."""
    system, shape = walkers_model.ATOMS["Li"], walkers_model.Shape()
    walkers = walkers_model.init_walkers(system, 128)
    params, key = walkers_model.init_params(system, shape), jax.random.PRNGKey(0)
    energy = walkers_model.total_energy(system, shape)
    gradient = jax.jit(jax.value_and_grad(energy, has_aux=True))
    unit = cost(gradient.lower(params, key, walkers).compile())
    rows: dict[str, Row] = {}
    for period in (1, 5):
        optimizer = walkers_model.make_optimizer(
            system, shape, period, multi_device=False
        )
        step = jax.jit(
            functools.partial(
                optimizer.step,
                momentum=walkers_model.MOMENTUM,
                damping=walkers_model.DAMPING,
            )
        )
        state = optimizer.init(params, key, walkers)
        given = params, state, key
        row = cost(step.lower(*given, batch=walkers).compile())
        with _compilations() as events:
            for _ in range(RUN):
                params, state, _ = step(*given, batch=walkers)
                given = params, state, key
        row["recompilations"] = float(len(events))
        rows[f"step, T3 = {period}"] = row
    return unit, rows


class Case:
    """A model with an optimizer: the step and the arguments that it starts from."""

    def __init__(self, model: Model, optimizer: Optimizer) -> None:
        """Makes the plan and the first state."""
        self.curvature = plan(model, **optimizer.plan)
        self.tx = kfac_jax.kfac(self.curvature, **optimizer.kfac)
        params = jax.tree.map(jnp.copy, model.params)  # the step gets them donated
        self.start = params, self.tx.init(params)
        self.rest = jax.random.key(0), *model.args

    def step(self, params: Any, state: Any, key: jax.Array, *args: Any) -> Any:
        """As in a user's program."""
        value, grads, statistics = self.curvature.value_grad_and_statistics(
            params, *args, rng=key, factors=state.factors
        )
        updates, state = self.tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state

    def jitted(self) -> Any:
        """The step, compiled when first called."""
        # another function each time: JAX keeps what it traced
        return jax.jit(lambda *args: self.step(*args), donate_argnums=(0, 1))


def _programs(model: Model, optimizer: Optimizer, steps: int) -> dict[str, Row]:
    case = Case(model, optimizer)
    # the whole step is last, as it takes what the case starts from
    measured = (_ordinary, _refreshed, functools.partial(_whole, steps=steps))
    each = dict(zip(PROGRAMS, measured, strict=True))
    return {name: f(case) for name, f in each.items() if name in optimizer.programs}


def _ordinary(case: Case) -> Row:
    """A step without a refresh."""
    original, called = preconditioner.refresh, []

    @functools.wraps(original)
    def idle(*args: Any) -> Any:
        called.append(True)
        groups, factors, inverses, damping, gamma, due, *rest = args
        never = [jnp.zeros_like(now) for now in due]
        return original(groups, factors, inverses, damping, gamma, never, *rest)

    with mock.patch.object(preconditioner, "refresh", idle):
        compiled = case.jitted().lower(*case.start, *case.rest).compile()
    if not called:
        raise RuntimeError(
            "Expected a step to call refresh of optimization.preconditioner, got none: "
            "adapt _ordinary to how steps refresh their inverses now."
        )
    return cost(compiled)


def _refreshed(case: Case) -> Row:
    """The refresh of all layers."""
    groups, state = case.curvature.groups, case.start[1]
    moving = {x.name: state.factors[x.name] for x in groups if x.moves}

    def refresh(factors: Any, moving: Any, inverses: Any) -> Any:
        return refresh_share(
            groups, factors, jnp.float32(1.0), ALONE, None, moving, inverses, None
        )

    args = state.factors, moving, state.inverses
    return cost(jax.jit(refresh).lower(*args).compile())


def _whole(case: Case, steps: int) -> Row:
    """The whole step, which is also run."""
    jitted = case.jitted()
    compiled = jitted.lower(*case.start, *case.rest).compile()
    row = cost(compiled)  # FLOPs and bytes as if all steps refreshed
    row["calls in every step"] = float(len(library_calls(compiled.as_text(), True)))
    given = sum(x.nbytes for x in jax.tree.leaves(case.start))
    row["copied"] = 1 - compiled.memory_analysis().alias_size_in_bytes / given
    # compiled above, so that this is not compiled again
    params, state = case.start
    with _compilations() as events:
        for _ in range(steps):
            params, state = jax.block_until_ready(jitted(params, state, *case.rest))
    row["recompilations"] = float(len(events))
    row["refreshes"] = float(state.info.inverse_refreshes)
    return row


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Collects an entry for each program that is compiled."""
    events: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILATION_EVENT:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def cost(compiled: Any) -> Row:
    """A compiled program's cost, by XLA and with what XLA leaves out."""
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    calls = library_calls(text)
    return {
        "flops": float(analysis["flops"]) + sum(calls),
        "bytes": float(analysis["bytes accessed"]),
        "temporaries": float(memory.temp_size_in_bytes),
        "instructions": float(instructions(text)),
        "library calls": float(len(calls)),
    }
