"""Groups of a single layer, which the layer's block approximates."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from chex import ArrayTree, Numeric
from jax import Array

from kfac_jax._jaxpr.loops import sum_over
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import LOST, Examples
from kfac_jax._utils import fresh
from kfac_jax.blocks import Block, BlockShape, Spectrum
from kfac_jax.blocks._tied import SECOND, join
from kfac_jax.devices import Devices
from kfac_jax.devices.rows import row_axis
from kfac_jax.linalg import Inverted
from kfac_jax.plan.group import (
    Arrays,
    Factors,
    FactorShapes,
    Group,
    Name,
    Products,
    ToInvert,
    Vectors,
)
from kfac_jax.plan.layer import Layer


@dataclasses.dataclass(frozen=True)
class Single(Group):
    """One layer with its block."""

    layer: Layer

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The single layer."""
        return (self.layer,)

    @property
    def block(self) -> Block:
        """The layer's block, which must not be None."""
        assert self.layer.block is not None
        return self.layer.block

    # ------------------------------------------------------------------ what it holds

    @property
    def inverse_shapes(self) -> FactorShapes:
        """The shapes of the matrices that the block has inverted."""
        return {self.name: {name: x.shape for name, x in self.layer.damped.items()}}

    @property
    def in_every_step(self) -> bool:
        """Whether the block's inverses follow the factors in every step."""
        return self.layer.block is not None and self.block.inverted_in_every_step

    @property
    def by_entry(self) -> bool:
        """Whether the block has neither a basis nor its own way to average."""
        if self.layer.block is None:
            return True
        return not self.moves and type(self.block).average is Block.average

    @property
    def solves_by_rows(self) -> bool:
        """Whether the inverse is `A⁻¹ ⊗ G⁻¹`, cut along the first axis after `lead`."""
        if self.layer.block is None or not self.block.solves_by_sides:
            return False
        lead = len(self.layer.shape.lead)
        shapes = self.inverse_shapes[self.name].values()
        return all(row_axis(shape) == lead for shape in shapes)

    # --------------------------------------------------------------------- statistics

    @property
    def row_statistics(self) -> dict[str, frozenset[str]]:
        """The block's statistics that depend on inputs only."""
        layer = self.layer
        own = frozenset() if layer.block is None else layer.block.row_statistics
        return {self.name: own}

    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[ArrayTree]
    ) -> Factors:
        """Zeros like the block's statistics."""
        if not self.layer.is_tapped:
            return {}
        shapes = self.layer.statistics_shapes
        zeros = {n: jnp.zeros(s, self.layer.dtype) for n, s in shapes.items()}
        return {self.name: zeros}

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The block's statistics."""
        return site_statistics(site, self.block, layer.shape, x, dy, carried)

    # ------------------------------------------------------------------------ factors

    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """The block's counts."""
        own = statistics[self.name]
        if self.layer.block is None or not own:
            return {}
        return {self.name: self.block.counts(own, weight.astype(self.layer.dtype))}

    def average(self, old: Factors, new: Factors, epsilon: Array) -> Factors:
        """The block's averages."""
        own = self.block.average(old[self.name], new[self.name], epsilon)
        return {self.name: own}

    def looked_at(self, factors: Factors) -> tuple[list[Array], list[Array]]:
        """Matrices (also bases), and arrays that are inverted elementwise."""
        elementwise = self.block.elementwise
        own = factors[self.name]
        matrices = [x for name, x in own.items() if name not in elementwise]
        return matrices, [x for name, x in own.items() if name in elementwise]

    # ----------------------------------------------------------------------- inverses

    def init_inverses(self) -> Factors:
        """Identities, or ones for what is inverted elementwise."""
        own = self.layer.damped
        elementwise = self.block.elementwise if own else frozenset()
        return {
            self.name: {
                name: fresh.full(x.shape, 1.0, x.dtype)
                if name in elementwise
                else fresh.identities(x.shape, x.dtype)
                for name, x in own.items()
            }
        }

    def move(self, factors: Factors) -> Factors:
        """The factors that the block's refresh changes."""
        own = factors[self.name]
        new = self.block.refresh(own)
        return {self.name: {n: x for n, x in new.items() if x is not own[n]}}

    def to_invert(self, factors: Factors, damping: Numeric) -> ToInvert:
        """The matrices that the block has inverted."""
        if self.layer.block is None:
            return ToInvert({}, {})
        damping = jnp.asarray(damping, self.layer.dtype)
        damped = self.block.damp(factors[self.name], damping)
        elementwise = self.block.elementwise
        return ToInvert(
            {(self.name, n): x for n, x in damped.items() if n not in elementwise},
            {(self.name, n): x for n, x in damped.items() if n in elementwise},
        )

    def inverses(
        self,
        found: Mapping[Name, Inverted],
        factors: Factors,
        damping: Numeric,
        devices: Devices,
    ) -> tuple[Factors, Array]:
        """The inverses, unchanged."""
        own = {name: found[self.name, name] for name in self.layer.damped}
        flags = [x.finite for x in own.values()]
        finite = jnp.asarray(True)
        if flags:
            finite = functools.reduce(jnp.logical_and, flags)
        return {self.name: {name: x.inverse for name, x in own.items()}}, finite

    @classmethod
    def solve_all(
        cls,
        groups: Sequence["Single"],
        inverses: Factors,
        vectors: Vectors,
        products: Products,
    ) -> Vectors:
        """Solves layer by layer."""
        return {
            x.name: x.block.solve(inverses[x.name], vectors[x.name])
            for x in groups
            if x.name in vectors
        }

    # ----------------------------------------------------------------------- operator

    def matvec(self, factors: Factors, vectors: Vectors) -> Vectors:
        """Multiplies by the block."""
        return {self.name: self.block.matvec(factors[self.name], vectors[self.name])}

    def diagonal(self, factors: Factors) -> Vectors:
        """The block's diagonal."""
        return {self.name: self.block.diagonal(factors[self.name], self.layer.shape)}

    def check_mode(self, damping: Numeric, mode: str) -> None:
        """Does nothing: blocks have both modes."""

    @property
    def has_spectrum(self) -> bool:
        """True, as every block has one."""
        return True

    def _spectrum(self, factors: Factors) -> Spectrum:
        return self.block.spectrum(factors[self.name], self.layer.shape)

    def power(
        self,
        factors: Factors,
        vectors: Vectors,
        exponent: Numeric,
        damping: Numeric,
        mode: str,
    ) -> Vectors:
        """Multiplies in the basis of the block's eigenvectors."""
        spectrum = self._spectrum(factors)
        v = vectors[self.name]
        scale = (spectrum.eigenvalues(damping, mode) ** exponent).astype(v.dtype)
        return {self.name: spectrum.from_basis(scale * spectrum.to_basis(v))}

    def eigenvalues(self, factors: Factors) -> Array:
        """Those of the block."""
        if not self.has_spectrum:
            return super().eigenvalues(factors)
        return self._spectrum(factors).eigenvalues(0.0, "exact")

    def logdet(self, factors: Factors, damping: Numeric, mode: str) -> Array:
        """The sum of the logarithms of the block's eigenvalues."""
        return jnp.log(self._spectrum(factors).eigenvalues(damping, mode)).sum()

    def sample(
        self, factors: Factors, noise: Vectors, damping: Numeric, mode: str
    ) -> Vectors:
        """Multiplies the noise by the power -½."""
        return self.power(factors, noise, -0.5, damping, mode)

    # ------------------------------------------------------------------ costs, report

    @property
    def inversion_cost(self) -> int:
        """Multiply-adds of the factors that are inverted or decomposed."""
        layer = self.layer
        if layer.block is None:
            return 0
        names = layer.block.elementwise | layer.block.carried
        inverted = {name: x.shape for name, x in layer.damped.items()}
        if not layer.shape.tied:  # a tied layer's factors are added up before
            inverted |= layer.factor_shapes
        return sum(
            math.prod(shape) * shape[-1]
            for name, shape in inverted.items()
            if name not in names
        )

    @property
    def statistics_cost(self) -> float:
        """Multiply-adds of the factors' products, and of the output's gradient."""
        return statistics_cost(self.layer, self.layer.factor_shapes)


