"""What is kept of each full benchmark: a row in `history.json`, tables in a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PATH = Path(__file__).with_suffix(".json")
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

QUANTITIES = {
    "full": ("kfac", "T3 = 20"),
    "1/8": ("kfac-1/8", "T3 = 20"),
    "first call": ("kfac", "first call"),
}
"""What is kept of each model: which number of which optimizer."""


def read(path: Path) -> list[Row]:
    """All rows, oldest first; none if there is no file yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def row_of(machine: Row, rows: Sequence[Row]) -> Row:
    """One run as a row.

    Args:
        machine: what it ran on, and of which commit.
        rows: what was measured.

    Returns:
        `commit`, `dirty`, `date`, `device`, and numbers by model. What was not measured
        is left out there.
    """
    models: dict[str, dict[str, float]] = {}
    for quantity, (optimizer, key) in QUANTITIES.items():
        for row in rows:
            if row["optimizer"] == optimizer and row["status"] == "ok":
                numbers = models.setdefault(row["model"], {})
                numbers[quantity] = round(row[key], 3)
    return {
        "commit": machine["commit"],
        "dirty": machine["dirty"],
        "date": machine["date"],
        "device": device(machine),
        "models": models,
    }


def device(machine: Row) -> str:
    """What decides whether rows can be compared."""
    if machine["platform"] == "cpu":
        return f"{machine['cpu']}, {machine['cores']} cores"
    return machine["device"]


def appended(history: Sequence[Row], row: Row) -> list[Row]:
    """The history with the row last, instead of an earlier one of commit and device."""
    same = {key: row[key] for key in ("commit", "device")}
    return [old for old in history if not same.items() <= old.items()] + [row]


def write(history: Sequence[Row], path: Path) -> None:
    """Writes all rows, one a line, so that a change shows what was added."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in history)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def replaced(page: str, tables: str) -> str:
    """The page with other tables between its two marks.

    Args:
        page: the text of the page.
        tables: what goes between them.

    Returns:
        The text of the new page.

    Raises:
        ValueError: if the page has not each mark once, the beginning first.
    """
    counts = page.count(BEGIN), page.count(END)
    if counts != (1, 1) or page.index(BEGIN) > page.index(END):
        raise ValueError(
            f"Expected {BEGIN!r} once and {END!r} once after it; got {counts[0]} and "
            f"{counts[1]}. Put both into the page, around the tables."
        )
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{after}"
