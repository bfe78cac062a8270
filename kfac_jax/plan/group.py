"""The protocol of groups: layers whose curvature is inverted together.

Stages ask groups, never layers. So each way to treat layers (one by one, linked to
their neighbours, with gradients kept as products) is one class in one file of
`kfac_jax/operator/`, and no stage knows which classes there are.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from chex import ArrayTree, Numeric
from jax import Array

from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.sites import Site
from kfac_jax.blocks import Damped
from kfac_jax.blocks._layout import Arrays as Arrays
from kfac_jax.devices import Devices
from kfac_jax.linalg import Inverted
from kfac_jax.plan.layer import Layer

Factors = dict[str, Arrays]
"""Arrays by layer name, then by the array's name."""

FactorShapes = dict[str, dict[str, tuple[int, ...]]]
"""Shapes by layer name, then by the array's name."""

Abstract = dict[str, dict[str, jax.ShapeDtypeStruct]]
"""Shapes and types by layer name, then by the array's name."""

Vectors = dict[str, Array]
"""By layer name, the matrix `[*e, i, o]` of a vector's entries."""

Products = dict[str, tuple[Array, Array]]
"""By layer name, X `[r, i]` and dY `[r, o]` of a gradient `Xᵀ dY`."""

Name = tuple[str, str]
"""The name of a layer, and the name of one of its arrays."""


class ToInvert(NamedTuple):
    """Damped arrays to invert at a refresh: as matrices, and entry by entry."""

    matrices: dict[Name, Damped]
    elementwise: dict[Name, Damped]


