"""This library side by side with what would be used instead of it.

    make bench                         about 40 minutes on two cores
    make bench BENCH_ARGS=--quick      a smoke test, 5 minutes
    make bench BENCH_ARGS=--keep       also renews docs/performance.md and history.json

Runs `cost.py` for each model and optimizer, each in a process of its own, one after the
other and in the optimizer's environment (see `environments.py`); then `scaling.py`,
`walkers.py` and `time_to_target.py`. An optimizer without an environment is shown as
skipped, one that crashes or takes too long as failed, each with the reason.

It writes results.json (all numbers), table.md and figures to the output folder. With
`--report` it writes these of the results.json that is there, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_plots
import history
import pairs
from bench_report import tables
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
PAGE = DOCS / "performance.md"
PICTURES = {
    "costs.png": "What a step costs with each optimizer",
    "target.png": "Error over time",
    "scaling.png": "How costs grow",
    "history.png": "Costs over commits",
}

Results = dict[str, Any]


class Program(NamedTuple):
    """Another benchmark, which runs by itself.

    Attributes:
        command: its file and options; `{output}` is the output folder.
        table: the file in it that the program writes its table to.
        pictures: what it draws, by the name that the figure gets here.
        limit: seconds until it is given up.
    """

    command: tuple[str, ...]
    table: str
    pictures: dict[str, str]
    limit: float


PROGRAMS = {
    "How costs grow": Program(
        (
            "scaling.py",
            *("--json", "{output}/scaling.json", "--png", "{output}/scaling.png"),
            *("--table", "{output}/scaling.md"),
        ),
        "scaling.md",
        {"scaling.png": "scaling.png"},
        600,
    ),
    "Programs written for the published release": Program(
        (
            "walkers.py",
            *("--output", "{output}/walkers", "--seconds", "5"),
            *("--batches", "128", "2048", "--periods", "1"),
        ),
        "walkers/walkers.md",
        {},
        420,
    ),
    "Time to a target": Program(
        ("time_to_target.py", "--output", "{output}/target"),
        "target/table.txt",
        {"target.png": "target/curves.png"},
        1500,
    ),
}


def measure(arguments: argparse.Namespace) -> Results:
    """Runs everything; what there is is written after each pair.

    With `--renew` the chosen pairs are measured again, on the machine of the results
    that are there, and their rows say of which commit they are.
    """
    machine = _machine()
    if arguments.renew:
        results = _read(arguments.output)
        if history.device(results["machine"]) != history.device(machine):
            raise ValueError(
                f"Expected the machine of the results, {results['machine']}; this is "
                f"{machine}. Measure everything."
            )
    else:
        results = {"partial": arguments.partial, "machine": machine}
        results |= {"rows": [], "programs": {}}
    chosen = [
        pair
        for pair in pairs.all_pairs(arguments.quick)
        if pair.model in arguments.models and pair.optimizer in arguments.optimizers
    ]
    budget = pairs.QUICK_BUDGET if arguments.quick else pairs.BUDGET
    end = time.perf_counter() + budget
    for pair in (bar := tqdm(chosen, disable=None)):
        bar.set_description(f"{pair.optimizer}, {pair.model}")
        if time.perf_counter() < end:
            row = pairs.measure(pair, machine["platform"])
        else:
            row = pair.row(f"skipped: the {budget / 60:g} minutes for all were over")
        if arguments.renew:
            row |= {"commit": machine["commit"]}
        results["rows"] = [x for x in results["rows"] if not pair.same(x)] + [row]
        _write(arguments.output, results)
    for title, program in PROGRAMS.items():
        if not (arguments.pairs_only or arguments.renew):
            print(f"{title}: {program.command[0]}", flush=True)
            results["programs"][title] = _run(program, arguments)
            _write(arguments.output, results)
    return results


def _machine() -> dict[str, Any]:
    command = [sys.executable, str(HERE / "machine.py")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(program: Program, arguments: argparse.Namespace) -> dict[str, str]:
    """Runs it: `status`, and `table`, as Markdown."""
    file, *options = program.command
    if not (HERE / file).exists():
        return {"status": f"skipped: there is no {file}"}
    command = [sys.executable, str(HERE / file)]
    command += [option.format(output=arguments.output) for option in options]
    command += ["--quick"] * arguments.quick
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    status, _ = pairs.output_of(command, program.limit, environment)
    if status != "ok":
        return {"status": status}
    for name, drawn in program.pictures.items():
        source, target = arguments.output / drawn, arguments.output / name
        if source != target:
            shutil.copyfile(source, target)
    return {"status": "ok", "table": _table(arguments.output / program.table)}


def _table(path: Path) -> str:
    """A table in a file, as Markdown shows it."""
    text = path.read_text("utf-8").strip()
    return text if text.startswith("|") else f"```text\n{text}\n```"


def _read(folder: Path) -> Results:
    return json.loads((folder / "results.json").read_text("utf-8"))


def _write(folder: Path, results: Results) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", "utf-8")


def report(folder: Path, results: Results) -> list[history.Row]:
    """Writes the table and the figures.

    Args:
        folder: the output folder.
        results: from `measure`.

    Returns:
        The history, with a row of this run.
    """
    text = tables(results)
    (folder / "table.md").write_text(text + "\n", "utf-8")
    print(text)
    row = history.row_of(results["machine"], results["rows"])
    rows = history.appended(history.read(history.PATH), row)
    bench_plots.draw_costs(results["rows"], folder / "costs.png")
    bench_plots.draw_history(rows, folder / "history.png")
    return rows


def keep(folder: Path, results: Results, rows: Sequence[history.Row]) -> None:
    """Renews the page, its pictures and the history.

    Raises:
        ValueError: if the results are not of a full run.
    """
    if results["partial"]:
        raise ValueError(
            f"Expected results of all of it in {folder}, got those of a part; run "
            "bench.py without options that leave something out."
        )
    place = DOCS / "performance"
    place.mkdir(exist_ok=True)
    shown = [name for name in PICTURES if (folder / name).exists()]
    for name in shown:
        shutil.copyfile(folder / name, place / name)
    pictures = [f"![{PICTURES[name]}](performance/{name})" for name in shown]
    region = "\n\n".join([tables(results), *pictures])
    page = history.replaced(PAGE.read_text("utf-8"), region)
    PAGE.write_text(page, "utf-8")
    history.write(rows, history.PATH)
    print(f"Renewed: {PAGE}, {place} and {history.PATH}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test")
    add("--keep", action="store_true", help="renew docs/performance.md and the history")
    add("--report", action="store_true", help="of the results that are there")
    add("--renew", action="store_true", help="only measure the chosen pairs again")
    add("--output", type=Path, default=HERE / "results", metavar="DIR")
    add("--pairs-only", action="store_true", help="no scaling, no time to a target")
    add("--models", nargs="+", choices=pairs.MODELS, metavar="MODEL")
    add("--optimizers", nargs="+", metavar="NAME", help="only some, as in cost.py")
    found = parser.parse_args(arguments)
    found.partial = bool(
        found.quick or found.pairs_only or found.models or found.optimizers
    )
    if found.keep and found.partial and not found.renew:
        parser.error(
            "--keep expects all of it, not --quick, --pairs-only, --models or "
            "--optimizers, unless with --renew"
        )
    known = {pair.optimizer for pair in pairs.all_pairs(quick=False)}
    if unknown := set(found.optimizers or ()) - known:
        parser.error(f"expected some of {', '.join(sorted(known))}; got {unknown}")
    found.models = found.models or pairs.MODELS
    found.optimizers = found.optimizers or known
    found.output = found.output.resolve()
    return found


def main() -> None:
    """The command line."""
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = _read(arguments.output) if arguments.report else measure(arguments)
    rows = report(arguments.output, results)
    if arguments.keep:
        keep(arguments.output, results, rows)


if __name__ == "__main__":
    main()
