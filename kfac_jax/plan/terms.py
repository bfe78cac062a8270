"""Which uses of a weight share a Kronecker product, where a block is a sum of two."""

import dataclasses
from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr.graph import Graph, is_value
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.slicing import differentiated
from kfac_jax.blocks import KroneckerSum
from kfac_jax.plan.layer import Layer

Sites = Mapping[str, Sequence[Site]]


def with_terms(
    layers: Sequence[Layer], sites: Sites, graph: Graph
) -> tuple[tuple[Layer, ...], Sites]:
    """Divides the uses of layers under `KroneckerSum` between two products.

    Args:
      layers: the layers.
      sites: for each layer name, its uses.
      graph: the program.

    Returns:
      Both, with the layers' numbers of products and the uses' terms. A layer with a
      single product has `Kronecker` in place of the block.
    """
    if not any(isinstance(x.block, KroneckerSum) for x in layers):
        return tuple(layers), sites
    losses = [node for node in graph.walk() if node.name == "kfac_loss"]
    leading = [
        differentiated(graph, {node.inputs[0]} if is_value(node.inputs[0]) else set())
        for node in losses
    ]
    result, changed = list(layers), dict(sites)
    for i, layer in enumerate(layers):
        block = layer.block
        if not isinstance(block, KroneckerSum) or layer.shape.tied:
            continue
        own = sites[layer.name]
        reached = [_reached(site, leading) for site in own]
        first = min(reached)
        if all(x == first for x in reached):
            result[i] = dataclasses.replace(layer, block=block.alone)
            continue
        shape = dataclasses.replace(layer.shape, products=2)
        result[i] = dataclasses.replace(layer, shape=shape)
        changed[layer.name] = [
            dataclasses.replace(site, term=int(x != first))
            for site, x in zip(own, reached, strict=True)
        ]
    return tuple(result), changed


def _reached(site: Site, leading: Sequence[set[int]]) -> tuple[int, ...]:
    """The losses that a use leads to, in the order of the program."""
    value = site.output[0] if isinstance(site.output, tuple) else site.output
    return tuple(i for i, values in enumerate(leading) if value in values)


def notes(layers: Sequence[Layer], sites: Sites) -> tuple[str, ...]:
    """Lines for the report: how many uses are in each product."""
    lines = []
    for layer in layers:
        if not isinstance(layer.block, KroneckerSum):
            continue
        terms = [int(x.swapped or x.term) for x in sites[layer.name]]
        which = "as it is and transposed" if layer.shape.tied else "by their losses"
        counts = f"{terms.count(0)} and {terms.count(1)}"
        lines.append(f"  {layer.name}: {counts} uses, {which}")
    return ("Sums of two Kronecker products:", *lines) if lines else ()
