"""Describes this machine and the installed packages, for what is measured on it.

    python benchmarks/machine.py    one line of JSON

Run in a process of its own: JAX takes most of a GPU's memory as long as it runs.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, Any]:
    """Processor, memory, device, versions, commit and date."""
    device = jax.devices()[0]
    return {
        "cpu": _proc("cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _proc("meminfo", "MemTotal"),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        "OPENBLAS_NUM_THREADS": os.environ["OPENBLAS_NUM_THREADS"],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "commit": _git("rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": _git("status", "--porcelain", "--untracked-files=no")
        not in ("", None),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _proc(file: str, key: str) -> str | None:
    """A value that Linux tells of the machine; None elsewhere."""
    path = Path("/proc") / file
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    values = (line.split(":", 1)[1].strip() for line in lines if line.startswith(key))
    return next(values, None)


def _git(*arguments: str) -> str | None:
    """What git answers; None outside a checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe()) + "\n")
