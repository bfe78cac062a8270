"""What gpu.py times of one model: the gradient, AdamW, and steps of K-FAC.

All programs take `(carry, key, args)`, the carry being `(params, state)`, which a step
returns in the place of its own. Whether a step refreshes inverses, or measures how well
the model predicts, is decided by the count in its state. So one program has several
kinds of steps, and a kind is chosen by setting the count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from gpu_models import Model
from jax import Array

import kfac_jax
from kfac_jax.operator import inverses

FIXED = {"learning_rate": 1e-3, "momentum": 0.9, "damping": 1e-2}
PERIOD = 20  # T3, the default
MEASURED = 5  # T1, the default
SETTLED = 100  # batches before the steps that count, past the refreshes of the first
GRADIENT, SOLVE, SOURCE = "gradient", "solve", "K-FAC, fixed rates"

Kinds = dict[str, int]
"""Kinds of steps, each with how many steps were before it."""

ORDINARY: Kinds = {"ordinary": SETTLED + PERIOD // 2}
OF_FIXED = ORDINARY | {"refreshing": SETTLED + PERIOD - 1}
OF_RULES: Kinds = {
    "ordinary": SETTLED + MEASURED + 1,
    "measuring": SETTLED + MEASURED - 1,
    "refreshing": SETTLED + PERIOD - 1,  # it measures, too
}
SHARES = {
    SOURCE: {"ordinary": 1 - 1 / PERIOD, "refreshing": 1 / PERIOD},
    "K-FAC": {
        "ordinary": 1 - 1 / MEASURED,
        "measuring": 1 / MEASURED - 1 / PERIOD,
        "refreshing": 1 / PERIOD,
    },
}
"""How often each kind of step comes with fixed rates, and with the defaults."""


class Program(NamedTuple):
    """A step, and where it starts."""

    step: Callable[..., Any]  # (carry, key, args) -> the next carry, or a result
    init: Callable[[Any], Any] | None = None  # params -> state; None without a state
    kinds: Kinds = ORDINARY
    of: str | None = None  # the program whose carry it reads, if it has none


def programs(model: Model) -> dict[str, Callable[[], Program]]:
    """Makes of all programs, by name; the most important first."""
    return {
        GRADIENT: lambda: _gradient(model),
        SOURCE: lambda: _kfac(model, FIXED),
        f"{SOURCE}, 1/8": lambda: _kfac(model, FIXED, 1 / 8),
        SOLVE: lambda: _solve(model),
        "AdamW": lambda: _adamw(model),
        "K-FAC": lambda: _kfac(model, {}),
        "K-FAC, 1/8": lambda: _kfac(model, {}, 1 / 8),
    }


def _gradient(model: Model) -> Program:
    def step(carry: Any, key: Array, args: Any) -> Any:
        del key
        return jax.value_and_grad(model.loss_fn)(carry[0], *args)

    return Program(step)


def _adamw(model: Model) -> Program:
    tx = optax.adamw(1e-4)

    def step(carry: Any, key: Array, args: Any) -> Any:
        del key
        params, state = carry
        grads = jax.grad(model.loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, tx.init)


def _plan(model: Model, fraction: float = 1.0) -> kfac_jax.Curvature:
    params, args = model.shapes()
    return kfac_jax.make_curvature(
        model.loss_fn,
        params,
        *args,
        estimation_mode=model.estimation_mode,
        statistics_fraction=fraction,
    )


def _kfac(model: Model, rates: dict[str, Any], fraction: float = 1.0) -> Program:
    curvature = _plan(model, fraction)
    tx = kfac_jax.kfac(curvature, inverse_every=PERIOD, **rates)
    whole = kfac_jax.make_step(curvature, tx)

    def step(carry: Any, key: Array, args: Any) -> Any:
        return whole(*carry, key, *args)[:2]

    return Program(step, tx.init, OF_FIXED if rates else OF_RULES)


def _solve(model: Model) -> Program:
    """The inverses applied to what has the shape of a gradient, and nothing else."""
    curvature = _plan(model)

    def step(carry: Any, key: Array, args: Any) -> Any:
        del key, args
        params, state = carry
        vector = jax.tree.leaves(params)
        return inverses.precondition(
            curvature.groups, state.factors, state.inverses, vector, {}
        )

    return Program(step, of=SOURCE)


# -------------------------------------------------------------------------- compilation


class Traced(NamedTuple):
    """A program before it is compiled."""

    program: Program
    lowered: tuple[Any, Any | None]  # of the step and of `init`
    seconds: float  # of planning, tracing and lowering


class Compiled(NamedTuple):
    """A program that can run."""

    traced: Traced
    step: Any
    init: Any | None
    seconds: float  # of the step's compilation, beside others


def trace(model: Model, make: Callable[[], Program]) -> Traced:
    """Plans, traces and lowers on shapes: nothing is computed."""
    start = time.perf_counter()
    program = make()
    params, args = model.shapes()
    shapes, init, donated = (), None, ()
    if program.of is not None:
        shapes = jax.eval_shape(programs(model)[program.of]().init or tuple, params)
    elif program.init is not None:
        init, donated = jax.jit(program.init), (0,)
        shapes = jax.eval_shape(program.init, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.jit(program.step, donate_argnums=donated)
    lowered = step.lower((params, shapes), key, args)
    of_init = None if init is None else init.lower(params)
    return Traced(program, (lowered, of_init), time.perf_counter() - start)


def build(traced: Traced) -> Compiled:
    """Compiles; several threads may do so at the same time."""
    step, init = traced.lowered
    start = time.perf_counter()
    compiled = step.compile()
    seconds = time.perf_counter() - start
    return Compiled(traced, compiled, init and init.compile(), seconds)


def peak_bytes(compiled: Any) -> int | None:
    """The most memory that a program needs at a time; None where XLA does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(used + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


# ------------------------------------------------------------------------------ running


class Runner:
    """A compiled program that steps on, always on the same batch."""

    def __init__(
        self, compiled: Compiled, params: Any, args: Any, source: Runner | None = None
    ) -> None:
        """Makes the carry, of copied parameters.

        Args:
            compiled: the program.
            params: where to start.
            args: the batch.
            source: the runner whose carry is read instead.
        """
        program = compiled.traced.program
        self.kinds, self.name_of_source = program.kinds, program.of
        self._step, self._args, self._source = compiled.step, args, source
        self.advances, self.carry = compiled.init is not None, (params, ())
        if compiled.init is not None:
            own = jax.tree.map(jnp.copy, params)
            self.carry = own, compiled.init(own)
        start = time.perf_counter()
        self._run(None)
        self.first_seconds = time.perf_counter() - start

    def _run(self, count: int | None) -> float:
        """One step, as the first or after `count` steps; how long it takes."""
        carry = self.carry if self._source is None else self._source.carry
        if count is not None and self.advances:
            carry = carry[0], _after(carry[1], count)
        key = jax.random.key(count or 0)
        jax.block_until_ready((carry, key))
        start = time.perf_counter()
        result = jax.block_until_ready(self._step(carry, key, self._args))
        seconds = time.perf_counter() - start
        if self.advances:
            self.carry = result
        return seconds

    def __call__(self, kind: str) -> float:
        """The seconds of one step of a kind."""
        return self._run(self.kinds[kind])

    @property
    def said(self) -> dict[str, float]:
        """What K-FAC's state says of the run."""
        info = getattr(self.carry[1], "info", None)
        if info is None:
            return {}
        names = ("loss", "damping", "inverse_refreshes", "skipped_updates")
        return {name: float(getattr(info, name)) for name in names}


def _after(state: Any, count: int) -> Any:
    """A state of K-FAC with other counts; other states stay."""
    if not isinstance(state, kfac_jax.KFACState):
        return state
    # two arrays, as they are donated
    step, batches = (jnp.array(count, jnp.int32) for _ in range(2))
    return state._replace(step=step, batches=batches)
