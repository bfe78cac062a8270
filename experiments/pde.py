"""Solves partial differential equations by networks, with several optimizers.

Poisson's equation in two and in five dimensions, and the heat equation in four
dimensions and time, in double precision. Every method has the same seconds on each; the
error is relative, in the L2 norm, on points that no method sees. The defaults are 18
minutes of training, and two or three to compile on two CPU cores:

    python experiments/pde.py
    python experiments/pde.py --problem poisson2 --methods natural adam --seconds 20

`pde_results/` gets pde.json, errors.png (against seconds) and, of the equation in two
dimensions, fields.png (the solutions and their errors).

| file | holds |
|---|---|
| pde_problems.py | the equations, the network and the loss |
| pde_methods.py | the optimizers |
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
from pde_methods import METHODS, Method
from pde_problems import PROBLEMS, Params, Problem, network
from report import save_figure, write_json
from tqdm import tqdm

HELD_OUT = 4000
SIDE = 64  # points along each axis of a picture


@dataclass(frozen=True, kw_only=True)
class Options:
    """Solves partial differential equations by networks, with several optimizers."""

    problem: Literal["poisson2", "poisson5", "heat", "all"] = "all"  # what to solve
    methods: tuple[str, ...] = tuple(METHODS)  # by which optimizers
    seconds: float = 60.0  # of training, for each method
    seed: int = 0  # of everything random
    output: Path = Path("pde_results")  # folder
    quick: bool = False  # a trial that proves nothing: three steps each


@dataclass
class Curve:
    """What one method gave."""

    seconds: list[float] = field(default_factory=list)  # without evaluations
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0


def train(
    problem: Problem, method: Method, params: Params, options: Options
) -> tuple[Curve, Params]:
    """Trains for the time that the options give, and measures ever more rarely."""
    start, held_out = jax.random.split(jax.random.key(options.seed), 2)
    shown, _ = jax.vmap(problem.points)(jax.random.split(held_out, 8))
    shown = shown.reshape(-1, problem.dimensions)[:HELD_OUT]
    error_of = jax.jit(problem.relative_error)
    step = jax.jit(_with_points(problem, method, start))
    curve, state = Curve(), method.init(params)
    begin = time.perf_counter()
    compiled = step.lower(params, state, 0).compile()
    curve.compile_seconds = time.perf_counter() - begin
    count, spent, due, loss = 0, 0.0, 1, jnp.nan
    with tqdm(
        total=options.seconds, unit="s", bar_format="{l_bar}{bar}{postfix}"
    ) as bar:
        while spent < options.seconds and not (options.quick and count == 3):
            begin = time.perf_counter()
            while count < due:
                params, state, loss = compiled(params, state, count)
                count += 1
            loss = float(loss)  # waits for the step
            spent += time.perf_counter() - begin
            due = max(count + 1, int(count * 1.1))
            curve.seconds.append(spent)
            curve.steps.append(count)
            curve.losses.append(loss)
            curve.errors.append(float(error_of(params, shown)))
            bar.n = min(spent, options.seconds)
            bar.set_postfix_str(f"{count} steps, error {curve.errors[-1]:.2e}")
    return curve, params


def _with_points(problem: Problem, method: Method, key: Array) -> Callable[..., Any]:
    """The step as a function of its number, which says what is drawn."""

    def step(params: Params, state: Any, count: Any) -> tuple[Params, Any, Array]:
        own = jax.random.fold_in(key, count)
        fixed = key if not method.resamples else own
        points = problem.points(jax.random.fold_in(fixed, 0))
        return method.step(params, state, jax.random.fold_in(own, 1), *points)

    return step


def table(results: dict[str, dict[str, Curve]]) -> str:
    """The last error of each method, and its steps."""
    rows = {
        (problem, name): {
            "error": f"{curve.errors[-1]:.2e}",
            "loss": f"{curve.losses[-1]:.2e}",
            "steps": curve.steps[-1],
            "seconds": f"{curve.seconds[-1]:.0f}",
            "to compile": f"{curve.compile_seconds:.0f}",
        }
        for problem, curves in results.items()
        for name, curve in curves.items()
    }
    return pandas.DataFrame.from_dict(rows, orient="index").to_string()


def plot_errors(path: Path, results: dict[str, dict[str, Curve]]) -> None:
    """Errors against seconds."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(1 + 4 * len(results), 3.5), squeeze=False
    )
    for axis, (problem, curves) in zip(axes[0], results.items(), strict=True):
        for name, curve in curves.items():
            axis.loglog(curve.seconds, curve.errors, label=name)
        axis.set_title(problem)
        axis.set_xlabel("seconds")
    axes[0, 0].set_ylabel("relative L2 error")
    axes[0, 0].legend()
    save_figure(figure, path)


def plot_fields(path: Path, problem: Problem, found: dict[str, Params]) -> None:
    """Solutions in two dimensions, and how far they are off."""
    side = jnp.linspace(0, 1, SIDE)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    true = problem.solution(grid)
    figure, axes = plt.subplots(
        2, len(found), figsize=(2.6 * len(found), 5), squeeze=False
    )
    for (upper, lower), (name, params) in zip(axes.T, found.items(), strict=True):
        values = network(params, grid)
        for axis, shown in ((upper, values), (lower, jnp.abs(values - true))):
            picture = np.asarray(shown).reshape(SIDE, SIDE)
            image = axis.imshow(picture, origin="lower", extent=(0, 1, 0, 1))
            figure.colorbar(image, ax=axis, shrink=0.7)
        upper.set_title(name)
    axes[0, 0].set_ylabel("found")
    axes[1, 0].set_ylabel("off by")
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Solves what the options say; returns the exit status."""
    options = parse(Options, arguments)
    unknown = set(options.methods) - set(METHODS)
    if unknown or not options.methods:
        print(
            f"Error: expected methods among {[*METHODS]}; got {sorted(unknown)}.",
            file=sys.stderr,
        )
        return 1
    jax.config.update("jax_enable_x64", True)
    names = list(PROBLEMS) if options.problem == "all" else [options.problem]
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Curve]] = {}
    try:
        for name in names:
            problem, found = PROBLEMS[name], dict[str, Params]()
            params = problem.init(jax.random.key(options.seed))
            for chosen in options.methods:
                print(f"{name}, {chosen}")
                method = METHODS[chosen](problem, params)
                curve, found[chosen] = train(problem, method, params, options)
                results.setdefault(name, {})[chosen] = curve
                _save(options, results)
            if problem.dimensions == 2:
                plot_fields(options.output / "fields.png", problem, found)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; finished runs are saved.", file=sys.stderr)
        return 130
    print(f"\n{table(results)}\nNumbers and plots: {options.output}")
    return 0


def _save(options: Options, results: dict[str, dict[str, Curve]]) -> None:
    numbers = {p: {m: asdict(x) for m, x in c.items()} for p, c in results.items()}
    config = {k: v for k, v in asdict(options).items() if k != "output"}
    write_json(options.output / "pde.json", {"config": config, "results": numbers})
    plot_errors(options.output / "errors.png", results)


if __name__ == "__main__":
    sys.exit(main())
