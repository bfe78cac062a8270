"""The defaults of this library beside tuned first-order optimizers, by steps.

    python benchmarks/workloads/compare.py               trains all, into defaults.json
    python benchmarks/workloads/compare.py --tasks GRU   trains some, and keeps the rest
    python benchmarks/workloads/compare.py --prices      times the steps anew
    python benchmarks/workloads/compare.py --table       the table of what is kept

Nothing is chosen for a task: `kfac(curvature)` and `make_step`. The others' record is
baselines.json, which `tune.py` makes. Curves are of the loss on the same cases of the
training set, every ten steps; numbers are medians over three seeds. Prices are of steps
in steps of AdamW, in turns in one process; they want a quiet machine.
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
import numpy as np
import optax
import turns

import kfac_jax
from workloads import WORKLOADS, Task, training

HERE = Path(__file__).resolve().parent
RECORD, BASELINES = HERE / "defaults.json", HERE / "baselines.json"
SEEDS = 3


def of_kfac(task: Task, **options: Any) -> training.Trainer:
    """K-FAC with its defaults, or with options."""
    params, batch = task.example()
    curvature = kfac_jax.make_curvature(task.loss_fn, params, *batch)
    tx = kfac_jax.kfac(curvature, **options)
    return training.Trainer(tx.init, kfac_jax.make_step(curvature, tx))


def train(name: str, seeds: int) -> dict[str, Any]:
    """What is kept of a task."""
    task = WORKLOADS[name]()
    start = time.perf_counter()
    found = jax.device_get(training.seeds(task, of_kfac(task), seeds))
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "curves": [[_digits(x) for x in row] for row in found.curve],
        "held out": [[_digits(x) for x in row] for row in found.held_out],
        "largest": [_digits(x) for x in found.largest],
    }


def price(name: str) -> dict[str, float]:
    """Of a step of K-FAC, and of its longer first call, in steps of AdamW."""
    task = WORKLOADS[name]()
    key = jax.random.key(0)
    params, batch = task.init(key), task.batch(key, task.train)
    trainers = of_kfac(task), training.of_optax(task, optax.adamw(1e-3))
    own, other = (turns.Training(*trainer, params, batch) for trainer in trainers)
    step, unit = turns.means([own, other])
    print(f"{name}: {step / unit:.2f} steps of AdamW", flush=True)
    first = (own.first - other.first) / unit
    return {"step": float(f"{step / unit:.3g}"), "first": float(f"{first:.3g}")}


def _digits(x: Any) -> float | None:
    return float(f"{float(x):.4g}") if np.isfinite(x) else None


def _array(rows: Any) -> np.ndarray:
    return np.array(rows, dtype=float)  # None becomes NaN


def end(found: dict[str, Any]) -> float:
    """The median loss at the end; infinite where a run did not stay finite."""
    last = _array(found["curves"])[:, -1]
    return float(np.median(np.where(np.isnan(last), np.inf, last)))


def steps_to(found: dict[str, Any], target: float) -> int | None:
    """The median number of steps to a loss; None where most runs do not reach it."""
    counts = []
    for curve in _array(found["curves"]):
        below = np.flatnonzero(curve <= target)
        counts.append(training.EVERY * (below[0] + 1) if len(below) else np.inf)
    median = np.median(counts)
    return int(median) if np.isfinite(median) else None


def _share_of_seconds(own: dict[str, Any], target: float) -> str:
    """To a loss, of AdamW's seconds; in brackets with the longer first call."""
    count = steps_to(own, target)
    if "price" not in own or count is None:
        return "not reached" if count is None else ""
    budget, price = training.EVERY * len(own["curves"][0]), own["price"]
    share = count * price["step"] / budget
    return f"{share:.2f} ({share + price['first'] / budget:.2f})"


def table(defaults: dict[str, Any], baselines: dict[str, Any]) -> str:
    """Markdown: losses at the end, and steps to AdamW's and Muon's."""
    heads = ["task", "steps", "K-FAC", "AdamW", "Nesterov", "Muon"]
    heads += ["steps to AdamW's", "to Muon's", "a step's price", "seconds to AdamW's"]
    heads += ["held out: K-FAC", "AdamW", "Muon"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in defaults["tasks"].items():
        others = baselines["tasks"][name]
        steps = training.EVERY * len(own["curves"][0])
        cells = [name, str(steps), f"**{end(own):.3g}**"]
        cells += [f"{end(others[x]):.3g}" for x in ("AdamW", "Nesterov", "Muon")]
        for other in ("AdamW", "Muon"):
            count = steps_to(own, end(others[other]))
            cells.append("not reached" if count is None else f"{count / steps:.2f}")
        cells.append(f"{own['price']['step']:.2f}" if "price" in own else "")
        cells.append(_share_of_seconds(own, end(others["AdamW"])))
        for found in (own, others["AdamW"], others["Muon"]):
            cells.append(f"{np.median(_array(found['held out'])[:, 1]):.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--seeds", type=int, default=SEEDS)
    add("--prices", action="store_true", help="train nothing, and time the steps")
    add("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"tasks": {}}
    if RECORD.exists():
        record = json.loads(RECORD.read_text("utf-8"))
    for name in [] if arguments.table else arguments.tasks:
        found = record["tasks"].get(name, {})
        if arguments.prices:
            found["price"] = price(name)
        else:
            found |= train(name, arguments.seeds) | {"jax": jax.__version__}
        record["tasks"][name] = found
        order = [x for x in WORKLOADS if x in record["tasks"]]
        record["tasks"] = {x: record["tasks"][x] for x in order}
        RECORD.write_text(json.dumps(record) + "\n", "utf-8")
    print(table(record, json.loads(BASELINES.read_text("utf-8"))))


if __name__ == "__main__":
    main()
