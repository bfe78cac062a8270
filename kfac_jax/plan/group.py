"""What a group is: layers whose curvature is inverted together.

All that a stage may ask of layers, it asks of groups. So a way to treat layers (one by
one, linked to their neighbours, with gradients that stay products) is one class in one
file of `kfac_jax/operator/`, and no stage knows which there are.
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
"""By layer name, and for each layer by name."""

FactorShapes = dict[str, dict[str, tuple[int, ...]]]
"""Likewise."""

Abstract = dict[str, dict[str, jax.ShapeDtypeStruct]]
"""FactorShapes and types, likewise."""

Vectors = dict[str, Array]
"""By layer name, the matrix `[*e, i, o]` of a vector's entries."""

Products = dict[str, tuple[Array, Array]]
"""By layer name, X `[r, i]` and dY `[r, o]` of a gradient `Xᵀ dY`."""

Name = tuple[str, str]
"""Of a layer, and of one of its arrays."""


class ToInvert(NamedTuple):
    """What a group has inverted at a refresh."""

    matrices: dict[Name, Damped]
    elementwise: dict[Name, Damped]


class Group(abc.ABC):
    """Layers that are inverted together. Frozen and hashable; arrays are passed in.

    Methods with arrays "by layer name" get more layers than their own and return only
    their own.

    Laws: `solve_all` with the inverses of what `to_invert` returns inverts `matvec`
    plus (factored) damping; `logdet` and `sample` agree with both.
    """

    wants_roots: ClassVar[bool] = False
    """Whether what is inverted comes back as triangular roots R of inverses `R Rᵀ`."""

    @property
    @abc.abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """Its layers, the parents of linked ones before their children."""

    @property
    def name(self) -> str:
        """Its first layer's."""
        return self.layers[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """Its layers'."""
        return tuple(layer.name for layer in self.layers)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must not differ between the plan and a later trace of the program."""
        return tuple((x.name, x.kind, x.block, x.shape, x.layouts) for x in self.layers)

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
        """The shapes of what an optimizer keeps to divide by the curvature."""

    @property
    def carried(self) -> dict[str, tuple[str, ...]]:
        """Those factors, a basis, that statistics and solutions need, too."""
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
        """Whether factors are averages by entry, of which devices may keep rows."""
        return True

    @property
    def product_rows(self) -> int:
        """Of how many rows its gradient is gathered as a product; 0 where it is not."""
        return 0

    @property
    def solves_by_rows(self) -> bool:
        """Whether devices that keep rows of A⁻¹ and G⁻¹ may apply them as they are."""
        return False

    # --------------------------------------------------------------------- statistics

    @property
    @abc.abstractmethod
    def row_statistics(self) -> dict[str, frozenset[str]]:
        """Statistics that depend on layers' inputs only."""

    @abc.abstractmethod
    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[ArrayTree]
    ) -> Factors:
        """Zeros like what the taps at the layers' uses bring out.

        Args:
          sites: the uses of each layer.
          data: the loss function's further arguments.

        Returns:
          Arrays for those layers that are tapped.
        """

    @abc.abstractmethod
    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """What one tap brings out; what is left out counts as zero.

        Args:
          layer: the layer.
          site: which of its uses.
          x: the input, as the program has it; None for a shift.
          dy: the output's cotangent.
          carried: what statistics need of the factors.

        Returns:
          Arrays by name.
        """

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """Statistics from what the taps brought, summed over all uses.

        Args:
          sums: what they brought, by layer.
          carried: what statistics need of the factors.

        Returns:
          Arrays like `statistics_shapes`, without what is carried.
        """
        return {name: sums[name] for name in self.names if name in sums}

    def products(self, sums: Factors) -> Products:
        """The sides of gradients, from what the taps brought with the loss's."""
        return {}

    # ------------------------------------------------------------------------ factors

    @abc.abstractmethod
    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """What sums are divided by, as sums that add up over devices.

        Args:
          statistics: the sums.
          weight: how many batches they are of.

        Returns:
          Counts by the names of the factors, for those that statistics inform about.
        """

    def divisors(self, counts: Factors) -> Factors:
        """What sums over all devices are divided by, from counts over all devices."""
        return {name: counts[name] for name in self.names if name in counts}

    @abc.abstractmethod
    def average(self, old: Factors, new: Factors, epsilon: Array) -> Factors:
        """Moves the averages on by a batch: `ε · old + (1 - ε) · new`."""

    @abc.abstractmethod
    def looked_at(self, factors: Factors) -> tuple[list[Array], list[Array]]:
        """Of which arrays the diagonal tells whether they are finite, and of which not.

        An eigendecomposition or a matrix product that fails is NaN throughout.
        """

    # ----------------------------------------------------------------------- inverses

    @abc.abstractmethod
    def init_inverses(self) -> Factors:
        """Identities: until the first refresh succeeds, steps follow the gradient."""

    def move(self, factors: Factors) -> Factors:
        """Those factors that a refresh changes, in their new basis."""
        return {}

    @abc.abstractmethod
    def to_invert(self, factors: Factors, damping: Numeric) -> ToInvert:
        """What is to be inverted for damping λ."""

    @abc.abstractmethod
    def inverses(
        self, found: Mapping[Name, Inverted], factors: Factors, devices: Devices
    ) -> tuple[Factors, Array]:
        """What the optimizer keeps, from the inverses (or roots).

        Args:
          found: of what `to_invert` returned.
          factors: the factors.
          devices: which share what is left to do.

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
          inverses: what `inverses` returned, and what is `carried`.
          vectors: V; of layers that a mask hides there is none.
          products: X and dY of some of them, if V is their product.

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
        """Raises ValueError if it cannot be damped in this way."""

    @property
    @abc.abstractmethod
    def has_spectrum(self) -> bool:
        """Whether powers can be computed; then so are exactly damped solutions."""

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

    @abc.abstractmethod
    def logdet(self, factors: Factors, damping: Numeric, mode: str) -> Array:
        """The logarithm of the damped curvature's determinant."""

    @abc.abstractmethod
    def sample(
        self, factors: Factors, noise: Vectors, damping: Numeric, mode: str
    ) -> Vectors:
        """Turns white noise to one with the inverse damped curvature as covariance."""

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
    """What a structure sees of a program."""

    layers: Sequence[Layer]
    sites: Mapping[str, Sequence[Site]]  # by layer name, where each is used
    graph: Graph
    l2: float  # η
    custom_rules: bool  # whether derivative rules of the user's decide about gradients


