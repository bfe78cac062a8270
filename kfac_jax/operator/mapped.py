"""Parameters that reach the data by a map, under blocks of two sides.

The factors are those of the weight that the map computes, `A` of its inputs and `G` of
its output gradients, brought to the parameter. A product `θ R` has the gradient
`Xᵀ dY Rᵀ`, and so the sides `A` and `R G Rᵀ`. A map that keeps the shape counts as one
entry by entry, with the derivatives D, as a mask's is.
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
from kfac_jax.blocks._layout import Arrays
from kfac_jax.operator.single import Single, site_statistics
from kfac_jax.plan.group import Factors
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.summing import used


@dataclasses.dataclass(frozen=True)
class Mapped(Single):
    """A layer with the factors of what is computed from its parameter."""

    def spread(
        self,
        probes: Factors,
        sites: Mapping[str, Sequence[Site]],
        graph: Graph,
        inputs: Sequence[ArrayTree],
    ) -> Factors:
        """Adds the matrices, or derivatives, that bring sides to the parameter."""
        own = dict(probes[self.name])
        for site in sites[self.name]:
            for name in self.handed(site):
                if name not in own:
                    own[name] = self._derivative(site, graph, inputs)
        return {self.name: own}

    def handed(self, site: Site) -> tuple[str, ...]:
        """The name of such an array, if there is one."""
        return () if site.computed is None else (_name(site.computed),)

    def _derivative(
        self, site: Site, graph: Graph, inputs: Sequence[ArrayTree]
    ) -> Array:
        """The other matrix of a product, or derivatives entry by entry."""
        computed = site.computed
        assert computed is not None
        weight = map_of(graph, self.layer.leaves[0], computed, inputs)
        shape = self.layer.leaf_shapes[0]
        zero = jnp.zeros(shape, self.layer.dtype)
        if computed.form == "entry":
            value, pull = jax.vjp(weight, zero)
            signs = jax.random.rademacher(jax.random.key(0), value.shape, value.dtype)
            # of a map that is not entry by entry, these are near the diagonal
            found = pull(signs)[0] * signs.astype(zero.dtype)
            return used(site).layout.to_matrix(found)
        rank = jnp.arange(shape[1] if computed.form == "right" else shape[0])
        unit = zero.at[rank, rank].set(1)
        moved = jax.jvp(weight, (zero,), (unit,))[1].astype(zero.dtype)
        return moved[rank] if computed.form == "right" else moved[:, rank].T

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The statistics of what is computed, brought to the parameter."""
        shape, computed = layer.shape, site.computed
        if computed is None:
            return site_statistics(site, self.block, shape, x, dy, carried)
        *_, inputs, outputs = used(site).layout.shape
        shape = dataclasses.replace(shape, inputs=inputs, outputs=outputs)
        sums = site_statistics(site, self.block, shape, x, dy, {})
        (name,) = self.handed(site)
        wanted = layer.statistics_shapes.keys()
        if computed.form == "entry":
            return _by_entry(sums, carried[name])
        side = "input" if computed.form == "left" else "output"
        return _by_matrix(sums, carried[name], side, side in wanted)


def _by_entry(sums: Arrays, d: Array) -> Arrays:
    """Sides for `D (A ⊗ G) D`, from A and G or their diagonals, linear in G.

    `A ∘ (D Dᵀ) / o` and `G ∘ (Dᵀ diag(A) D)` up to a factor, with which their product
    has the trace `Σ a_i d_io² g_o`.
    """
    a = _diagonal_of(sums, "input")
    d = d.astype(a.dtype)
    outputs = d.shape[-1]
    trace = jnp.einsum("...i,...io->...", a, d * d)[..., None] / outputs
    weights = a / jnp.where(trace > 0, trace, 1)
    result = dict(sums)
    for name, moment in sums.items():
        match name:
            case "input":
                by = d @ d.mT / outputs
            case "input_diagonal":
                by = (d * d).mean(-1)
            case "output":
                by = (d * weights[..., None]).mT @ d
            case "output_diagonal":
                by = jnp.einsum("...io,...i->...o", d * d, weights)
            case _:
                continue
        result[name] = moment * by
    return result


def _diagonal_of(sums: Arrays, side: str) -> Array:
    if side in sums:
        return jnp.diagonal(sums[side], axis1=-2, axis2=-1)
    return sums[f"{side}_diagonal"]


def _by_matrix(sums: Arrays, by: Array, side: str, full: bool) -> Arrays:
    """One side as `B M Bᵀ`, or as its diagonal."""
    result, is_full = dict(sums), side in sums
    moment = result.pop(side if is_full else f"{side}_diagonal")
    by = by.astype(moment.dtype)
    half = by @ moment if is_full else by * moment[None]
    found = half @ by.T if full else (half * by).sum(-1)
    return result | {side if full else f"{side}_diagonal": found}


def _name(computed: Computed) -> str:
    return f"value {computed.value}"
