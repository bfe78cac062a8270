"""What a K-FAC step costs, as a multiple of the gradient of the same loss.

The model is the MNIST autoencoder of the examples, at batch 512:

    python benchmarks/step_cost.py                  the whole table, some minutes
    python benchmarks/step_cost.py --batch 4096     as large as in the paper
    python benchmarks/step_cost.py --quick          a smoke test

Step times come from one process in which the variants take turns, one step each, so a
drifting machine hits all alike; they are medians over several cycles of T3 steps. First
call, compilations and memory come from a fresh process for each variant.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
from autoencoder_model import L2, Params, init_params, loss_fn
from tqdm import tqdm

import kfac_jax

INVERSE_EVERY = 20  # T3
INCOMING = 15  # weights that are not zero, of each unit
WARM_UP_STEPS = 5  # the first three refresh the inverses
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"

Carry = Any
# carry, images, iteration -> (carry, number of inverse refreshes so far)
Step = Callable[[Carry, jax.Array, jax.Array], tuple[Carry, Any]]


class Sizes(NamedTuple):
    """How much to run."""

    batch: int
    cycles: int  # of T3 steps each, in the step times
    compilation_steps: int  # over which compilations are counted


FULL = Sizes(batch=512, cycles=7, compilation_steps=45)
QUICK = Sizes(batch=64, cycles=1, compilation_steps=6)


class StepTimes(NamedTuple):
    """Seconds of a step."""

    amortised: float  # over a cycle of T3 steps
    ordinary: float  # of the steps without an inverse refresh
    refreshing: float | None  # of those with one; None where there are none


class Row(NamedTuple):
    """One line of the table."""

    label: str
    value: float
    unit: str
    ratio: float | None  # to the gradient alone
    target: Target | None

    def line(self) -> str:
        """The line as text."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        target = "" if self.target is None else self.target.verdict(self)
        value = f"{self.value:.4g} {self.unit}"
        return f"{self.label:<58}{value:>13}{ratio:>9}  {target}".rstrip()


class Target(NamedTuple):
    """An upper limit on a row's ratio or value."""

    limit: float
    of: str  # "ratio" | "value"

    def verdict(self, row: Row) -> str:
        """The limit, and whether the row keeps it."""
        kept = getattr(row, self.of) <= self.limit
        return f"{self.of} <= {self.limit:g}: {'met' if kept else 'MISSED'}"


Targets = dict[tuple[str, str], Target]
"""By variant, and kind of step or quantity."""


class Built(NamedTuple):
    """A step and where it starts."""

    step: Step
    carry: Carry


@dataclass(frozen=True)
class Variant:
    """One row of the step times."""

    label: str
    build: Callable[[Params, jax.Array], Built]
    advances: bool = True  # the step returns the next carry, and its own is donated


def gradient_only(params: Params, images: jax.Array) -> Built:
    """The unit of all ratios: loss and gradient, nothing else."""
    del images

    def step(carry, images, iteration):
        del iteration
        return jax.value_and_grad(loss_fn)(carry, images), jnp.int32(0)

    return Built(step, params)


def adam(params: Params, images: jax.Array) -> Built:
    """The optimizer to compare with."""
    del images
    tx = optax.adam(1e-3)

    def step(carry, images, iteration):
        del iteration
        params, state = carry
        _, grads = jax.value_and_grad(loss_fn)(params, images)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), jnp.int32(0)

    return Built(step, (params, tx.init(params)))


def kfac(
    params: Params,
    images: jax.Array,
    *,
    statistics_fraction: float = 1.0,
    with_statistics: bool = True,
    **options: Any,
) -> Built:
    """K-FAC with fixed rates, unless `options` says otherwise."""
    curvature = kfac_jax.make_curvature(
        loss_fn, params, images, l2=L2, statistics_fraction=statistics_fraction
    )
    rates = {"learning_rate": 1e-3, "momentum": 0.9, "damping": 1.0}
    tx = kfac_jax.kfac(curvature, inverse_every=INVERSE_EVERY, **(rates | options))
    key = jax.random.key(0)

    def step(carry, images, iteration):
        params, state = carry
        if with_statistics:
            rng = jax.random.fold_in(key, iteration)
            result = curvature.value_grad_and_statistics(params, images, rng=rng)
            value, grads, batch_statistics = result
        else:
            value, grads = curvature.value_and_grad(params, images)
            batch_statistics = curvature.zero_statistics(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            statistics=batch_statistics,
            value=value,
            args=(images,),
        )
        carry = optax.apply_updates(params, updates), state
        return carry, state.info.inverse_refreshes

    return Built(step, (params, tx.init(params)))


def _without_statistics(params: Params, images: jax.Array) -> Built:
    return kfac(params, images, with_statistics=False)


