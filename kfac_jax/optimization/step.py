"""The length of one step, and the quality of its prediction by the quadratic model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils.dtypes import wide, wide_dtype
from kfac_jax._utils.ordering import known_false_after
from kfac_jax._utils.vectors import inner_product, plane_products
from kfac_jax.optimization.adaptation import reduction_ratio
from kfac_jax.optimization.local_model import LocalModel
from kfac_jax.optimization.loss import loss_of
from kfac_jax.optimization.state import at, nan
from kfac_jax.rules import QuadraticModel, Refine, Refined, Solution


class Rates(NamedTuple):
    """The coefficients that were chosen for a step."""

    solution: Solution  # α, μ and the model's change
    scale: Array  # [], the factor that a limit multiplied α and μ by
    length: Array  # [], the next running mean of lengths
    curvature: Array  # [], Δᵀ F Δ / Δᵀ Δ; NaN where it was not computed


class Combined(NamedTuple):
    """The update of one step, by leaves."""

    delta: list[Array]  # δ, or zero
    velocity: list[Array]  # δ0 of the next step
    finite: Array  # []: whether δ was accepted


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One update's vectors, as lists of leaves (without those a mask hides).

    Attributes:
      model: the batch's quadratic model.
      direction: Δ, minus the preconditioned gradient.
      squared_length: ΔᵀΔ, or an upper bound.
      usable: whether h(θ) is finite, as far as it is known.
      previous: δ0, the previous update.
    """

    model: LocalModel
    direction: list[Array]
    squared_length: Array
    usable: Array
    previous: list[Array]

    def plane(self, fraction: float) -> tuple[Array, Array]:
        """`F + (λ+η) I` in the plane of Δ and δ0, `[2, 2]`, and ∇h there, `[2]`.

        Args:
          fraction: τ2, the part of the batch that F is computed on.

        Returns:
          The matrix and the slope.
        """
        basis = (self.direction, self.previous)
        treedef = self.model.curvature.tree.treedef
        vectors = [jax.tree.unflatten(treedef, v) for v in basis]
        fisher = self.model.fisher(vectors, fraction)
        gram, slope = plane_products(self.model.gradient, *basis)
        total = self.model.total_damping(fisher)
        return fisher + total * gram.astype(fisher.dtype), slope.astype(fisher.dtype)

    def along(self, matrix: Array) -> Array:
        """`Δᵀ F Δ / Δᵀ Δ` from the matrix of `plane`; 0 if Δ = 0."""
        square = self.squared_length.astype(matrix.dtype)
        ratio = matrix[0, 0] / jnp.where(square > 0, square, 1.0)
        return jnp.where(square > 0, ratio - self.model.total_damping(matrix), 0.0)

    def refined(
        self, rule: Refine, inverse: Callable[[list[Array]], list[Array]]
    ) -> tuple["Step", Refined]:
        """Replaces Δ by what iterations from it reach.

        Args:
          rule: how many, and on what.
          inverse: applies the inverses.

        Returns:
          The step with that vector for Δ, and what the model says of it.
        """
        found = rule.solve(
            self.model.gradient,
            self.direction,
            functools.partial(self.model.product, fraction=rule.fraction),
            inverse,
        )
        square = inner_product(found.delta, found.delta)
        new = dataclasses.replace(self, direction=found.delta, squared_length=square)
        return new, found

    def refined_rates(
        self, rule: Refine, found: Refined, count: Array, length: Array
    ) -> Rates:
        """The coefficients of a refined step: α = 1, within a limit.

        Args:
          rule: the rule.
          found: what `refined` returned.
          count: the number of previous steps.
          length: the running mean of the lengths of steps.

        Returns:
          The coefficients.
        """
        solution, scale, length = rule.limit(found, length, count)
        square = self.squared_length
        ratio = found.curved / jnp.where(square > 0, square, 1.0)
        along = jnp.where(square > 0, ratio - self.model.total_damping(ratio), 0.0)
        return Rates(solution, scale, length, along)

    def constrain(self, alpha: Array, constraint: Array) -> Array:
        """Lowers α so that `-α² Δᵀ ∇h` is at most `constraint`."""
        slope = inner_product(self.model.gradient, self.direction).astype(alpha.dtype)
        squared = jnp.maximum(-slope * alpha**2, jnp.finfo(alpha.dtype).tiny)
        ratio = constraint.astype(alpha.dtype) / squared
        return alpha * jnp.sqrt(jnp.minimum(1.0, ratio))

    @jax.named_scope("kfac_rates")
    def rates(
        self,
        rule: optax.ScalarOrSchedule | QuadraticModel,
        momentum: Array | None,
        count: Array,
        constraint: Array | None,
        length: Array,
    ) -> Rates:
        """Chooses α and μ: by the quadratic model, or the user's, within limits.

        Args:
          rule: a quadratic model, a number or a schedule.
          momentum: μ; None lets the model choose it.
          count: the number of previous steps.
          constraint: the largest `-α² Δᵀ ∇h` for a user's α, or None.
          length: the running mean of the lengths of steps.

        Returns:
          The coefficients.
        """
        if isinstance(rule, QuadraticModel):
            matrix, slope = self.plane(rule.fraction)
            free = rule.solve(matrix, slope, momentum)
            step = jnp.stack([free.learning_rate, free.momentum]).astype(slope.dtype)
            solution, scale, length = rule.limit(free, slope @ step, length, count)
            return Rates(solution, scale, length, self.along(matrix))
        assert momentum is not None
        alpha = free_alpha = at(rule, count)
        if constraint is not None:
            alpha = self.constrain(alpha, constraint)
        is_zero = free_alpha == 0
        scale = jnp.where(is_zero, 1.0, alpha / jnp.where(is_zero, 1.0, free_alpha))
        return Rates(Solution(alpha, momentum, nan()), scale, length, nan())

    @jax.named_scope("kfac_update")
    def combine(self, alpha: Array, mu: Array, value: Any) -> Combined:
        """Computes `δ = α Δ + μ δ0`, if it is certain to be finite.

        Its finiteness is decided before δ is computed, from the lengths of Δ and δ0,
        which saves passes over δ. The decision also waits for the loss, the last reader
        of the parameters. So δ is added to them after the last read, and XLA can update
        donated parameters in place.

        Args:
          alpha: α.
          mu: μ.
          value: h(θ), as passed to update, or None.

        Returns:
          δ, the next δ0, and whether δ is finite. If not, δ is zero and δ0 unchanged.
        """
        u, v = self.direction, self.previous
        squares = jnp.stack([self.squared_length, inner_product(v, v)])
        rates = jnp.stack([alpha, mu]).astype(squares.dtype)
        # |α Δ + μ δ0| ≤ |α| |Δ| + |μ| |δ0|, and no entry is larger than the length
        length = (jnp.abs(rates) * jnp.sqrt(squares)).sum()
        limits = (float(jnp.finfo(x.dtype).max) for x in self.model.gradient)
        largest = min(limits, default=float("inf"))
        finite = self.usable & (length <= largest)
        finite &= ~known_false_after(loss_of(value))
        delta: list[Array] = []
        velocity: list[Array] = []
        for d, d0, g in zip(u, v, self.model.gradient, strict=True):
            dtype = wide_dtype(d.dtype)
            moved = alpha.astype(dtype) * wide(d) + mu.astype(dtype) * wide(d0)
            moved = moved.astype(g.dtype)
            velocity.append(jnp.where(finite, moved.astype(d0.dtype), d0))
            # δ is computed from δ0's new array where types allow, for one pass less
            moved = velocity[-1] if d0.dtype == g.dtype else moved
            delta.append(jnp.where(finite, moved, jnp.zeros_like(moved)))
        return Combined(delta, velocity, finite)

    @jax.named_scope("kfac_damping")
    def reduction_ratio(
        self, moved: optax.Params, rates: Solution, modelled: bool, value: Any
    ) -> tuple[Array, Array, Array]:
        """Measures `ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0))` on this step's own batch.

        If the loss rises, ρ is -∞, whatever the model predicted.

        Args:
          moved: θ + δ.
          rates: α and μ, and the model's change if `modelled`.
          modelled: whether the quadratic model was solved for this step.
          value: h(θ), as passed to update.

        Returns:
          ρ, the predicted change, and `Δᵀ F Δ / Δᵀ Δ` unless `modelled`.
        """
        predicted, along = rates.change, nan()
        if not modelled:
            matrix, slope = self.plane(1.0)
            along = self.along(matrix).astype(float)
            step = jnp.stack([rates.learning_rate, rates.momentum])
            step = step.astype(matrix.dtype)
            predicted = slope @ step + 0.5 * step @ matrix @ step

        after = self.model.loss(moved)
        predicted = predicted.astype(after.dtype)
        rho = reduction_ratio(loss_of(value), after, predicted)
        return rho, predicted, along
