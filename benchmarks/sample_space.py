"""What T, its solution and the update cost, beside the gradient and the Jacobian.

    python benchmarks/sample_space.py            about a minute
    python benchmarks/sample_space.py --quick    a smoke test

A network of four layers of 256 with one output, 1,024 cases. Memory is what the
compiled program needs for temporaries, as a share of the Jacobian's `[N, P]`. Times are
taken in turns, their medians divided by the gradient's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax

REPEATS = 15
LAYERS = 4


def network(params: Any, x: jax.Array) -> jax.Array:
    """Four dense layers, and one output."""
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
    return x @ params["o"]


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error."""
    return kfac_jax.losses.squared_error(network(params, x), y).sum(-1).mean()


def programs(params: Any, x: jax.Array, y: jax.Array) -> dict[str, Callable[..., Any]]:
    """The gradient, T, and whole steps."""
    curvature = kfac_jax.make_curvature(
        loss_fn,
        params,
        x,
        y,
        structure=kfac_jax.SampleSpace(),
        estimation_mode="ggn_exact",
    )
    key = jax.random.key(0)

    def step(**options: Any) -> Callable[..., Any]:
        tx = kfac_jax.natural_gradient(curvature, damping=1e-3, **options)
        train, state = kfac_jax.make_step(curvature, tx), tx.init(params)
        return lambda params, x, y: train(params, state, key, x, y)

    return {
        "gradient": jax.value_and_grad(loss_fn),
        "T": curvature.gram,
        "step": step(),
        "step, SPRING, norm constraint": step(
            momentum=kfac_jax.Spring(0.99), norm_constraint=1e-2
        ),
        "step, quadratic model": step(learning_rate=kfac_jax.QuadraticModel()),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    n, width = (32, 8) if parser.parse_args().quick else (1024, 256)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)

    params = {f"w{i}": normal(width, width) for i in range(LAYERS)}
    params |= {f"b{i}": jnp.zeros(width) for i in range(LAYERS)}
    params |= {"o": normal(width, 1)}
    args = params, normal(n, width) * n**0.5, normal(n, 1)
    compiled = {
        name: jax.jit(program).lower(*args).compile()
        for name, program in programs(*args).items()
    }
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(REPEATS):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - start)
    count = sum(x.size for x in jax.tree.leaves(params))
    base = compiled["gradient"].cost_analysis()["flops"]
    print(f"{n} cases, {count} parameters; multiples of the gradient's")
    print(f"{'':32}{'FLOPs':>8}{'time':>8}{'memory : Jacobian':>20}")
    for name, program in compiled.items():
        flops = program.cost_analysis()["flops"] / base
        seconds = np.median(times[name]) / np.median(times["gradient"])
        memory = program.memory_analysis().temp_size_in_bytes / (4 * n * count)
        print(f"{name:32}{flops:8.2f}{seconds:8.2f}{memory:20.3f}")


if __name__ == "__main__":
    main()
