"""Variational Monte Carlo with this library and with the published kfac-jax.

    python benchmarks/walkers.py                 all batches and periods
    python benchmarks/walkers.py --quick         a smoke test, a minute
    python benchmarks/walkers.py --attention --batches 128 512
    python benchmarks/walkers.py --energies 10   do both train alike?

The same program (`walkers_model.py`) runs in two processes, one with each library. Both
are there at once and take turns of a few steps, so that a drifting machine hits both
alike. Beside the steps each times the gradient alone.

Of a step, the medians at each place of the refresh's period are averaged over them. The
first step is `init` and one step, with all that is compiled for them. Memory is the
most that a process had resident up to then, before the gradient alone is compiled.

Writes walkers.json and walkers.md to the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

# Nothing here imports JAX, but for the child: a child's peak of memory starts at what
# the process that started it had.
import environments
import pairs

HERE = Path(__file__).resolve().parent

BATCHES = (128, 512, 2048, 4096)
PERIODS = (1, 5)
FLAGS = ("full", "attention", "no_jastrow", "float64")  # of the model
LIBRARIES = {"here": "front-published-jax", "published": "published"}
"""Names of `pairs`. Both have the last JAX that the published release runs on."""

STEPS, GRADIENTS = 5, 3  # of a turn
LEAST_ROUNDS = 6
SECONDS = 40.0  # for the rounds of a case, once there are enough
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.0
LIMIT = 600.0  # seconds until a child that does not answer is given up

Row = dict[str, Any]
"""`batch`, `period`, `status` ("ok" or why not), and what was measured if it is ok."""


class ChildFailed(Exception):
    """A child ended; the message says why, in a line."""


# -------------------------------------------------------------------------- the child


def child(arguments: argparse.Namespace) -> None:
    """Answers each line of standard input, a request, by a line of standard output."""
    import jax

    jax.config.update("jax_enable_x64", arguments.float64)
    import jax.numpy as jnp
    import walkers_model

    training = walkers_model.Training(
        walkers_model.ATOMS[arguments.atom],
        walkers_model.Shape(
            full=arguments.full,
            attention=arguments.attention,
            jastrow=not arguments.no_jastrow,
        ),
        *arguments.child,
        dtype=jnp.float64 if arguments.float64 else jnp.float32,
    )

    def timed(function: Callable[[Any], Any]) -> float:
        key = jax.block_until_ready(training.next_key())
        start = time.perf_counter()
        result = function(key)
        jax.block_until_ready((result, training.params, training.state))
        return time.perf_counter() - start

    def first() -> Row:
        before = _peak_bytes()
        row = {"init, s": timed(training.init), "first step, s": timed(training.step)}
        _turn(timed, training, gradients=0)
        row |= {"peak bytes": _peak_bytes(), "added bytes": _peak_bytes() - before}
        timed(training.gradient)  # compiles it
        return row | {"jax": jax.__version__}

    def energy() -> float:
        training.move(training.next_key())
        return float(training.step(training.next_key())["loss"][0])

    answers: dict[str, Callable[[], Any]] = {
        "first": first,
        "turn": lambda: _turn(timed, training),
        "energy": energy,
        "init": lambda: timed(training.init),
    }
    for line in sys.stdin:
        print(json.dumps(answers[json.loads(line)]()), flush=True)


def _turn(
    timed: Callable[[Any], float], training: Any, gradients: int = GRADIENTS
) -> Row:
    return {
        "steps": [timed(training.step) for _ in range(STEPS)],
        "gradients": [timed(training.gradient) for _ in range(gradients)],
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------- the parent


class Child:
    """A process with one of the libraries, from the side that asks."""

    def __init__(self, library: str, options: Sequence[str]) -> None:
        """Starts it.

        Args:
            library: one of `LIBRARIES`.
            options: of its command line.

        Raises:
            ChildFailed: if its environment cannot be used.
        """
        name = LIBRARIES[library]
        reason = environments.failure(pairs.ENVIRONMENTS[name])
        if reason is not None:
            raise ChildFailed(reason)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [pairs.python_of(name), str(Path(__file__).resolve()), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=pairs.environment(name, os.environ),
        )

    def ask(self, request: str) -> Any:
        """Its answer to a request.

        Raises:
            ChildFailed: if it ended instead.
        """
        assert self._process.stdin and self._process.stdout
        timer = threading.Timer(LIMIT, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        raise ChildFailed(pairs.reason_of(self._errors.read(), status))

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def compare(
    arguments: argparse.Namespace,
    batch: int,
    period: int,
    measure: Callable[[argparse.Namespace, dict[str, Child], int], Row],
) -> Row:
    """One case, with both libraries.

    Args:
        arguments: the command line's.
        batch: how many walkers.
        period: steps between inverses.
        measure: what to measure of the children, as `times` or `energies`.

    Returns:
        Its row.
    """
    about: Row = {"batch": batch, "period": period}
    options = ["--child", str(batch), str(period), "--atom", arguments.atom]
    for name in FLAGS:
        options += [f"--{name.replace('_', '-')}"] * getattr(arguments, name)
    children: dict[str, Child] = {}
    library = ""
    try:
        for library in LIBRARIES:
            children[library] = Child(library, options)
        return about | {"status": "ok"} | measure(arguments, children, period)
    except ChildFailed as error:
        return about | {"status": f"failed: {error}"}
    finally:
        for process in children.values():
            process.end()


def times(
    arguments: argparse.Namespace, children: dict[str, Child], period: int
) -> Row:
    """Seconds and bytes, of each library."""
    rows = {library: _ask(children, library, "first") for library in children}
    taken = {library: {"steps": [], "gradients": []} for library in children}
    least, seconds = LEAST_ROUNDS, arguments.seconds
    if arguments.quick:
        least, seconds = QUICK_ROUNDS, QUICK_SECONDS
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for library in children:
            for kind, some in _ask(children, library, "turn").items():
                taken[library][kind] += some
        rounds += 1
    for library, row in rows.items():
        steps = taken[library]["steps"]
        row["step, s"] = fmean(median(steps[i::period]) for i in range(period))
        row["gradient, s"] = median(taken[library]["gradients"])
        row["rounds"] = rounds
    return rows


def energies(
    arguments: argparse.Namespace, children: dict[str, Child], period: int
) -> Row:
    """Energies of each library, walkers moving before each step."""
    rows: Row = {}
    for library in children:
        _ask(children, library, "init")
        asked = range(arguments.energies)
        rows[library] = [_ask(children, library, "energy") for _ in asked]
    differences = [
        abs(a - b) / abs(b)
        for a, b in zip(rows["here"], rows["published"], strict=True)
    ]
    return rows | {"largest relative difference": max(differences)}


def _ask(children: dict[str, Child], library: str, request: str) -> Any:
    try:
        return children[library].ask(request)
    except ChildFailed as error:
        raise ChildFailed(f"{library}: {error}") from error


# ------------------------------------------------------------------------- the report

TIMES = (
    ("step, ms", 1e3, "step, s"),
    ("first step, s", 1.0, "first, s"),
    ("peak, MiB", 2.0**-20, "peak bytes"),
    ("gradient, ms", 1e3, "gradient, s"),
)


def times_table(rows: Sequence[Row]) -> str:
    """Markdown; ratios are those of this library to the published one."""
    heads = [f"{title}: here | published | ratio" for title, *_ in TIMES]
    heads.append("step / gradient: here | published")
    lines = [" | ".join(["| batch | period", *heads]) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in rows:
        cells = [str(row["batch"]), str(row["period"])]
        if row["status"] != "ok":
            cells += [_cell(row["status"])] + [""] * (3 * len(TIMES) + 1)
            lines.append(f"| {' | '.join(cells)} |")
            continue
        both = [dict(row[library]) for library in LIBRARIES]
        for one in both:
            one["first, s"] = one["init, s"] + one["first step, s"]
        for _, unit, name in TIMES:
            ours, theirs = (one[name] for one in both)
            cells += [f"{ours * unit:.4g}", f"{theirs * unit:.4g}"]
            cells.append(f"**{ours / theirs:.2f}**")
        cells += [f"{one['step, s'] / one['gradient, s']:.2f}" for one in both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def energies_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| batch | period | first energy | last, here | last, published "
        "| largest relative difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["batch"]), str(row["period"])]
        if row["status"] == "ok":
            here, there = row["here"], row["published"]
            cells += [f"{x:.6f}" for x in (here[0], here[-1], there[-1])]
            cells.append(f"{row['largest relative difference']:.1e}")
        else:
            cells += [_cell(row["status"]), "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ------------------------------------------------------------------- the command line


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test")
    add("--batches", nargs="+", type=int, metavar="WALKERS")
    add("--periods", nargs="+", type=int, metavar="STEPS", help="between inverses")
    add("--seconds", type=float, default=SECONDS, help="of taking turns, for each case")
    add("--energies", type=int, metavar="N", help="compare N energies, time nothing")
    add("--atom", choices=("Li", "Be"), default="Li")
    add("--full", action="store_true", help="determinants of all electrons")
    add("--attention", action="store_true", help="like Psiformer")
    add("--no-jastrow", action="store_true", help="no parameters outside of layers")
    add("--float64", action="store_true")
    add("--output", type=Path, default=HERE / "results", metavar="DIR")
    # what this program starts its children with: batch, period
    add("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    cases = (BATCHES[:1], PERIODS[-1:]) if found.quick else (BATCHES, PERIODS)
    found.batches = found.batches or cases[0]
    found.periods = found.periods or cases[1]
    return found


def cases(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Batches and periods, in the order in which they are measured."""
    for batch in arguments.batches:
        for period in arguments.periods:
            yield batch, period


def main() -> None:
    """Measures, and writes after each case what there is."""
    arguments = parse()
    if arguments.child:
        return child(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    measure, table = times, times_table
    if arguments.energies:
        measure, table = energies, energies_table
    machine = [sys.executable, str(HERE / "machine.py")]
    _, described = pairs.output_of(machine, LIMIT, os.environ)
    results: dict[str, Any] = {
        "machine": json.loads(described),
        "model": {name: getattr(arguments, name) for name in ("atom", *FLAGS)},
        "rows": [],
    }
    for batch, period in cases(arguments):
        results["rows"].append(compare(arguments, batch, period, measure))
        text = table(results["rows"])
        print(text.splitlines()[-1], flush=True)
        (arguments.output / "walkers.md").write_text(text + "\n", "utf-8")
        numbers = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        (arguments.output / "walkers.json").write_text(numbers, "utf-8")
    print(f"\n{text}\n\nWritten to {arguments.output}")


if __name__ == "__main__":
    main()
