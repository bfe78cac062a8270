"""What T costs, and how each layer's rows are multiplied: lines for the report."""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax.plan.plan import Plan
from kfac_jax.plan.report import in_bytes
from kfac_jax.statistics.sample_space.gram_matrix import (
    is_pairwise,
    sampled,
    statistics,
)
from kfac_jax.statistics.sample_space.layer_rows import LayerRows, layer_rows
from kfac_jax.statistics.sample_space.rows import RowsError, RowSet
from kfac_jax.statistics.sample_space.taps import tapped

LARGE = 2**33
"""Bytes of T above which a plan warns."""


def lines(plan: Plan, params: Any, args: Any) -> tuple[str, ...]:
    """What the report says of the sample space.

    Args:
      plan: the plan.
      params: the parameters, or their shapes.
      args: the loss function's further arguments, or their shapes.

    Returns:
      The lines. If there is no T, one with the reason.
    """
    found: list[str] = []
    sizes: list[int] = []

    def trace(params: Any, args: Any, key: Any) -> None:
        leaves = plan.tree.leaves(params, "params")
        drawn = sampled(statistics(plan, params, args, leaves, key))
        parts, sets = layer_rows(plan, params, args, drawn)
        _, others = tapped(plan.derive(params, args, quiet=True))
        found.extend(_lines(parts, sets, others))
        sizes.extend(one.cases * one.columns for one in sets)

    try:
        jax.eval_shape(trace, params, args, jax.random.key(0))
    except RowsError as error:
        return (f"Sample space: there is no T. {error}",)
    if sum(sizes) ** 2 * jnp.result_type(float).itemsize > LARGE:
        warnings.warn(
            f"{found[0]} Use fewer cases, a sampled mode with one row for each "
            '(estimation_mode="fisher_gradients"), or statistics_fraction.',
            stacklevel=3,  # the caller of make_curvature
        )
    return tuple(found)


def _lines(
    parts: dict[str, list[LayerRows | None]],
    sets: Sequence[RowSet],
    others: dict[str, str],
) -> Iterator[str]:
    rows = sum(one.cases * one.columns for one in sets)
    size = rows**2 * jnp.result_type(float).itemsize
    kinds = " and ".join(f"{one.cases} cases with {one.columns} each" for one in sets)
    ways: dict[str, list[str]] = {"inputs": [], "gradients": [], "one": []}
    work = 0
    for name, of_sets in parts.items():
        present = [x for x in of_sets if x is not None]
        pairwise = all(is_pairwise(x) for x in present)
        way = "one" if name in others else "inputs" if pairwise else "gradients"
        ways[way].append(name)
        work += sum(_work(x, present, pairwise) for x in present)
    yield (
        f"Sample space: T has {rows} rows ({kinds}) and takes {in_bytes(size)}; its "
        f"products are {work:.2g} multiply-adds, its factorisation {rows**3 / 6:.2g}."
    )
    for way, title in (
        ("inputs", "By products of inputs and of output gradients"),
        ("gradients", "By gradients of cases"),
        ("one", "By the gradients of cases that are evaluated one by one"),
    ):
        if ways[way]:
            yield f"{title}: {', '.join(ways[way])}."


def _work(a: LayerRows, everyone: Sequence[LayerRows], pairwise: bool) -> int:
    """Multiply-adds of one set's products with all."""
    stack = math.prod(a.dy.shape[1 : 1 + a.lead])
    outputs, positions = a.dy.shape[-1], 1 if a.x is None else a.dy.shape[-2]
    pairs = _rows(a) * sum(map(_rows, everyone))
    if pairwise:
        inputs = 1 if a.of_integers else a.inputs
        return stack * pairs * positions**2 * (inputs + outputs)
    forming = 0 if a.x is None else _rows(a) * positions
    return stack * a.inputs * outputs * (forming + pairs)


def _rows(rows: LayerRows) -> int:
    return rows.dy.shape[0] * rows.dy.shape[1 + rows.lead]
