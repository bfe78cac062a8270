"""What the factors of a whole data set cost, in epochs of gradients.

    python benchmarks/data_set.py            12,000 images, three turns
    python benchmarks/data_set.py --cases N  another part of Fashion-MNIST

The network is that of `experiments/classifier.py`. EKFAC's factors take two passes, one
for the bases and one for the moments in them. Gradients and factors take turns on the
same batches, after a first call of each; the cost grows with the number of cases alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import classifier
import fashion
import jax

import kfac_jax
from kfac_jax import blocks

BATCH = 500
CACHE = Path.home() / ".cache" / "kfac_jax"


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    train, _ = fashion.load(CACHE)
    starts = range(0, arguments.cases, BATCH)
    batches = [tuple(jax.device_put(x[k : k + BATCH]) for x in train) for k in starts]
    params = classifier.init_params(0)
    key = jax.random.key(0)
    gradient = jax.jit(jax.grad(classifier.loss_fn))

    def epoch() -> Any:
        return [gradient(params, *batch) for batch in batches][-1]

    def factors_of(block: blocks.Block, mode: str) -> Callable[[], Any]:
        curvature = kfac_jax.make_curvature(
            classifier.loss_fn, params, *batches[0], blocks=block, estimation_mode=mode
        )

        def gather() -> Any:
            *_, last = curvature.gathered(params, batches, rng=key)
            return last.factors

        return gather

    runs = {
        f"{name}, {mode}": factors_of(block, mode)
        for name, block in (
            ("Kronecker", blocks.Kronecker()),
            ("Eigen", blocks.Eigen()),
        )
        for mode in ("fisher_gradients", "fisher_exact")
    }
    for run in (epoch, *runs.values()):
        run()  # compiles
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.turns):
        for name, run in runs.items():
            unit = seconds(epoch)
            ratios[name].append(seconds(run) / unit)
    print("| factors of a data set | epochs of gradients |\n|---|---|")
    for name, found in ratios.items():
        print(f"| {name} | {statistics.median(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
