"""What follows from the times that gpu.py takes, and its record as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpu_programs import GRADIENT, SHARES, SOLVE, SOURCE

Row = dict[str, Any]

STEPS = (SOURCE, f"{SOURCE}, 1/8", "K-FAC", "K-FAC, 1/8")
AMORTISED = "T3 = 20"
FACTORS, REFRESH = "factors", "refresh"


class Anchor(NamedTuple):
    """What curvlinops takes on an RTX A6000 in float32, in gradients."""

    factors: float
    refresh: float  # by Cholesky's decomposition
    solve: float


ANCHORS = {
    "GPT-2 124M": Anchor(1.39, 1.73, 0.16),
    "ResNet-50": Anchor(2.46, 2.06, 0.09),
}
TARGETS = {"GPT-2 124M": (2.2, 1.3), "ResNet-50": (2.8, 1.4)}
"""Of T3 = 20, with full statistics and with those of an eighth, in gradients."""

REFRESH_TARGET = 2.0  # gradients


def derived(row: Row) -> Row:
    """Costs in gradients, from the times of a model's programs.

    Args:
        row: with `programs`.

    Returns:
        By program the `peak` memory over the gradient's, and each kind of step. For
        K-FAC also `refresh`, what a refreshing step takes more than another, and the
        average over T3. `factors` is what a step takes beyond gradient and solve.
    """
    programs = row.get("programs", {})
    second = _seconds(programs, GRADIENT, "ordinary")
    if second is None:
        return {}
    found: Row = {}
    for name, one in programs.items():
        own = {x: k["seconds"] / second for x, k in one.get("kinds", {}).items()}
        if one.get("peak bytes") and programs[GRADIENT].get("peak bytes"):
            own["peak"] = one["peak bytes"] / programs[GRADIENT]["peak bytes"]
        own |= _amortised(own, SHARES[SOURCE if SOURCE in name else "K-FAC"])
        found[name] = own
    ordinary = found.get(SOURCE, {}).get("ordinary")
    solve = found.get(SOLVE, {}).get("ordinary")
    if ordinary is not None and solve is not None:
        found[SOURCE][FACTORS] = ordinary - 1 - solve
    return found


def _amortised(own: Row, shares: Mapping[str, float]) -> Row:
    """The average step of a period, and what the refresh adds to one."""
    if not all(kind in own for kind in shares):
        return {}
    before = own["measuring" if "measuring" in shares else "ordinary"]
    average = sum(share * own[kind] for kind, share in shares.items())
    return {REFRESH: own["refreshing"] - before, AMORTISED: average}


def _seconds(programs: Row, name: str, kind: str) -> float | None:
    kinds = programs.get(name, {}).get("kinds", {})
    return kinds[kind]["seconds"] if kind in kinds else None


# ----------------------------------------------------------------------------- Markdown


def markdown(record: Row) -> str:
    """All tables of a record."""
    about = record["machine"]
    head = (
        f"{about['date']}, commit {about['commit']}; {about['device']}, "
        f"JAX {about['jax']}, Python {about['python']}."
    )
    if record.get("tiny"):
        head += " **Tiny sizes: these numbers mean nothing.**"
    rows = record["rows"]
    models = {x: row for x, row in rows.items() if "derived" in row}
    parts = [head, _costs(models), _parts_of_steps(models), _targets(models)]
    parts += [_programs(models), _precision(rows), _inverses(rows), _failures(rows)]
    return "\n\n".join(part for part in parts if part)


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(x)} |" for x in every)])


def _number(x: float | None, digits: int = 2) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def _small(x: float | None) -> str:
    return "–" if x is None else f"{x:.1e}"


def _costs(models: dict[str, Row]) -> str:
    head = ["model", "gradient, ms", "AdamW"]
    for name in ("fixed rates", "fixed, 1/8", "defaults", "defaults, 1/8"):
        head += [name, f"{name}: {AMORTISED}"]
    lines: list[list[str]] = []
    for model, row in models.items():
        found = row["derived"]
        second = _seconds(row.get("programs", {}), GRADIENT, "ordinary")
        line = [model, _number(second and 1e3 * second)]
        line.append(_number(found.get("AdamW", {}).get("ordinary")))
        for name in STEPS:
            own = found.get(name, {})
            line += [_number(own.get("ordinary")), _number(own.get(AMORTISED))]
        lines.append(line)
    return _table("A step, in gradients", head, lines)


def _parts_of_steps(models: dict[str, Row]) -> str:
    head = ["model"]
    for part in Anchor._fields:
        head += [part, "curvlinops"]
    lines: list[list[str]] = []
    for model, row in models.items():
        own = row["derived"].get(SOURCE, {})
        solve = row["derived"].get(SOLVE, {}).get("ordinary")
        measured = (own.get(FACTORS), own.get(REFRESH), solve)
        anchor: Sequence[float | None] = ANCHORS.get(model, (None,) * 3)
        line = [model]
        for mine, other in zip(measured, anchor, strict=True):
            line += [_number(mine), _number(other)]
        lines.append(line)
    title = "Parts of a step, in gradients (curvlinops: on an RTX A6000, float32)"
    return _table(title, head, lines)


def _targets(models: dict[str, Row]) -> str:
    lines = [
        [what, model, _number(value), f"≤ {limit}", _verdict(value, limit)]
        for model, row in models.items()
        if model in TARGETS
        for what, value, limit in _goals(model, row["derived"])
    ]
    return _table("Targets", ["target", "model", "measured", "limit", ""], lines)


def _goals(model: str, found: Row) -> Iterator[tuple[str, float | None, float]]:
    names = {"full statistics": SOURCE, "τ1 = 1/8": f"{SOURCE}, 1/8"}
    for (what, name), limit in zip(names.items(), TARGETS[model], strict=True):
        yield f"{AMORTISED}, {what}", found.get(name, {}).get(AMORTISED), limit
    yield REFRESH, found.get(SOURCE, {}).get(REFRESH), REFRESH_TARGET


def _verdict(value: float | None, limit: float) -> str:
    if value is None:
        return "not measured"
    return "met" if value <= limit else "**MISSED**"


def _programs(models: dict[str, Row]) -> str:
    """Each program by itself: compilation, memory and kinds of steps."""
    head = ["model", "program", "trace, s", "compile, s", "first, s", "peak, GiB"]
    head += ["peak", "ms of each kind (count)", "refused"]
    lines: list[list[str]] = []
    for model, row in models.items():
        for name, one in row.get("programs", {}).items():
            peak = one.get("peak bytes")
            kinds = ", ".join(
                f"{kind} {1e3 * x['seconds']:.2f} ({x['count']})"
                for kind, x in one.get("kinds", {}).items()
            )
            times = ("trace seconds", "compile seconds", "first run seconds")
            line = [model, name, *(_number(one.get(x), 1) for x in times)]
            line.append(_number(peak and peak / 2**30))
            line.append(_number(row["derived"].get(name, {}).get("peak")))
            line += [kinds or "–", _number(one.get("skipped_updates"), 0)]
            lines.append(line)
    title = "Programs (compiled beside others; peaks are XLA's, and in gradients)"
    return _table(title, head, lines)


def _precision(rows: Row) -> str:
    lines = [
        [
            cell["what"],
            _shape(cell),
            cell["precision"],
            _number(1e3 * cell["seconds"], 3),
            _small(cell["error of result"]),
        ]
        for cell in _cells(rows, "precision")
    ]
    head = ["product", "shape", "precision", "ms", "relative error"]
    return _table("Precision of products", head, lines)


def _inverses(rows: Row) -> str:
    head = ["inverse of", "by", "precision", "ms", "condition", "least residual"]
    head += ["relative error", "iterations, ms to 1e-3", "to 1e-5"]
    lines: list[list[str]] = []
    for cell in _cells(rows, "inverses"):
        for condition, own in cell["conditions"].items():
            line = [_shape(cell), cell["method"], cell["precision"]]
            line += [_number(1e3 * cell["seconds"], 3), condition]
            line += [_small(own["residual"]), _small(own.get("error"))]
            for target in ("1e-03", "1e-05"):
                to = own.get(target, {})
                seconds: float | None = to.get("seconds")
                line.append(
                    "–"
                    if seconds is None
                    else f"{to['iterations']}, {1e3 * seconds:.2f}"
                )
            lines.append(line)
    return _table("Inverses (ms of iterations: of each)", head, lines)


def _cells(rows: Row, name: str) -> list[Row]:
    return [x for x in rows.get(name, {}).get("cells", []) if "error" not in x]


def _shape(cell: Row) -> str:
    return " × ".join(map(str, cell["shape"]))


def _failures(rows: Row) -> str:
    """What failed or was skipped."""
    lines: list[list[str]] = []
    for name, row in rows.items():
        parts = {name: row}
        for program, one in row.get("programs", {}).items():
            parts[f"{name}, {program}"] = one
        for i, cell in enumerate(row.get("cells", [])):
            parts[f"{name}, row {i}"] = cell
        for what, one in parts.items():
            for key in ("error", "skipped"):
                if isinstance(one.get(key), str):
                    text = " ".join(one[key].split()).replace("|", "/")[:200]
                    lines.append([what, key, text])
    return _table("Not measured", ["what", "", "why"], lines)
