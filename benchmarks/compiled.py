"""What steps compile to: arithmetic, memory traffic, temporary memory, compilations.

    python benchmarks/compiled.py                 the table, some minutes
    python benchmarks/compiled.py --record        writes compiled.json beside this file
    python benchmarks/compiled.py --check         compares with it; fails if one grew

Numbers are multiples of those of `jax.value_and_grad` of the same loss, from XLA's cost
and memory analysis, so that they do not depend on the machine; no times are taken.
Other releases of JAX may compile differently: only with the recorded one are numbers
compared. A step compiles once; it is run three times to see that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import optax
from models import MODELS, Model, plan
from tqdm import tqdm

import kfac_jax

RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 1.02
STEPS = 3
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"

Row = dict[str, float]


def gradient(model: Model) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Loss and gradient: the unit."""
    return jax.value_and_grad(model.loss_fn), (model.params, *model.args)


def kfac_step(
    model: Model, gathers: bool, **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step with fixed rates."""
    curvature = plan(model, **options)
    tx = kfac_jax.kfac(curvature, learning_rate=1e-3, momentum=0.9, damping=1.0)

    def step(params: Any, state: Any, key: jax.Array, *args: Any) -> Any:
        if gathers:
            _, grads, statistics = curvature.value_grad_and_statistics(
                params, *args, rng=key
            )
        else:
            _, grads = curvature.value_and_grad(params, *args)
            statistics = curvature.zero_statistics(params)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    start = model.params, tx.init(model.params), jax.random.key(0), *model.args
    return step, start


PROGRAMS: dict[str, Callable[[Model], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "gradient": gradient,
    "without statistics": lambda model: kfac_step(model, False),
    "full statistics": lambda model: kfac_step(model, True),
    "statistics of 1/8": lambda model: kfac_step(
        model, True, statistics_fraction=1 / 8
    ),
}


def measure(model: Model, program: str) -> Row:
    """The compiled program's costs, and how often it is compiled."""
    function, args = PROGRAMS[program](model)
    jitted = jax.jit(function)
    compiled = jitted.lower(*args).compile()
    cost: Any = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    row = {
        "flops": float(cost["flops"]),
        "bytes": float(cost["bytes accessed"]),
        "temporaries": float(memory.temp_size_in_bytes),
    }
    if program == "gradient":
        return row
    events: list[str] = []
    listen = lambda event, *_, **__: events.append(event)  # noqa: E731
    params, state, *rest = args
    params, state = jax.block_until_ready(jitted(params, state, *rest))
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(STEPS - 1):
        params, state = jax.block_until_ready(jitted(params, state, *rest))
    return row | {"recompilations": float(events.count(COMPILATION_EVENT))}


def table(names: list[str]) -> dict[str, dict[str, Row]]:
    """Ratios to the gradient, by model and program."""
    result: dict[str, dict[str, Row]] = {}
    for name in tqdm(names, disable=None):
        model = MODELS[name]()
        unit = measure(model, "gradient")
        result[name] = {
            program: {
                key: round(value / unit[key], 4) if key in unit else value
                for key, value in measure(model, program).items()
            }
            for program in PROGRAMS
            if program != "gradient"
        }
    return result


def show(found: dict[str, dict[str, Row]]) -> None:
    """Prints the table."""
    columns = ("flops", "bytes", "temporaries", "recompilations")
    print(f"{'multiples of the gradient':<52}" + "".join(f"{c:>16}" for c in columns))
    for name, programs in found.items():
        for program, row in programs.items():
            cells = "".join(f"{row[column]:>16.3g}" for column in columns)
            print(f"{name + ': ' + program:<52}{cells}")


def grown(found: dict[str, dict[str, Row]], recorded: Any) -> list[str]:
    """What is larger than recorded."""
    return [
        f"{name}, {program}: {key} {recorded[name][program][key]} -> {value}"
        for name, programs in found.items()
        for program, row in programs.items()
        for key, value in row.items()
        if value > TOLERANCE * recorded[name][program][key]
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the record")
    parser.add_argument("--check", action="store_true", help="compare with the record")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if arguments.check else {}
    if arguments.check and record["jax"] != jax.__version__:
        print(f"Recorded with JAX {record['jax']}, this is {jax.__version__}: skipped.")
        return
    found = table(arguments.model or list(MODELS))
    show(found)
    if arguments.record:
        text = json.dumps({"jax": jax.__version__, "models": found}, indent=1)
        RECORD.write_text(text + "\n")
    if arguments.check:
        worse = grown(found, record["models"])
        print(
            "\n".join(["Grown beyond the record:", *worse]) if worse else "As recorded."
        )
        sys.exit(bool(worse))


if __name__ == "__main__":
    main()