def _part_statistics(params: Params, images: jax.Array) -> Built:
    return kfac(params, images, statistics_fraction=1 / 8)


def _adaptive(params: Params, images: jax.Array, **options: Any) -> Built:
    return kfac(
        params,
        images,
        statistics_fraction=1 / 8,
        learning_rate=kfac_jax.QuadraticModel(fraction=1 / 4),
        momentum=None,
        damping=kfac_jax.LevenbergMarquardt(150.0),
        **options,
    )


def _separate(params: Params, images: jax.Array) -> Built:
    rule = kfac_jax.SeparateDamping(every=INVERSE_EVERY)
    return _adaptive(params, images, factored_damping=rule)


VARIANTS = {
    "gradient": Variant("gradient only", gradient_only, advances=False),
    "adam": Variant("Adam", adam),
    "skipped": Variant("K-FAC, statistics skipped", _without_statistics),
    "full": Variant("K-FAC, full statistics", kfac),
    "part": Variant("K-FAC, tau1 = 1/8", _part_statistics),
    "adaptive": Variant("K-FAC, adaptive, tau1 = 1/8, tau2 = 1/4", _adaptive),
    "separate": Variant("K-FAC, adaptive, with a separate gamma", _separate),
}


def make_images(batch_size: int) -> jax.Array:
    """Random images as sparse as digits; the values do not matter here."""
    rng = np.random.default_rng(0)
    inked = rng.random((batch_size, 784)) < 0.2
    return jnp.asarray(inked * rng.random((batch_size, 784)), jnp.float32)


def make_params() -> Params:
    """Weights as sparse as the example's, without compiling anything for them."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.zeros(leaf.shape, leaf.dtype)
        kept = rng.random(leaf.shape) < INCOMING / leaf.shape[0]
        return jnp.asarray(kept * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(init_params, 0))


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        """Starts now."""
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


class Runner:
    """A compiled variant that steps on."""

    def __init__(self, variant: Variant, images: jax.Array) -> None:
        """Builds and compiles, timing each phase into `phases` (seconds)."""
        params = make_params()
        self._variant, self._images = variant, images
        self._iteration = 0
        clock = Clock()
        built = variant.build(params, images)
        clock.lap("plan and init")
        donated = (0,) if variant.advances else ()
        self.jitted = jax.jit(built.step, donate_argnums=donated)
        traced = self.jitted.trace(built.carry, images, np.int32(0))
        clock.lap("trace")
        self.compiled = traced.lower().compile()
        clock.lap("compile")
        self._step, self._carry = self.compiled, built.carry
        self.advance()
        clock.lap("first run")
        self.phases = clock.laps

    def advance(self) -> tuple[float, int]:
        """One step: its seconds, and the number of inverse refreshes so far."""
        iteration = np.int32(self._iteration)
        start = time.perf_counter()
        result, refreshes = self._step(self._carry, self._images, iteration)
        jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        if self._variant.advances:
            self._carry = result
        self._iteration += 1
        return seconds, int(refreshes)

    def use_jit(self) -> None:
        """Steps through `jax.jit` from here on, as a user's loop does."""
        self._step = self.jitted


def measure_alone(name: str, sizes: Sizes) -> dict[str, Any]:
    """First call, peak memory and compilations of one variant; run in its own process.

    Args:
        name: the variant.
        sizes: how much to run.

    Returns:
        Seconds by phase, MiB, counts and floating-point operations.
    """
    runner = Runner(VARIANTS[name], make_images(sizes.batch))
    for _ in range(WARM_UP_STEPS):
        runner.advance()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = runner.compiled.memory_analysis()
    phases = runner.phases
    return phases | {
        "first call": sum(phases.values()) - phases["plan and init"],
        "compilations": _count_compilations(runner, sizes.compilation_steps),
        "peak memory": peak_kib / 1024,
        "temporaries": memory.temp_size_in_bytes / 2**20,
        "arithmetic": runner.compiled.cost_analysis()["flops"] / 1e9,
    }


def _count_compilations(runner: Runner, steps: int) -> int:
    """How often a loop over the jitted step compiles: once, and each time more."""
    runner.use_jit()
    runner.advance()
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )
    for _ in range(steps - 1):
        runner.advance()
    return 1 + events.count(COMPILATION_EVENT)


def measure_step_times(names: list[str], sizes: Sizes) -> dict[str, StepTimes]:
    """Times every variant in this process, in turns of one step each."""
    images = make_images(sizes.batch)
    runners = {name: Runner(VARIANTS[name], images) for name in names}
    for runner in runners.values():  # past the refreshes of the first steps
        for _ in range(WARM_UP_STEPS):
            runner.advance()
    steps: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    total = sizes.cycles * INVERSE_EVERY
    for _ in tqdm(range(total), desc="step times", unit="turn"):
        for name, runner in runners.items():
            steps[name].append(runner.advance())
    return {name: _summarise(timed) for name, timed in steps.items()}


