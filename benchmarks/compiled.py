"""What steps compile to, beside a record: a change that makes them dearer fails.

    python benchmarks/compiled.py                 the table, some minutes
    python benchmarks/compiled.py --record        writes compiled.json beside this file
    python benchmarks/compiled.py --check         compares with it; fails if one grew

Each takes `--model NAME` (several times) for some models only; a record then keeps the
others. No times are taken.

FLOPs, bytes, temporaries and instructions are multiples of those of
`jax.value_and_grad` of the same loss. The first three are XLA's, with LAPACK's FLOPs,
which XLA does not see; instructions are those of the compiled program, to which the
time of compilation is about proportional. Counted as they are: calls of LAPACK, and how
many of them no conditional guards; the share of the donated parameters and state that
is copied all the same; steps that refresh inverses, of the 3 (small net: 25) that are
run; and what is compiled after the first step.

Numbers are compared closely with the recorded releases of JAX and jaxlib alone, and on
the recorded kind of CPU, by whose vector units XLA chooses what to fuse. With others
only refreshes and compilations are held to the record, and the rest to a coarse limit,
which is said. What became cheaper by more than its limit is told, to be recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Before JAX starts: the record is of CPUs, however many there are.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "2")

import compiled_programs
import jax
import jaxlib
from compiled_check import Row, Table, Verdict, compare, merged
from compiled_programs import NAMES, PARTS
from tqdm import tqdm

VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
RECORD = Path(__file__).with_suffix(".json")


def environment() -> dict[str, str]:
    """What numbers depend on."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.platform,
        "device_kind": _cpu() if device.platform == "cpu" else device.device_kind,
    }


def _cpu() -> str:
    """The CPU's name and vector units where Linux tells them; to JAX all are "cpu"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    about = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
    units = [x for x in about.get("flags", "").split() if x in VECTOR_UNITS]
    return ", ".join([about.get("model name", "cpu"), *sorted(units)])


def table(names: list[str]) -> Table:
    """Measures and prints the costs, by model and program."""
    found: Table = {}
    for name in tqdm(names, disable=None):
        found[name] = compiled_programs.measure(name)
        tqdm.write(f"\n{name}")
        for program, row in found[name].items():
            tqdm.write(f"  {program}\n    {_cells(row)}")
    return found


def _cells(row: Row) -> str:
    times = [f"{key} x {row[key]:.3g}" for key in PARTS if key in row]
    counts = [f"{key} {value:g}" for key, value in row.items() if key not in PARTS]
    return ", ".join(times + counts)


def report(verdict: Verdict) -> None:
    """Prints what a comparison found."""
    better = "Better than recorded, please --record:"
    for title, lines in (
        ("Note:", verdict.notes),
        (better, verdict.improvements),
        ("FAILED, beside the record:", verdict.failures),
    ):
        if lines:
            print("\n".join(["", title, *(f"  {line}" for line in lines)]))
    if not verdict.failures:
        print("\nNothing grew.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--record", action="store_true", help="write the record")
    action.add_argument("--check", action="store_true", help="compare with the record")
    parser.add_argument("--model", choices=NAMES, action="append", help="only this")
    arguments = parser.parse_args()
    partial = arguments.model is not None
    here = environment()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else None
    if arguments.check and record is None:
        parser.error(f"There is no {RECORD}: make it by --record.")
    # before minutes of work: these refuse a record that they cannot use
    if arguments.check:
        compare({}, record, here, partial=True)
    if arguments.record:
        merged({}, record, here, partial)
    found = table(arguments.model or list(NAMES))
    if arguments.record:
        new = merged(found, record, here, partial)
        RECORD.write_text(json.dumps(new, indent=1) + "\n")
    if arguments.check:
        verdict = compare(found, record, here, partial)
        report(verdict)
        sys.exit(bool(verdict.failures))


if __name__ == "__main__":
    main()