class Grouped(NamedTuple):
    """What a structure makes of it."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()  # lines for the report


class Structure(Protocol):
    """How layers become groups: what `make_curvature(..., structure=)` takes."""

    def group(self, uses: Uses) -> Grouped:
        """Divides the layers into groups."""
        ...


def names_of(groups: Sequence[Group]) -> set[str]:
    """The names of all their layers."""
    return {name for group in groups for name in group.names}


def layers_of(groups: Sequence[Group]) -> list[Layer]:
    """All their layers."""
    return [layer for group in groups for layer in group.layers]


def abstract_factors(groups: Sequence[Group]) -> Abstract:
    """Their factors as they are kept."""
    shapes = {n: part for x in groups for n, part in x.factor_shapes.items()}
    return {
        layer.name: {
            n: jax.ShapeDtypeStruct(s, layer.kept_dtype(n))
            for n, s in shapes[layer.name].items()
        }
        for layer in layers_of(groups)
    }


def abstract_inverses(groups: Sequence[Group]) -> Abstract:
    """What an optimizer keeps to divide by their curvature."""
    shapes = {n: part for x in groups for n, part in x.inverse_shapes.items()}
    return {
        layer.name: {
            n: jax.ShapeDtypeStruct(s, layer.dtype)
            for n, s in shapes[layer.name].items()
        }
        for layer in layers_of(groups)
    }


def widened(groups: Sequence[Group], factors: Factors) -> Factors:
    """The factors in the types that their layers are computed in, also of NumPy's."""
    return {
        x.name: {n: jnp.asarray(f, x.dtype) for n, f in factors[x.name].items()}
        for x in layers_of(groups)
    }
