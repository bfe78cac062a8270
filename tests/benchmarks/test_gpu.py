"""The benchmark of a GPU at tiny sizes: all rows run, and make a record and tables."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return importlib.import_module("gpu_report")


def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as it changes JAX's settings."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--output", str(path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment
    )


def check(done: subprocess.CompletedProcess[str], path: Path) -> Any:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed: nothing" in done.stdout and "Not measured" not in done.stdout
    return json.loads(path.read_text("utf-8"))["rows"]


def check_model(row: Any) -> None:
    for name, one in row["programs"].items():
        assert one["peak bytes"] > 0 and one["kinds"], name
        assert all(x["count"] >= 5 for x in one["kinds"].values())
        assert one.get("skipped_updates", 0) == 0
    steps = [x for name, x in row["programs"].items() if name.startswith("K-FAC")]
    assert len(steps) == 4
    for one in steps:
        rounds = one["kinds"]["refreshing"]["count"] + 2  # of warming up
        # the first step is one of the first three, which refresh
        assert one["inverse_refreshes"] == 1 + rounds


@pytest.mark.slow
def test_a_model_and_both_tables_of_parts(tmp_path):
    path = tmp_path / "gpu.json"
    names = ["autoencoder", "precision", "inverses"]
    rows = check(run(path, "--tiny", "--seconds", "300", "--rows", *names), path)
    assert set(rows) == set(names)
    check_model(rows["autoencoder"])
    assert len(rows["precision"]["cells"]) == 10
    assert len(rows["inverses"]["cells"]) == 7
    for cell in rows["inverses"]["cells"]:
        assert cell["conditions"]["1e+02"]["residual"] < 1e-4
    table = run(path, "--table")
    assert table.returncode == 0
    assert "### Precision of products" in table.stdout


@pytest.mark.slow
@pytest.mark.full
def test_all_rows(tmp_path):
    path = tmp_path / "gpu.json"
    rows = check(run(path, "--tiny", "--seconds", "1500"), path)
    models = [row for row in rows.values() if "programs" in row]
    assert len(models) == 6 and len(rows) == 8
    for row in models:
        check_model(row)


def test_a_row_for_which_no_time_is_left_is_skipped(tmp_path):
    path = tmp_path / "gpu.json"
    done = run(path, "--tiny", "--seconds", "0", "--rows", "precision")
    assert done.returncode == 0
    assert "skipped" in json.loads(path.read_text("utf-8"))["rows"]["precision"]
    assert "### Not measured" in done.stdout


def test_the_record_is_not_renewed_by_tiny_models():
    done = run(BENCHMARKS / "gpu.json", "--tiny")
    assert done.returncode == 2 and "another --output" in done.stderr


def times(**kinds: float) -> dict[str, Any]:
    return {"kinds": {kind: {"seconds": x, "count": 5} for kind, x in kinds.items()}}


def test_a_period_has_its_refresh_and_its_measurements(report):
    programs = {
        "gradient": times(ordinary=2.0),
        "K-FAC, fixed rates": times(ordinary=4.0, refreshing=8.0),
        "K-FAC": times(ordinary=6.0, measuring=8.0, refreshing=12.0),
        "solve": times(ordinary=0.5),
    }
    found = report.derived({"programs": programs})
    fixed, rules = found["K-FAC, fixed rates"], found["K-FAC"]
    assert fixed["T3 = 20"] == pytest.approx((19 * 2 + 4) / 20)
    assert fixed["refresh"] == pytest.approx(2) and rules["refresh"] == pytest.approx(2)
    assert fixed["factors"] == pytest.approx(0.75)
    assert rules["T3 = 20"] == pytest.approx((16 * 3 + 3 * 4 + 6) / 20)


def test_errors_are_told(report):
    programs = {"gradient": {"error": "RuntimeError: out | of\nmemory"}}
    row = {"programs": programs, "derived": report.derived({"programs": programs})}
    about = dict.fromkeys(("date", "commit", "device", "jax", "python"), "?")
    text = report.markdown({"machine": about, "rows": {"GPT-2 124M": row}})
    assert "RuntimeError: out / of memory" in text and "not measured" in text
