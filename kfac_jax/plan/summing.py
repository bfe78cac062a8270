"""Which layers' gradients can be summed over several uses, example by example."""

import math
from collections.abc import Sequence

from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax.blocks import Block
from kfac_jax.plan.layer import Layer

LARGEST = 2**28
"""How many numbers the gradients of all examples may be, at most: a gibibyte."""


def is_shared(sites: Sequence[Site]) -> bool:
    """Whether a layer is used several times for each example."""
    return len(sites) > 1 or any(site.repeated for site in sites)


def sums_gradients(block: Block | None, sites: Sequence[Site]) -> bool:
    """Whether examples' gradients are summed over a layer's uses for its block."""
    return block is not None and block.takes_gradients and is_shared(sites)


def cases(sites: Sequence[Site]) -> int:
    """How many examples a layer's uses are of."""
    (size,) = {x.examples.size for x in sites if isinstance(x.examples, Examples)}
    return size


def gradient_entries(layer: Layer, sites: Sequence[Site]) -> int:
    """How many numbers the gradients of all examples are."""
    return cases(sites) * math.prod(layer.shape.matrix)


def no_sums(layer: Layer, sites: Sequence[Site], block: Block) -> str:
    """Why examples' gradients cannot be summed over uses; empty if they can.

    Args:
      layer: the layer.
      sites: its uses.
      block: the block that is to get them.

    Returns:
      The reason.
    """
    if not block.takes_gradients:
        return "this layer is used several times for each example"
    sizes = {x.examples.size for x in sites if isinstance(x.examples, Examples)}
    if len(sizes) != 1:
        return "its uses are of different numbers of examples"
    if any(site.cases for site in sites):
        return "some of its inputs are shared by all cases"
    if any(site.on_device for site in sites):
        return "it is used several times inside of a shard_map"
    entries = gradient_entries(layer, sites)
    if entries > LARGEST:
        return (
            f"the gradients of {cases(sites)} examples are {entries:,} numbers, more "
            f"than {LARGEST:,}"
        )
    return ""
