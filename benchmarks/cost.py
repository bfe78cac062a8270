"""What a step of one optimizer costs on one model, beside the gradient of its loss.

    python benchmarks/cost.py --model "convnet, batch 128" --optimizer kfac

Prints one line of JSON; `bench.py` runs this once for each pair, as times of the first
call and peak memory need a process of their own. It also runs where the published
release of kfac-jax is installed instead of this package: both have the same name.

The gradient and the steps take turns, one each, so that a drifting machine hits all
alike. With all periods known, the steps of one kind (refreshing the inverses or not) do
the same work: of each kind the median is taken, and what a step costs on average over a
period T3 follows from the two. A staggered refresh has a kind for each place of its
period instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import jax
import jax.monitoring
import numpy as np
from models import MODELS, Model
from optimizers import CASES, Build, Case, gradient

PERIODS = (1, 5, 20, 100)
LEAST_TURNS = 10
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"

Taken = list[tuple[float, int]]
"""Seconds of steps, and the count of each."""


class Runner:
    """A compiled program that steps on."""

    def __init__(self, build: Build, model: Model) -> None:
        """Builds and compiles, timing each phase into `phases` (seconds)."""
        clock = [time.perf_counter()]

        def lap() -> float:
            clock.append(time.perf_counter())
            return clock[-1] - clock[-2]

        self._args, self.count, self.phases = model.args, 0, {}
        self.program = build(model)
        self._carry = jax.block_until_ready(self.program.carry)
        self.phases["init"] = lap()
        self._step, self.cost, self.changes_type = self.program.step, {}, False
        if not self.program.compiles_itself:
            donated = (0,) if self.program.advances else ()
            jitted = jax.jit(self._step, donate_argnums=donated)
            traced = jitted.trace(self._carry, self._key(), self._args)
            self.phases["trace"] = lap()
            compiled = traced.lower().compile()
            self.phases["compile"] = lap()
            self.cost, self._step = _analysis(compiled), compiled
            if self.program.advances:
                of_carry = len(jax.tree.leaves(self._carry))
                jaxpr = traced.jaxpr
                self.changes_type = jaxpr.in_avals[:of_carry] != jaxpr.out_avals
        self.advance()
        self.phases["first run"] = lap()

    def _key(self) -> Any:
        return jax.random.key(self.count)

    def advance(self) -> tuple[float, int]:
        """One step: its seconds, and its count from 1."""
        key = jax.block_until_ready(self._key())
        self.count += 1
        start = time.perf_counter()
        result = jax.block_until_ready(self._step(self._carry, key, self._args))
        seconds = time.perf_counter() - start
        if self.program.advances:
            self._carry = result
        return seconds, self.count


def _analysis(compiled: Any) -> dict[str, float]:
    """XLA's counts; temporaries are bytes, too."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": float(cost["flops"]),
        "bytes": float(cost["bytes accessed"]),
        "temporaries": float(memory.temp_size_in_bytes),
    }


def peak_bytes() -> int:
    """The most memory so far: the device's own, or this process's on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, optimizer: str, seconds: float) -> dict[str, Any]:
    """Everything about one optimizer on one model, as multiples of the gradient.

    Args:
        name: the model.
        optimizer: the optimizer.
        seconds: for how long to take turns; every kind of step is seen at least twice,
            every place in a longer period once.

    Returns:
        Ratios by name, `seconds` of the gradient, and counts.
    """
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event)
    )
    model, case = MODELS[name](), CASES[optimizer]
    unit = Runner(gradient, _copied(model))
    first_call = sum(unit.phases[p] for p in ("trace", "compile", "first run"))
    base = peak_bytes()
    result: dict[str, Any] = {
        "platform": jax.devices()[0].platform,
        "jax": jax.__version__,
        "gradient first call, s": first_call,
    }
    if optimizer == "gradient":
        for _ in range(case.period):
            unit.advance()
        return result | {"peak bytes": peak_bytes()}
    own = Runner(case.build, _copied(model))
    for _ in range(case.period):  # past the refreshes of the first steps
        own.advance()
    peak, before = peak_bytes(), compilations.count(COMPILATION_EVENT)
    runners = {"gradient": unit, "step": own}
    for part, build in case.parts.items():
        runners[part] = Runner(build, _copied(model))
        while runners[part].count < own.count:
            runners[part].advance()
    compiled_parts = compilations.count(COMPILATION_EVENT) - before
    taken = take_turns(runners, seconds, max(LEAST_TURNS, case.period))
    later = compilations.count(COMPILATION_EVENT) - before - compiled_parts
    result |= {
        "peak bytes": peak,
        "added bytes": peak - base,
        "turns": len(taken["step"]),
        "recompilations": later + own.changes_type,
        "first call": sum(own.phases.values()) / first_call,
    }
    if own.program.plan_seconds is not None:
        result["plan, s"] = own.program.plan_seconds
    if own.cost:
        result |= {p: own.phases[p] / unit.phases[p] for p in ("trace", "compile")}
        result |= {key: own.cost[key] / unit.cost[key] for key in own.cost}
    return result | _times(case, own, taken)


def _copied(model: Model) -> Model:
    """With parameters of its own, as steps are given theirs to reuse."""
    return model._replace(params=jax.tree.map(lambda x: x.copy(), model.params))


def take_turns(
    runners: dict[str, Runner], seconds: float, least: int
) -> dict[str, Taken]:
    """Steps on with all of them, one step each.

    Args:
        runners: what takes turns, by name.
        seconds: for how long.
        least: how many turns, however long they take.

    Returns:
        All steps, by name.
    """
    taken: dict[str, Taken] = {name: [] for name in runners}
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < least:
        for name, runner in runners.items():
            taken[name].append(runner.advance())
        turns += 1
    return taken


def _times(case: Case, own: Runner, taken: dict[str, Taken]) -> dict[str, float]:
    """What the steps cost, in gradients."""
    second = float(np.median([s for s, _ in taken["gradient"]]))
    result = {"gradient, s": second}
    if case.by_place:
        for name in ("step", *case.parts):
            places = by_place(taken[name], case.period)
            of = "" if name == "step" else f"{name}: "
            result[f"{of}largest / median"] = float(places.max() / np.median(places))
            result[f"{of}T3 = {case.period}"] = float(places.mean() / second)
        return result
    for part in case.parts:
        result[part] = float(np.median([s for s, _ in taken[part]])) / second
    ordinary, refreshing = (
        [s for s, count in taken["step"] if own.program.refreshes(count) == kind]
        for kind in (False, True)
    )
    result["ordinary step"] = float(np.median(ordinary)) / second
    if refreshing:
        result["refreshing step"] = float(np.median(refreshing)) / second
        more = result["refreshing step"] - result["ordinary step"]
        result |= {f"T3 = {t}": result["ordinary step"] + more / t for t in PERIODS}
    return result


def by_place(taken: Taken, period: int) -> np.ndarray:
    """The median of the steps at each place of the period.

    Args:
        taken: seconds and counts of at least `period` consecutive steps.
        period: after how many steps the same work comes again.

    Returns:
        `period` times, in seconds.
    """
    places = [[s for s, k in taken if k % period == place] for place in range(period)]
    return np.array([np.median(seconds) for seconds in places])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--optimizer", choices=CASES, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="of taking turns")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.optimizer, arguments.seconds)))


if __name__ == "__main__":
    main()
