"""Blocks beside the default ones, by steps.

    python benchmarks/workloads/variants.py               all, into variants.json
    python benchmarks/workloads/variants.py --tasks PINN  some, and keeps the rest
    python benchmarks/workloads/variants.py --table       the table of what is kept

All train with `kfac(curvature)`, on the same batches. Numbers are medians over three
seeds, of the loss at the end and of the steps to what the default blocks end at.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

import kfac_jax
from kfac_jax import blocks
from workloads import WORKLOADS, compare, training

RECORD = Path(__file__).with_name("variants.json")
SEEDS = 3

VARIANTS: dict[str, Any] = {
    "default": None,
    "fit: frobenius": {"dense": blocks.Kronecker(fit="frobenius")},
    "fit: kl": {"dense": blocks.Kronecker(fit="kl")},
    "Eigen": {"dense": blocks.Eigen()},
    "KroneckerSum": {"dense": blocks.KroneckerSum()},
}
"""The blocks of dense layers."""

TASKS = {
    "MLP, batch 128": ("fit: frobenius", "fit: kl", "Eigen"),
    "MLP, batch 1024": ("fit: frobenius", "fit: kl", "Eigen"),
    "autoencoder, batch 500": ("fit: frobenius", "fit: kl", "Eigen"),
    "tabular regression": ("fit: frobenius", "fit: kl", "Eigen"),
    "transformer": ("fit: frobenius", "fit: kl", "Eigen"),
    "PINN": ("fit: frobenius", "fit: kl", "KroneckerSum"),
}


def train(task_name: str, variant: str) -> dict[str, Any]:
    """What is kept of one variant on one task."""
    task = WORKLOADS[task_name]()
    params, batch = task.example()
    curvature = kfac_jax.make_curvature(
        task.loss_fn, params, *batch, blocks=VARIANTS[variant]
    )
    tx = kfac_jax.kfac(curvature)
    trainer = training.Trainer(tx.init, kfac_jax.make_step(curvature, tx))
    start = time.perf_counter()
    found = jax.device_get(training.seeds(task, trainer, SEEDS))
    print(f"{task_name}, {variant}: {time.perf_counter() - start:.0f} s", flush=True)
    return {"curves": [[float(f"{x:.4g}") for x in row] for row in found.curve]}


def table(record: dict[str, Any]) -> str:
    """Markdown: losses at the end, and the steps to the default's."""
    heads = ["task", "blocks of dense layers", "loss at the end", "steps to default's"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in record.items():
        target = compare.end(found["default"])
        for variant, own in found.items():
            reached = compare.steps_to(own, target) or "not reached"
            lines.append(f"| {name} | {variant} | {compare.end(own):.3g} | {reached} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for name in [] if arguments.table else arguments.tasks:
        record[name] = {v: train(name, v) for v in ("default", *TASKS[name])}
        RECORD.write_text(json.dumps(record) + "\n", "utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
