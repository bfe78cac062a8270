"""What costs are to keep to, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

AMORTISED = {
    "autoencoder, batch 512": (3.4, 2.3),
    "autoencoder, batch 4096": (2.3, 1.45),
    "transformer, 8 x 128 tokens": (2.1, 1.5),
    "convnet, batch 128": (3.0, 1.6),
    "ResNet-20, batch 64": (3.0, 1.6),
}
"""Of T3 = 20, with full statistics and with an eighth of the cases, in gradients."""

FIRST_CALL = 8.0  # the gradient's
PEAK_MEMORY = 0.8  # the published release's, of whole processes and beyond the gradient
WITHOUT_STATISTICS = 1.15  # the gradient and the update alone
STAGGERED = 1.3  # the median step


class Verdict(NamedTuple):
    """A target, what was measured, and what that says.

    `value` is None where something was not measured; `note` then says why.
    """

    target: str
    model: str
    value: float | None
    limit: float
    note: str = ""

    @property
    def word(self) -> str:
        """met, MISSED or not measured."""
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.limit else "MISSED"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """All targets of the models that were measured.

    Args:
        rows: with `model`, `optimizer`, `status` and what was measured.

    Returns:
        Verdicts, by target, then by model.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    table = {(row["model"], row["optimizer"]): row for row in rows}
    found = [verdict for model in models for verdict in _of_model(table, model)]
    return sorted(found, key=lambda verdict: TARGETS.index(verdict.target))


TARGETS = (
    "T3 = 20, full statistics",
    "T3 = 20, τ1 = 1/8",
    "first call",
    "peak memory : the published release's",
    "the same, beyond the gradient's peak",
    "recompilations",
    "without statistics : gradient + update alone",
    "staggered refresh, largest : median step",
)


def _of_model(table: dict[tuple[str, str], Row], model: str) -> Iterator[Verdict]:
    def value(optimizer: str, key: str) -> tuple[float | None, str]:
        row = table.get((model, optimizer), {"status": "not run"})
        if row["status"] != "ok":
            return None, f"{optimizer} {row['status']}"
        return row[key], ""

    full, part, first, peak, added, again, without, staggered = TARGETS
    if model in AMORTISED:
        for target, optimizer, limit in zip(
            (full, part), ("kfac", "kfac-1/8"), AMORTISED[model], strict=True
        ):
            measured, note = value(optimizer, "T3 = 20")
            yield Verdict(target, model, measured, limit, note)
    for target, key, limit in (
        (first, "first call", FIRST_CALL),
        (again, "recompilations", 0),
    ):
        both = [value(optimizer, key) for optimizer in ("kfac", "kfac-1/8")]
        notes = "; ".join(note for _, note in both if note)
        numbers = [number for number, _ in both if number is not None]
        worst = None if notes else max(numbers)
        yield Verdict(target, model, worst, limit, notes)
    yield _ratio(
        (peak, model, PEAK_MEMORY),
        value("kfac", "peak bytes"),
        value("published", "peak bytes"),
    )
    yield _ratio(
        (added, model, PEAK_MEMORY),
        value("kfac", "added bytes"),
        value("published", "added bytes"),
    )
    update, note = value("kfac", "update alone")
    yield _ratio(
        (without, model, WITHOUT_STATISTICS),
        value("kfac", "without statistics"),
        (None if update is None else 1 + update, note),
    )
    if (model, "kfac-staggered") in table:
        measured, note = value("kfac-staggered", "largest / median")
        yield Verdict(staggered, model, measured, STAGGERED, note)


def _ratio(
    about: tuple[str, str, float],
    above: tuple[float | None, str],
    below: tuple[float | None, str],
) -> Verdict:
    target, model, limit = about
    (a, why_a), (b, why_b) = above, below
    if a is None or b is None:
        return Verdict(target, model, None, limit, why_a or why_b)
    return Verdict(target, model, a / b, limit)
