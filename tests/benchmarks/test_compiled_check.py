"""What the benchmark of compiled costs calls worse than its record."""

import copy
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HERE = {"jax": "0.10.2", "jaxlib": "0.10.2", "platform": "cpu", "device_kind": "A"}
FOUND = {
    "net": {
        "ordinary step": {
            "flops": 20.0,
            "bytes": 2.0,
            "temporaries": 1.5,
            "instructions": 9.0,
            "library calls": 0.0,
        },
        "whole step": {
            "instructions": 11.0,
            "library calls": 4.0,
            "calls in every step": 0.0,
            "copied": 0.0001,
            "refreshes": 4.0,
            "recompilations": 0.0,
        },
    },
    "other": {"refresh": {"flops": 0.5}},
}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return importlib.import_module("compiled_check")


def changed(program: str, key: str, value: float) -> Any:
    found = copy.deepcopy(FOUND)
    found["net"][program][key] = value
    return found


def test_what_was_recorded_passes(check: ModuleType) -> None:
    record = check.merged(FOUND, None, HERE)
    record = json.loads(json.dumps(record))
    assert check.compare(FOUND, record, HERE) == ([], [], [])


@pytest.mark.parametrize(
    ("program", "key", "value"),
    [
        ("ordinary step", "flops", 20.03),  # 0.15 %, but of 20 gradients
        ("ordinary step", "bytes", 2.1),
        ("ordinary step", "temporaries", 1.6),
        ("ordinary step", "instructions", 9.5),
        ("ordinary step", "library calls", 1.0),
        ("whole step", "library calls", 8.0),
        ("whole step", "calls in every step", 4.0),
        ("whole step", "copied", 0.1),
        ("whole step", "refreshes", 25.0),
        ("whole step", "recompilations", 1.0),
        ("ordinary step", "flops", math.nan),
        ("ordinary step", "flops", math.inf),
        ("whole step", "recompilations", math.nan),
    ],
)
def test_growth_fails(check: ModuleType, program: str, key: str, value: float) -> None:
    record = check.merged(FOUND, None, HERE)
    failures, improvements, _ = check.compare(
        changed(program, key, value), record, HERE
    )
    assert len(failures) == 1 and not improvements
    assert failures[0].startswith(f"net, {program}: {key} ")


@pytest.mark.parametrize(
    ("program", "key", "value"),
    [
        ("ordinary step", "flops", 20.01),
        ("ordinary step", "bytes", 2.05),
        ("whole step", "instructions", 11.4),
        ("whole step", "copied", 0.001),
    ],
)
def test_what_another_cpu_may_change_passes(
    check: ModuleType, program: str, key: str, value: float
) -> None:
    record = check.merged(FOUND, None, HERE)
    found = changed(program, key, value)
    verdict = check.compare(found, record, HERE | {"device_kind": "B"})
    assert not verdict.failures and not verdict.improvements
    assert "device_kind A, this is" in verdict.notes[0]
    assert "device_kind B" in verdict.notes[0]


def test_every_recorded_quantity_has_a_limit(check: ModuleType) -> None:
    record = json.loads((BENCHMARKS / "compiled.json").read_text())
    rows = [row for model in record["models"].values() for row in model.values()]
    assert {key for row in rows for key in row} == set(check.ALLOWED)


def test_a_record_that_is_not_a_number_fails(check: ModuleType) -> None:
    record = check.merged(changed("ordinary step", "bytes", math.nan), None, HERE)
    failures = check.compare(FOUND, json.loads(json.dumps(record)), HERE).failures
    assert len(failures) == 1 and "not a number" in failures[0]


def test_an_improvement_is_told_and_passes(check: ModuleType) -> None:
    record = check.merged(FOUND, None, HERE)
    found = changed("whole step", "library calls", 2.0)
    failures, improvements, _ = check.compare(found, record, HERE)
    assert not failures
    assert improvements == ["net, whole step: library calls 4 -> 2"]


@pytest.mark.parametrize("path", [("net",), ("net", "whole step")])
def test_what_is_on_one_side_only_fails(
    check: ModuleType, path: tuple[str, ...]
) -> None:
    less: Any = copy.deepcopy(FOUND)
    inner = less
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    for found, recorded, message in (
        (less, FOUND, "recorded but not measured any more; run --record"),
        (FOUND, less, "not in the record; run --record"),
    ):
        record = check.merged(recorded, None, HERE)
        failures = check.compare(found, record, HERE).failures
        assert failures == [f"{', '.join(path)}: {message}"]


def test_a_quantity_on_one_side_only_fails(check: ModuleType) -> None:
    less = copy.deepcopy(FOUND)
    del less["net"]["whole step"]["refreshes"]
    for found, recorded in ((less, FOUND), (FOUND, less)):
        record = check.merged(recorded, None, HERE)
        (failure,) = check.compare(found, record, HERE).failures
        assert failure.startswith("net, whole step, refreshes: ")


def test_models_that_are_left_out_on_purpose_pass(check: ModuleType) -> None:
    record = check.merged(FOUND, None, HERE)
    found = {"other": FOUND["other"]}
    assert not check.compare(found, record, HERE, partial=True).failures


@pytest.mark.parametrize("version", ["jax", "jaxlib"])
def test_another_version_is_compared_coarsely(check: ModuleType, version: str) -> None:
    record, there = check.merged(FOUND, None, HERE), HERE | {version: "0.12.0"}
    verdict = check.compare(changed("ordinary step", "flops", 24.0), record, there)
    assert not verdict.failures
    (note,) = verdict.notes
    assert "NOT COMPARED CLOSELY" in note and f"{version} 0.12.0" in note
    for program, key, value in (
        ("ordinary step", "flops", 26.0),
        ("whole step", "recompilations", 1.0),
        ("whole step", "refreshes", 5.0),
        ("ordinary step", "library calls", 1.0),
        ("ordinary step", "bytes", math.nan),
    ):
        verdict = check.compare(changed(program, key, value), record, there)
        assert len(verdict.failures) == 1, key
    verdict = check.compare(changed("ordinary step", "flops", 2.0), record, there)
    assert not verdict.failures and not verdict.improvements


def test_another_platform_is_refused(check: ModuleType) -> None:
    record = check.merged(FOUND, None, HERE)
    with pytest.raises(ValueError, match="set JAX_PLATFORMS=cpu"):
        check.compare(FOUND, record, HERE | {"platform": "gpu"})


def test_an_older_record_is_refused(check: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"lacks device_kind.*--record"):
        check.compare(FOUND, {"jax": "0.10.2", "models": FOUND}, HERE)


def test_recording_one_model_keeps_the_others(check: ModuleType) -> None:
    record = check.merged(FOUND, None, HERE)
    new = {"net": {"refresh": {"flops": 1.0}}}
    kept = check.merged(new, record, HERE, partial=True)
    assert kept["models"] == {**new, "other": FOUND["other"]}
    assert check.merged(new, record, HERE)["models"] == new
    assert record["models"] == FOUND
    with pytest.raises(ValueError, match="record all, without --model"):
        check.merged(new, record, HERE | {"jax": "0.12.0"}, partial=True)
