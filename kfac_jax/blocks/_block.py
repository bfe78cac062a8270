"""What a block is: the approximation of one layer's diagonal block of the curvature."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Float

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
    """`factor + shift · I`, which is to be inverted."""

    factor: Array  # [*e, d, d]; of any shape [*e, ...] where inverted elementwise
    shift: Array  # [*e]; [] where inverted elementwise, or for all


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """An eigendecomposition of a block: what functions of its matrix are computed from.

    Attributes:
      eigenvalues: `(damping, mode) -> array` of the eigenvalues of the damped block.
      to_basis: takes `[*e, i, o]` vectors to coordinates shaped like the eigenvalues.
      from_basis: the transpose (and inverse) of `to_basis`.
    """

    eigenvalues: Callable[[Numeric, str], Array]
    to_basis: Callable[[Array], Array]
    from_basis: Callable[[Array], Array]


class Block(abc.ABC):
    """A frozen, hashable description of an approximation; all arrays are passed in.

    A layer's statistics are sums over the batch which also add up over micro-batches
    and devices; its factors are their normalised form, of which moving averages are
    kept. `damp` gives what has to be inverted; those in `elementwise` by reciprocals,
    all others as positive definite matrices. `solve(inverses, v)` applies the inverted
    damped block.

    Laws: `solve` with inverses of `damp` inverts `matvec` plus damping (exactly, or in
    factored form for `Kronecker`); `spectrum` agrees with `matvec`.
    """

    elementwise: ClassVar[frozenset[str]] = frozenset()
    """Which results of `damp` are inverted by reciprocals."""

    row_statistics: ClassVar[frozenset[str]] = frozenset()
    """Statistics of inputs only. Exact modes gather them once, not for each output; for
    an input that all cases share they are multiplied by the number of cases."""

    handles_tied: ClassVar[bool] = False
    """Whether it can be the block of a weight that is used transposed too. The methods
    that get a shape must then mind `tied`; `statistics` gets one of its `terms`, and
    what it returns for the second is given the prefix `transposed_`."""

    handles_one_hot: ClassVar[bool] = False
    """Whether an embedding's inputs may be given as the integers that they are: then
    its shape is `one_hot`, and `statistics` gets `x [*e, b, s]`. A factor of the
    table, as in `√d · table[ids]`, is in `dy` then. Others get one-hot rows
    `[*e, b, s, i]`, multiplied by it."""

    carried: ClassVar[frozenset[str]] = frozenset()
    """Factors that `statistics` needs, as keywords, and `solve`, beside the inverses:
    a basis. Statistics hold them too, once for each batch."""

    solves_by_sides: ClassVar[bool] = False
    """Whether `solve` is `A⁻¹ V G⁻¹` with the inverses of `input` and `output`, or of
    their diagonals, so that devices may apply rows of these."""

    handles_links: ClassVar[bool] = False
    """Whether layers may be linked to their neighbours: `input` and `output` are second
    moments of `rows` then, and damping is factored."""

    takes_gradients: ClassVar[bool] = False
    """Whether there is `of_gradients`, for weights that are used several times."""

    gradient_products: bool = False
    """Whether a gradient stays the product `Xᵀ dY` that it is, where that saves
    arithmetic; only with `solves_by_sides`."""

    @property
    def needs_examples(self) -> bool:
        """Whether rows must be summed within an example."""
        return False

    @property
    def inverted_in_every_step(self) -> bool:
        """Whether the inverse follows the factors and λ in every step, not every T3.

        All of `damp` must be elementwise then.
        """
        return bool(self.carried)

    @abc.abstractmethod
    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """Shapes of the factors."""

    def statistics_shapes(self, shape: BlockShape) -> Shapes:
        """Those of the statistics, the factors' if there are no others.

        Each with the `stacked` axes in front.
        """
        return self.factor_shapes(shape)

    @abc.abstractmethod
    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """Sums over the batch.

        `Σ_b dy dyᵀ` is already a mean over cases: the cotangents come scaled by √(1/N).
        """

    def of_gradients(self, gradients: Gradients, shape: BlockShape) -> Arrays:
        """The same sums, from each example's gradient.

        A weight that is used several times for an example has a gradient that is the
        sum over its uses. Only of blocks with `takes_gradients`. What is `carried`
        comes as keywords, as in `statistics`.

        Args:
          gradients: with the factor √(1/N).
          shape: the layer's shape.

        Returns:
          Arrays like `statistics_shapes`, each over batches.
        """
        raise NotImplementedError(f"{type(self).__name__} has no of_gradients")

    def rows(
        self, x: Float[Array, "*e b s i"], dy: Outputs
    ) -> tuple[Float[Array, "*e b r i"], Float[Array, "*e b r o"]]:
        """The rows that count as cases: all of them, or one for each example."""
        return x, dy

    def counts(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """What sums are divided by to become factors, by the factors' names.

        Sums like the statistics: those of devices and micro-batches add up.

        Args:
          statistics: the sums.
          weight: how many batches they are a sum of.

        Returns:
          Counts that broadcast to the factors; the number of batches for all.
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
        """Computes what is `carried` from the other factors."""
        return {}

    def average(self, old: Arrays, new: Arrays, epsilon: Float[Array, ""]) -> Arrays:
        """Moves the averages on by a batch: `ε · old + (1 - ε) · new`."""
        return {
            name: epsilon.astype(x.dtype) * x
            + (1 - epsilon.astype(x.dtype)) * new[name].astype(x.dtype)
            for name, x in old.items()
        }

    def refresh(self, factors: Arrays) -> Arrays:
        """What happens to the factors when inverses are refreshed, every T3 steps."""
        return factors

    @abc.abstractmethod
    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Returns what is to be inverted for the block with damping λ.

        With `carried` factors all of it must be elementwise.
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


def per_example(x: Float[Array, "*e b s i"], dy: Outputs) -> Gradients:
    """Each example's gradient, summed over its positions."""
    dtype = wide_dtype(dy.dtype)
    return jnp.einsum("...bsi,...bso->...bio", x, dy, preferred_element_type=dtype)