class Group(abc.ABC):
    """Layers that are inverted together. Frozen and hashable; arrays are passed in.

    Arrays "by layer name" that a method gets may include other groups' layers; its
    results only include this group's.

    Laws: `solve_all` with the inverses of what `to_invert` returns inverts `matvec`
    plus (factored) damping; `logdet` and `sample` agree with both.
    """

    wants_roots: ClassVar[bool] = False
    """Whether `inverses` gets triangular roots R of the inverses `R Rᵀ` instead."""

    @property
    @abc.abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """Its layers; a linked layer's parent comes before it."""

    @property
    def name(self) -> str:
        """The name of its first layer."""
        return self.layers[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def signature(self) -> tuple[Any, ...]:
        """The properties that a later trace of the program must have, too."""
        return tuple(
            (x.name, x.kind, x.block, x.shape, x.layouts, x.boxes) for x in self.layers
        )

    # ------------------------------------------------------------------ what it holds

    @property
    def factor_shapes(self) -> FactorShapes:
        """The shapes of its factors."""
        return {x.name: x.factor_shapes for x in self.layers}

    @property
    def statistics_shapes(self) -> FactorShapes:
        """The shapes of one batch's statistics."""
        return {x.name: x.statistics_shapes for x in self.layers}

    @property
    @abc.abstractmethod
    def inverse_shapes(self) -> FactorShapes:
        """The shapes of the arrays that an optimizer stores to apply the inverse."""

    @property
    def carried(self) -> dict[str, tuple[str, ...]]:
        """The names of factors (bases) that statistics and solutions need as well."""
        return {x.name: tuple(x.carried_shapes) for x in self.layers}

    @property
    def moves(self) -> bool:
        """Whether a refresh moves factors to another basis."""
        return any(self.carried.values())

    @property
    def in_every_step(self) -> bool:
        """Whether inverses follow the factors and λ in every step, not every T3."""
        return False

    @property
    def by_entry(self) -> bool:
        """Whether factors are averaged by entry, so that devices may keep rows."""
        return True

    @property
    def product_rows(self) -> int:
        """The number of rows of a gradient kept as a product; 0 if it is not one."""
        return 0

    @property
    def solves_by_rows(self) -> bool:
        """Whether devices may apply their rows of A⁻¹ and G⁻¹ without joining them."""
        return False

    # --------------------------------------------------------------------- statistics

    @property
    @abc.abstractmethod
    def row_statistics(self) -> dict[str, frozenset[str]]:
        """For each layer the names of statistics that depend on its inputs only."""

    @abc.abstractmethod
    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[ArrayTree]
    ) -> Factors:
        """Zeros like the arrays that the taps at the layers' uses return.

        Args:
          sites: the uses of each layer.
          data: the loss function's further arguments.

        Returns:
          Arrays for the layers that are tapped.
        """

    def spread(
        self,
        probes: Factors,
        sites: Mapping[str, Sequence[Site]],
        graph: Graph,
        inputs: Sequence[ArrayTree],
    ) -> Factors:
        """The arguments of the taps, from those that AD returns statistics for.

        Args:
          probes: what `probes` returns, with what is carried.
          sites: the uses of each layer.
          graph: the program.
          inputs: the program's inputs.

        Returns:
          Arrays by layer; a function of `probes` that JAX differentiates.
        """
        return probes

    def handed(self, site: Site) -> tuple[str, ...]:
        """The names of arrays of `spread` that a use's `gather` gets as carried."""
        return ()

    def tap(self, layer: Layer, site: Site) -> tuple[str, tuple[str, ...]]:
        """The name of what `spread` returns for a use, and its entries with values."""
        return layer.name, (*self.carried[layer.name], *self.handed(site))

    @abc.abstractmethod
    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The contribution of one use to the statistics.

        Args:
          layer: the layer.
          site: one of its uses.
          x: the input, as the program has it; None for a shift.
          dy: the output's cotangent.
          carried: the factors that the statistics depend on.

        Returns:
          Arrays by name; arrays left out count as zero.
        """

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """The statistics, from what the taps returned.

        Args:
          sums: what the taps returned, summed over all uses.
          carried: the factors that the statistics depend on.

        Returns:
          Arrays like `statistics_shapes`, without those that are carried.
        """
        return {name: sums[name] for name in self.names if name in sums}

    def products(self, sums: Factors) -> Products:
        """The sides of gradients, from what taps returned for the loss's cotangent."""
        return {}

    # ------------------------------------------------------------------------ factors

    @abc.abstractmethod
    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """The counts that sums are divided by; counts add up over devices, like sums.

        Args:
          statistics: the sums.
          weight: the number of cases that they are over.

        Returns:
          Counts by layer and factor name, for factors that have statistics.
        """

    def divisors(self, counts: Factors) -> Factors:
        """The divisors of sums over all devices, from counts over all devices."""
        return {name: counts[name] for name in self.names if name in counts}

    @abc.abstractmethod
    def average(self, old: Factors, new: Factors, epsilon: Array) -> Factors:
        """Updates the averages with a batch: `ε · old + (1 - ε) · new`."""

    @abc.abstractmethod
    def looked_at(self, factors: Factors) -> tuple[list[Array], list[Array]]:
        """Arrays to check for finiteness: by their diagonal, and by every entry.

        The diagonal is enough for a matrix product or an eigendecomposition, which is
        NaN throughout if it fails.
        """

    # ----------------------------------------------------------------------- inverses

    @abc.abstractmethod
    def init_inverses(self) -> Factors:
        """Identities: until the first refresh succeeds, steps follow the gradient."""

    def move(self, factors: Factors) -> Factors:
        """The factors that a refresh changes, in their new basis."""
        return {}

    @abc.abstractmethod
    def to_invert(self, factors: Factors, damping: Numeric) -> ToInvert:
        """The arrays to invert for damping λ."""

    @abc.abstractmethod
    def inverses(
        self,
        found: Mapping[Name, Inverted],
        factors: Factors,
        damping: Numeric,
        devices: Devices,
    ) -> tuple[Factors, Array]:
        """The arrays that the optimizer stores, from the inverses (or roots).

        Args:
          found: the inverses of what `to_invert` returned.
          factors: the factors.
          damping: λ.
          devices: the devices that share the remaining work.

        Returns:
          Arrays like `inverse_shapes`, and whether all are finite.
        """

    @classmethod
    @abc.abstractmethod
    def solve_all(
        cls,
        groups: Sequence[Any],
        inverses: Factors,
        vectors: Vectors,
        products: Products,
    ) -> Vectors:
        """Applies inverses for all groups of this class.

        Args:
          groups: the groups.
          inverses: the results of `inverses`, and the factors in `carried`.
          vectors: V; layers that a mask hides have none.
          products: X and dY of some layers, whose V may be `Xᵀ dY`.

        Returns:
          The products of all layers that have vectors.
        """

    # ----------------------------------------------------------------------- operator

    @abc.abstractmethod
    def matvec(self, factors: Factors, vectors: Vectors) -> Vectors:
        """Multiplies by the undamped curvature."""

    @abc.abstractmethod
    def diagonal(self, factors: Factors) -> Vectors:
        """The undamped curvature's diagonal."""

    @abc.abstractmethod
    def check_mode(self, damping: Numeric, mode: str) -> None:
        """Raises ValueError if the group cannot be damped in this way."""

    @property
    @abc.abstractmethod
    def has_spectrum(self) -> bool:
        """Whether powers can be computed, and so solutions with exact damping."""

    @abc.abstractmethod
    def power(
        self,
        factors: Factors,
        vectors: Vectors,
        exponent: Numeric,
        damping: Numeric,
        mode: str,
    ) -> Vectors:
        """Multiplies by a power of the damped curvature.

        Raises:
          ValueError: without a spectrum.
        """

    def eigenvalues(self, factors: Factors) -> Array:
        """Those of the undamped block.

        Raises:
          ValueError: without a spectrum.
        """
        raise ValueError(
            f"The block of {self.names} has no eigenvalues in closed form: expected a "
            f"plan with structure=BlockDiagonal() and blocks of one product, got "
            f"{type(self).__name__}."
        )

    @abc.abstractmethod
    def logdet(self, factors: Factors, damping: Numeric, mode: str) -> Array:
        """The logarithm of the damped curvature's determinant."""

    @abc.abstractmethod
    def sample(
        self, factors: Factors, noise: Vectors, damping: Numeric, mode: str
    ) -> Vectors:
        """Turns white noise into noise with covariance `(F + λ I)⁻¹`."""

    # ------------------------------------------------------------------ costs, report

    @property
    @abc.abstractmethod
    def inversion_cost(self) -> int:
        """Multiply-adds of one refresh, d³ for the inversion of a factor `[d, d]`."""

    @property
    @abc.abstractmethod
    def statistics_cost(self) -> float:
        """Multiply-adds of one batch's statistics, gradients of outputs included."""


