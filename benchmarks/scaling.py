"""How the cost of K-FAC grows with width, batch, depth and number of devices.

    python benchmarks/scaling.py            two or three minutes
    python benchmarks/scaling.py --quick    a smoke test
    python benchmarks/scaling.py --json scaling.json --png scaling.png

A step's parts are compiled apart: the gradient, the statistics beside it, the
preconditioning and one refresh of all inverses. Exponents are slopes of straight lines
through logarithms, beside those of the paper's section 8: `l d² m` for the gradient and
the statistics, `l d³` for the rest.

Seconds are medians of a few rounds in which parts and sizes take turns. FLOPs are XLA's
count for the compiled program, and what that leaves out: factorisations and triangular
solves of libraries. XLA counts the body of a loop once however often it runs, so that
there is no count for what is scanned. Devices are simulated: their arithmetic and
memory can be counted, but seconds would say nothing.

Deep transformers are planned and compiled besides, and compared with targets.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scaling_models import Problem, Transformer, dense_net, transformer
from scaling_report import PARTS, draw, exponents, table
from tqdm import tqdm

import kfac_jax
from kfac_jax.devices import ALONE
from kfac_jax.operator import by_rows
from kfac_jax.operator import inverses as inverses_lib

ROUNDS = 3, 9  # at least and at most
SECONDS = 10.0  # for the rounds of all sizes, once there are enough of them
PLANNED = 3  # times, for the median
DEVICES = 8

Results = dict[str, Any]
"""Names, numbers, lists and further such: what JSON can hold."""


# ------------------------------------------------------------------- one problem


class Plan:
    """A problem's plan, and its compiled programs by name."""

    def __init__(self, problem: Problem) -> None:
        """Makes the plan from shapes, and times that."""
        self.problem = problem
        shapes = jax.eval_shape(lambda *x: x, problem.params, *problem.args)
        times: list[float] = []
        for _ in range(PLANNED):
            start = time.perf_counter()
            self.curvature = kfac_jax.make_curvature(
                problem.loss_fn, *shapes, on_unmatched="error"
            )
            times.append(time.perf_counter() - start)
        self.seconds = float(np.median(times))
        self.compile_seconds: dict[str, float] = {}
        self.traced: dict[str, Any] = {}
        self.compiled: dict[str, Any] = {}
        self.args: dict[str, tuple[Any, ...]] = {}

    def add(self, name: str, function: Callable[..., Any], *args: Any) -> None:
        """Traces and compiles a program, and times that."""
        start = time.perf_counter()
        self.traced[name] = jax.jit(function).trace(*args)
        self.compiled[name] = self.traced[name].lower().compile()
        self.compile_seconds[name] = time.perf_counter() - start
        self.args[name] = args

    def add_gradients(self) -> None:
        """Adds the gradient, and the same with statistics."""
        batch = self.problem.params, *self.problem.args
        self.add("gradient", jax.value_and_grad(self.problem.loss_fn), *batch)
        function = functools.partial(_statistics, self.curvature)
        self.add("gradient and statistics", function, *batch)

    def add_rest(self) -> None:
        """Adds what follows: refresh and preconditioning, on this batch's factors."""
        curvature, groups = self.curvature, self.curvature.groups
        _, grads, statistics = self.call("gradient and statistics")
        zeros = curvature.init_factors(self.problem.params)
        factors = jax.jit(curvature.update_factors)(zeros, statistics, 1)
        inverses = jax.jit(lambda: inverses_lib.initial(groups))()
        self.add(
            "refresh", functools.partial(_refresh, groups, ALONE), factors, inverses
        )
        inverses = self.call("refresh")
        function = functools.partial(_precondition, groups, ALONE)
        self.add("preconditioning", function, factors, inverses, grads)

    def call(self, name: str) -> Any:
        """Runs a program to its end."""
        return jax.block_until_ready(self.compiled[name](*self.args[name]))

    def bytes(self, name: str) -> int:
        """What a program needs for temporaries and results."""
        memory = self.compiled[name].memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    def flops(self, name: str) -> float:
        """XLA's count, and what libraries do."""
        counted = self.compiled[name].cost_analysis()["flops"]
        return float(counted) + _library_flops(self.traced[name].jaxpr)

    def instructions(self, name: str) -> int:
        """How many the optimised program has, those in fusions too."""
        return sum(" = " in line for line in self.compiled[name].as_text().splitlines())