def _summarise(steps: list[tuple[float, int]]) -> StepTimes:
    """Medians over cycles, position by position.

    All periods divide T3, so the steps at one position of a cycle do the same work:
    their median is safe from outliers, and the mean of these medians is the amortised
    cost.
    """
    seconds = np.array([each for each, _ in steps]).reshape(-1, INVERSE_EVERY)
    counts = np.array([count for _, count in steps])
    refreshed = np.diff(counts, prepend=counts[0]).reshape(-1, INVERSE_EVERY)
    medians = np.median(seconds, axis=0)
    refreshing = refreshed.max(axis=0) > 0
    return StepTimes(
        amortised=float(medians.mean()),
        ordinary=float(np.median(medians[~refreshing])),
        refreshing=float(medians[refreshing].mean()) if refreshing.any() else None,
    )


def measure_in_new_process(name: str, sizes: Sizes) -> dict[str, Any]:
    """`measure_alone` in a fresh interpreter: nothing cached, memory of its own."""
    print(f"Fresh process: {VARIANTS[name].label}.", file=sys.stderr)
    command = [sys.executable, __file__, "--alone", name, "--batch", str(sizes.batch)]
    command += ["--quick"] if sizes.cycles == QUICK.cycles else []
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def step_rows(times: dict[str, StepTimes], targets: Targets) -> list[Row]:
    """The step times of every variant, beside those of the gradient alone."""
    unit = times["gradient"].amortised
    rows = []
    for name, measured in times.items():
        kinds = measured._asdict() if measured.refreshing else {}
        # A variant that never refreshes has one kind of step.
        for kind, seconds in (kinds or {"amortised": measured.amortised}).items():
            label = VARIANTS[name].label + (f": {kind} step" if kinds else "")
            target = targets.get((name, kind))
            rows.append(Row(label, seconds * 1e3, "ms", seconds / unit, target))
    return rows


def process_rows(alone: dict[str, dict[str, Any]], targets: Targets) -> list[Row]:
    """What each variant needs in a process of its own."""
    rows = []
    for name, measured in alone.items():
        for quantity, unit in UNITS.items():
            value, base = measured[quantity], alone["gradient"][quantity]
            ratio = value / base if unit and quantity != "plan and init" else None
            label = f"{VARIANTS[name].label}: {quantity}"
            rows.append(Row(label, value, unit, ratio, targets.get((name, quantity))))
    return rows


UNITS = {
    "plan and init": "s",
    "trace": "s",
    "compile": "s",
    "first call": "s",
    "compilations": "",
    "peak memory": "MiB",
    "temporaries": "MiB",
    "arithmetic": "GFLOP",
}

TARGETS: dict[int, Targets] = {  # by the batch
    512: {
        ("full", "amortised"): Target(3.5, "ratio"),
        ("part", "amortised"): Target(2.5, "ratio"),
        ("adaptive", "amortised"): Target(3.3, "ratio"),
    },
    4096: {("separate", "amortised"): Target(2.0, "ratio")},
}
for _name in ("full", "part", "adaptive"):
    TARGETS[512][_name, "first call"] = Target(5.0, "value")
    TARGETS[512][_name, "compilations"] = Target(1, "value")
    TARGETS[512][_name, "peak memory"] = Target(800.0, "value")


def main() -> None:
    """Runs the benchmark, or with --alone the part that needs a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--batch", type=int, help="instead of 512, or 64 with --quick")
    parser.add_argument("--output", type=Path, default=Path("step_cost.json"))
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    sizes = sizes._replace(batch=args.batch or sizes.batch)
    if args.alone:
        print(json.dumps(measure_alone(args.alone, sizes)))
        return
    names = list(dict.fromkeys(["gradient", *args.variants]))
    alone = {name: measure_in_new_process(name, sizes) for name in names}
    times = measure_step_times(names, sizes)
    print(f"Batch {sizes.batch}, T3 = {INVERSE_EVERY}, jax {jax.__version__}, ", end="")
    print(f"{os.cpu_count()} CPUs; ratios are to the gradient only.")
    print(f"{'':<58}{'value':>13}{'ratio':>9}  target")
    targets = {} if args.quick else TARGETS.get(sizes.batch, {})
    for row in step_rows(times, targets) + process_rows(alone, targets):
        print(row.line())
    results = {name: alone[name] | times[name]._asdict() for name in names}
    args.output.write_text(json.dumps({"sizes": sizes._asdict(), "results": results}))
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