class Uses(NamedTuple):
    """The layers and uses of a program, from which a structure makes groups."""

    layers: Sequence[Layer]
    sites: Mapping[str, Sequence[Site]]  # for each layer name, its uses
    graph: Graph
    l2: float  # η
    custom_rules: bool  # whether a user's derivative rule may decide about gradients


class Grouped(NamedTuple):
    """The groups that a structure makes."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()  # lines for the report


class Structure(Protocol):
    """How layers become groups: what `make_curvature(..., structure=)` takes."""

    def group(self, uses: Uses) -> Grouped:
        """Divides the layers into groups."""
        ...


def names_of(groups: Sequence[Group]) -> set[str]:
    """The names of all layers of some groups."""
    return {name for group in groups for name in group.names}


def layers_of(groups: Sequence[Group]) -> list[Layer]:
    """All layers of some groups."""
    return [layer for group in groups for layer in group.layers]


def abstract_factors(groups: Sequence[Group]) -> Abstract:
    """Shapes and types of the groups' factors as they are stored."""
    shapes = {n: part for x in groups for n, part in x.factor_shapes.items()}
    return {
        layer.name: {
            n: jax.ShapeDtypeStruct(s, layer.stored_dtype(n))
            for n, s in shapes[layer.name].items()
        }
        for layer in layers_of(groups)
    }


def abstract_inverses(groups: Sequence[Group]) -> Abstract:
    """Shapes and types of the arrays that an optimizer stores to apply inverses."""
    shapes = {n: part for x in groups for n, part in x.inverse_shapes.items()}
    return {
        layer.name: {
            n: jax.ShapeDtypeStruct(s, layer.dtype)
            for n, s in shapes[layer.name].items()
        }
        for layer in layers_of(groups)
    }


def widened(groups: Sequence[Group], factors: Factors) -> Factors:
    """Casts factors, NumPy's too, to the types that curvature is computed in."""
    return {
        x.name: {n: jnp.asarray(f, x.dtype) for n, f in factors[x.name].items()}
        for x in layers_of(groups)
    }
