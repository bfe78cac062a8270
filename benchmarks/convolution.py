"""What the statistics of a 3×3 convolution cost, against patches made explicitly.

    python benchmarks/convolution.py            about a minute
    python benchmarks/convolution.py --quick    a smoke test

Statistics are those of the targets' gradients, and of sampled ones, which take memory
for the samples that has nothing to do with the convolution. The explicit rival computes
both factors from `conv_general_dilated_patches` of the whole batch. Memory is what the
compiled program needs for temporaries beyond the gradient's, as a multiple of the
layer's input.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax

REPEATS = 15


def convolve(w: jax.Array, x: jax.Array) -> jax.Array:
    """A 3×3 convolution in the usual layout of images."""
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
    """Squares of the convolution's output, nothing else."""
    return kfac_jax.losses.squared_error(convolve(w, x)).sum((1, 2, 3)).mean()


def explicit(w: jax.Array, x: jax.Array) -> Any:
    """Value, gradient and factors by hand, with all patches at once."""
    y, pull = jax.vjp(lambda w: convolve(w, x), w)
    n, *_, outputs = y.shape
    patches = jax.lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    rows, dy = (
        patches.reshape(-1, patches.shape[-1]),
        (2 * y / n**0.5).reshape(-1, outputs),
    )
    return jnp.square(y).sum() / n, pull(2 * y / n), rows.T @ rows, dy.T @ dy


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    n, size, channels = (4, 8, 4) if parser.parse_args().quick else (64, 32, 32)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((n, size, size, channels)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((3, 3, channels, channels)), jnp.float32)
    empirical, sampled = (
        kfac_jax.make_curvature(loss_fn, w, x, on_unmatched="error", estimation_mode=m)
        for m in ("fisher_empirical", "fisher_gradients")
    )
    key = jax.random.key(0)
    programs = {
        "gradient": jax.value_and_grad(loss_fn),
        "statistics": lambda w, x: empirical.value_grad_and_statistics(w, x),
        "sampled": lambda w, x: sampled.value_grad_and_statistics(w, x, rng=key),
        "explicit": explicit,
    }
    compiled = {
        name: jax.jit(program).lower(w, x).compile()
        for name, program in programs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(REPEATS):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(w, x))
            times[name].append(time.perf_counter() - start)
    seconds = {name: float(np.median(each)) for name, each in times.items()}
    memory = {
        name: program.memory_analysis().temp_size_in_bytes
        for name, program in compiled.items()
    }
    for name in compiled:
        ratio = seconds[name] / seconds["gradient"]
        extra = (memory[name] - memory["gradient"]) / x.nbytes
        print(f"{name}: {ratio:.2f} × the gradient's time, {extra:+.2f} inputs more")
    extra, more = (
        (memory[name] - memory["gradient"]) / x.nbytes
        for name in ("statistics", "sampled")
    )
    slower = seconds["statistics"] / seconds["explicit"]
    for name, value, limit in (
        ("extra memory, in inputs", extra, 2.0),
        ("extra memory with samples, in inputs", more, 2.0),
        ("time, in that of explicit patches", slower, 1.0),
    ):
        verdict = "met" if value <= limit else "MISSED"
        print(f"{name}: {value:.2f}, target <= {limit}: {verdict}")


if __name__ == "__main__":
    main()
