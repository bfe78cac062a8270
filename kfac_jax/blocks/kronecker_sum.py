"""Sums of two Kronecker products, of several losses or of both uses of a tied table."""

import dataclasses
from typing import final

import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Float

from kfac_jax.blocks import _moments, _product
from kfac_jax.blocks._block import Block, Damped, Spectrum
from kfac_jax.blocks._layout import Arrays, BlockShape, Inputs, Matrix, Outputs, Shapes
from kfac_jax.blocks._pi import check_pi, pi
from kfac_jax.blocks._sides import (
    DIAGONAL,
    SIDES,
    Side,
    Sides,
    check_max_factor_dim,
    named,
    side_shapes,
    sides,
)
from kfac_jax.blocks._tied import SECOND, TRANSPOSED, as_matrix, join, split
from kfac_jax.blocks.kronecker import Kronecker
from kfac_jax.linalg._psd import eigh

BASIS, RATIO = "_basis", "_ratio"
"""The suffixes of K, and of s, after the name of a side."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerSum(Block):
    """`F ≈ A ⊗ G + A' ⊗ G'`, inverted as what it is.

    For a weight whose uses lead to several registered losses, as of a PDE's interior
    and its boundary: one product for the uses of each, where `Kronecker` takes all rows
    together. Uses that lead to the same losses share a product, and so do, of more than
    two losses, all but the first. For a weight that is also used transposed (a tied
    table), one product for each direction. Of other weights it is `Kronecker`.

    With `K_A = A^{-1/2} E_A` and `s_A`, where `E_A diag(s_A) E_Aᵀ` is the
    eigendecomposition of `A^{-1/2} A' A^{-1/2}`, and the same for G, the inverse is
    `V ↦ K_A ((K_Aᵀ V K_G) / (1 + s_A s_Gᵀ)) K_Gᵀ`. Both products are damped in factored
    form, by λ/2 each. Exact damping, and powers, are not possible.

    Attributes:
      max_factor_dim: the longest side with a full factor; None for no limit.
      weight_sharing: "expand" or "reduce", as of `Kronecker`.
      pi: the norm in π, as of `Kronecker`.

    References:
      Martens & Grosse 2015, Appendix B. Dangel et al. 2024 (arXiv:2405.15603) for PDEs.

    >>> KroneckerSum()
    KroneckerSum(max_factor_dim=8192, weight_sharing='expand', pi='trace')
    """

    max_factor_dim: int | None = 8192
    weight_sharing: str = "expand"
    pi: str = "trace"

    elementwise = frozenset(
        prefix + side + DIAGONAL
        for prefix in ("", TRANSPOSED, SECOND)
        for side in SIDES
    )
    row_statistics = frozenset(
        prefix + name
        for prefix in ("", TRANSPOSED, SECOND)
        for name in ("input", "input_diagonal", "count")
    )
    handles_tied = True
    handles_one_hot = True
    handles_sums = True

    def __post_init__(self) -> None:
        """Checks the options."""
        check_max_factor_dim(self.max_factor_dim)
        _moments.check_weight_sharing(self.weight_sharing)
        check_pi(self.pi)

    @property
    def alone(self) -> Kronecker:
        """What it is for a weight with a single product."""
        return Kronecker(
            max_factor_dim=self.max_factor_dim,
            weight_sharing=self.weight_sharing,
            pi=self.pi,
        )

    @property
    def needs_examples(self) -> bool:
        """Whether the setting is "reduce", which sums within an example."""
        return self.weight_sharing == "reduce"

    def statistics_shapes(self, shape: BlockShape) -> Shapes:
        """Sums for all factors, and the numbers of rows that count."""
        first, *second = (_moments.shapes(s, self.max_factor_dim) for s in shape.terms)
        return join(first, *second, prefix=_prefix(shape)) if second else first

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """Those of `Kronecker` for both products."""
        first, *second = (side_shapes(s, self.max_factor_dim) for s in shape.terms)
        return join(first, *second, prefix=_prefix(shape)) if second else first

    def statistics(self, x: Inputs, dy: Outputs, shape: BlockShape) -> Arrays:
        """The sums over all rows with a gradient, for one product."""
        limit, sharing = self.max_factor_dim, self.weight_sharing
        return _moments.moments(x, dy, shape, limit, sharing)

    def counts(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """The numbers of rows for inputs, and `weight` for outputs."""
        prefix = _prefix_of(statistics)
        first, second = split(statistics, prefix)
        own = _moments.counts(first, weight), _moments.counts(second, weight)
        return join(*own, prefix=prefix)

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """The sides of the first product, with factored damping by λ/2.

        They are what is inverted; those of the second get theirs in `decompose`.
        """
        (left, _), (right, _) = self._damped(factors, damping)
        return {
            f"{name}{'' if side.is_full else DIAGONAL}": Damped(
                side.array, jnp.zeros((), side.array.dtype)
            )
            for name, side in zip(SIDES, (left, right), strict=True)
        }

    def _damped(
        self, factors: Arrays, damping: Numeric
    ) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
        """The left sides of both products, and the right ones, damped.

        Those that meet are both full matrices, or both diagonals.
        """
        terms: list[Sides] = []
        for term in oriented(factors):
            half = jnp.asarray(damping, term[0].array.dtype) / 2
            shifts = pi(self.pi, term) * jnp.sqrt(half)
            first, second = (
                _shifted(side, shift) for side, shift in zip(term, shifts, strict=True)
            )
            terms.append((first, second))
        (a, g), (other_a, other_g) = terms
        return _alike(a, other_a), _alike(g, other_g)

    def decompose(self, roots: Arrays, factors: Arrays, damping: Numeric) -> Arrays:
        """K and s of both sides.

        Args:
          roots: by the names of `damp`, a root R of each inverse `R Rᵀ`, or of the
            entries of a diagonal.
          factors: all factors.
          damping: λ.

        Returns:
          K as `input_basis`, `[*e, i, i]`, or its diagonal; s as `input_ratio`,
          `[*e, i]`; and those of the outputs.
        """
        result: Arrays = {}
        both = self._damped(factors, damping)
        for name, (first, second) in zip(SIDES, both, strict=True):
            if first.is_full:
                root = roots[name]
                s, e = eigh(jnp.swapaxes(root, -1, -2) @ second.array @ root)
                result[name + BASIS], result[name + RATIO] = root @ e, s
            else:
                root = roots[name + DIAGONAL]
                result[name + DIAGONAL + BASIS] = root
                result[name + RATIO] = second.array * jnp.square(root)
        return result

    def decomposed_shapes(self, shape: BlockShape) -> Shapes:
        """The shapes of what `decompose` returns."""
        result: Shapes = {}
        damped = oriented_shapes(self.factor_shapes(shape))
        for name, is_full in zip(SIDES, damped, strict=True):
            d = shape.inputs if name == "input" else shape.outputs
            if is_full:
                result[name + BASIS] = (*shape.lead, d, d)
            else:
                result[name + DIAGONAL + BASIS] = (*shape.lead, d)
            result[name + RATIO] = (*shape.lead, d)
        return result

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """`K_A ((K_Aᵀ V K_G) / (1 + s_A s_Gᵀ)) K_Gᵀ`."""
        return from_basis(inverses, to_basis(inverses, v) / total(inverses))

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """`A V G + A' V G'`."""
        first, second = (named(*term) for term in oriented(factors))
        return _product.multiply(first, v) + _product.multiply(second, v)

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """The sum of the products' diagonals."""
        first, second = (named(*term) for term in oriented(factors))
        return _product.diagonal(first) + _product.diagonal(second)

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """Refuses: a sum of two products has no eigenvectors in closed form."""
        raise ValueError(
            "A sum of two Kronecker products has no eigenvectors in closed form: "
            'expected damping_mode="factored" in solve, logdet and sample, and no '
            "power; got KroneckerSum(). Use Kronecker() for these."
        )


