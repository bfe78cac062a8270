"""The examples train, wherever they are copied to."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIMIT = 300  # seconds
BOUNDS = {"plain_jax": (0.02, 7.0), "flax_nnx": (0.04, 5.0)}
"""Of the last epoch's mean loss, and of the test error in per cent."""


def test_each_example_has_bounds():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(BOUNDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_an_example_trains_by_itself(name, tmp_path):
    pytest.importorskip("mlxtend")
    script = shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    answer = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert answer.returncode == 0, answer.stderr
    found = re.findall(r"^epoch \d+: loss (.+), test error (.+)%$", answer.stdout, re.M)
    losses, errors = zip(*(map(float, pair) for pair in found), strict=True)
    assert list(losses) == sorted(losses, reverse=True)
    loss, error = BOUNDS[name]
    assert losses[-1] < loss
    assert errors[-1] < error
