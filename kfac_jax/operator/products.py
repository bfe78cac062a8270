"""Layers whose gradient is kept as a product of two matrices, to save arithmetic.

A dense layer's gradient over `r` cases is `V = Xᵀ dY`, of rank r. With few cases
`A⁻¹ V G⁻¹ = (A⁻¹ Xᵀ) (dY G⁻¹)` takes fewer multiply-adds on the right than on the left
(Martens & Grosse 2015, section 8 and appendix C).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax import Array
from jaxtyping import Bool, Float

from kfac_jax._jaxpr.flow import types_outside_loops
from kfac_jax._jaxpr.sites import Site
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks import KroneckerSum
from kfac_jax.operator.mapped import Mapped
from kfac_jax.operator.remote import Remote
from kfac_jax.operator.single import Single
from kfac_jax.operator.summed import Summed
from kfac_jax.operator.two_products import TwoProducts
from kfac_jax.plan.group import Arrays, Factors, Group, Products, Uses, Vectors
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.summing import (
    cases,
    gradient_entries,
    is_remote,
    sums_gradients,
)

_SIDES = ("product_inputs", "product_outputs")
"""Names of the arrays X, `[rows, i]`, and dY, `[rows, o]`, that taps return besides
statistics. When the loss's cotangents are pulled back, `∇W = Xᵀ dY`."""


