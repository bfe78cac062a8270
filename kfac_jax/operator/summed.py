"""Layers that are used several times, under blocks of whole gradients.

A weight may be used at several places, at each step of a scan, or transposed too. The
gradient of an example is the sum over its uses, which must be known before it is
squared. So each tap brings out examples' gradients; reverse mode sums them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.sites import Site
from kfac_jax.blocks._block import per_example
from kfac_jax.blocks._layout import Arrays
from kfac_jax.operator.single import Single
from kfac_jax.plan.group import Factors
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.summing import cases

GRADIENTS = "gradients"
"""What the taps bring out: `[*e, b, i, o]`."""


@dataclasses.dataclass(frozen=True)
class Summed(Single):
    """A layer whose examples' gradients are summed over its uses."""

    examples: int  # in the plan's batch

    @property
    def statistics_cost(self) -> float:
        """Multiply-adds of examples' gradients, and of the factors of these."""
        layer, shape = self.layer, self.layer.shape
        one = shape.inputs * shape.outputs
        moments = sum(
            math.prod(x) * (1 if name in self.block.elementwise else one // x[-1])
            for name, x in layer.factor_shapes.items()
        )
        return layer.positions * math.prod(shape.matrix) + self.examples * moments

    @property
    def row_statistics(self) -> dict[str, frozenset[str]]:
        """None: all are of gradients."""
        return {self.name: frozenset()}

    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[Any]
    ) -> Factors:
        """Zeros like the examples' gradients."""
        shape = self.layer.shape
        size = (*shape.lead, cases(sites[self.name]), shape.inputs, shape.outputs)
        return {self.name: {GRADIENTS: jnp.zeros(size, self.layer.dtype)}}

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The gradients of one use."""
        rows = site.canonical(x, dy, layer.shape.homogeneous, one_hot=False)
        gradients = per_example(*rows)
        if site.swapped:
            gradients = jnp.swapaxes(gradients, -1, -2)
        return {GRADIENTS: gradients}

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """The block's statistics of the sums."""
        function: Callable[..., Arrays] = self._of_slice
        for _ in self.layer.shape.stacked:
            function = jax.vmap(function)
        own = carried.get(self.name, {})
        return {self.name: function(sums[self.name][GRADIENTS], own)}

    def _of_slice(self, gradients: Array, carried: Arrays) -> Arrays:
        return self.block.of_gradients(gradients, self.layer.shape, **carried)

    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """The number of cases for all: each sum is of squared gradients."""
        own = self.layer.factor_shapes.keys() & statistics[self.name].keys()
        weight = weight.astype(self.layer.dtype)
        return {self.name: dict.fromkeys(sorted(own), weight)}
