"""What of a compiled cost is worse than recorded; knows nothing of JAX.

Costs are numbers by model, program and quantity, see `compiled_programs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

Row = dict[str, float]
Table = dict[str, dict[str, Row]]
"""By model and program."""


class Allowed(NamedTuple):
    """By how much a number may exceed the record.

    It is a share of the record, kept within two absolute limits: costs near zero are
    left some room, and what is large cannot hide a growth that matters beside the
    gradient.
    """

    relative: float
    least: float
    most: float

    def room(self, recorded: float) -> float:
        """What may be added to a recorded number."""
        return min(max(self.relative * recorded, self.least), self.most)


NOTHING = Allowed(0.0, 0.0, 0.0)
ALLOWED = {
    "flops": Allowed(0.01, 0.002, 0.02),
    "bytes": Allowed(0.03, 0.02, 0.2),
    "temporaries": Allowed(0.05, 0.02, 0.2),
    "instructions": Allowed(0.05, 0.05, 1.0),
    "library calls": NOTHING,
    "calls in every step": NOTHING,
    "copied": Allowed(0.0, 0.002, 0.002),
    "refreshes": NOTHING,
    "recompilations": NOTHING,
}
"""By quantity, where JAX and the device are the recorded ones."""

ELSEWHERE = Allowed(0.25, 0.05, math.inf)
"""Where they are others: XLA chooses by the CPU's vector units what it fuses."""

ALWAYS_EXACT = {"refreshes", "recompilations"}
"""What no other version or device may change."""

PLACE = ("jax", "jaxlib", "device_kind")


class Verdict(NamedTuple):
    """What a comparison found, a line each."""

    failures: list[str]
    improvements: list[str]
    notes: list[str]


def compare(
    found: Table,
    record: Mapping[str, Any],
    environment: Mapping[str, str],
    partial: bool = False,
) -> Verdict:
    """Compares with the record.

    Args:
        found: what was measured.
        record: as `merged` makes it.
        environment: the versions and the platform it was measured with.
        partial: whether models were left out on purpose.

    Returns:
        What failed, what is better than recorded, and what else there is to say.

    Raises:
        ValueError: if the record is of another platform, or of an older form.
    """
    recorded_with = _environment(record)
    if environment["platform"] != recorded_with["platform"]:
        raise ValueError(
            f"The record is of platform {recorded_with['platform']}, this is "
            f"{environment['platform']}: set JAX_PLATFORMS={recorded_with['platform']}."
        )
    same = all(environment[key] == recorded_with[key] for key in PLACE)
    notes: list[str] = []
    if not same:
        notes.append(
            f"NOT COMPARED CLOSELY: recorded with {_place(recorded_with)}, this is "
            f"{_place(environment)}. Only refreshes and recompilations are held to "
            f"the record; the rest may be {ELSEWHERE.relative:.0%} larger."
        )
    models: Table = record["models"]
    failures, improvements = _differences(found, models, same)
    failures += [
        f"{name}: recorded but not measured any more; run --record"
        for name in models
        if name not in found and not partial
    ]
    return Verdict(failures, improvements, notes)


def _differences(
    found: Table, models: Table, same: bool
) -> tuple[list[str], list[str]]:
    failures: list[str] = []
    improvements: list[str] = []
    for name, programs in found.items():
        if name not in models:
            failures.append(f"{name}: not in the record; run --record")
            continue
        old_programs = models[name]
        for program in [*programs, *(x for x in old_programs if x not in programs)]:
            where = f"{name}, {program}"
            new, old = programs.get(program), old_programs.get(program)
            if new is None or old is None:
                failures.append(_only(where, new is None))
                continue
            for key in [*new, *(x for x in old if x not in new)]:
                if key not in new or key not in old:
                    failures.append(_only(f"{where}, {key}", key not in new))
                    continue
                change = _change(key, new[key], old[key], same)
                line = f"{where}: {key} {old[key]:g} -> {new[key]:g}"
                if change == "better":
                    improvements.append(line)
                elif change:
                    failures.append(f"{line} ({change})")
    return failures, improvements


def _only(where: str, recorded: bool) -> str:
    state = "recorded but not measured any more" if recorded else "not in the record"
    return f"{where}: {state}; run --record"


def _change(key: str, new: float, old: float, same: bool) -> str:
    """What is wrong, "better", or nothing."""
    if not (math.isfinite(new) and math.isfinite(old)):
        return "not a number"
    allowed = ALLOWED[key]
    if not same and key not in ALWAYS_EXACT:
        allowed = ELSEWHERE
    room = allowed.room(old) + 1e-9  # rounding
    if new > old + room:
        return f"allowed {old + allowed.room(old):.4g}"
    return "better" if new < old - room and same else ""


def merged(
    found: Table,
    record: Mapping[str, Any] | None,
    environment: Mapping[str, str],
    partial: bool = False,
) -> dict[str, Any]:
    """The record with new numbers in it.

    Args:
        found: what was measured.
        record: the record so far, or None.
        environment: the versions and the platform it was measured with.
        partial: whether to keep the other models' numbers.

    Returns:
        The new record.

    Raises:
        ValueError: if numbers to keep are of another environment.
    """
    models = dict(found)
    if partial and record is not None:
        before = _environment(record)
        if before != dict(environment):
            raise ValueError(
                f"The other models were recorded with {before}, this is "
                f"{dict(environment)}: record all, without --model."
            )
        models = record["models"] | models
    return {"environment": dict(environment), "models": models}


def _environment(record: Mapping[str, Any]) -> dict[str, str]:
    environment = record.get("environment", {})
    missing = {*PLACE, "platform"} - set(environment)
    if missing or "models" not in record:
        raise ValueError(
            f"The record lacks {', '.join(sorted(missing)) or 'models'}: make it again "
            "by --record, without --model."
        )
    return environment


def _place(environment: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {environment[key]}" for key in PLACE)
