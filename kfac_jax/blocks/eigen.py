"""EKFAC: the Kronecker eigenbasis with the exact second moments in it."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from chex import Numeric
from jax import Array
from jaxtyping import Bool, Float

from kfac_jax._utils import arguments
from kfac_jax.blocks import _moments
from kfac_jax.blocks._block import Block, Damped, Spectrum
from kfac_jax.blocks._layout import (
    Arrays,
    BlockShape,
    Gradients,
    Inputs,
    Matrix,
    Outputs,
    Shapes,
)
from kfac_jax.blocks._sides import (
    DIAGONAL,
    SIDES,
    check_max_factor_dim,
    named,
    side_shapes,
)
from kfac_jax.blocks.diagonal import Diagonal
from kfac_jax.blocks.tnt import marginals
from kfac_jax.linalg._psd import eigh, turned_basis


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigen(Block):
    """`F ≈ U diag(s) Uᵀ` with `U = U_A ⊗ U_G` and `s = E[(U_Aᵀ g U_G)²]`.

    `U_A` and `U_G` are the eigenvectors of `Kronecker`'s factors; g is the gradient of
    an example. In the Frobenius norm that is the best approximation with this basis,
    so never worse than `Kronecker`, and exact wherever that is. Damping is exact:
    `s + λ`, without π. A side with a diagonal factor has the standard basis.

    The basis is part of the factors. An optimizer recomputes it every T3 steps and
    carries the moments over, while s moves on, and counts, at every step. Pass
    `factors=state.factors` to `value_grad_and_statistics`: the moments are then
    gathered in that basis. Without, the batch's own eigenbasis is computed in every
    call (as exact, but much slower), and sums over micro-batches mean nothing.

    With `warm_start` only the first basis is an eigendecomposition. Each later one is
    the last one turned by a step of orthogonal iteration, which takes a QR
    decomposition: faster, and near the eigenbasis as long as the factors change slowly.
    The moments are those of whatever basis there is.

    Attributes:
      max_factor_dim: the longest side with a full factor; None for no limit.
      weight_sharing: "expand" or "reduce", as of `Kronecker`: what the basis is of.
      warm_start: whether a new basis starts from the last one.

    References:
      George et al. 2018 (arXiv:1806.03884). Vyas et al. 2024 (arXiv:2409.11321),
      algorithm 4, for the warm start.

    >>> Eigen(max_factor_dim=1024).warm_start
    False
    """

    max_factor_dim: int | None = 8192
    weight_sharing: str = "expand"
    warm_start: bool = False

    elementwise = frozenset({"input_diagonal", "output_diagonal", "moments"})
    row_statistics = frozenset({"input", "input_diagonal", "count"})
    handles_one_hot = True
    takes_gradients = True
    carried = frozenset({"input_basis", "output_basis"})
    bases = carried

    def __post_init__(self) -> None:
        """Checks the options."""
        check_max_factor_dim(self.max_factor_dim)
        _moments.check_weight_sharing(self.weight_sharing)
        arguments.flag("warm_start", self.warm_start)

    @property
    def needs_examples(self) -> bool:
        """Yes: gradients are summed within an example before they are squared."""
        return True

    def statistics_shapes(self, shape: BlockShape) -> Shapes:
        """Those of `Kronecker`, the squares, and the basis that these are in."""
        sums = _moments.shapes(shape, self.max_factor_dim)
        return sums | self.factor_shapes(shape)

    def factor_shapes(self, shape: BlockShape) -> Shapes:
        """Those of `Kronecker`, `moments: [*e, i, o]` and `input_basis` and so on."""
        own = side_shapes(shape, self.max_factor_dim)
        bases = {side + "_basis": own[side] for side in SIDES if side in own}
        return own | {"moments": shape.matrix} | bases

    def statistics(
        self,
        x: Inputs,
        dy: Outputs,
        shape: BlockShape,
        *,
        input_basis: Float[Array, "*e i i"] | None = None,
        output_basis: Float[Array, "*e o o"] | None = None,
    ) -> Arrays:
        """`Kronecker`'s sums, and `Σ_b (Σ_s U_Aᵀ x dy U_G)²`."""
        u, v = x, dy
        if input_basis is not None:
            u = x.astype(input_basis.dtype) @ input_basis[..., None, :, :]
        if output_basis is not None:
            v = dy.astype(output_basis.dtype) @ output_basis[..., None, :, :]
        squares = Diagonal().statistics(u, v, shape)["diagonal"]
        limit, sharing = self.max_factor_dim, self.weight_sharing
        return _moments.moments(x, dy, shape, limit, sharing) | {"moments": squares}

    def of_gradients(
        self,
        gradients: Gradients,
        shape: BlockShape,
        *,
        input_basis: Float[Array, "*e i i"] | None = None,
        output_basis: Float[Array, "*e o o"] | None = None,
    ) -> Arrays:
        """`Σ_b (U_Aᵀ g U_G)²`, in the bases of `TNT`'s factors instead."""
        rotated = gradients
        if input_basis is not None:
            rotated = jnp.swapaxes(input_basis, -1, -2)[..., None, :, :] @ rotated
        if output_basis is not None:
            rotated = rotated @ output_basis[..., None, :, :]
        sums = named(*marginals(gradients, self.factor_shapes(shape)))
        if not shape.homogeneous:
            lead = gradients.shape[:-3]
            sums["count"] = jnp.full(lead, gradients.shape[-3], gradients.dtype)
        return sums | {"moments": jnp.square(rotated).sum(-3)}

    def carry(self, factors: Arrays) -> Arrays:
        """The eigenvectors of both sides."""
        return {
            side + "_basis": eigh(factors[side])[1] for side in SIDES if side in factors
        }

    def counts(self, statistics: Arrays, weight: Float[Array, ""]) -> Arrays:
        """Those of `Kronecker`; the moments, and a basis, count once for each batch."""
        own = [name for name in statistics if name == "moments" or name in self.carried]
        rest = {name: x for name, x in statistics.items() if name not in own}
        return _moments.counts(rest, weight) | dict.fromkeys(own, weight)

    def average(self, old: Arrays, new: Arrays, epsilon: Float[Array, ""]) -> Arrays:
        """The first batch brings its basis; later ones move to the one that is there.

        They are in it already if it was passed to `value_grad_and_statistics`.
        """
        names = self.carried & old.keys()
        basis = {name: jnp.where(epsilon == 0, new[name], old[name]) for name in names}
        moments = self.rebase(new, basis)
        return super().average(old, new | {"moments": moments}, epsilon)

    def refresh(self, factors: Arrays) -> Arrays:
        """Moves to the present eigenbasis, or towards it, where that is finite."""
        basis = self._turn(factors) if self.warm_start else self.carry(factors)
        finite = jnp.asarray(True)
        for x in basis.values():
            finite &= jnp.isfinite(x).all()
        basis = {n: jnp.where(finite, x, factors[n]) for n, x in basis.items()}
        return factors | basis | {"moments": self.rebase(factors, basis)}

    def _turn(self, factors: Arrays) -> Arrays:
        """The bases after a step of orthogonal iteration; at first the eigenbases."""
        sides = {side: factors[side] for side in SIDES if side in factors}
        bases = {name: factors[name] for name in factors if name in self.carried}
        first = jnp.stack([_is_standard(u) for u in bases.values()] or [True]).all()

        def turned() -> Arrays:
            return {
                side + "_basis": turned_basis(x, factors[side + "_basis"])
                for side, x in sides.items()
            }

        return jax.lax.cond(first, lambda: self.carry(factors), turned)

    def rebase(self, factors: Arrays, basis: Arrays) -> Matrix:
        """The moments, estimated in another basis.

        By how much they exceed the Kronecker-factored ones is averaged over the old
        directions that make up a new one: exact if the basis stays, and if F is a
        Kronecker product.

        Args:
          factors: with the moments in their own basis.
          basis: the other one.

        Returns:
          `moments` in the other basis.
        """
        moments = factors["moments"]
        if not basis:
            return moments
        tolerance = _eps(moments) ** 0.5
        same, empty = jnp.asarray(True), jnp.asarray(True)
        for name, x in basis.items():
            same &= (jnp.abs(x - factors[name]) <= tolerance).all()
            empty &= (factors[name] == 0).all()  # of a step without statistics

        def move() -> Array:
            before = self._factored_moments(factors, factors)
            known = before > _eps(before) * before.max((-2, -1), keepdims=True)
            excess = jnp.where(known, moments / jnp.where(known, before, 1.0), 1.0)
            for name, x in basis.items():
                weights = jnp.square(jnp.swapaxes(x, -1, -2) @ factors[name])
                if name == "input_basis":
                    excess = weights @ excess
                else:
                    excess = excess @ jnp.swapaxes(weights, -1, -2)
            return excess * self._factored_moments(factors, basis)

        return jax.lax.cond(same | empty, lambda: moments, move)

    def _factored_moments(self, factors: Arrays, basis: Arrays) -> Matrix:
        """The diagonal of `A ⊗ G` in a basis."""

        def side(name: str) -> Array:
            if name not in factors:
                return factors[name + DIAGONAL]
            u = basis[name + "_basis"]
            return jnp.maximum((u * (factors[name] @ u)).sum(-2), 0.0)

        return side("input")[..., :, None] * side("output")[..., None, :]

    def damp(self, factors: Arrays, damping: Numeric) -> dict[str, Damped]:
        """Adds λ to the moments, in either mode.

        Moments count as the rounding of the largest where they are less: along those
        eigenvectors a gradient is rounding, too.
        """
        s = factors["moments"]
        s = jnp.maximum(s, _eps(s) * s.max((-2, -1), keepdims=True))
        return {"moments": Damped(s, jnp.asarray(damping))}

    def solve(self, inverses: Arrays, v: Matrix) -> Matrix:
        """`U_A ((U_Aᵀ V U_G) / (s + λ)) U_Gᵀ`."""
        return self.matvec(inverses, v)

    def matvec(self, factors: Arrays, v: Matrix) -> Matrix:
        """`U_A (s ∘ (U_Aᵀ V U_G)) U_Gᵀ`."""
        return _from_basis(factors, factors["moments"] * _to_basis(factors, v))

    def diagonal(self, factors: Arrays, shape: BlockShape) -> Matrix:
        """`(U_A ∘ U_A) s (U_G ∘ U_G)ᵀ`."""
        squares = {
            name: jnp.square(x) for name, x in factors.items() if name in self.carried
        }
        return _from_basis(squares, factors["moments"])

    def spectrum(self, factors: Arrays, shape: BlockShape) -> Spectrum:
        """The moments in their basis; damping adds λ in either mode."""
        s = factors["moments"]
        return Spectrum(
            lambda damping, _: s + jnp.asarray(damping, s.dtype),
            to_basis=lambda v: _to_basis(factors, v),
            from_basis=lambda v: _from_basis(factors, v),
        )


def _is_standard(basis: Float[Array, "*e d d"]) -> Bool[Array, ""]:
    return (basis == jnp.eye(basis.shape[-1], dtype=basis.dtype)).all()


def _eps(x: Array) -> float:
    return float(jnp.finfo(x.dtype).eps)


def _to_basis(basis: Arrays, v: Matrix) -> Matrix:
    """`U_Aᵀ V U_G`."""
    if "input_basis" in basis:
        v = jnp.swapaxes(basis["input_basis"], -1, -2) @ v
    return v @ basis["output_basis"] if "output_basis" in basis else v


def _from_basis(basis: Arrays, v: Matrix) -> Matrix:
    """`U_A V U_Gᵀ`."""
    if "input_basis" in basis:
        v = basis["input_basis"] @ v
    if "output_basis" in basis:
        v = v @ jnp.swapaxes(basis["output_basis"], -1, -2)
    return v
