"""Conjugate gradients on the exact curvature, preconditioned by the approximation."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide
from kfac_jax._utils.vectors import inner_product
from kfac_jax.rules._quadratic_model import QuadraticModel, Solution

Product = Callable[[list[Array]], list[Array]]


class Refined(NamedTuple):
    """A step, and what the quadratic model says of it."""

    delta: list[Array]
    change: Array  # M(δ) - M(0), []
    slope: Array  # ∇hᵀ δ, []
    curved: Array  # δᵀ (F + (λ+η) I) δ, []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine:
    """Minimises the quadratic model by conjugate gradients, preconditioned by K-FAC.

    The model is `M(δ) = ½ δᵀ (F + (λ+η) I) δ + ∇hᵀ δ + h`, with the exact Fisher of the
    batch. Pass it as `learning_rate`: the update is what `steps` iterations reach from
    zero, in which the curvature that the blocks leave out is made up for. One iteration
    is `QuadraticModel` without momentum; as many as there are parameters are the step
    of the exact damped Fisher. Each costs a product with F (a forward-mode and a
    reverse-mode pass), and one with the inverses.

    Attributes:
      steps: the number of iterations, at least 1.
      fraction: τ2, the fraction of the batch that the products are computed on.
      longest: the largest length `√(½ δᵀ (F + (λ+η) I) δ)` of a step, in multiples of
        the running mean; None for no limit.

    References:
      Martens & Grosse 2015, section 6.4, for the model; Martens 2010 (Hessian-free
      optimization), for conjugate gradients on it.

    >>> Refine(steps=4)
    Refine(steps=4, fraction=1.0, longest=2.0)
    """

    steps: int = 4
    fraction: float = 1.0
    longest: float | None = 2.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        arguments.count("steps", self.steps, 1)
        _ = self.limits  # which checks the others

    @property
    def limits(self) -> QuadraticModel:
        """The rule with the same limit of a step's length."""
        return QuadraticModel(
            fraction=self.fraction, largest_momentum=None, longest=self.longest
        )

    def solve(
        self,
        gradient: list[Array],
        direction: list[Array],
        matrix: Product,
        inverse: Product,
    ) -> Refined:
        """Runs the iterations.

        Args:
          gradient: ∇h.
          direction: minus the preconditioned gradient.
          matrix: multiplies by `F + (λ+η) I`.
          inverse: multiplies by the inverse of the approximation.

        Returns:
          The step. Iterations end early where the matrix has no curvature along a
          direction, or what remains is zero.
        """

        def iteration(carry: _Carry, _: None) -> tuple[_Carry, None]:
            image = matrix(carry.search)
            curved = inner_product(carry.search, image)
            goes_on = (curved > 0) & (carry.square > 0) & jnp.isfinite(curved)
            alpha = jnp.where(goes_on, carry.square / jnp.where(goes_on, curved, 1), 0)
            delta = _added(carry.delta, alpha, carry.search)
            rest = _added(carry.rest, -alpha, image)
            solved = inverse(rest)
            square = inner_product(rest, solved)
            before = jnp.where(carry.square > 0, carry.square, 1)
            beta = jnp.where(goes_on & (square > 0), square / before, 0)
            search = _added(solved, beta, carry.search)
            # once ended, it stays so: the square of what remains is then zero
            return _Carry(delta, rest, search, jnp.where(goes_on, square, 0)), None

        rest = [-wide(g) for g in gradient]
        start = _Carry(
            [jnp.zeros_like(x) for x in rest],
            rest,
            [x.astype(y.dtype) for x, y in zip(direction, rest, strict=True)],
            inner_product(rest, direction),
        )
        end = jax.lax.scan(iteration, start, length=self.steps)[0]
        # (F + (λ+η) I) δ = -∇h - rest
        slope = inner_product(gradient, end.delta)
        curved = -slope - inner_product(end.rest, end.delta)
        return Refined(end.delta, slope + 0.5 * curved, slope, curved)

    def limit(
        self, refined: Refined, mean: Array, step: Array
    ) -> tuple[Solution, Array, Array]:
        """Shortens a step that is much longer than those before.

        Args:
          refined: the step.
          mean: the running mean of lengths so far, `[]`.
          step: how many steps there were before, `[]`.

        Returns:
          α, the factor that the step is multiplied by, with μ = 0 and the model's
          change; α again; and the next mean.
        """
        one = jnp.ones_like(refined.change)
        whole = Solution(one, jnp.zeros_like(one), refined.change)
        return self.limits.limit(whole, refined.slope, mean, step)


class _Carry(NamedTuple):
    delta: list[Array]
    rest: list[Array]  # -∇h - (F + (λ+η) I) δ
    search: list[Array]
    square: Array  # of the rest, in the norm of the inverse


def _added(x: list[Array], factor: Array, y: list[Array]) -> list[Array]:
    return [a + factor.astype(a.dtype) * b for a, b in zip(x, y, strict=True)]