def _library_flops(jaxpr: Any) -> float:
    """`d³/3` of a factorisation and `d² n` of a triangular solve."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [x.aval.shape for x in equation.invars]
        if equation.primitive.name == "cholesky":
            total += math.prod(shapes[0]) * shapes[0][-1] / 3
        elif equation.primitive.name == "triangular_solve":
            total += math.prod(shapes[1]) * shapes[0][-1]
        parameters = jax.tree.leaves(list(equation.params.values()))
        total += sum(_library_flops(x) for x in parameters if hasattr(x, "eqns"))
    return total


def _statistics(curvature: kfac_jax.Curvature, params: Any, *args: Any) -> Any:
    key = jax.random.key(0)
    return curvature.value_grad_and_statistics(params, *args, rng=key)


def _refresh(groups: Any, over: Any, factors: Any, old: Any) -> Any:
    shapes = {n: part for x in groups for n, part in x.factor_shapes.items()}
    factors = by_rows.full(shapes, factors, over)
    return inverses_lib.refresh(groups, factors, old, jnp.float32(1.0), over)[0]


def _precondition(
    groups: Any, over: Any, factors: Any, inverses: Any, grads: Any
) -> Any:
    leaves = jax.tree.leaves(grads)
    return inverses_lib.precondition(groups, factors, inverses, leaves, {}, over)


# -------------------------------------------------------------------- one device


def _seconds(plans: Sequence[Plan]) -> list[dict[str, float]]:
    """Medians over rounds in which all programs of all sizes take turns.

    So a drifting machine hits all alike. Of the statistics it is what they add to the
    gradient.
    """
    rounds: list[list[dict[str, float]]] = []
    begun = time.perf_counter()
    # the first does not count
    while len(rounds) <= ROUNDS[0] or (
        len(rounds) <= ROUNDS[1] and time.perf_counter() - begun < SECONDS
    ):
        rounds.append([_with_statistics(_one_round(plan)) for plan in plans])
    return [
        {x: float(np.median([times[x] for times in each])) for x in PARTS}
        for each in zip(*rounds[1:], strict=True)
    ]


def _one_round(plan: Plan) -> dict[str, float]:
    times: dict[str, float] = {}
    for name in plan.compiled:
        start = time.perf_counter()
        plan.call(name)
        times[name] = time.perf_counter() - start
    return times


def _with_statistics(costs: dict[str, float]) -> dict[str, float]:
    both = costs["gradient and statistics"]
    return costs | {"statistics": both - costs["gradient"]}


def measure_sizes(problems: Sequence[Problem], scanned: bool) -> list[Results]:
    """What problems that differ in size cost.

    Args:
        problems: the problems.
        scanned: whether their layers are scanned, so that XLA miscounts the FLOPs of
            what goes through them.

    Returns:
        For each, seconds, FLOPs and counts by quantity.
    """
    plans = [Plan(problem) for problem in problems]
    for plan in plans:
        plan.add_gradients()
        plan.add_rest()
    looped = PARTS[:2] if scanned else ()
    points: list[Results] = []
    for plan, seconds in zip(plans, _seconds(plans), strict=True):
        flops = _with_statistics({name: plan.flops(name) for name in plan.compiled})
        point: Results = {
            x: {"seconds": seconds[x]} | ({} if x in looped else {"flops": flops[x]})
            for x in PARTS
        }
        point["planning"] = {"seconds": plan.seconds}
        point["compilation"] = {
            "seconds": sum(plan.compile_seconds.values()),
            "instructions": sum(map(plan.instructions, plan.compiled)),
        }
        points.append(point)
    return points


# ------------------------------------------------------------------ several devices


def measure_devices(quick: bool) -> Results:
    """Per device, from programs that are compiled and never run.

    Raises:
        RuntimeError: unless this process has the devices.
    """
    if len(jax.devices()) < DEVICES:
        raise RuntimeError(
            f"Expected {DEVICES} devices, got {len(jax.devices())}; set XLA_FLAGS="
            f"--xla_force_host_platform_device_count={DEVICES} before JAX starts."
        )
    width, batch = (32, 64) if quick else (512, 1024)
    # from 1024 on all devices invert one matrix together
    many, large = dense_net(width, 16, batch), dense_net(4 * width, 1, batch)
    sizes = [1, DEVICES] if quick else [1, 2, 4, DEVICES]
    points = []
    for count in tqdm(sizes, desc="devices", disable=None):
        found, alone = _on_devices(many, count), _on_devices(large, count, "refresh")
        found["refresh of 32 factors"] = found.pop("refresh")
        found["refresh of 2 factors"] = alone["refresh"]
        points.append(found)
    fixed = f"16 layers of width {width}, or 1 of {4 * width}, batch {batch}"
    return _sweep("devices", fixed, sizes, points)


def _on_devices(problem: Problem, count: int, only: str = "") -> Results:
    """A device's part of a step that keeps the state in rows, or one part of that."""
    mesh = jax.make_mesh(
        (count,), ("data",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,)
    )
    over = kfac_jax.OverMesh(mesh, state_axes="data")
    shapes = jax.eval_shape(lambda *x: x, problem.params, *problem.args)
    plan = Plan(problem)
    groups = plan.curvature.groups

    def lay(tree: Any, *spec: str) -> Any:
        place = NamedSharding(mesh, P(*spec))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
        )

    state = jax.eval_shape(lambda: over.tree_rows(inverses_lib.initial(groups)))
    rows, params, batch = lay(state, "data"), lay(shapes[0]), lay(shapes[1:], "data")
    programs: list[tuple[str, Callable[..., Any], Any]] = [
        (
            "gradient and statistics",
            functools.partial(_statistics, plan.curvature),
            (params, *batch),
        ),
        ("refresh", functools.partial(_refresh, groups, over), (rows, rows)),
        (
            "preconditioning",
            functools.partial(_precondition, groups, over),
            (rows, rows, params),
        ),
    ]
    # CPUs invert a device's matrices in a loop, accelerators as one batch: the same
    # arithmetic, which XLA can count of the batch only
    with mock.patch.object(jax.lax, "platform_dependent", _default):
        for name, function, args in programs:
            if only in ("", name):
                plan.add(name, function, *args)
    result: Results = {name: {"flops": plan.flops(name)} for name in plan.compiled}
    kept = plan.compiled["refresh"].memory_analysis().output_size_in_bytes
    return result | {"inverses kept": {"bytes": kept}}


