"""Finds ground states of H, He, Li and H2 by variational Monte Carlo with K-FAC.

A small neural wavefunction psi is trained to lowest energy. Its electrons are sampled
from psi^2 by a Markov chain, so there is no data. With the defaults it takes three or
four minutes on two CPU cores:

    python experiments/wavefunction.py
    python experiments/wavefunction.py --system Li --steps 5000 --precision float64
    python experiments/wavefunction.py --route optimizer

After training, the parameters stay as they are, and the energy and its standard error
are measured. `wavefunction_results/` gets energies.json, which says for each system
whether its target is met, and energies.png.

| file | holds |
|---|---|
| wavefunction_systems.py | the systems, their exact energies, the Coulomb potential |
| wavefunction_model.py | the wavefunction |
| wavefunction_sampling.py | Metropolis steps, local energies, standard errors |
| wavefunction_methods.py | the gradient of the energy, and two kinds of K-FAC steps |
| wavefunction_report.py | JSON, table and plot |
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from experiment import option
from jax import Array
from parallel_training import count
from tqdm import tqdm
from wavefunction_methods import ROUTES, Settings, energies
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
QUICK = {"walkers": 32, "steps": 6, "evaluations": 6, "width": 4}

# params, walkers, how much to adapt the width -> walkers, acceptance
Sample = Callable[[Params, Walkers, float], tuple[Walkers, Array]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is computed."""

    walkers: int = option(512, "Markov chains, the batch")
    moves: int = option(10, "Metropolis steps between steps of training")
    steps: int = option(1000, "of training")
    evaluations: int = option(500, "measurements of all walkers after training")
    layers: int = option(2, "of the network")
    width: int = option(24, "of the network's layers")
    determinants: int = option(4, "of the wavefunction")


@dataclass
class Training:
    """Where training has come to."""

    sample: Sample
    params: Params
    walkers: Walkers
    energies: list[float]
    seconds: float = 0.0
    compile_seconds: float = 0.0  # of the sampler and the step


def solve(
    system: System, scale: Scale, settings: Settings, args: argparse.Namespace
) -> Result:
    """Trains and evaluates one system."""
    dtype = jnp.dtype(args.precision)
    for_params, for_walkers, for_route = jax.random.split(jax.random.key(args.seed), 3)
    shape = Shape(
        layers=scale.layers, width=scale.width, determinants=scale.determinants
    )
    training = Training(
        _sampler(system, scale.moves),
        init_params(system, shape, dtype, for_params),
        start(system, scale.walkers, dtype, for_walkers),
        [],
    )
    _train(system, scale, settings, args.route, training, for_route)
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
    settings: Settings,
    route_name: str,
    training: Training,
    key: Array,
) -> None:
    """Brings `training` forward by all steps."""
    begin = time.perf_counter()
    sample = training.sample
    for _ in range(SETTLING):
        training.walkers, _ = sample(training.params, training.walkers, 1.0)
    electrons = training.walkers.electrons
    route = ROUTES[route_name](system, settings, training.params, electrons)
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


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--system", choices=(*SYSTEMS, "all"), default="all", help="what to solve")
    add("--route", choices=ROUTES, default="native", help="which of the two interfaces")
    add("--precision", choices=("float32", "float64"), default="float32")
    add("--seed", type=int, default=0, help="of everything random")
    add("--output", type=Path, default=Path("wavefunction_results"), help="folder")
    add("--quick", action="store_true", help="a trial that proves nothing: few of all")
    for title, constants in (("scale", Scale()), ("optimizer", Settings())):
        add = parser.add_argument_group(title).add_argument
        for one in fields(constants):
            default = getattr(constants, one.name)
            kind = count if one.type == "int" else float
            name = "--" + one.name.replace("_", "-")
            add(name, type=kind, default=default, help=one.metadata["help"])
    if arguments is None:
        arguments = sys.argv[1:]
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def _constants(kind: Any, args: argparse.Namespace) -> Any:
    """Those that the options say."""
    return kind(**{one.name: getattr(args, one.name) for one in fields(kind)})


def main(arguments: list[str] | None = None) -> int:
    """Solves what the options say; returns the exit status."""
    args = _parse(arguments)
    jax.config.update("jax_enable_x64", args.precision == "float64")
    scale, settings = _constants(Scale, args), _constants(Settings, args)
    shared = {name: getattr(args, name) for name in ("route", "precision", "seed")}
    config = shared | asdict(scale) | asdict(settings)
    names = list(SYSTEMS) if args.system == "all" else [args.system]
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    try:
        for name in names:
            results[name] = solve(SYSTEMS[name], scale, settings, args)
            save(args.output / "energies.json", results, config)
            plot(args.output / "energies.png", results)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; finished systems are saved.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(results)}\nEnergies and plot: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
