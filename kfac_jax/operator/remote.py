"""Parameters that reach the data by a map, under blocks of whole gradients.

The gradient of an example by `w` in `x @ (w * mask)` is that by the product of both,
pulled back. Each tap brings out examples' gradients by what is used there; reverse mode
pulls them back to the parameter, and sums them over its uses.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax import Array

from kfac_jax._jaxpr.computed import map_of
from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.sites import Computed, Site
from kfac_jax.blocks._block import per_example
from kfac_jax.blocks._layout import Arrays
from kfac_jax.operator.summed import GRADIENTS, Summed
from kfac_jax.plan.group import Factors
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.summing import cases, used


@dataclasses.dataclass(frozen=True)
class Remote(Summed):
    """A parameter that a map separates from the data, or that is used in many ways."""

    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[ArrayTree]
    ) -> Factors:
        """Zeros like the examples' gradients by the parameter."""
        size = (cases(sites[self.name]), *self.layer.shapes[0])
        return {self.name: {GRADIENTS: jnp.zeros(size, self.layer.dtype)}}

    def spread(
        self,
        probes: Factors,
        sites: Mapping[str, Sequence[Site]],
        graph: Graph,
        inputs: Sequence[ArrayTree],
    ) -> Factors:
        """Zeros like the examples' gradients by all that is used.

        They are computed for each example from the parameter plus its probe, and only
        their derivative matters.
        """
        own = dict(probes[self.name])
        change = own.pop(GRADIENTS)
        for computed in {site.computed: None for site in sites[self.name]}:
            if computed is None:
                own[_name(None)] = change
            else:
                weight = map_of(graph, self.layer.leaves[0], computed.value, inputs)
                own[_name(computed)] = jax.vmap(weight)(change)
        return {self.name: own}

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The gradients by what is used at one place."""
        gradients = per_example(*site.canonical(x, dy, False, one_hot=False))
        layout = used(site).layout
        matrices = jnp.moveaxis(gradients, -3, 0)
        arrays = jax.vmap(layout.from_matrix)(
            matrices.reshape(len(matrices), *layout.shape)
        )
        return {_name(site.computed): arrays}

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """The block's statistics of the gradients by the parameter."""
        by_example = jax.vmap(lambda g: self.layer.to_matrix([g]))
        matrices = by_example(sums[self.name][GRADIENTS])
        gradients = jnp.moveaxis(matrices, 0, -3)
        return super().collect({self.name: {GRADIENTS: gradients}}, carried)


def _name(computed: Computed | None) -> str:
    return "parameter" if computed is None else f"value {computed.value}"
