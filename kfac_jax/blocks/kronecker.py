"""The Kronecker-factored block of Martens & Grosse (2015)."""

import dataclasses
from typing import final

from chex import Numeric
from jax import Array
from jaxtyping import Float

from kfac_jax._utils import arguments
from kfac_jax.blocks import _fits, _moments, _product
from kfac_jax.blocks._block import Block, Damped, Spectrum
from kfac_jax.blocks._layout import Arrays, BlockShape, Inputs, Matrix, Outputs, Shapes
from kfac_jax.blocks._pi import check_pi
from kfac_jax.blocks._sides import check_max_factor_dim, side_shapes
from kfac_jax.blocks._tied import TRANSPOSED, join, nearest_product, split

ROW_STATISTICS = frozenset(
    prefix + name
    for prefix in ("", TRANSPOSED)
    for name in ("input", "input_diagonal", "count")
)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Kronecker(Block):
    """`F ≈ A ⊗ G`, with `A = E[x xᵀ]` and `G = E[dy dyᵀ]`.

    Weight and bias share the block: the bias is the weight of a homogeneous coordinate.
    As a matrix, `V ↦ A V G`.

    A layer used at several positions of an example (weight sharing) has, in the
    "expand" setting, `A` averaged over all of them and `G` summed. In the "reduce"
    setting x is averaged and dy summed over an example's positions first. Each is exact
    for deep linear nets where the loss treats positions, or their mean, as cases.

    Factored damping replaces the factors by `A + π √λ I` and `G + √λ / π I` with `π =
    √(‖A ⊗ I‖ / ‖I ⊗ G‖)`. This π minimises a bound on the norm of the difference
    between their product and `A ⊗ G + λ I`.

    A weight that is also used transposed (a table of embeddings that is the output
    layer too) has a sum of two such products, `A ⊗ G + G' ⊗ A'`, with four factors. The
    block is the product nearest to this sum in the Frobenius norm.

    A side longer than `max_factor_dim` keeps only its factor's diagonal, called
    `input_diagonal` or `output_diagonal`. So do one-hot inputs (an embedding's
    vocabulary), whose factor is diagonal anyway.

    With `gradient_products`, a dense layer's inverses are applied to the two matrices
    whose product is the gradient, `A⁻¹ (Xᵀ dY) G⁻¹ = (A⁻¹ Xᵀ) (dY G⁻¹)`, if that takes
    fewer multiply-adds: if a batch has fewer cases than about two thirds of the layer's
    width. It is not possible with an `l2` penalty. The report says which layers do so.
    The statistics then include the batch's inputs and output gradients. If an update's
    gradients are not their product (but clipped, or averaged over devices or
    micro-batches), the update detects that and multiplies the gradients themselves.

    By default both sides are taken for independent. Other fits weigh each row by the
    other side, `A = E[(dyᵀ Q dy) x xᵀ]` and `G = E[(xᵀ P x) dy dyᵀ]`, up to a number
    that makes the scale of their product the best. "frobenius", with P = A and Q = G,
    makes the product nearest to the second moments of gradients `x dyᵀ`; "kl", with the
    inverses of A and G, that with the least divergence from them. P and Q are of the
    factors so far, as the basis of `Eigen` is, and are
    renewed with the inverses: pass `factors=state.factors`. In "expand" each row counts
    as a case. A weight that is also used transposed keeps the independent fit, and
    layers with another one are not linked to others.

    Attributes:
      max_factor_dim: the longest side with a full factor; None for no limit.
      weight_sharing: "expand" or "reduce".
      pi: the norm in π: "trace", the paper's choice; "frobenius"; "spectral", for the
        cost of an eigendecomposition in each refresh; or "one" for π = 1.
      gradient_products: whether to precondition gradients as products, see above.
      exact_scalars: whether a layer with a single input or output, whose factor g is a
        number, is damped exactly, as `A g + λ I`. If not, its damping is factored, too.
      fit: "independent" (the paper's), "frobenius" or "kl".

    References:
      Martens & Grosse 2015, sections 3, 4.2, 6.3 and 8. Eschenhagen et al. 2023
      (arXiv:2311.00636) for weight sharing. Van Loan & Pitsianis 1993 and Lin et al.
      2025 (arXiv:2509.03378) for the fits.

    >>> Kronecker(weight_sharing="reduce")
    Kronecker(max_factor_dim=8192, weight_sharing='reduce', pi='trace',
              gradient_products=False, exact_scalars=False, fit='independent')
    """

    max_factor_dim: int | None = 8192
    weight_sharing: str = "expand"
    pi: str = "trace"
    gradient_products: bool = False
    exact_scalars: bool = False
    fit: str = "independent"

    elementwise = frozenset(
        prefix + name
        for prefix in ("", TRANSPOSED)
        for name in ("input_diagonal", "output_diagonal")
    ) | {"scale", "input_diagonal_weight", "output_diagonal_weight"}
    handles_one_hot = True
    solves_by_sides = True

    def __post_init__(self) -> None:
        """Checks the options."""
        check_max_factor_dim(self.max_factor_dim)
        _moments.check_weight_sharing(self.weight_sharing)
        check_pi(self.pi)
        arguments.choice("fit", self.fit, _fits.FITS)
        for name in ("gradient_products", "exact_scalars"):
            arguments.flag(name, getattr(self, name))

    @property
    def is_fitted(self) -> bool:
        """Whether rows are weighed by the other side."""
        return self.fit != "independent"

    @property
    def row_statistics(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The sums of inputs, if rows of them are not weighed."""
        return frozenset() if self.is_fitted else ROW_STATISTICS

    @property
    def handles_tied(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the sides are taken for independent."""
        return not self.is_fitted

    @property
    def handles_links(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the sides are taken for independent."""
        return not self.is_fitted

    @property
    def carried(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weights of the sides in a fit."""
        return _fits.CARRIED if self.is_fitted else frozenset()

    @property
    def inverted_in_every_step(self) -> bool:
        """No: matrices are."""
        return False

    @property
    def needs_examples(self) -> bool:
        """Whether the setting is "reduce", which sums within an example."""
        return self.weight_sharing == "reduce"

    def statistics_shapes(self, shape: BlockShape) -> Shapes:
        """Sums for both factors, and the number of rows that count."""
        if self.is_fitted:
            return _fits.shapes(shape, self.max_factor_dim)
        first, *second = (_moments.shapes(s, self.max_factor_dim) for s in shape.terms)
        return join(first, *second) if second else first

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """`input: [*e, i, i]` and `output: [*e, o, o]`, or their diagonals."""
        if self.is_fitted:
            return _fits.shapes(shape, self.max_factor_dim)
        first, *second = (side_shapes(s, self.max_factor_dim) for s in shape.terms)
        return join(first, *second) if second else first

    def statistics(
        self, x: Inputs, dy: Outputs, shape: BlockShape, **weights: Array
    ) -> Arrays:
        """The sums over all rows with a gradient."""
        if self.is_fitted:
            return _fits.moments(x, dy, shape, weights, self.weight_sharing)
        limit, sharing = self.max_factor_dim, self.weight_sharing
        return _moments.moments(x, dy, shape, limit, sharing)

    def rows(
        self, x: Float[Array, "*e b s i"], dy: Outputs
    ) -> tuple[Float[Array, "*e b r i"], Float[Array, "*e b r o"]]:
        """The given rows or, in "reduce", one for each example."""
        sharing = self.weight_sharing
        return _moments.input_rows(x, dy, sharing), _moments.output_rows(dy, sharing)

    def counts(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """The number of rows for inputs, and `weight` for outputs or weighed rows."""
        if self.is_fitted:
            return dict.fromkeys(statistics, weight)
        first, second = split(statistics)
        own = _moments.counts(first, weight)
        return join(own, _moments.counts(second, weight)) if second else own

    def carry(self, factors: Arrays) -> Arrays:
        """The weights of a fit, of the factors."""
        return _fits.carry(factors, self.fit) if self.is_fitted else {}

    def refresh(self, factors: Arrays) -> Arrays:
        """Renews the weights of a fit."""
        return factors | self.carry(factors)

    def _product(self, factors: Arrays) -> Arrays:
        """The sides of the product that the factors make."""
        return _fits.product(factors) if self.is_fitted else nearest_product(factors)

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Factored Tikhonov damping (section 6.3)."""
        product = self._product(factors)
        return _product.damp(product, damping, self.pi, self.exact_scalars)

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """`A⁻¹ V G⁻¹`."""
        return _product.multiply(inverses, v)

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """`A V G`."""
        return _product.multiply(self._product(factors), v)

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The outer product of both diagonals."""
        return _product.diagonal(self._product(factors))

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The joint eigenbasis `U_A ⊗ U_G`; exact damping adds λ to the products."""
        product = self._product(factors)
        return _product.spectrum(product, self.pi, self.exact_scalars)
