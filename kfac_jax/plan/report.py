"""The report: the plan as a table for people, and its totals as data."""

import collections
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax import Array

from kfac_jax.blocks import Kronecker
from kfac_jax.plan.group import (
    Factors,
    Group,
    abstract_factors,
    abstract_inverses,
    layers_of,
)
from kfac_jax.plan.layer import Layer

PROPORTION = 64
"""Beyond how many times a layer's parameters its factors are told in the report."""

_COLUMNS = ("parameter", "shape", "kind", "uses", "block", "factors", "bytes")


class Totals(NamedTuple):
    """What a plan covers, in scalar parameters, and costs, in bytes and multiply-adds.

    >>> import jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> totals = kfac_jax.make_curvature(loss_fn, w, x, y).totals
    >>> totals.covered, totals.factor_bytes == 4 * (3 * 3 + 2 * 2)
    (6, True)
    """

    parameters: int  # how many there are
    covered: int  # how many are in layers with which nothing is amiss
    by_kind: Mapping[str, int]  # how many there are of each kind of layer
    factor_bytes: int  # what the factors hold
    inverse_bytes: int  # what their inverses hold
    inversion_cost: int  # multiply-adds of one refresh of the inverses
    refresh_bytes: int  # what it needs beside factors and inverses, about
    statistics_cost: float  # of the statistics of one batch, or of the part τ1 of it
    gradient_cost: float  # of the layers in one gradient of the batch


def totals(groups: Sequence[Group], fraction: float, inputs: bool) -> Totals:
    """Sums over the groups.

    Args:
      groups: the plan's groups.
      fraction: τ1, the part of the batch that statistics are gathered from.
      inputs: whether they are of inputs alone, and come with the gradient.

    Returns:
      The sums.
    """
    layers = layers_of(groups)
    cost = sum(x.statistics_cost for x in groups)
    if inputs:  # without gradients of outputs of their own
        cost -= sum(gradient_cost(x) / 3 for x in layers if x.is_tapped)
    by_kind: dict[str, int] = collections.defaultdict(int)
    for layer in layers:
        by_kind[layer.kind] += _size(layer)
    return Totals(
        parameters=sum(map(_size, layers)),
        covered=sum(_size(layer) for layer in layers if not layer.reason),
        by_kind=dict(by_kind),
        factor_bytes=sum(map(_size_in_bytes, abstract_factors(groups).values())),
        inverse_bytes=sum(map(_size_in_bytes, abstract_inverses(groups).values())),
        inversion_cost=sum(x.inversion_cost for x in groups),
        refresh_bytes=_refresh_bytes(groups),
        statistics_cost=cost * fraction,
        gradient_cost=sum(map(gradient_cost, layers)),
    )


def _refresh_bytes(groups: Sequence[Group]) -> int:
    """The memory of one refresh, from what XLA reports of compiled ones.

    Matrices of one size are decomposed as one stack, and all new ones are there before
    the old ones are replaced.
    """
    factors = abstract_factors(groups)

    def inverted_by(group: Group, own: Factors) -> list[Array]:
        return [x.factor for x in group.to_invert(own, 1.0).matrices.values()]

    inverted = [
        x
        for group in groups
        for x in jax.eval_shape(
            functools.partial(inverted_by, group),
            {name: factors[name] for name in group.names},
        )
    ]
    bases = [
        factors[name][key]
        for group in groups
        for name, keys in group.carried.items()
        for key in keys
    ]
    sizes = [sum(x.size * x.dtype.itemsize for x in some) for some in (inverted, bases)]
    return round(2.5 * sizes[0] + 1.4 * sizes[1])


def gradient_cost(layer: Layer) -> float:
    """Multiply-adds of a layer in one gradient: three products."""
    return 3 * layer.positions * math.prod(layer.shape.matrix)


def _size_in_bytes(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """The total size of arrays in bytes."""
    return sum(x.size * x.dtype.itemsize for x in arrays.values())


def _size(layer: Layer) -> int:
    return sum(map(math.prod, layer.shapes))


def _rows(
    layer: Layer, arrays: Mapping[str, jax.ShapeDtypeStruct]
) -> list[tuple[str, ...]]:
    factors = " ".join(f"{name}{_dimensions(x.shape)}" for name, x in arrays.items())
    block = "none" if layer.block is None else type(layer.block).__name__
    if isinstance(layer.block, Kronecker) and layer.block.is_fitted:
        block += f" ({layer.block.fit})"
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
        in_bytes(_size_in_bytes(arrays)),
    )
    return rows


def _dimensions(shape: Sequence[int]) -> str:
    return "[" + "×".join(map(str, shape)) + "]"


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
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


def table(
    layers: Sequence[Layer],
    groups: Sequence[Group],
    notes: Sequence[str],
    total: Totals,
) -> str:
    """Formats the plan.

    Args:
      layers: the plan's layers.
      groups: the groups of these layers.
      notes: the structure's lines for the report.
      total: the sums over them.

    Returns:
      The table, then totals, then what is not covered and why.
    """
    factors = abstract_factors(groups)
    rows = [_COLUMNS, *(row for x in layers for row in _rows(x, factors[x.name]))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append(
        f"{len(layers)} layers, {total.parameters} parameters, {total.covered} of them "
        f"covered; factors {in_bytes(total.factor_bytes)}, inverses "
        f"{in_bytes(total.inverse_bytes)}."
    )
    lines.append(_kinds(total))
    lines.append(_costs(total))
    lines.extend(notes)
    lines.extend(_out_of_proportion(layers, factors))
    uncovered = [layer for layer in layers if layer.reason]
    if uncovered:
        alone = all(layer.block is None for layer in layers)  # the sample space
        way = ", so that gradients are taken case by case" if alone else ""
        lines.append(f"Not covered by a layer{way}:")
        lines.extend(explain(layer) for layer in uncovered)
    return "\n".join(lines)


def _out_of_proportion(
    layers: Sequence[Layer], factors: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
) -> list[str]:
    """Lines about layers whose factors have far more entries than they themselves."""
    times = {
        x.name: sum(f.size for f in factors[x.name].values()) / max(_size(x), 1)
        for x in layers
    }
    large = {name: ratio for name, ratio in times.items() if ratio > PROPORTION}
    if not large:
        return []
    title = f"Factors of over {PROPORTION} × the parameters (see max_factor_dim):"
    return [title, *(f"  {name}: {ratio:.0f} ×" for name, ratio in large.items())]


def _kinds(total: Totals) -> str:
    """The line with the number of parameters of each kind."""
    parts = [
        f"{kind} {n} ({n / max(total.parameters, 1):.1%})"
        for kind, n in total.by_kind.items()
    ]
    return f"Parameters by kind: {', '.join(parts)}."


def _costs(total: Totals) -> str:
    """The line with the arithmetic of refreshes and statistics."""
    text = f"One refresh of the inverses: {total.inversion_cost:.2g} multiply-adds"
    if total.refresh_bytes:
        text += f", about {in_bytes(total.refresh_bytes)} beside them"
    if total.gradient_cost:
        times = total.statistics_cost / total.gradient_cost
        text += f"; statistics of one batch: {times:.2f} × the gradient"
    return text + "."
