"""Which layers' gradients can be summed over several uses, example by example."""

import math
from collections.abc import Sequence

from kfac_jax._jaxpr.sites import Parameter, Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax.blocks import Block
from kfac_jax.plan.layer import Layer

LARGEST = 2**28
"""How many numbers the gradients of all examples may be, at most: a gibibyte."""


def is_shared(sites: Sequence[Site]) -> bool:
    """Whether a layer is used several times for each example."""
    return len(sites) > 1 or any(site.repeated for site in sites)


def is_remote(sites: Sequence[Site]) -> bool:
    """Whether a parameter reaches the data by a map, or as different linear maps.

    Then only the gradients of examples by the parameter itself add up over its uses.
    """
    own = [site for site in sites if not site.swapped]
    different = len({(site.kind, used(site).layout) for site in own}) > 1
    return different or any(site.computed is not None for site in sites)


def is_mapped(layer: Layer, sites: Sequence[Site]) -> bool:
    """Whether a parameter's uses have sides that a map brings to it; see `Mapped`."""
    maps = [site.computed for site in sites if site.computed is not None]
    if not maps or len({site.kind for site in sites}) > 1 or layer.shape.stacked:
        return False
    if len(layer.layouts) != 1 or any(site.scans or site.cases for site in sites):
        return False
    return all(_is_mapped(layer, site) for site in sites)


def _is_mapped(layer: Layer, site: Site) -> bool:
    own = used(site).layout
    if site.weight is None:
        return False
    if site.computed is None or site.computed.form == "entry":
        return own == layer.layouts[0]
    plain = own.shape == own.source_shape and len(own.permutation) == 1
    return plain and site.computed.form in ("left", "right")


def used(site: Site) -> Parameter:
    """The weight that a site uses or, at a shift, the bias."""
    parameter = site.weight or site.bias
    assert parameter is not None
    return parameter


def sums_gradients(block: Block | None, sites: Sequence[Site]) -> bool:
    """Whether examples' gradients are summed over a layer's uses for its block."""
    takes = block is not None and block.takes_gradients
    return takes and (is_shared(sites) or is_remote(sites))


def cases(sites: Sequence[Site]) -> int:
    """How many examples a layer's uses are of."""
    (size,) = {x.examples.size for x in sites if isinstance(x.examples, Examples)}
    return size


def gradient_entries(layer: Layer, sites: Sequence[Site]) -> int:
    """How many numbers the gradients of all examples are."""
    weights = {x.computed: math.prod(used(x).layout.shape) for x in sites if x.computed}
    return cases(sites) * (math.prod(layer.shape.matrix) + sum(weights.values()))


def no_sums(layer: Layer, sites: Sequence[Site], block: Block) -> str:
    """Why examples' gradients cannot be summed over uses; empty if they can.

    Args:
      layer: the layer.
      sites: its uses.
      block: the block that is to get them.

    Returns:
      The reason.
    """
    if not block.takes_gradients and is_remote(sites):
        return "the parameter reaches its uses by maps"
    if not block.takes_gradients:
        return "this layer is used several times for each example"
    if not all(isinstance(x.examples, Examples) for x in sites):
        return "which rows belong to one example could not be followed"
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
