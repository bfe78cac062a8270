"""Two thousand steps: what they leave in memory, what they compile, which bits."""

import functools
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax
import jax.monitoring
import numpy as np
import pytest

from tests.reliability import fault_problem
from tests.reliability.long_run import Run

STEPS = 2000
LIMIT = 0.01
"""How much of the memory may be new after the second half of the steps."""

COMPILED = "/jax/core/compile/backend_compile_duration"
NAMES = (
    "defaults",
    "adaptive",
    "separate damping",
    "eigen",
    "eigen, warm",
    "tridiagonal",
    "staggered",
    "stale",
    "fraction",
    "scale_by_kfac",
)

ADAPTIVE = ("adaptive", "separate damping", "tridiagonal")

SHORT = ("defaults", "adaptive")

pytestmark = pytest.mark.slow

each = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SHORT else [pytest.mark.full])
        for name in NAMES
    ],
)


def resident_bytes():
    """What this process has in memory now."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


class Compilations:
    """Counts what the backend compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.count += event == COMPILED


@functools.cache
def compilations():
    """One listener: they cannot be taken away again."""
    return Compilations()


@each
def test_two_thousand_steps_take_no_memory_and_compile_nothing(name):
    run = Run(name)
    run.go(STEPS // 2)
    jax.block_until_ready(run.state)
    compiled = compilations().count
    live, resident = live_bytes(), resident_bytes()
    run.go(STEPS // 2)
    jax.block_until_ready(run.state)
    grown, new = live_bytes() - live, resident_bytes() - resident
    print(f"{name}: live {live} + {grown}, resident {resident} + {new}, {run.loss:.4f}")
    assert grown == 0
    assert new <= LIMIT * resident
    assert compilations().count == compiled
    assert run.step._cache_size() == 1
    state = fault_problem.kfac_state(run.state)
    assert int(state.step) == STEPS
    assert int(state.batches) == STEPS
    # λ of full batches falls by 5 % a step, in the end below what rounding needs: then
    # inverses fail, and the last good ones stay
    failures = int(state.info.inverse_refreshes) if name in ADAPTIVE else 0
    assert int(state.info.skipped_updates) <= failures
    assert np.isfinite(run.loss)
    assert state.damping > 0


@each
def test_no_tracer_is_leaked(name):
    with jax.checking_leaks():
        Run(name).go(2)


@each
def test_nothing_is_nan_on_the_way(name):
    """`jax_debug_nans` stops a program at the first NaN that anything computes."""
    with jax.debug_nans(True):
        run = Run(name)
        run.go(12)
    assert np.isfinite(run.loss)


@each
def test_steps_without_jit_are_the_same(name):
    expected, found = Run(name), Run(name)
    expected.go(2)
    with jax.disable_jit():
        found.go(2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    jax.tree.map(close, found.params, expected.params)


@each
def test_types_are_promoted_by_no_rule(name):
    """Strictly, as in all tests, and as JAX does by default: the same bits."""
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    strict = Run(name)
    strict.go(5)
    with jax.numpy_dtype_promotion("standard"):
        standard = Run(name)
        standard.go(5)
    assert standard.digest() == strict.digest()


PROGRAM = [sys.executable, "-W", "error", "-m", "tests.reliability.long_run"]


def in_a_process(name, steps, wide):
    root = pathlib.Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*PROGRAM, name, str(steps)],
        env=os.environ | {"PYTHONPATH": path, "JAX_ENABLE_X64": str(int(wide))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "name",
    [
        "adaptive",
        pytest.param("eigen", marks=pytest.mark.full),
        pytest.param("tridiagonal", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_runs_and_processes_agree_bit_by_bit(name, wide):
    """And in single precision a run ends about where it does in double."""
    steps = 500
    found = [in_a_process(name, steps, wide) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["x64"] is wide
    here, again = Run(name), Run(name)
    here.go(steps)
    again.go(steps)
    assert here.digest() == again.digest()
    assert found[0]["loss"] == pytest.approx(float(here.loss), rel=0.03)
    if wide:
        assert here.digest() == found[0]["digest"]