def _default(*args: Any, default: Callable[..., Any], **_: Any) -> Any:
    return default(*args)


def _devices_in_new_process(quick: bool) -> Results:
    """`measure_devices` where there are as many."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, __file__, "--devices", *["--quick"] * quick]
    answer = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    return json.loads(answer.stdout.splitlines()[-1])


# ----------------------------------------------------------------------- all of it


def _sweep(name: str, fixed: str, sizes: list[int], points: list[Results]) -> Results:
    return {"name": name, "fixed": fixed, "sizes": sizes, "points": points}


def _cases(quick: bool) -> Iterator[tuple[str, str, dict[int, Problem]]]:
    """What grows, what does not, and the problems by size."""
    width, batch, depth = (64, 64, 2) if quick else (512, 512, 4)
    sizes = [32, 128] if quick else [128, 256, 512, 1024, 2048]
    nets = {d: dense_net(d, depth, batch) for d in sizes}
    yield "width", f"{depth} layers, batch {batch}", nets
    sizes = [64, 256] if quick else [256, 512, 1024, 2048, 4096]
    nets = {m: dense_net(width, depth, m) for m in sizes}
    yield "batch", f"{depth} layers of width {width}", nets
    width = width // 2
    sizes = [2, 4] if quick else [4, 8, 16, 32, 64]
    for name, scanned in (("depth, written out", False), ("depth, scanned", True)):
        nets = {n: dense_net(width, n, batch, scanned) for n in sizes}
        yield name, f"width {width}, batch {batch}", nets


def measure(quick: bool) -> Results:
    """Runs all of it; several processes at a time would disturb each other.

    Args:
        quick: whether to run a smoke test, whose exponents mean nothing.

    Returns:
        The sweeps, each with its sizes and a point for each; the exponents; the targets
        and what was found.

    Raises:
        RuntimeError: if this process has several CPU devices.
    """
    devices = len(jax.local_devices(backend="cpu"))
    if devices > 1:
        raise RuntimeError(
            f"Expected one CPU device, got {devices}, among which inversions go in "
            "loops that XLA miscounts; leave them out of XLA_FLAGS."
        )
    jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
    measure_sizes([dense_net(8, 2, 4, True)], True)  # first-use caches
    sweeps: list[Results] = []
    for name, fixed, problems in tqdm(_cases(quick), disable=None):
        points = measure_sizes([*problems.values()], name == "depth, scanned")
        sweeps.append(_sweep(name, fixed, list(problems), points))
    targets = _targets(quick)
    sweeps.append(_devices_in_new_process(quick))
    return {
        "quick": quick,
        "jax": jax.__version__,
        "cpus": os.cpu_count(),
        "sweeps": sweeps,
        "exponents": exponents(sweeps),
        "targets": targets,
    }


def _targets(quick: bool) -> list[Results]:
    """What a deep transformer is to keep to; a dense net in a smoke test."""
    shallow, deep = (2, 4) if quick else (12, 48)

    def make(depth: int, scanned: bool) -> Problem:
        if quick:
            return dense_net(16, depth, 8, scanned)
        return transformer(Transformer(), depth, scanned)

    small, large = Plan(make(shallow, True)), Plan(make(deep, True))
    for plan in (small, large):
        plan.add_gradients()
    statistics = "gradient and statistics"
    allowed = large.bytes("gradient") + large.curvature.totals.factor_bytes
    ratio = large.compile_seconds[statistics] / small.compile_seconds[statistics]
    rows = (
        (f"planning {deep} layers written out, s", Plan(make(deep, False)).seconds, 2),
        (f"compilation, {deep} : {shallow} layers scanned", ratio, 1.5),
        (
            f"memory : the gradient's and the factors', {deep} layers scanned",
            large.bytes(statistics) / allowed,
            1.3,
        ),
    )
    return [{"name": n, "value": v, "limit": limit} for n, v, limit in rows]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--png", type=Path, help="where to draw them")
    parser.add_argument("--table", type=Path, help="where to write the table, too")
    parser.add_argument("--devices", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.devices:
        print(json.dumps(measure_devices(arguments.quick)))
        return
    results = measure(arguments.quick)
    print(table(results))
    if arguments.table:
        arguments.table.write_text(table(results) + "\n", "utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.png:
        draw(results, arguments.png)


if __name__ == "__main__":
    main()