def total(inverses: Arrays) -> Matrix:
    """`1 + s_A s_Gᵀ`: the sum, in the basis of K."""
    a, g = inverses["input" + RATIO], inverses["output" + RATIO]
    return 1 + a[..., :, None] * g[..., None, :]


def to_basis(inverses: Arrays, v: Matrix) -> Matrix:
    """`K_Aᵀ V K_G`."""
    a, g = _bases(inverses)
    v = jnp.swapaxes(a.array, -1, -2) @ v if a.is_full else a.array[..., None] * v
    return v @ g.array if g.is_full else v * g.array[..., None, :]


def from_basis(inverses: Arrays, v: Matrix) -> Matrix:
    """`K_A V K_Gᵀ`."""
    a, g = _bases(inverses)
    v = a.array @ v if a.is_full else a.array[..., None] * v
    if g.is_full:
        return v @ jnp.swapaxes(g.array, -1, -2)
    return v * g.array[..., None, :]


def _bases(inverses: Arrays) -> Sides:
    return sides(
        {n.removesuffix(BASIS): x for n, x in inverses.items() if n.endswith(BASIS)}
    )


def log_determinant_of_bases(inverses: Arrays) -> Array:
    """`log |det (K_A ⊗ K_G)|`, summed over independent layers."""
    a, g = _bases(inverses)
    logs = [
        jnp.linalg.slogdet(x.array)[1] if x.is_full else jnp.log(x.array).sum(-1)
        for x in (a, g)
    ]
    return (g.array.shape[-1] * logs[0] + a.array.shape[-1] * logs[1]).sum()


def oriented(factors: Arrays) -> tuple[Sides, Sides]:
    """The sides of both products that meet the inputs, and the outputs."""
    prefix = _prefix_of(factors)
    first, (a, g) = (sides(x) for x in split(factors, prefix))
    return first, (g, a) if prefix == TRANSPOSED else (a, g)


def oriented_shapes(shapes: Shapes) -> tuple[bool, bool]:
    """Whether the sides that meet inputs, and outputs, are full matrices."""
    is_transposed = any(name.startswith(TRANSPOSED) for name in shapes)
    prefix = TRANSPOSED if is_transposed else SECOND
    others = SIDES[::-1] if is_transposed else SIDES
    first, second = (
        own in shapes or prefix + other in shapes
        for own, other in zip(SIDES, others, strict=True)
    )
    return first, second


def _prefix(shape: BlockShape) -> str:
    return TRANSPOSED if shape.tied else SECOND


def _prefix_of(arrays: Arrays) -> str:
    tied = any(name.startswith(TRANSPOSED) for name in arrays)
    return TRANSPOSED if tied else SECOND


def _shifted(side: Side, shift: Array) -> Side:
    x, is_full = side
    if not is_full:
        return Side(x + shift[..., None], False)
    unit = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    return Side(x + shift[..., None, None] * unit, True)


def _alike(first: Side, second: Side) -> tuple[Side, Side]:
    """Both as they are if they have one form; as full matrices if not."""
    if first.is_full == second.is_full:
        return first, second
    return Side(as_matrix(first), True), Side(as_matrix(second), True)