def statistics_cost(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Multiply-adds of one batch's second moments, gradients of outputs included.

    Args:
      layer: the layer.
      shapes: the shapes of its second moments.

    Returns:
      The number.
    """
    if not layer.is_tapped:
        return 0
    moments = sum(map(math.prod, shapes.values()))
    moments /= len(layer.shape.terms)  # about half of a tied layer's rows go to each
    return layer.positions * (moments + math.prod(layer.shape.matrix))


def site_statistics(
    site: Site,
    block: Block,
    shape: BlockShape,
    x: Array | None,
    dy: Array,
    carried: Arrays,
) -> Arrays:
    """One use's statistics, from input and output cotangent as the program has them.

    A convolution's patches take up to the kernel's size times the memory of its input.
    So they are made for a chunk of the batch at a time, which takes no more memory than
    the input.

    Args:
      site: the use.
      block: the layer's block.
      shape: the layer's shape.
      x: the input; None for a shift.
      dy: the cotangent of the output.
      carried: the factors that the block's statistics need.

    Returns:
      The block's sums.
    """

    def gathered(site: Site, x: Array | None, dy: Array) -> Arrays:
        term = shape.terms[site.swapped or site.term]
        rows = site.canonical(x, dy, term.homogeneous, one_hot=term.one_hot)
        sums = block.statistics(*rows, term, **carried)
        if site.cases:
            sums = _repeated(sums, block.row_statistics, site.cases)
        if site.swapped:
            return join({}, sums)
        return join({}, sums, prefix=SECOND) if site.term else sums

    axes = site.reader.batch_axes
    if axes is None or x is None:
        return gathered(site, x, dy)
    x_axis, y_axis = axes
    batch = x.shape[x_axis]
    chunks, size = site.reader.chunks(batch)
    in_front = Examples(0, batch)
    # A chunk of the batch axis holds full examples only if that is their axis. Blocks
    # that sum within an example must see all of it.
    if chunks <= 1 or (block.needs_examples and site.examples != in_front):
        return gathered(site, x, dy)

    def chunk(start: Array | int, size: int) -> Arrays:
        return gathered(
            dataclasses.replace(
                site, examples=Examples(0, size) if site.examples == in_front else LOST
            ),
            jax.lax.dynamic_slice_in_dim(x, start, size, x_axis),
            jax.lax.dynamic_slice_in_dim(dy, start, size, y_axis),
        )

    total = sum_over(lambda index: chunk(index * size, size), chunks)
    done = chunks * size
    if done == batch:
        return total
    return jax.tree.map(jnp.add, total, chunk(done, batch - done))


def _repeated(sums: Arrays, row_statistics: frozenset[str], cases: int) -> Arrays:
    """The statistics of a constant input, which stands for one row of each case.

    `A` has the same row `cases` times. `G` needs no factor: the output's gradient is
    the sum over cases, and the expectation of its square is the sum of the cases'
    squares, as sampled gradients of different cases are independent with mean zero.
    """
    return {
        name: value * cases if name in row_statistics else value
        for name, value in sums.items()
    }
