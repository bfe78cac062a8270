"""What `bench.py` measured, as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench_targets import verdicts
from history import device

Row = dict[str, Any]
Results = dict[str, Any]

NAMES = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "kfac": "K-FAC",
    "kfac-1/8": "K-FAC, τ1 = 1/8",
    "published": "kfac-jax 0.0.8",
    "shampoo": "Shampoo",
    "psgd": "PSGD Kron",
    "front": "`kfac_jax.Optimizer`",
    "front-adaptive": "`kfac_jax.Optimizer`, adaptive",
    "published-adaptive": "kfac-jax 0.0.8, adaptive",
    "kfac-adaptive": "K-FAC, τ1 = 1/8, all rules of the paper",
    "kfac-staggered": "K-FAC, τ1 = 1/8, staggered",
    "gradient": "gradient alone",
}
"""What readers know optimizers by, in the order of the tables."""

COLUMNS = {
    "T3 = 1": "T3 = 1",
    "T3 = 5": "5",
    "T3 = 20": "20",
    "T3 = 100": "100",
    "ordinary step": "ordinary step",
    "refreshing step": "refreshing step",
    "without statistics": "without statistics",
    "update alone": "update alone",
    "first call": "first call",
    "compile": "compile",
    "peak, MiB": "peak, MiB",
    "peak": "peak",
    "added, MiB": "added, MiB",
    "flops": "FLOPs",
    "bytes": "bytes",
    "recompilations": "recompilations",
    "plan, s": "plan, s",
}


def tables(results: Results) -> str:
    """All tables, with their headings.

    Args:
        results: `machine`, `rows` and, by name, the `programs` run besides.

    Returns:
        Markdown.
    """
    machine, rows = results["machine"], results["rows"]
    parts = [
        f"{machine['date']}, commit {machine['commit']}"
        f"{' with changes' * machine['dirty']}; {device(machine)}; JAX "
        f"{machine['jax']}, Python {machine['python']}.",
        renewed(machine, rows),
        "### A step, in gradients",
        summary(rows),
        "### Targets",
        targets(rows),
        "### Staggered refresh",
        staggered(rows),
    ]
    for model in _models(rows):
        parts += [f"### {model}", details(rows, model)]
    for title, program in results["programs"].items():
        ok = program["status"] == "ok"
        parts += [f"### {title}", program["table"] if ok else program["status"]]
    return "\n\n".join(part for part in parts if part)


def renewed(machine: Row, rows: Sequence[Row]) -> str:
    """Which rows are of another commit than the rest; "" if none is."""
    later: dict[str, list[str]] = {}
    for row in rows:
        commit = row.get("commit", machine["commit"])
        name = NAMES[row["optimizer"]]
        if commit != machine["commit"] and name not in later.setdefault(commit, []):
            later[commit].append(name)
    return "\n".join(
        f"Of commit {commit}: {', '.join(names)}." for commit, names in later.items()
    )


def amortised(row: Row) -> float | None:
    """What a step costs with T3 = 20, or at all, in gradients."""
    return row.get("T3 = 20", row.get("ordinary step"))


def summary(rows: Sequence[Row]) -> str:
    """A row for each model and a column for each optimizer measured on all."""
    models = _models(rows)
    table = {(row["model"], row["optimizer"]): row for row in rows}
    names = [
        name
        for name in NAMES
        if name != "gradient" and all((model, name) in table for model in models)
    ]
    notes: list[str] = []

    def cell(row: Row) -> str:
        if row["status"] == "ok":
            return _number(amortised(row))
        if row["status"] not in notes:
            notes.append(row["status"])
        word = row["status"].split(":")[0]
        return f"{word} ({notes.index(row['status']) + 1})"

    lines = [[model, *(cell(table[model, name]) for name in names)] for model in models]
    markdown = _markdown(["model", *(NAMES[name] for name in names)], lines)
    if not notes:
        return markdown
    numbered = [f"({i}) {_escaped(note)}." for i, note in enumerate(notes, 1)]
    return "\n\n".join([markdown, *numbered])


def details(rows: Sequence[Row], model: str) -> str:
    """Everything about the optimizers on one model."""
    mine = [row for row in rows if row["model"] == model]
    alone = [row for row in mine if row["optimizer"] == "gradient"]
    lowest = next((row["peak bytes"] for row in alone if row["status"] == "ok"), None)
    seconds = [row["gradient, s"] for row in mine if "gradient, s" in row]
    lines: list[list[str]] = []
    for name in NAMES:
        for row in (row for row in mine if row["optimizer"] == name):
            if row["status"] != "ok":
                cells = [_escaped(row["status"])] + [""] * (len(COLUMNS) - 1)
            else:
                peak = row["peak bytes"]
                ratio = None if lowest is None else peak / lowest
                shown = row | {"peak, MiB": peak / 2**20, "peak": ratio}
                if "added bytes" in row:  # nothing is added to the gradient alone
                    shown["added, MiB"] = row["added bytes"] / 2**20
                cells = [_number(shown.get(column)) for column in COLUMNS]
            lines.append([NAMES[name], *cells])
    unit = f"The gradient takes {1e3 * min(seconds):.3g} ms.\n\n" if seconds else ""
    return unit + _markdown(["", *COLUMNS.values()], lines)


def staggered(rows: Sequence[Row]) -> str:
    """The longest step of a period of 20, over the median; "" if none was measured."""
    lines = []
    for row in rows:
        if row["optimizer"] == "kfac-staggered":
            lines.append([row["model"], _escaped(row["status"]), ""])
            if row["status"] == "ok":
                keys = "largest / median", "all at once: largest / median"
                lines[-1][1:] = [_number(row[key]) for key in keys]
    if not lines:
        return "Not run."
    header = ["largest : median step, τ1 = 1/8, T3 = 20", "8 shares", "all at once"]
    return _markdown(header, lines)


def targets(rows: Sequence[Row]) -> str:
    """Every target, and whether it is met."""
    lines = []
    for verdict in verdicts(rows):
        value = _number(verdict.value)
        word = f"**{verdict.word}**" if verdict.word == "MISSED" else verdict.word
        note = f" ({_escaped(verdict.note)})" if verdict.note else ""
        limit = f"≤ {verdict.limit:g}"
        lines.append([verdict.target, verdict.model, value, limit, word + note])
    return _markdown(["target", "model", "measured", "limit", ""], lines)


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 or isinstance(value, int) else f"{value:.2f}"


def _escaped(text: str) -> str:
    """A message as Markdown shows it, on one line of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    whole = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in whole)
