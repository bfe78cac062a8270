"""What a step of one optimizer costs on one model, beside the gradient of its loss.

    python benchmarks/cost.py --model "convnet, batch 128" --optimizer kfac

Prints one line of JSON; `bench.py` runs this once for each pair, as times of the first
call and peak memory need a process of their own. It also runs where the published
release of kfac-jax is installed instead of this package: both have the same name.

The gradient and the steps take turns, one each, so that a drifting machine hits all
alike. With all periods known, the steps of one kind (refreshing the inverses or not) do
the same work: of each kind the median is taken, and what a step costs on average over a
period T3 follows from the two.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np
import optax
from models import MODELS, Model, plan

import kfac_jax

INVERSE_EVERY = 5  # T3 while timing; others follow from it
PERIODS = (1, 5, 20, 100)
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
RATES = {"learning_rate": 1e-4, "momentum": 0.9, "damping": 1.0}
EIGHTH = {"statistics_fraction": 1 / 8}

Step = Callable[[Any, Any, Any], Any]
"""From carry, key and the model's arguments to the next carry."""


class Program(NamedTuple):
    """A step, where it starts, and when it refreshes inverses."""

    step: Step
    carry: Any
    refreshes: Callable[[int], bool] = lambda count: False  # of the count from 1
    compiles_itself: bool = False


def first_order(tx: optax.GradientTransformation, model: Model) -> Program:
    """An optax optimizer."""

    def step(carry: Any, key: Any, args: Any) -> Any:
        params, state = carry
        grads = jax.grad(model.loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, (model.params, tx.init(model.params)))


def kfac(
    model: Model,
    *,
    schedule: Any = INVERSE_EVERY,
    gathers: bool = True,
    differentiates: bool = True,
    **options: Any,
) -> Program:
    """K-FAC with fixed rates; without statistics or gradients, those are zero."""
    curvature = plan(model, **options)
    tx = kfac_jax.kfac(curvature, inverse_every=schedule, **RATES)

    def step(carry: Any, key: Any, args: Any) -> Any:
        params, state = carry
        statistics = curvature.zero_statistics(params)
        if gathers:
            _, grads, statistics = curvature.value_grad_and_statistics(
                params, *args, rng=key
            )
        elif differentiates:
            _, grads = curvature.value_and_grad(params, *args)
        else:
            grads = params
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    start = model.params, tx.init(model.params)
    if not gathers:
        return Program(step, start)
    return Program(step, start, lambda k: k <= 3 or k % INVERSE_EVERY == 0)


def published(model: Model) -> Program:
    """`kfac_jax.Optimizer`, of the published release or of this package."""
    loss_fn = lambda params, batch: model.loss_fn(params, *batch)  # noqa: E731
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn),
        l2_reg=model.l2,
        learning_rate_schedule=lambda _: RATES["learning_rate"],
        momentum_schedule=lambda _: RATES["momentum"],
        damping_schedule=lambda _: RATES["damping"],
        inverse_update_period=INVERSE_EVERY,
        estimation_mode=model.estimation_mode,
        num_burnin_steps=0,
    )

    def step(carry: Any, key: Any, args: Any) -> Any:
        return optimizer.step(*carry, key, batch=args)[:2]

    state = optimizer.init(model.params, jax.random.key(0), model.args)
    start = model.params, state
    return Program(step, start, lambda k: k % INVERSE_EVERY == 1, True)


OPTIMIZERS: dict[str, Callable[[Model], Program]] = {
    "adamw": lambda model: first_order(optax.adamw(1e-4), model),
    "sgd": lambda model: first_order(optax.sgd(1e-4, 0.9, nesterov=True), model),
    "kfac": kfac,
    "kfac-1/8": lambda model: kfac(model, **EIGHTH),
    "published": published,
}
PARTS: dict[str, dict[str, Callable[[Model], Program]]] = {
    "kfac": {
        "without statistics": lambda model: kfac(model, gathers=False),
        "update alone": lambda model: kfac(model, gathers=False, differentiates=False),
    }
}
"""What is timed beside an optimizer, in the same process."""


def gradient(model: Model) -> Program:
    """Loss and gradient: the unit."""

    def step(carry: Any, key: Any, args: Any) -> Any:
        return jax.value_and_grad(model.loss_fn)(model.params, *args)

    return Program(step, None)