@dataclasses.dataclass(frozen=True)
class KeptProduct(Single):
    """A layer whose gradient is gathered as the two sides of a product.

    Attributes:
      layer: the layer.
      rows: the number of rows of both sides, for the plan's batch.
    """

    rows: int

    @property
    def product_rows(self) -> int:
        """The number of rows of the sides."""
        return self.rows

    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[ArrayTree]
    ) -> Factors:
        """Zeros like the block's statistics, and like the two sides."""
        found = super().probes(sites, data)
        count, shape = sites[self.name][0].count, self.layer.shape
        for name, n in zip(_SIDES, (shape.inputs, shape.outputs), strict=True):
            found[self.name][name] = jnp.zeros((count, n), self.layer.dtype)
        return found

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The block's statistics, and the two sides.

        The sides are used only when the loss is pulled back. The compiler removes them
        where cotangents are pulled back for statistics.
        """
        sides = site.canonical(x, dy, layer.shape.homogeneous)
        rows = [side.reshape(-1, side.shape[-1]) for side in sides]
        sums = super().gather(layer, site, x, dy, carried)
        return sums | dict(zip(_SIDES, rows, strict=True))

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """The statistics without the sides."""
        own = {n: x for n, x in sums[self.name].items() if n not in _SIDES}
        return {self.name: own}

    def products(self, sums: Factors) -> Products:
        """The two sides of the gradient."""
        inputs, outputs = (sums[self.name][side] for side in _SIDES)
        return {self.name: (inputs, outputs)}

    @classmethod
    def solve_all(
        cls,
        groups: Sequence["Single"],
        inverses: Factors,
        vectors: Vectors,
        products: Products,
    ) -> Vectors:
        """Solves from the sides if every vector is their product, else from vectors."""
        names = [x.name for x in groups if x.name in vectors]
        if not names or not all(name in products for name in names):
            return super().solve_all(groups, inverses, vectors, products)

        def by_rows() -> Vectors:
            return {
                name: (products[name][0] @ inverses[name]["input"]).T
                @ (products[name][1] @ inverses[name]["output"])
                for name in names
            }

        def by_matrix() -> Vectors:
            return {
                name: inverses[name]["input"] @ vectors[name] @ inverses[name]["output"]
                for name in names
            }

        same = [_is_product(vectors[name], *products[name]) for name in names]
        return jax.lax.cond(jnp.stack(same).all(), by_rows, by_matrix)


def _is_product(
    v: Float[Array, "i o"], x: Float[Array, "r i"], dy: Float[Array, "r o"]
) -> Bool[Array, ""]:
    """Whether `V = Xᵀ dY`, tested with one vector of random signs.

    A gradient may have been clipped, or averaged over devices, since it was gathered.
    The test `uᵀ V = (X u)ᵀ dY` takes about as long as reading V, X and dY once.
    """
    u = jax.random.rademacher(jax.random.key(0), (len(v),), v.dtype)
    actual, expected = u @ v, (x @ u) @ dy
    tolerance = jnp.sqrt(jnp.asarray(jnp.finfo(v.dtype).eps, v.dtype))
    return jnp.linalg.norm(expected - actual) <= tolerance * jnp.linalg.norm(actual)


# ------------------------------------------------------------------- which layers


def by_themselves(
    layers: Sequence[Layer], uses: Uses, linked: frozenset[str] = frozenset()
) -> tuple[list[Group], list[str]]:
    """Makes a group of each layer, with gradients as products where asked and possible.

    Args:
      layers: the layers.
      uses: all uses of the program.
      linked: the names of layers that are already in a group with others.

    Returns:
      The groups, and lines for the report.
    """
    types = types_outside_loops(uses.graph)
    groups: list[Group] = []
    products: list[str] = []
    summed: list[str] = []
    others: list[str] = []
    for layer in layers:
        asked = layer.block is not None and layer.block.gradient_products
        reason = _refusal(layer, uses, types, layer.name in linked) if asked else ""
        if layer.name in linked or not asked or reason:
            if layer.name not in linked:
                sites = uses.sites[layer.name]
                several = sums_gradients(layer.block, sites)
                remote = is_remote(sites)
                if several:
                    held = Remote if remote else Summed
                    groups.append(held(layer, cases(sites)))
                else:
                    alone = Mapped if remote and layer.tagged else Single
                    two = isinstance(layer.block, KroneckerSum)
                    groups.append(TwoProducts(layer) if two else alone(layer))
                summed += [_held(layer, sites)] if several else []
            others += [f"  {layer.name}: {reason}"] if reason else []
            continue
        rows = uses.sites[layer.name][0].count
        groups.append(KeptProduct(layer, rows))
        products.append(f"  {layer.name}: {rows} cases")
    notes = ["Gradients preconditioned as products:", *products] if products else []
    notes += ["Examples' gradients, summed over uses:", *summed] if summed else []
    notes += ["Gradients not kept as products:", *others] if others else []
    return groups, notes


def _held(layer: Layer, sites: Sequence[Site]) -> str:
    """What the gradients of all examples take, for the report."""
    size = gradient_entries(layer, sites) * jnp.dtype(layer.dtype).itemsize
    return f"  {layer.name}: {size / 2**20:.3g} MiB in a step with statistics"


def not_one_product(layer: Layer, sites: Sequence[Site]) -> str:
    """Why a layer is not one product with two full factors, `input` and `output`.

    Args:
      layer: the layer.
      sites: its uses.

    Returns:
      The reason; empty if it is.
    """
    if layer.block is not None and layer.block.carried:
        return "its statistics are weighed by its factors"
    if set(layer.factor_shapes) != {"input", "output"}:
        return "a side of its block is diagonal"
    if is_remote(sites):
        return "it reaches the data by a map"
    if layer.shape.lead:
        return "it stands for several independent layers"
    if len(sites) != 1 or sites[0].repeated:
        return "it is used more than once"
    (site,) = sites
    if site.reader.is_partial:
        return "only a part of it is used here"
    if site.cases:
        return "its input is the same for all cases"
    return ""


def _refusal(layer: Layer, uses: Uses, types: Mapping[int, Any], linked: bool) -> str:
    """Why a gradient is not kept as a product; empty if it is."""
    if uses.custom_rules:
        return "a custom derivative rule of the program may change its gradient"
    if uses.l2:
        return "the penalty (l2) adds to its gradient"
    if layer.kind != "dense":
        return f'its kind is "{layer.kind}"'
    if linked:
        return "it is linked to another layer"
    sites = uses.sites[layer.name]
    if reason := not_one_product(layer, sites):
        return reason
    (site,) = sites
    if isinstance(site.output, tuple) or site.output not in types:
        return "it is inside a loop or conditional"
    dtype = jnp.dtype(types[site.output])
    if wide_dtype(dtype) != dtype:
        return f"its outputs are {dtype}, too coarse to recognise its gradient by"
    i, o, r = layer.shape.inputs, layer.shape.outputs, site.count
    # A⁻¹ Xᵀ, dY G⁻¹ and their product, against A⁻¹ V and (A⁻¹ V) G⁻¹
    if r * (i * i + o * o + i * o) >= i * o * (i + o):
        return f"it would take more multiply-adds with {r} cases"
    return ""
