"""Layers whose gradient is one product of inputs and output gradients, and its use."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_jax._jaxpr.flow import types_outside_loops
from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.sites import Site
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks import Kronecker
from kfac_jax.plan.layer import Layer


def not_one_product(layer: Layer, sites: Sequence[Site]) -> str:
    """Why a layer with a `Kronecker` block is not one product with two full factors.

    Args:
      layer: the layer.
      sites: its uses.

    Returns:
      The reason; empty if it is.
    """
    if set(layer.block_factor_shapes) != {"input", "output"}:
        return "a side of its block is diagonal"
    if layer.shape.lead:
        return "it stands for several independent layers"
    if len(sites) != 1 or sites[0].repeated:
        return "it is used more than once"
    (site,) = sites
    if site.parts or site.x_places or site.y_places:
        return "only a part of it is used here"
    if site.cases:
        return "its input is the same for all cases"
    return ""


def choose_products(
    layers: Sequence[Layer],
    sites: Mapping[int, Sequence[Site]],
    graph: Graph,
    l2: float,
    custom_rules: bool,
) -> list[Layer]:
    """Decides where gradients stay products of inputs and output gradients.

    That is so for blocks with `gradient_products`, where it is possible and, for the
    plan's batch, takes fewer multiply-adds.

    Args:
      layers: the plan's layers.
      sites: the uses of each, by its index.
      graph: the program.
      l2: the weight of the penalty.
      custom_rules: whether a derivative rule of the user decides about gradients.

    Returns:
      The layers with `product_rows`, or with `no_product`, the reason why not.
    """
    types = types_outside_loops(graph)
    result: list[Layer] = []
    for i, layer in enumerate(layers):
        if not (isinstance(layer.block, Kronecker) and layer.block.gradient_products):
            result.append(layer)
            continue
        reason = "a custom derivative rule of the program may change its gradient"
        if not custom_rules:
            reason = _refusal(layer, sites[i], types, l2)
        rows = 0 if reason else sites[i][0].rows
        result.append(dataclasses.replace(layer, product_rows=rows, no_product=reason))
    return result


def _refusal(
    layer: Layer, sites: Sequence[Site], types: Mapping[int, Any], l2: float
) -> str:
    if l2:
        return "the penalty (l2) adds to its gradient"
    if layer.kind != "dense":
        return f'its kind is "{layer.kind}"'
    if layer.link is not None:
        return "it is linked to another layer"
    if reason := not_one_product(layer, sites):
        return reason
    (site,) = sites
    if site.output not in types:
        return "it is inside a loop or conditional"
    dtype = jnp.dtype(types[site.output])
    if wide_dtype(dtype) != dtype:
        return f"its outputs are {dtype}, too coarse to recognise its gradient by"
    i, o, r = layer.shape.inputs, layer.shape.outputs, site.rows
    # A⁻¹ Xᵀ, dY G⁻¹ and their product, against A⁻¹ V and (A⁻¹ V) G⁻¹
    if r * (i * i + o * o + i * o) >= i * o * (i + o):
        return f"it would take more multiply-adds with {r} cases"
    return ""