class Runner:
    """A compiled program that steps on."""

    def __init__(self, build: Callable[[Model], Program], model: Model) -> None:
        """Builds and compiles, timing each phase into `phases` (seconds)."""
        clock = [time.perf_counter()]

        def lap() -> float:
            clock.append(time.perf_counter())
            return clock[-1] - clock[-2]

        self._args, self.count, self.phases = model.args, 0, {}
        self._program = build(model)
        self._carry = jax.block_until_ready(self._program.carry)
        self.phases["init"] = lap()
        self._step, self.cost = self._program.step, {}
        if not self._program.compiles_itself:
            donated = () if self._carry is None else (0,)
            jitted = jax.jit(self._step, donate_argnums=donated)
            traced = jitted.trace(self._carry, self._key(), self._args)
            self.phases["trace"] = lap()
            compiled = traced.lower().compile()
            self.phases["compile"] = lap()
            cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
            self.cost = {
                "flops": float(cost["flops"]),
                "bytes": float(cost["bytes accessed"]),
                "temporaries": float(memory.temp_size_in_bytes),
            }
            self._step = compiled
        self.advance()
        self.phases["first run"] = lap()

    def _key(self) -> Any:
        return jax.random.key(self.count)

    def advance(self) -> tuple[float, bool]:
        """One step: its seconds, and whether it refreshed inverses."""
        key = jax.block_until_ready(self._key())
        self.count += 1
        start = time.perf_counter()
        result = jax.block_until_ready(self._step(self._carry, key, self._args))
        seconds = time.perf_counter() - start
        self._carry = None if self._carry is None else result
        return seconds, self._program.refreshes(self.count)


def measure(name: str, optimizer: str, seconds: float) -> dict[str, Any]:
    """Everything about one optimizer on one model, as multiples of the gradient.

    Args:
        name: the model.
        optimizer: the optimizer.
        seconds: for how long to take turns; every kind of step is seen at least twice.

    Returns:
        Ratios by name, `seconds` of the gradient, and counts.
    """
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event)
    )
    model = MODELS[name]()
    unit = Runner(gradient, _copied(model))
    own = Runner(OPTIMIZERS[optimizer], _copied(model))
    for _ in range(INVERSE_EVERY):  # past the refreshes of the first steps
        own.advance()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = compilations.count(COMPILATION_EVENT)
    runners = {"gradient": unit, "step": own} | {
        part: Runner(build, _copied(model))
        for part, build in PARTS.get(optimizer, {}).items()
    }
    compiled_parts = compilations.count(COMPILATION_EVENT) - before
    times = _take_turns(runners, seconds)
    recompilations = compilations.count(COMPILATION_EVENT) - before - compiled_parts
    second = times["gradient"][0]
    first_call = sum(unit.phases[p] for p in ("trace", "compile", "first run"))
    result: dict[str, Any] = {
        "gradient, s": second,
        "gradient first call, s": first_call,
        "peak bytes": peak,
        "recompilations": recompilations,
        "first call": (sum(own.phases.values()) - 0.0) / first_call,
    }
    result |= {
        phase: t / unit.phases[phase]
        for phase, t in own.phases.items()
        if phase != "init"
    }
    result |= {key: own.cost[key] / unit.cost[key] for key in own.cost}
    ordinary, refreshing = times["step"]
    result["ordinary step"] = ordinary / second
    if refreshing is not None:
        result["refreshing step"] = refreshing / second
        result |= {
            f"T3 = {t}": (ordinary + (refreshing - ordinary) / t) / second
            for t in PERIODS
        }
    for part in PARTS.get(optimizer, {}):
        result[part] = times[part][0] / second
    return result


def _copied(model: Model) -> Model:
    """With parameters of its own, as steps are given theirs to reuse."""
    return model._replace(params=jax.tree.map(lambda x: x.copy(), model.params))


def _take_turns(
    runners: dict[str, Runner], seconds: float
) -> dict[str, tuple[float, float | None]]:
    """Medians of ordinary and of refreshing steps, in seconds."""
    taken: dict[str, list[tuple[float, bool]]] = {name: [] for name in runners}
    end = time.perf_counter() + seconds
    turns = 0
    while time.perf_counter() < end or turns < 2 * INVERSE_EVERY:
        for name, runner in runners.items():
            taken[name].append(runner.advance())
        turns += 1
    result: dict[str, tuple[float, float | None]] = {}
    for name, steps in taken.items():
        ordinary, refreshing = (
            [s for s, refreshed in steps if refreshed == kind] for kind in (False, True)
        )
        result[name] = (
            float(np.median(ordinary)),
            float(np.median(refreshing)) if refreshing else None,
        )
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="of taking turns")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.optimizer, arguments.seconds)))


if __name__ == "__main__":
    main()
