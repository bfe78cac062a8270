"""Training by several real processes, against training by one."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("multi_process.py")
LIMIT = 120  # seconds


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@functools.cache
def trained_by(count, kind):
    """The parameters that each of the processes ends with."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(count), str(port), kind],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (2, "whole"),
        pytest.param(4, "whole", marks=pytest.mark.slow),
        pytest.param(2, "parts", marks=pytest.mark.slow),
        pytest.param(2, "rows", marks=pytest.mark.slow),
        pytest.param(4, "rows", marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_one_does(count, kind):
    rows = kind == "rows"
    (alone,) = trained_by(1, "rows" if rows else "whole")
    for params in trained_by(count, kind):
        for name, expected in alone.items():
            atol = (1e-9 if rows else 1e-6) * np.abs(expected).max()
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=atol)
