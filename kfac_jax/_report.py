"""The report: the plan as a table a person can act on."""

from collections.abc import Sequence

from kfac_jax.layers import Layer

_COLUMNS = ("parameter", "shape", "kind", "uses", "block", "factors", "bytes")


def _rows(layer: Layer) -> list[tuple[str, ...]]:
    factors = " ".join(
        f"{name}{_dimensions(shape)}" for name, shape in layer.factor_shapes.items()
    )
    block = "none" if layer.block is None else type(layer.block).__name__
    rows = [
        (path, _dimensions(shape), "", "", "", "", "")
        for path, shape in zip(layer.params, layer.shapes, strict=True)
    ]
    rows[0] = (
        *rows[0][:2],
        layer.kind,
        str(layer.uses),
        block,
        factors,
        _bytes(layer.factor_bytes),
    )
    return rows


def _dimensions(shape: Sequence[int]) -> str:
    return "[" + "×".join(map(str, shape)) + "]"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def explain(layer: Layer) -> str:
    """Says why a parameter is not covered, and where the model uses it."""
    at = f"\n    at {layer.source}" if layer.source else ""
    return f"  {layer.name}: {layer.reason}{at}"


def table(layers: Sequence[Layer], fraction: float) -> str:
    """Formats the layers.

    Args:
      layers: the plan's layers.
      fraction: τ1, the part of the batch that statistics are gathered from.

    Returns:
      The table, then totals, then what is not covered and why.
    """
    rows = [_COLUMNS, *(row for layer in layers for row in _rows(layer))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    lines.insert(1, "  ".join("-" * width for width in widths))
    parameters = sum(_size(shape) for layer in layers for shape in layer.shapes)
    covered = sum(
        _size(shape) for layer in layers if not layer.reason for shape in layer.shapes
    )
    total = sum(layer.factor_bytes for layer in layers)
    inverses = sum(layer.inverse_bytes for layer in layers)
    lines.append(
        f"{len(layers)} layers, {parameters} parameters, {covered} of them covered; "
        f"factors {_bytes(total)}, inverses {_bytes(inverses)}."
    )
    lines.append(_kinds(layers))
    lines.append(_costs(layers, fraction))
    lines.extend(_links(layers))
    lines.extend(_products(layers))
    uncovered = [layer for layer in layers if layer.reason]
    if uncovered:
        lines.append("Not covered by a layer:")
        lines.extend(explain(layer) for layer in uncovered)
    return "\n".join(lines)


def _links(layers: Sequence[Layer]) -> list[str]:
    """Which layers are linked to a parent, and why others are not."""
    linked = [layer for layer in layers if layer.link is not None]
    pairs = [
        f"  {layer.name} → {layer.link.parent}"
        for layer in linked
        if layer.link is not None and layer.link.parent is not None
    ]
    others = [f"  {x.name}: {x.unlinked}" for x in layers if x.unlinked]
    lines = ["Linked to the layer that uses its output:", *pairs] if pairs else []
    return [*lines, "Without such a link:", *others] if others else lines


def _products(layers: Sequence[Layer]) -> list[str]:
    """Whose gradients stay products, and why others asked for do not."""
    kept = [f"  {x.name}: {x.product_rows} cases" for x in layers if x.product_rows]
    others = [f"  {x.name}: {x.no_product}" for x in layers if x.no_product]
    lines = ["Gradients preconditioned as products:", *kept] if kept else []
    return [*lines, "Gradients not kept as products:", *others] if others else lines


def _kinds(layers: Sequence[Layer]) -> str:
    """How many parameters there are of each kind."""
    counts: dict[str, int] = {}
    for layer in layers:
        size = sum(map(_size, layer.shapes))
        counts[layer.kind] = counts.get(layer.kind, 0) + size
    total = max(sum(counts.values()), 1)
    parts = [f"{kind} {n} ({n / total:.1%})" for kind, n in counts.items()]
    return f"Parameters by kind: {', '.join(parts)}."


def _costs(layers: Sequence[Layer], fraction: float) -> str:
    """Arithmetic, as the products of the layers count it."""
    inversion = sum(layer.inversion_cost for layer in layers)
    gradient = sum(layer.gradient_cost for layer in layers)
    statistics = sum(layer.statistics_cost for layer in layers) * fraction
    text = f"One refresh of the inverses: {inversion:.2g} multiply-adds"
    if gradient:
        text += f"; statistics of one batch: {statistics / gradient:.2f} × the gradient"
    return text + "."


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
