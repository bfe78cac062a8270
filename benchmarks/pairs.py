"""Which optimizers `bench.py` measures on which models, and one such measurement.

Whatever happens to a pair is in its row: nothing is left out because it failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import environments

HERE = Path(__file__).resolve().parent

SMALL = "autoencoder, batch 512"
MODELS = (
    SMALL,
    "autoencoder, batch 4096",
    "convnet, batch 128",
    "ResNet-20, batch 64",
    "transformer, 8 x 128 tokens",
    "wavefunction, batch 1024",
    "PINN, batch 512",
)
STAGGERED = (SMALL, "convnet, batch 128", "transformer, 8 x 128 tokens")
ADAPTIVE = (SMALL, "autoencoder, batch 4096")
QUICK_MODELS = MODELS[-1:]
OURS = "this library"
ENVIRONMENTS = {
    "published": "published",
    "published-adaptive": "published",
    "front-published-jax": "published-jax",
    "shampoo": "shampoo",
    "psgd": "psgd",
}
"""Of those that are not of, or run beside, this library."""

# The most important first, should the time for all not suffice.
OPTIMIZERS = ("kfac", "kfac-1/8", "published", "gradient", "adamw", "sgd")
LATER = ("shampoo", "psgd")

SECONDS = 6.0  # of taking turns; slow models take longer for the least number of turns
FIRST_ORDER_SECONDS = 3.0
QUICK_SECONDS = 0.5
LIMIT = 120.0  # of a pair, with compilation
BUDGET = 19 * 60.0  # of all pairs
QUICK_BUDGET = 2.5 * 60

Row = dict[str, Any]
"""`model`, `optimizer`, `status` ("ok" or why not) and, if ok, what was measured."""


class Pair(NamedTuple):
    """An optimizer on a model, and for how long to take turns."""

    model: str
    optimizer: str
    seconds: float
    limit: float = LIMIT

    def same(self, row: Row) -> bool:
        """Whether a row is of this pair."""
        return (row["model"], row["optimizer"]) == (self.model, self.optimizer)

    def row(self, status: str, **measured: Any) -> Row:
        """Its row of the results."""
        about = {"model": self.model, "optimizer": self.optimizer, "status": status}
        return about | measured


def all_pairs(quick: bool) -> Iterator[Pair]:
    """In the order in which they are measured."""
    models = QUICK_MODELS if quick else MODELS
    special = ["front", "front-adaptive", "published-adaptive"]
    for optimizer in OPTIMIZERS:
        long = FIRST_ORDER_SECONDS if optimizer in ("adamw", "sgd") else SECONDS
        for model in models:
            yield Pair(model, optimizer, QUICK_SECONDS if quick else long)
    for optimizer in () if quick else special:
        yield Pair(SMALL, optimizer, SECONDS)
    for model in () if quick else ADAPTIVE:
        yield Pair(model, "kfac-adaptive", SECONDS)
    for model in () if quick else STAGGERED:
        yield Pair(model, "kfac-staggered", SECONDS)
    for optimizer in LATER:
        for model in models if quick else STAGGERED:
            yield Pair(model, optimizer, QUICK_SECONDS if quick else SECONDS)


def python_of(optimizer: str) -> str:
    """The interpreter of an optimizer's environment."""
    if optimizer not in ENVIRONMENTS:
        return sys.executable
    return str(environments.folder(ENVIRONMENTS[optimizer]) / "bin" / "python")


def measure(pair: Pair, platform: str) -> Row:
    """One pair in a process of its own.

    Args:
        pair: what to measure.
        platform: of the devices that all are to run on.

    Returns:
        Its row; `wall, s` is how long the process ran.
    """
    if pair.optimizer in ENVIRONMENTS:
        reason = environments.failure(ENVIRONMENTS[pair.optimizer])
        if reason is not None:
            return pair.row(f"skipped: {reason}")
    command = [python_of(pair.optimizer), str(HERE / "cost.py")]
    command += ["--model", pair.model, "--optimizer", pair.optimizer]
    command += ["--seconds", str(pair.seconds)]
    start = time.perf_counter()
    row = _run(pair, command)
    if row["status"] == "ok" and row["platform"] != platform:
        row = pair.row(f"failed: ran on {row['platform']} instead of {platform}")
    return row | {"wall, s": time.perf_counter() - start}


def _run(pair: Pair, command: list[str]) -> Row:
    variables = environment(pair.optimizer, os.environ)
    status, printed = output_of(command, pair.limit, variables)
    if status != "ok":
        return pair.row(status)
    return pair.row("ok", **json.loads(printed.splitlines()[-1]))


def output_of(
    command: Sequence[str], limit: float, environment: Mapping[str, str]
) -> tuple[str, str]:
    """Runs a program.

    Args:
        command: the program and its arguments.
        limit: seconds until it is given up.
        environment: its environment's variables.

    Returns:
        "ok" or "failed: why", and what it printed.
    """
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"failed: more than {limit:g} s", ""
    except OSError as error:
        return f"failed: {error}", ""
    if done.returncode:
        return f"failed: {reason_of(done.stderr, done.returncode)}", done.stdout
    return "ok", done.stdout


def environment(optimizer: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Without PYTHONPATH where the published release must be the one that is found."""
    kept = dict(environ, OPENBLAS_NUM_THREADS="1")
    if ENVIRONMENTS.get(optimizer) == "published":
        kept.pop("PYTHONPATH", None)
    return kept


def reason_of(stderr: str, status: int) -> str:
    """The line that says why a process failed.

    Args:
        stderr: what it wrote.
        status: what it returned; below zero the signal that ended it.

    Returns:
        The exception's line, which JAX does not have last, or else the last line.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", x)]
    if status < 0:
        return f"ended by signal {-status}"
    return (errors or lines or [f"status {status}"])[-1]
