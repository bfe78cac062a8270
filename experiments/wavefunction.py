"""Finds ground states of small atoms and molecules by variational Monte Carlo.

A small neural wavefunction psi is trained to lowest energy. Its electrons are sampled
from psi^2 by a Markov chain, so there is no data. With the defaults it takes four or
five minutes on two CPU cores:

    python experiments/wavefunction.py
    python experiments/wavefunction.py --system Li --steps 5000 --precision float64
    python experiments/wavefunction.py --optimizer compat
    python experiments/wavefunction.py --system Li --optimizer spring

After training, the parameters stay as they are, and the energy and its standard error
are measured. `wavefunction_results/` gets energies.json, which says for each system
whether its target is met, and energies.png.

| file | holds |
|---|---|
| wavefunction_systems.py | the systems, their exact energies, the Coulomb potential |
| wavefunction_model.py | the wavefunction |
| wavefunction_sampling.py | Metropolis steps, local energies, standard errors |
| wavefunction_methods.py | the gradient of the energy, and the steps of optimizers |
| wavefunction_report.py | JSON, table and plot |
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from options import parse
from tqdm import tqdm
from wavefunction_methods import OPTIMIZERS, Settings, energies
from wavefunction_model import Params, Shape, init_params, log_psi
from wavefunction_report import Result, plot, save, table
from wavefunction_sampling import (
    Walkers,
    correlation_time,
    metropolis,
    standard_error,
    start,
)
from wavefunction_systems import SYSTEMS, System

SETTLING = 30  # calls of the sampler before training, and again before evaluation

# params, walkers, how much to adapt the width -> walkers, acceptance
Sample = Callable[[Params, Walkers, float], tuple[Walkers, Array]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is computed."""

    walkers: int = 512  # Markov chains, the batch
    moves: int = 10  # Metropolis steps between steps of training
    steps: int = 1000  # of training
    evaluations: int = 500  # measurements of all walkers after training
    layers: int = 2  # of the network
    width: int = 24  # of the network's layers
    determinants: int = 4  # of the wavefunction


QUICK = Scale(walkers=32, steps=6, evaluations=6, width=4)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Finds ground states of small atoms and molecules by variational Monte Carlo."""

    system: Literal["H", "He", "Li", "Be", "H2", "LiH", "all"] = "all"  # what to solve
    # K-FAC, by the front for existing programs, or natural gradients in sample space
    optimizer: Literal["kfac", "compat", "spring", "minsr"] = "kfac"
    precision: Literal["float32", "float64"] = "float32"
    seed: int = 0  # of everything random
    output: Path = Path("wavefunction_results")  # folder
    quick: bool = False  # a trial that proves nothing: few of all
    scale: Annotated[Scale, tyro.conf.arg(name="")] = Scale()
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()


@dataclass
class Training:
    """Where training has come to."""

    sample: Sample
    params: Params
    walkers: Walkers
    energies: list[float]
    seconds: float = 0.0
    compile_seconds: float = 0.0  # of the sampler and the step


def solve(system: System, scale: Scale, options: Options) -> Result:
    """Trains and evaluates one system."""
    dtype = jnp.dtype(options.precision)
    key = jax.random.key(options.seed)
    for_params, for_walkers, for_route = jax.random.split(key, 3)
    shape = Shape(
        layers=scale.layers, width=scale.width, determinants=scale.determinants
    )
    training = Training(
        _sampler(system, scale.moves),
        init_params(system, shape, dtype, for_params),
        start(system, scale.walkers, dtype, for_walkers),
        [],
    )
    _train(system, scale, options, training, for_route)
    return _evaluate(system, scale, training)


def _sampler(system: System, moves: int) -> Sample:
    @jax.jit
    def sample(
        params: Params, walkers: Walkers, adaptation: float
    ) -> tuple[Walkers, Array]:
        psi = partial(log_psi, system, params)
        return metropolis(psi, walkers, moves, adaptation)

    return sample


def _train(
    system: System,
    scale: Scale,
    options: Options,
    training: Training,
    key: Array,
) -> None:
    """Brings `training` forward by all steps."""
    begin = time.perf_counter()
    sample = training.sample
    for _ in range(SETTLING):
        training.walkers, _ = sample(training.params, training.walkers, 1.0)
    electrons = training.walkers.electrons
    make = OPTIMIZERS[options.optimizer]
    route = make(system, options.settings, training.params, electrons)
    state = route.init(training.params, electrons)
    print(f"\n{system.name}\n{route.report()}\n")
    with tqdm(range(scale.steps), desc=f"{system.name:<3}") as bar:
        for step in bar:
            training.walkers, acceptance = sample(
                training.params, training.walkers, 1.0
            )
            training.params, state, local = route.step(
                training.params,
                state,
                training.walkers.electrons,
                jax.random.fold_in(key, step),
            )
            training.energies.append(float(np.asarray(local, np.float64).mean()))
            if step == 0:  # it has compiled
                training.compile_seconds = time.perf_counter() - begin
                begin = time.perf_counter()
            recent = np.mean(training.energies[-50:])
            bar.set_postfix_str(
                f"energy {recent:.4f} (exact {system.exact:.4f}), accepted "
                f"{float(acceptance):.2f}",
                refresh=False,
            )
    training.seconds = time.perf_counter() - begin


def _evaluate(system: System, scale: Scale, training: Training) -> Result:
    """Measures the energy with the parameters as they are."""
    begin = time.perf_counter()
    params, walkers = training.params, training.walkers
    for _ in range(SETTLING):
        walkers, _ = training.sample(params, walkers, 1.0)
    measure = jax.jit(partial(energies, system))
    series, accepted = [], []
    for _ in tqdm(range(scale.evaluations), desc=f"{system.name:<3} measures"):
        walkers, acceptance = training.sample(params, walkers, 0.0)
        series.append(np.asarray(measure(params, walkers.electrons), np.float64))
        accepted.append(float(acceptance))
    local = np.stack(series, 1)  # [walkers, times]
    energy, error = float(local.mean()), standard_error(local)
    met = None
    if system.tolerance is not None:  # also if the energy is two errors further off
        met = abs(energy - system.exact) + 2 * error <= system.tolerance
    return Result(
        exact=system.exact,
        energy=energy,
        standard_error=error,
        deviation=float(local.std()),
        correlation_time=correlation_time(local),
        acceptance=float(np.mean(accepted)),
        target=system.tolerance,
        met=met,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        training_seconds=training.seconds,
        compile_seconds=training.compile_seconds,
        evaluation_seconds=time.perf_counter() - begin,
        energies=training.energies,
    )


def main(arguments: list[str] | None = None) -> int:
    """Solves what the options say; returns the exit status."""
    options = parse(Options, arguments)
    jax.config.update("jax_enable_x64", options.precision == "float64")
    scale = QUICK if options.quick else options.scale
    shared = {k: getattr(options, k) for k in ("optimizer", "precision", "seed")}
    config = shared | asdict(scale) | asdict(options.settings)
    names = list(SYSTEMS) if options.system == "all" else [options.system]
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    try:
        if min(asdict(scale).values()) < 1:
            raise ValueError(f"Expected numbers of at least 1; got {scale}.")
        for name in names:
            results[name] = solve(SYSTEMS[name], scale, options)
            save(options.output / "energies.json", results, config)
            plot(options.output / "energies.png", results)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; finished systems are saved.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(results)}\nEnergies and plot: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
