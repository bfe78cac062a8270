"""Energies of K-FAC, SPRING and MinSR after equal times, each tuned by equal trials.

    python experiments/wavefunction_compare.py --system Li --seconds 60
    python experiments/wavefunction_compare.py --plot

Step prices are measured first, in turns, and make seconds into numbers of steps: what
else the machine does later changes nothing. Each optimizer gets the same random trials
of rate, damping and norm constraint, a third of the time each, of which the one with
the lowest energy over its last fifth runs with further seeds. Their energies are
measured with parameters as they are at the end. `wavefunction_results/` gets
compared.json and, with `--plot`, compared.png.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas
from jax import Array
from options import parse
from report import save_figure, write_json
from tqdm import tqdm
from wavefunction_methods import METHODS, Settings, energies, plan
from wavefunction_model import Shape, init_params, log_psi
from wavefunction_report import windows
from wavefunction_sampling import metropolis, standard_error, start
from wavefunction_systems import SYSTEMS, System

import kfac_jax

SETTLING = 30  # calls of the sampler before training, and again before evaluation
EVALUATIONS = 500  # measurements of all walkers after training
STEPS_AT_ONCE = 20  # in one compiled loop


@dataclass(frozen=True, kw_only=True)
class Options:
    """Energies of K-FAC, SPRING and MinSR after equal times."""

    system: Literal["He", "Li", "Be", "H2", "LiH"] = "Li"  # what to solve
    optimizers: tuple[Literal["kfac", "spring", "minsr"], ...] = tuple(METHODS)
    seconds: float = 60.0  # of training at the measured prices
    trials: int = 12  # of each optimizer
    seeds: int = 3  # with the best trial's constants
    walkers: int = 512
    moves: int = 10  # Metropolis steps between steps of training
    output: Path = Path("wavefunction_results")  # folder
    plot: bool = False  # only draw what is recorded


def main(arguments: list[str] | None = None) -> int:
    """Compares, or draws what is recorded; returns the exit status."""
    options = parse(Options, arguments)
    path = options.output / "compared.json"
    options.output.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    records = {name: found[name] for name in SYSTEMS if name in found}
    if not options.plot:
        before = records.get(options.system, {})
        records[options.system] = before | compared(SYSTEMS[options.system], options)
        write_json(path, records)
    print(table(records))
    plot(options.output / "compared.png", records)
    return 0


def compared(system: System, options: Options) -> dict[str, Any]:
    """Tunes and runs all optimizers for one system."""
    runners = {name: runner(name, system, options) for name in options.optimizers}
    prices = measured(runners)
    tried = draws(options.trials)
    result: dict[str, Any] = {"options": {"system": system.name}, "exact": system.exact}
    result["options"] |= {k: getattr(options, k) for k in ("seconds", "walkers")}
    for name, run in runners.items():
        steps = int(options.seconds / prices[name])
        scores = []
        for settings in tqdm(tried, desc=f"{system.name} {name} trials"):
            curve = run(settings, steps // 3, 0, evaluate=False).energies
            last = np.mean(curve[-max(1, len(curve) // 5) :])
            scores.append(float(last) if np.isfinite(last) else float("inf"))
        best = tried[int(np.argmin(scores))]
        seeds = tqdm(range(1, options.seeds + 1), desc=f"{system.name} {name} seeds")
        runs = [asdict(run(best, steps, seed, evaluate=True)) for seed in seeds]
        result[name] = {
            "price": prices[name],
            "steps": steps,
            "trials": [
                asdict(settings) | {"energy": score}
                for settings, score in zip(tried, scores, strict=True)
            ],
            "best": asdict(best),
            "runs": runs,
        }
    return result


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run gave; energies in hartree."""

    seed: int
    energies: list[float]  # the mean of each step's walkers
    energy: float  # with the parameters at the end
    standard_error: float


Runner = Callable[..., Run]


def draws(count: int) -> list[Settings]:
    """The trials: rates, dampings and constraints at random, on a scale of powers."""
    rng = np.random.default_rng(0)
    first = Settings()
    result = [first]
    for _ in range(count - 1):
        rate, damping, constraint = rng.uniform([-1.7, -5, -3.5], [0.0, -1.5, -0.5])
        result.append(
            replace(
                first,
                learning_rate=float(10**rate),
                damping=float(10**damping),
                norm_constraint=float(10**constraint),
            )
        )
    return result[:count]


