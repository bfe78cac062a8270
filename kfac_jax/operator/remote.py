"""Parameters that reach the data by a map, under blocks of whole gradients.

The gradient of an example by `w` in `x @ (w * mask)` is that by the product of both,
pulled back. Each tap brings out examples' gradients by what is used there; reverse mode
pulls them back to the parameter, and sums them over its uses.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax import Array

from kfac_jax._jaxpr.computed import map_of
from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.sites import Site
from kfac_jax.blocks._block import per_example
from kfac_jax.blocks._layout import Arrays
from kfac_jax.operator.summed import GRADIENTS, Summed
from kfac_jax.plan.group import Factors
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.summing import cases, used


@dataclasses.dataclass(frozen=True)
class Remote(Summed):
    """A parameter that a map separates from the data, or that is used in many ways."""

    @property
    def statistics_cost(self) -> float:
        """Also each example's gradient, pulled back."""
        size = math.prod(self.layer.shape.matrix)
        return super().statistics_cost + 2 * self.examples * size

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
        change = probes[self.name][GRADIENTS]
        result: Factors = {}
        for site in sites[self.name]:
            name, _ = self.tap(self.layer, site)
            if name in result:
                continue
            layout, computed = used(site).layout, site.computed
            weight = lambda x: x  # noqa: E731
            if computed is not None:
                weight = map_of(graph, self.layer.leaves[0], computed, inputs)
            by_example = jax.vmap(lambda x, f=weight, to=layout: to.to_matrix(f(x)))
            matrices = by_example(change)
            if site.weight is None:  # a shift, whose only input is 1
                matrices = matrices[..., None, :]
            result[name] = {GRADIENTS: jnp.moveaxis(matrices, 0, -3)}
        return result

    def tap(self, layer: Layer, site: Site) -> tuple[str, tuple[str, ...]]:
        """One for each weight that is computed, and way to use it."""
        weight = "itself" if site.computed is None else f"value {site.computed.value}"
        layout = used(site).layout
        way = (layout.sizes, layout.permutation, layout.shape, site.scans)
        return f"{layer.name} by {weight} as {way}", ()

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The gradients by what is used at one place."""
        return {GRADIENTS: per_example(*site.canonical(x, dy, False, one_hot=False))}

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """The block's statistics of the gradients by the parameter."""
        by_example = jax.vmap(lambda g: self.layer.to_matrix([g]))
        matrices = by_example(sums[self.name][GRADIENTS])
        gradients = jnp.moveaxis(matrices, 0, -3)
        return super().collect({self.name: {GRADIENTS: gradients}}, carried)
