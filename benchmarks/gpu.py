"""What steps cost on a GPU, in gradients, and what their parts cost by themselves.

    python benchmarks/gpu.py --seconds 440    measures, and renews benchmarks/gpu.json
    python benchmarks/gpu.py --table          that record as Markdown
    python benchmarks/gpu.py --tiny           tries everything at tiny sizes, on a CPU

Programs of several models are compiled at the same time, in threads; nothing is
compiled while steps are timed. Those of one model then take turns, one step each. The
record is written after each row, the most important rows are first, and a row for which
there is too little time left is skipped. A row that fails is recorded with its error,
the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Before JAX, which else takes three quarters of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.88")

import gpu_parts
import jax
import machine
from gpu_models import MODELS, TINY, Model
from gpu_programs import Compiled, Runner, Traced, build, peak_bytes, programs, trace
from gpu_report import derived, markdown

RECORD = Path(__file__).with_name("gpu.json")
PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "precision": gpu_parts.precision,
    "inverses": gpu_parts.inverses,
}
GROUPS = (
    ("GPT-2 124M", "ResNet-50"),
    ("inverses", "precision"),
    ("autoencoder", "ViT-B/16", "PINN", "wavefunction"),
)
"""What is compiled together, and then measured; the most important first."""

NAMES = tuple(name for group in GROUPS for name in group)
SHARE = 0.5  # of the time left, the longest to wait until a group is compiled
SECONDS, LEAST = 1.2, 5  # of a kind of steps, and how many of it at least
WARM_UP = 2
NEEDED = {"model": 15.0, "part": 3.0}  # seconds left, or a row is skipped

Row = dict[str, Any]


class Traces(NamedTuple):
    """The programs of a model before they are compiled, by name, or errors."""

    programs: dict[str, Traced | str]
    data: Any  # makes parameters and a batch


class Building(NamedTuple):
    """The same while they are being compiled."""

    programs: dict[str, Future[Compiled] | str]
    data: Future[Any]


class Clock:
    """How much time is left."""

    def __init__(self, seconds: float) -> None:
        """Starts now."""
        self._start, self._seconds = time.perf_counter(), seconds

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self._seconds - self.gone


class Record:
    """The results so far, in a file that is rewritten after each row."""

    def __init__(self, path: Path, clock: Clock, tiny: bool) -> None:
        """Describes the machine."""
        self._path, self._clock = path, clock
        self.content: dict[str, Any] = {
            "machine": machine.describe(),
            "tiny": tiny,
            "rows": {},
        }
        say(json.dumps(self.content["machine"]))

    def add(self, name: str, row: Row) -> None:
        """Adds a row, or replaces it."""
        self.content["rows"][name] = row
        self.content["seconds"] = round(self._clock.gone, 1)
        text = json.dumps(self.content, indent=1, allow_nan=True)
        part = self._path.with_suffix(".part")
        part.write_text(text + "\n", "utf-8")
        part.replace(self._path)

    @property
    def failed(self) -> list[str]:
        """The rows with an error anywhere."""
        return [name for name, row in self.content["rows"].items() if _has_error(row)]


def _has_error(x: Any) -> bool:
    if isinstance(x, dict):
        own = isinstance(x.get("error"), str)
        return own or any(map(_has_error, x.values()))
    return isinstance(x, list) and any(map(_has_error, x))


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def told(error: BaseException) -> str:
    """An error in a few lines."""
    return f"{type(error).__name__}: {error}"[:2000]


def measure(names: Sequence[str], record: Record, clock: Clock, tiny: bool) -> bool:
    """All rows, as far as time goes.

    Args:
        names: of the rows.
        record: where results go.
        clock: how much time is left.
        tiny: whether models and matrices are tiny.

    Returns:
        Whether something is still being compiled, as it took too long.
    """
    groups = [[x for x in group if x in names] for group in GROUPS]
    models = [x for group in groups for x in group if x in MODELS]
    traced: dict[str, Traces] = {}
    building: dict[str, Building] = {}
    late: list[str] = []
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    for group in groups:
        new = [x for x in group if x in MODELS]
        for name in new:
            traces = traced.pop(name, None) or _traces(name, tiny, clock)
            building[name] = _start(pool, traces)
        if new:  # those of later groups are traced while others compile
            for name in models[models.index(new[-1]) + 1 :]:
                if name not in traced and _unfinished(building):
                    traced[name] = _traces(name, tiny, clock)
            wait(_unfinished(building), SHARE * clock.left)
        due, late = [*late, *group], []
        for name in due:
            kind = "model" if name in MODELS else "part"
            if kind == "model" and _unfinished({name: building[name]}):
                if group is not groups[-1]:
                    say(f"{name}: put off, as it is still being compiled")
                    late.append(name)
                    continue
            if clock.left < NEEDED[kind]:
                record.add(name, {"skipped": f"{clock.left:.0f} s were left"})
                say(f"{name}: skipped, as {clock.left:.0f} s are left")
            elif kind == "part":
                _part_row(name, record, clock, tiny)
            else:
                own = building.pop(name)
                beside = len(_unfinished(building))
                _model_row(name, own, record, clock, tiny, beside)
    pool.shutdown(wait=False, cancel_futures=True)
    return bool(_unfinished(building))


def _unfinished(building: dict[str, Building]) -> list[Future[Any]]:
    """What is still being compiled."""
    parts = [x for one in building.values() for x in (one.data, *one.programs.values())]
    return [x for x in parts if not isinstance(x, str) and not x.done()]


def _made(name: str, tiny: bool) -> Model:
    return (TINY if tiny else MODELS)[name]()


def _traces(name: str, tiny: bool, clock: Clock) -> Traces:
    """Traces all programs of a model; errors in place of those that fail."""
    start, model = clock.gone, _made(name, tiny)
    found: dict[str, Traced | str] = {}
    for program, make in programs(model).items():
        try:
            found[program] = trace(model, make)
        except Exception as error:  # it is reported, and fails the run
            found[program] = told(error)
    data = jax.jit(model.init).lower(jax.random.key(0))
    say(f"{name}: traced in {clock.gone - start:.1f} s")
    return Traces(found, data)


def _start(pool: ThreadPoolExecutor, traces: Traces) -> Building:
    data = pool.submit(traces.data.compile)  # before what needs it
    programs = {
        name: x if isinstance(x, str) else pool.submit(build, x)
        for name, x in traces.programs.items()
    }
    return Building(programs, data)


# ------------------------------------------------------------------------------- models


def _model_row(
    name: str,
    building: Building,
    record: Record,
    clock: Clock,
    tiny: bool,
    beside: int,
) -> None:
    say(f"{name}: compiled after {clock.gone:.0f} s")
    try:
        row = _steps(building, clock, 0.05 if tiny else SECONDS)
    except Exception as error:  # it is reported, and fails the run
        row = {"error": told(error)}
    row |= {"derived": derived(row), "compiled beside": beside}
    record.add(name, row)
    say(json.dumps({name: row}, indent=1))


def _steps(building: Building, clock: Clock, seconds: float) -> Row:
    """All programs of a model, taking turns."""
    row: Row = {"programs": {name: {} for name in building.programs}}
    if not building.data.done():
        raise TimeoutError("not compiled in time")
    params, args = jax.block_until_ready(building.data.result()(jax.random.key(0)))
    row["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    runners: dict[str, Runner] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        """What it returns; if it fails, the program takes no more turns."""
        try:
            return action()
        except Exception as error:  # it is reported, and fails the run
            row["programs"][name]["error"] = told(error)
            say(f"  {name}: {told(error)}")
            runners.pop(name, None)
        return None

    for name, future in building.programs.items():
        runner = attempt(
            name, partial(_runner, row, name, future, runners, params, args)
        )
        if runner is not None:
            runners[name] = runner
    turns = [(name, kind) for name, runner in runners.items() for kind in runner.kinds]
    taken: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    end, count = clock.gone + seconds * len(turns), -WARM_UP
    while count < LEAST or (clock.gone < end and clock.left > 5.0):
        for name, kind in turns:
            if name in runners and clock.left > 0:
                one = attempt(name, partial(runners[name], kind))
                if count >= 0 and one is not None:
                    taken[name, kind].append(one)
        count += 1
    for (name, kind), all_seconds in taken.items():
        if all_seconds:
            kinds = row["programs"][name].setdefault("kinds", {})
            kinds[kind] = {
                "seconds": median(all_seconds),
                "least": min(all_seconds),
                "count": len(all_seconds),
            }
    for name, runner in runners.items():
        row["programs"][name] |= runner.said
    return row


def _runner(
    row: Row,
    name: str,
    future: Future[Compiled] | str,
    runners: dict[str, Runner],
    params: Any,
    args: Any,
) -> Runner:
    """A program that has made its first step."""
    if isinstance(future, str):
        raise RuntimeError(f"not traced: {future}")
    if not future.done():
        raise TimeoutError("not compiled in time")
    compiled = future.result()
    own = row["programs"][name]
    own["trace seconds"] = round(compiled.traced.seconds, 3)
    own["compile seconds"] = round(compiled.seconds, 3)  # beside others
    own["peak bytes"] = peak_bytes(compiled.step)
    of = compiled.traced.program.of
    if of is not None and of not in runners:
        raise RuntimeError(f"{of}, whose state it reads, failed")
    runner = Runner(compiled, params, args, None if of is None else runners[of])
    own["first run seconds"] = round(runner.first_seconds, 3)
    return runner


# -------------------------------------------------------------------------------- parts


def _part_row(name: str, record: Record, clock: Clock, tiny: bool) -> None:
    cells: list[Row] = []
    row: Row = {"cells": cells}
    sizes = gpu_parts.TINY if tiny else gpu_parts.Sizes()
    try:
        rows = PARTS[name](sizes)
        while clock.left > NEEDED["part"]:
            cell = next(rows, None)
            if cell is None:
                break
            cells.append(cell)
            record.add(name, row)
            say(f"{name} {json.dumps(cell)}")
        else:
            row["skipped"] = "the rest, for want of time"
            say(f"{name}: the rest is skipped, for want of time")
    except Exception as error:  # it is reported, and fails the run
        row["error"] = told(error)
        say(f"{name}: {told(error)}")
    record.add(name, row)


def main(argv: Sequence[str] | None = None) -> tuple[int, bool]:
    """The command line.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code, and whether something is still being compiled.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=440.0, help="of everything")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--table", action="store_true", help="only print the record")
    arguments = parser.parse_args(argv)
    if arguments.table:
        say(markdown(json.loads(arguments.output.read_text("utf-8"))))
        return 0, False
    if arguments.tiny and arguments.output == RECORD:
        parser.error("--tiny must not renew the record: pass another --output")
    if arguments.tiny:  # compiling takes longer than anything else
        jax.config.update("jax_disable_most_optimizations", True)
    clock = Clock(arguments.seconds)
    record = Record(arguments.output, clock, arguments.tiny)
    goes_on = measure(arguments.rows, record, clock, arguments.tiny)
    say(markdown(record.content))
    failed = record.failed
    say(f"{clock.gone:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return int(bool(failed)), goes_on


if __name__ == "__main__":
    code, unfinished = main()
    if unfinished:
        os._exit(code)  # not waiting for threads that compile
    sys.exit(code)
