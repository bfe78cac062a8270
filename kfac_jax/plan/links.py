"""Chooses which layers are linked for the block-tridiagonal structure."""

import dataclasses
from collections.abc import Mapping, Sequence

from kfac_jax._jaxpr.flow import sources
from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax.blocks import Kronecker
from kfac_jax.plan.layer import Layer, Link
from kfac_jax.plan.product_choice import not_one_product


def link(
    layers: Sequence[Layer], sites: Mapping[int, Sequence[Site]], graph: Graph
) -> list[Layer]:
    """Gives each layer its place in a forest.

    A layer's parent is the first layer in the order of the program whose input depends
    on its output, with no other layer that can be linked between.

    Args:
      layers: the plan's layers.
      sites: the uses of each, by its index.
      graph: the program.

    Returns:
      The layers with `link`, or with `unlinked`, the reason why they have no parent.
    """
    refusals = {i: _refusal(layer, sites[i]) for i, layer in enumerate(layers)}
    able = {i: sites[i][0] for i, reason in refusals.items() if not reason}
    found = sources(graph, able)
    parents: dict[int, int] = {}
    for i in able:
        if i not in found:
            refusals[i] = "it is inside a loop or conditional"
            continue
        users = [j for j, before in found.items() if i in before]
        if not users:
            refusals[i] = "no such layer uses its output"
        elif reason := _mismatch(layers, able, i, users[0]):
            refusals[i] = reason
        else:
            parents[i] = users[0]
    linked = {*parents, *parents.values()}
    return [
        dataclasses.replace(
            layer,
            link=_link(layers, parents, i) if i in linked else None,
            unlinked=refusals[i],
        )
        for i, layer in enumerate(layers)
    ]


def _link(layers: Sequence[Layer], parents: Mapping[int, int], i: int) -> Link:
    root = i
    while root in parents:
        root = parents[root]
    if i not in parents:
        return Link(layers[root].name)
    parent = layers[parents[i]]
    shape = parent.shape
    return Link(layers[root].name, parent.name, shape.inputs, shape.outputs)


def _refusal(layer: Layer, sites: Sequence[Site]) -> str:
    """Why a layer can be neither child nor parent; empty if it can."""
    if layer.kind not in ("dense", "conv"):
        return f'its kind is "{layer.kind}"'
    if type(layer.block) is not Kronecker:
        return f"its block is {layer.block!r}"
    return not_one_product(layer, sites)


def _mismatch(
    layers: Sequence[Layer], sites: Mapping[int, Site], i: int, j: int
) -> str:
    """Why two layers that can be linked cannot be linked to each other."""
    first, second = layers[i].block, layers[j].block
    assert isinstance(first, Kronecker)
    assert isinstance(second, Kronecker)
    name = layers[j].name
    if first.weight_sharing != second.weight_sharing:
        return f"{name}, which uses its output, has another weight_sharing"
    examples = [sites[k].examples for k in (i, j)]
    known = [x for x in examples if isinstance(x, Examples)]
    if len(known) < 2 or known[0].size != known[1].size:
        return f"its examples are not known to be those of {name}"
    if paired_rows(layers[i], sites[i]) != paired_rows(layers[j], sites[j]):
        return f"{name}, which uses its output, has other positions in each example"
    return ""


def paired_rows(layer: Layer, site: Site) -> int:
    """How many rows of a layer count as cases, and are paired with its parent's."""
    assert isinstance(layer.block, Kronecker)
    assert isinstance(site.examples, Examples)
    reduces = layer.block.weight_sharing == "reduce"
    return site.examples.size if reduces else site.rows
