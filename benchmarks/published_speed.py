"""The speed of `kfac_jax.Optimizer`, here and in the published release of kfac-jax.

Both have the import name and the constructor, so this file measures whichever the
Python that runs it has installed; times are multiples of the gradient of the same loss
in the same process:

    python benchmarks/published_speed.py --json ours.json      some minutes
    python benchmarks/published_speed.py --quick               a smoke test
    python benchmarks/published_speed.py --compare ours.json published.json

The model is a deep autoencoder, 784-512-256-64-256-512-784, at batch 512 in float32.
Each setting has a process of its own. There the gradient and the optimizer take turns,
one step each, so a drifting machine hits both alike; step times are medians over cycles
of the mean over a cycle, of as many steps as there are between two inverse refreshes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

import kfac_jax

WIDTHS = (784, 512, 256, 64, 256, 512, 784)
L2 = 1e-5
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"

FIXED = {
    "learning_rate_schedule": lambda step: 1e-3,
    "momentum_schedule": lambda step: 0.9,
    "damping_schedule": lambda step: 1.0,
}
ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 10.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    f"{mode}, {rates}, {period}": {
        "estimation_mode": mode,
        "inverse_update_period": period,
        **options,
    }
    for mode, (rates, options), period in (
        ("fisher_gradients", ("fixed", FIXED), 5),
        ("fisher_gradients", ("fixed", FIXED), 20),
        ("ggn_curvature_prop", ("fixed", FIXED), 5),
        ("ggn_curvature_prop", ("fixed", FIXED), 20),
        ("fisher_gradients", ("adaptive", ADAPTIVE), 5),
        ("fisher_gradients", ("adaptive", ADAPTIVE), 20),
    )
}


class Sizes(NamedTuple):
    """How much to run."""

    batch: int
    least_steps: int  # timed; rounded up to whole cycles, of which two at least


FULL = Sizes(batch=512, least_steps=100)
QUICK = Sizes(batch=32, least_steps=1)

RATIOS = {
    "step": "a step, over the gradient",
    "ordinary": "a step between two refreshes, over the gradient",
    "refreshing": "a step with a refresh, over the gradient",
    "first": "init and the first step, over the gradient's first call",
    "gradient": "milliseconds of the gradient",
}
COUNTS = {
    "compilations": "programs compiled by init and the first step",
    "recompilations": "programs compiled by all later steps",
}
COLUMNS = RATIOS | COUNTS


def make_batch(size: int) -> jax.Array:
    """Random images as sparse as digits; the values do not matter here."""
    rng = np.random.RandomState(0)
    inked = rng.random_sample((size, WIDTHS[0])) < 0.2
    return jnp.asarray(inked * rng.random_sample(inked.shape), jnp.float32)


def make_params() -> list[dict[str, jax.Array]]:
    """Weights that keep the scale of what passes through them."""
    rng = np.random.RandomState(1)
    return [
        {
            "b": jnp.zeros(o, jnp.float32),
            "w": jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), jnp.float32),
        }
        for i, o in itertools.pairwise(WIDTHS)
    ]


def loss_fn(params: list[dict[str, jax.Array]], images: jax.Array) -> jax.Array:
    """Sigmoid cross entropy of the reconstruction, with the penalty of `L2`."""
    x = images
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    kfac_jax.register_sigmoid_cross_entropy_loss(logits, images)
    losses = jnp.sum(jax.nn.softplus(logits) - images * logits, axis=1)
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return jnp.mean(losses) + 0.5 * L2 * penalty


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long `function` takes until its result is there, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def measure(name: str, sizes: Sizes) -> dict[str, float]:
    """Everything about one setting; run in its own process."""
    options = SETTINGS[name]
    period = options["inverse_update_period"]
    cycles = max(2, -(-sizes.least_steps // period))
    compilations: list[str] = []
    batch, params, fixed_params = make_batch(sizes.batch), make_params(), make_params()
    keys = list(jax.random.split(jax.random.PRNGKey(0), (cycles + 1) * period))
    gradient = jax.jit(jax.value_and_grad(loss_fn))
    gradient_first, _ = seconds(lambda: gradient(fixed_params, batch))
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn), l2_reg=L2, num_burnin_steps=0, **options
    )
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event)
    )
    init_seconds, state = seconds(lambda: optimizer.init(params, keys[0], batch))
    times, gradient_times, compiled_first = [], [], 0
    for key in keys:
        gradient_times.append(seconds(lambda: gradient(fixed_params, batch))[0])
        elapsed, (params, state, _) = seconds(
            lambda params=params, state=state, key=key: optimizer.step(
                params, state, key, batch=batch
            )
        )
        times.append(elapsed)
        compiled_first = compiled_first or compilations.count(COMPILATION_EVENT)
    # The first cycle warms up; the first step of each refreshes the inverses.
    gradient_ms = 1e3 * statistics.median(gradient_times[period:])
    by_cycle = 1e3 * np.reshape(times[period:], (cycles, period)) / gradient_ms
    return {
        "step": float(np.median(np.mean(by_cycle, axis=1))),
        "ordinary": float(np.median(by_cycle[:, 1:])),
        "refreshing": float(np.median(by_cycle[:, 0])),
        "first": (init_seconds + times[0]) / gradient_first,
        "gradient": gradient_ms,
        "compilations": compiled_first,
        "recompilations": compilations.count(COMPILATION_EVENT) - compiled_first,
    }


def measure_all(sizes: Sizes, quick: bool) -> dict[str, Any]:
    """Each setting in a fresh process, printed as it comes."""
    settings = list(SETTINGS)[:: 5 if quick else 1]
    results: dict[str, Any] = {}
    print("\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items()))
    print(f"\n{'':<34}" + "".join(f"{name:>16}" for name in COLUMNS))
    for name in settings:
        command = [sys.executable, __file__, "--setting", name]
        command += ["--quick"] if quick else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        line = "".join(f"{results[name][column]:>16.3g}" for column in COLUMNS)
        print(f"{name:<34}{line}", flush=True)
    return {
        "kfac-jax": version("kfac-jax"),
        "jax": version("jax"),
        "device": jax.devices()[0].device_kind,
        "batch": sizes.batch,
        "settings": results,
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The first's ratios over the second's, their medians, and both counts."""
    for one in (ours, theirs):
        print({key: value for key, value in one.items() if key != "settings"})
    print(f"\n{'':<34}" + "".join(f"{name:>16}" for name in COLUMNS))
    rows: list[list[float]] = []
    for name, numbers in ours["settings"].items():
        published = theirs["settings"][name]
        rows.append([numbers[column] / published[column] for column in RATIOS])
        counts = [f"{numbers[c]} to {published[c]}" for c in COUNTS]
        print(f"{name:<34}" + "".join(f"{r:>16.3g}" for r in rows[-1]), end="")
        print("".join(f"{count:>16}" for count in counts))
    medians = np.median(rows, axis=0)
    print(f"{'median':<34}" + "".join(f"{m:>16.3g}" for m in medians))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--compare", type=Path, nargs=2, help="two written before")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    if arguments.compare:
        compare(*(json.loads(path.read_text("utf-8")) for path in arguments.compare))
    elif arguments.setting:
        print(json.dumps(measure(arguments.setting, sizes)))
    else:
        results = measure_all(sizes, arguments.quick)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