def runner(name: str, system: System, options: Options) -> Runner:
    """A function that trains by one optimizer, compiled once for all its settings."""
    key = jax.random.key(0)
    params = init_params(system, Shape(), jnp.float32, key)
    walkers = start(system, options.walkers, jnp.dtype("float32"), key)
    method = METHODS[name]
    curvature = plan(method, system, params, walkers.electrons)

    @jax.jit
    def sample(params: Any, walkers: Any, adaptation: float) -> Any:
        psi = partial(log_psi, system, params)
        return metropolis(psi, walkers, options.moves, adaptation)[0]

    def transformation(numbers: dict[str, Any]) -> Any:
        return method.transformation(curvature, replace(Settings(), **numbers))

    @jax.jit
    def several(numbers: dict[str, Any], carry: Any, keys: Array) -> Any:
        train = kfac_jax.make_step(curvature, transformation(numbers))

        def one(carry: Any, key: Array) -> Any:
            params, state, walkers = carry
            walkers = sample(params, walkers, 1.0)
            params, state, (_, local) = train(params, state, key, walkers.electrons)
            return (params, state, walkers), local.mean()

        return jax.lax.scan(one, carry, keys)

    measure = jax.jit(partial(energies, system))

    def run(settings: Settings, steps: int, seed: int, *, evaluate: bool) -> Run:
        for_params, for_walkers, for_steps = jax.random.split(jax.random.key(seed), 3)
        params = init_params(system, Shape(), jnp.float32, for_params)
        walkers = start(system, options.walkers, jnp.dtype("float32"), for_walkers)
        for _ in range(SETTLING):
            walkers = sample(params, walkers, 1.0)
        numbers = {
            k: getattr(settings, k)
            for k in ("learning_rate", "damping", "norm_constraint")
        }
        carry = params, transformation(numbers).init(params), walkers
        curve: list[float] = []
        keys = jax.random.split(for_steps, max(1, steps // STEPS_AT_ONCE))
        for key in keys:
            carry, found = several(numbers, carry, jax.random.split(key, STEPS_AT_ONCE))
            curve += np.asarray(found, np.float64).tolist()
            if not np.isfinite(curve[-1]):
                break
        energy = error = float("nan")
        if evaluate:
            params, _, walkers = carry
            series = []
            for i in range(SETTLING + EVALUATIONS):
                walkers = sample(params, walkers, float(i < SETTLING))
                if i >= SETTLING:
                    series.append(
                        np.asarray(measure(params, walkers.electrons), np.float64)
                    )
            local = np.stack(series, 1)  # [walkers, times]
            energy, error = float(local.mean()), standard_error(local)
        return Run(seed=seed, energies=curve, energy=energy, standard_error=error)

    return run


def measured(runners: dict[str, Runner], rounds: int = 5) -> dict[str, float]:
    """The median seconds of a step of training and sampling, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            base = run_seconds(run, STEPS_AT_ONCE)
            more = run_seconds(run, 4 * STEPS_AT_ONCE)
            if turn:  # the first compiles
                seconds[name].append((more - base) / (3 * STEPS_AT_ONCE))
    return {name: statistics.median(found) for name, found in seconds.items()}


def run_seconds(run: Runner, steps: int) -> float:
    """How long so many steps take."""
    begin = time.perf_counter()
    run(Settings(), steps, 0, evaluate=False)
    return time.perf_counter() - begin


def table(records: dict[str, Any]) -> str:
    """One line for each system and optimizer: the median seed's energy."""
    rows = []
    for system, record in records.items():
        present = [name for name in METHODS if name in record]
        for name in present:
            found = record[name]
            # a run that has failed has no energy
            runs = sorted(found["runs"], key=lambda run: run["energy"] or 0.0)
            middle = runs[len(runs) // 2]
            prices = [record[other]["price"] for other in present]
            rows.append(
                {
                    "system": system,
                    "optimizer": name,
                    "price": found["price"] / prices[0],
                    "steps": found["steps"],
                    "energy": middle["energy"],
                    "error": middle["standard_error"],
                    "above exact": (middle["energy"] or 0.0) - record["exact"],
                    "best seed": (runs[0]["energy"] or 0.0) - record["exact"],
                    "worst seed": (runs[-1]["energy"] or 0.0) - record["exact"],
                }
            )
    frame = pandas.DataFrame(rows)
    return frame.to_string(index=False, float_format=lambda x: f"{x:.5f}")


def plot(path: Path, records: dict[str, Any]) -> None:
    """The distance from the exact energy against seconds, of all seeds."""
    figure, axes = plt.subplots(
        1, len(records), figsize=(1 + 4.5 * len(records), 4), squeeze=False
    )
    for axis, (system, record) in zip(axes[0], records.items(), strict=True):
        for color, name in enumerate(METHODS):
            if name not in record:
                continue
            found = record[name]
            for i, run in enumerate(found["runs"]):
                steps, means, errors = windows(run["energies"])
                axis.errorbar(
                    steps * found["price"],
                    np.abs(means - record["exact"]),
                    errors,
                    color=f"C{color}",
                    lw=1,
                    label=name if i == 0 else None,
                )
        axis.set_yscale("log")
        axis.set_title(system)
        axis.set_xlabel("seconds at the measured price")
        axis.legend()
    axes[0, 0].set_ylabel("|energy - exact|, hartree")
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
