"""Learning rate and momentum from the exact quadratic model."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments

_FREE = 5
"""The number of first steps without a limit; the first mean of lengths is theirs."""

_DECAY = 0.95
"""The decay of the running mean of lengths."""


class Solution(NamedTuple):
    """The minimiser of the quadratic model over `δ = α Δ + μ δ0`."""

    learning_rate: Array  # α, []
    momentum: Array  # μ, []
    change: Array  # M(δ) - M(0), []


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticModel:
    """Chooses α (and μ) to minimise `M(δ) = ½ δᵀ (F + (λ+η) I) δ + ∇hᵀ δ + h` exactly.

    F is the exact Fisher of the batch, met only in forward-mode products. Pass it as
    `learning_rate`; with `momentum=None` it chooses μ too, which on a quadratic makes
    the method preconditioned conjugate gradients.

    The model knows one batch only. Two limits keep small batches from steps that fit
    only them. First, on noise the best μ is often negative or above one, so it is
    clipped to between 0 and `largest_momentum`. Second, a case that is wrong with
    confidence has a large gradient but almost no curvature, so that α is 1/λ along it.
    So no step is more than `longest` times as long as the running mean of lengths. The
    length is `√(½ δᵀ (F + (λ+η) I) δ)`, which for the best step is the root of its
    decrease. With both limits None the rule is the paper's.

    Attributes:
      fraction: τ2, the fraction of the batch the products are computed on; the paper
        uses 1/4 with batches of thousands. With 128 cases even 1/2 lets runs diverge
        (docs/tuning.md), and L2 or more damping is needed below 1.
      largest_momentum: the largest μ, with 0 as the smallest; None for no limit.
      longest: the largest length of a step, in multiples of the mean; None for no
        limit.

    References:
      Martens & Grosse 2015, sections 6.4, 7 and 8, for the model.

    >>> QuadraticModel(fraction=0.25)
    QuadraticModel(fraction=0.25, largest_momentum=0.95, longest=2.0)
    """

    fraction: float = 1.0
    largest_momentum: float | None = 0.95
    longest: float | None = 2.0

    def __post_init__(self) -> None:
        """Checks the range."""
        arguments.number("fraction (τ2)", self.fraction)
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction (τ2) must be in (0, 1]; got {self.fraction}.")
        for name, least in (("largest_momentum", 0.0), ("longest", 1.0)):
            value = getattr(self, name)
            if value is None:
                continue
            arguments.number(name, value)
            if not least <= value < float("inf"):
                raise ValueError(
                    f"{name} must be finite and at least {least}, or None for no "
                    f"limit; got {value}."
                )

    def solve(self, matrix: Array, slope: Array, momentum: Array | None) -> Solution:
        """Minimises the model in the plane of Δ and δ0.

        Args:
          matrix: `[2, 2]`, `F + (λ+η) I` in that plane; the second row and column are
            zero while there is no δ0.
          slope: `[2]`, the products of ∇h with Δ and δ0.
          momentum: a fixed μ, or None to choose it.

        Returns:
          α, μ and the change of the model.

        Raises:
          ValueError: if the matrix or the slope is of another shape.
        """
        matrix = arguments.floating("matrix", matrix)
        slope = arguments.floating("slope", slope)
        if matrix.shape != (2, 2) or slope.shape != (2,):
            raise ValueError(
                "matrix and slope must have shapes (2, 2) and (2,); got "
                f"{matrix.shape} and {slope.shape}."
            )
        if momentum is not None:
            arguments.number("momentum (μ)", momentum, arrays=True)
            momentum = jnp.asarray(momentum)
        q00, q01, q11 = matrix[0, 0], matrix[0, 1], matrix[1, 1]
        zero = jnp.zeros_like(q00)
        safe00 = jnp.where(q00 > 0, q00, 1.0)
        along = jnp.where(q00 > 0, -slope[0] / safe00, zero)
        if momentum is not None:
            mu = momentum.astype(q00.dtype)
            alpha = jnp.where(q00 > 0, along - mu * q01 / safe00, zero)
        else:
            # scaled to unit diagonal, so that the determinant measures the angle only
            s0 = jnp.sqrt(safe00)
            s1 = jnp.sqrt(jnp.where(q11 > 0, q11, 1.0))
            c, b0, b1 = q01 / (s0 * s1), slope[0] / s0, slope[1] / s1
            determinant = 1.0 - c * c
            usable = (q00 > 0) & (q11 > 0)
            usable &= determinant > 100 * jnp.finfo(q00.dtype).eps
            determinant = jnp.where(usable, determinant, 1.0)
            alpha = jnp.where(usable, -(b0 - c * b1) / (determinant * s0), along)
            mu = jnp.where(usable, -(b1 - c * b0) / (determinant * s1), zero)
            if self.largest_momentum is not None:
                free, mu = mu, jnp.clip(mu, 0.0, self.largest_momentum)
                best = jnp.where(q00 > 0, along - mu * q01 / safe00, zero)
                alpha = jnp.where(mu == free, alpha, best)
        step = jnp.stack([alpha, mu])
        change = slope @ step + 0.5 * step @ matrix @ step
        return Solution(alpha, mu, change)

    def limit(
        self, solution: Solution, slope: Array, mean: Array, step: Array
    ) -> tuple[Solution, Array, Array]:
        """Shortens a step that is much longer than those before.

        Args:
          solution: the step, from `solve`.
          slope: `∇hᵀ δ` of that step, `[]`.
          mean: the running mean of lengths so far, `[]`.
          step: how many steps there were before, `[]`.

        Returns:
          The step, the factor that it was multiplied by, and the next mean.
        """
        length = jnp.sqrt(jnp.maximum(-solution.change, 0.0))
        if self.longest is None:
            return solution, jnp.ones_like(length), jnp.zeros_like(length)
        mean = mean.astype(length.dtype)
        most = self.longest * mean
        has_mean = mean > 0  # a mean of zero means that no step has moved yet
        late = has_mean & (step >= _FREE)
        scale = jnp.where(late & (length > most), most / length, 1.0)
        scale = jnp.where(jnp.isfinite(length), scale, 0.0)
        # The mean may grow with the model's lengths, but slowly: a single length counts
        # at most as twice the longest allowed one.
        seen = jnp.where(late, jnp.minimum(length, 2.0 * most), length)
        seen = jnp.where(jnp.isfinite(length), seen, mean)
        mean = jnp.where(has_mean, _DECAY * mean + (1.0 - _DECAY) * seen, seen)
        curved = solution.change - slope  # ½ δᵀ (F + (λ+η) I) δ
        change = scale * slope + jnp.square(scale) * curved
        limited = Solution(
            scale * solution.learning_rate, scale * solution.momentum, change
        )
        return limited, scale, mean
