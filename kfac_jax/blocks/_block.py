"""The protocol of blocks, which approximate one layer's block of the curvature."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Float, Inexact

from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks._layout import (
    Arrays,
    BlockShape,
    Gradients,
    Inputs,
    Matrix,
    Outputs,
    Shapes,
)


class Damped(NamedTuple):
    """The matrix `factor + shift · I`, to be inverted."""

    factor: Array  # [*e, d, d]; any shape [*e, ...] if inverted elementwise
    shift: Array  # [*e]; [] if inverted elementwise, or if equal for all


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """An eigendecomposition of a block, for functions of its matrix.

    Attributes:
      eigenvalues: `(damping, mode) -> array` of the eigenvalues of the damped block.
      to_basis: maps `[*e, i, o]` vectors to coordinates shaped like the eigenvalues.
      from_basis: the transpose (and inverse) of `to_basis`.
    """

    eigenvalues: Callable[[Numeric, str], Array]
    to_basis: Callable[[Array], Array]
    from_basis: Callable[[Array], Array]


class Block(abc.ABC):
    """A frozen, hashable description of an approximation; all arrays are passed in.

    A layer's statistics are sums over the batch, which add up over micro-batches and
    devices. Its factors are the sums divided by counts, and the optimizer stores moving
    averages of them. `damp` returns the arrays to invert: those named in `elementwise`
    by reciprocals, all others as positive definite matrices. `solve(inverses, v)`
    applies the inverted damped block.

    Laws: `solve` with inverses of `damp` inverts `matvec` plus damping (exactly, or in
    factored form for `Kronecker`); `spectrum` agrees with `matvec`.
    """

    elementwise: ClassVar[frozenset[str]] = frozenset()
    """The names of results of `damp` that are inverted by reciprocals."""

    row_statistics: frozenset[str] = frozenset()
    """The names of statistics that depend on inputs only. Exact modes gather them once,
    not for each output. For an input that all cases share they are multiplied by the
    number of cases."""

    handles_tied: bool = False
    """Whether it can be the block of a weight that is also used transposed. Then the
    methods that get a shape must handle `tied`. `statistics` gets one of the shape's
    `terms`; its results for the second get the prefix `transposed_`."""

    handles_one_hot: ClassVar[bool] = False
    """Whether `statistics` takes an embedding's inputs as integers `x [*e, b, s]`, with
    a shape that is `one_hot`. Then a scalar factor of the table, as in
    `√d · table[ids]`, is in `dy`. Other blocks get one-hot rows `[*e, b, s, i]`, which
    are multiplied by the factor."""

    carried: frozenset[str] = frozenset()
    """The names of factors that later statistics are made with, such as a basis.
    `statistics` gets them as keywords, and `solve` among the inverses. A batch's
    statistics include them, too."""

    bases: frozenset[str] = frozenset()
    """The names in `carried` of orthogonal matrices. Statistics in different bases do
    not add up, which is noticed by these."""

    handles_sums: ClassVar[bool] = False
    """Whether it is a sum of two products where uses lead to different losses. Then the
    methods that get a shape must handle `products`, as for `handles_tied`, with the
    prefix `second_`."""

    needs_outputs: ClassVar[bool] = True
    """Whether statistics depend on output gradients, beyond which rows have any."""

    solves_by_sides: ClassVar[bool] = False
    """Whether `solve` is `A⁻¹ V G⁻¹` with the inverses of `input` and `output`, or of
    their diagonals, so that devices may apply rows of these."""

    handles_links: bool = False
    """Whether layers may be linked to their neighbours: `input` and `output` are second
    moments of `rows` then, and damping is factored."""

    takes_gradients: ClassVar[bool] = False
    """Whether there is `of_gradients`, for weights that are used several times."""

    gradient_products: bool = False
    """Whether gradients are kept as products `Xᵀ dY` where that saves arithmetic; only
    with `solves_by_sides`."""

    @property
    def needs_examples(self) -> bool:
        """Whether rows must be summed within an example."""
        return False

    @property
    def inverted_in_every_step(self) -> bool:
        """Whether the inverse follows the factors and λ in every step, not every T3.

        If so, all results of `damp` must be elementwise.
        """
        return bool(self.carried)

    @abc.abstractmethod
    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """Shapes of the factors."""

    def statistics_shapes(self, shape: BlockShape) -> Shapes:
        """Shapes of the statistics, each with the `stacked` axes in front.

        By default the factors' shapes.
        """
        return self.factor_shapes(shape)

    @abc.abstractmethod
    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """Sums over the cases of a batch.

        Args:
          x: inputs, zero in rows that do not count.
          dy: gradients of each case's own loss by the outputs, sampled or exact (up to
            a factor that is the same for all batches, see `Statistics.weight`).
          shape: the layer's shape.

        Returns:
          Arrays of `statistics_shapes`, without what is `carried`.
        """

    def of_gradients(self, gradients: Gradients, shape: BlockShape) -> Arrays:
        """The same sums from examples' gradients, if the block `takes_gradients`.

        The gradient of a weight that is used several times for an example is the sum
        over its uses. What is `carried` comes as keywords, as in `statistics`.

        Args:
          gradients: those of the examples' own losses, as `x` and `dy` give them.
          shape: the layer's shape.

        Returns:
          Arrays of `statistics_shapes`, all of which count by cases.

        Raises:
          NotImplementedError: without `takes_gradients`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no of_gradients")

    def rows(
        self, x: Float[Array, "*e b s i"], dy: Outputs
    ) -> tuple[Float[Array, "*e b r i"], Float[Array, "*e b r o"]]:
        """The rows that count as cases: all of them, or one for each example."""
        return x, dy

    def counts(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """The divisors that turn sums into factors, by the factors' names.

        Counts are sums too: those of devices and micro-batches add up.

        Args:
          statistics: the sums.
          weight: the number of cases that the sums are over.

        Returns:
          Counts that broadcast to the factors; by default the weight for all.
        """
        return dict.fromkeys(statistics, weight)

    def __init_subclass__(cls) -> None:
        """Refuses blocks that normalise sums in a way of their own."""
        if "factors" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} must say what its sums are divided by: expected a "
                "method counts(statistics, weight), got one called factors. Statistics "
                "are summed over devices before they are divided."
            )

    def factors(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """Divides the sums by their `counts`, where those are not zero."""
        counts = self.counts(statistics, weight)
        return {name: divide(statistics[name], count) for name, count in counts.items()}

    def carry(self, factors: Arrays) -> Arrays:
        """Computes the `carried` factors from the others."""
        return {}

    def average(self, old: Arrays, new: Arrays, epsilon: Float[Array, ""]) -> Arrays:
        """Updates the averages with a batch: `ε · old + (1 - ε) · new`.

        The first batch brings what is carried; later ones leave what is there.
        """
        result: Arrays = {}
        for name, x in old.items():
            batch, share = new[name].astype(x.dtype), epsilon.astype(x.dtype)
            if name in self.carried:
                result[name] = jnp.where(epsilon == 0, batch, x)
            else:
                result[name] = share * x + (1 - share) * batch
        return result

    def refresh(self, factors: Arrays) -> Arrays:
        """Changes the factors when inverses are refreshed, every T3 steps."""
        return factors

    @abc.abstractmethod
    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Returns the arrays to invert for the block with damping λ.

        With `carried` factors all of them must be elementwise.
        """

    @abc.abstractmethod
    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """Applies inverses (of the results of `damp`) to a vector."""

    @abc.abstractmethod
    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """Multiplies a vector by the undamped block."""

    @abc.abstractmethod
    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The diagonal of the undamped block."""

    @abc.abstractmethod
    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """An eigendecomposition of the block."""


def divide(total: Array, count: Array) -> Array:
    """A mean from a sum; zero where nothing was counted."""
    return total / jnp.where(count > 0, count, 1)


def per_example(
    x: Inexact[Array, "*e b s i"], dy: Inexact[Array, "*e b s o"]
) -> Inexact[Array, "*e b i o"]:
    """Each example's gradient, summed over its positions; also of complex weights."""
    dtype = wide_dtype(dy.dtype)
    return jnp.einsum("...bsi,...bso->...bio", x, dy, preferred_element_type=dtype)
