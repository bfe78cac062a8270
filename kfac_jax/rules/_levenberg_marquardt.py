"""Damping adapted by the Levenberg-Marquardt rule."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.rules._adaptation import check_adaptation


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapts λ to how well the quadratic model predicts the loss (section 6.5).

    Every `every` steps `ρ = (h(θ + δ) - h(θ)) / (M(δ) - M(0))` is measured on the
    step's own batch. `λ *= ω1` if ρ > 3/4, `λ /= ω1` if ρ < 1/4 or not finite. Where
    h(θ) or its gradient is not finite, the batch is to blame, not the step: λ stays.

    150 suits the paper's autoencoders, with full batches; start low for short runs.
    A batch that is fitted exactly says nothing of others, but has ρ near one: keep λ
    above `relative_minimum` times the curvature that steps meet, `Δᵀ F Δ / Δᵀ Δ`
    (its running mean), which has the problem's own scale. Where the change of the loss
    is lost in rounding ρ is noise, and λ climbs: keep it below `relative_maximum` times
    that, too.

    With `QuadraticModel`, `α = -∇hᵀ Δ / Δᵀ (F + (λ+η) I) Δ` compares K-FAC's model of a
    step with the exact one: it is 1 where they agree, and small where K-FAC sees too
    little curvature, which is also so where Δ is the noise of one batch. Where α is at
    least `trusted_rate`, λ may fall faster, by `trusted_factor`. This is what large
    batches need, whose α stays large (docs/tuning.md).

    Attributes:
      initial: λ0.
      every: T1, in steps.
      factor: ω1 in (0, 1); None means `(19/20) ** every`.
      minimum: λ never falls below it, nor to zero, which it could not leave.
      relative_minimum: nor below this multiple of the curvature along the steps.
      maximum: λ never rises above it, nor to infinity.
      relative_maximum: nor above this multiple of the curvature along the steps.
      lower: λ rises where ρ is below.
      upper: λ falls where ρ is above.
      trusted_factor: in (0, ω1], in place of ω1 where α is large; None for ω1.
      trusted_rate: the least such α.

    References:
      Martens & Grosse 2015, section 6.5.

    >>> LevenbergMarquardt(150.0).update(150.0, 1.0)
    Array(116.06714, dtype=float32...)
    """

    initial: float = 150.0
    _: dataclasses.KW_ONLY
    every: int = 5
    factor: float | None = None
    minimum: float = 0.0
    relative_minimum: float = 0.0
    maximum: float = float("inf")
    relative_maximum: float = float("inf")
    lower: float = 0.25
    upper: float = 0.75
    trusted_factor: float | None = None
    trusted_rate: float = 0.2

    def __post_init__(self) -> None:
        """Checks the ranges."""
        arguments.number("initial (λ0)", self.initial)
        if not 0.0 < self.initial < float("inf"):
            raise ValueError(
                "LevenbergMarquardt needs as initial a finite positive damping λ0; got "
                f"{self.initial}."
            )
        check_adaptation(self, "T1", "ω1")
        for name in ("relative_minimum", "relative_maximum"):
            arguments.number(name, getattr(self, name))
        if not 0.0 <= self.relative_minimum < self.relative_maximum:
            raise ValueError(
                "Need 0 ≤ relative_minimum < relative_maximum, multiples of the "
                f"curvature; got {self.relative_minimum} and {self.relative_maximum}."
            )
        for name in ("lower", "upper"):
            arguments.number(name, getattr(self, name))
        if not 0.0 < self.lower < self.upper < float("inf"):
            raise ValueError(
                f"Need 0 < lower < upper (thresholds of ρ); got {self.lower} and "
                f"{self.upper}."
            )
        arguments.number("trusted_rate (α)", self.trusted_rate)
        if not self.trusted_rate > 0.0:
            raise ValueError(
                f"trusted_rate (α) must be positive; got {self.trusted_rate}."
            )
        if self.trusted_factor is None:
            return
        arguments.number("trusted_factor", self.trusted_factor)
        if not 0.0 < self.trusted_factor <= self.omega:
            raise ValueError(
                "trusted_factor must be in (0, ω1], so that λ falls at least as fast "
                f"as elsewhere; got {self.trusted_factor} and ω1 = {self.omega:.3g}."
            )

    @property
    def omega(self) -> float:
        """ω1."""
        return (19.0 / 20.0) ** self.every if self.factor is None else self.factor

    def update(
        self,
        damping: Array | float,
        rho: Array | float,
        curvature: Array | float = 0.0,
        learning_rate: Array | float = 0.0,
    ) -> Array:
        """Returns the next λ.

        Args:
          damping: λ, `[]`.
          rho: the measured ρ, `[]`.
          curvature: `Δᵀ F Δ / Δᵀ Δ`, `[]`; 0 if it is not known.
          learning_rate: the quadratic model's α, `[]`; 0 if there is none.

        Returns:
          λ, within its limits.
        """
        damping = arguments.real("damping (λ)", damping).astype(float)
        rho = arguments.real("rho (ρ)", rho).astype(float)
        curvature = arguments.real("curvature", curvature).astype(float)
        alpha = arguments.real("learning_rate (α)", learning_rate)
        fast = self.omega if self.trusted_factor is None else self.trusted_factor
        lower = damping * jnp.where(alpha >= self.trusted_rate, fast, self.omega)
        raise_ = damping / self.omega
        good = (rho > self.upper) & (rho < jnp.inf)
        bad = ~((rho >= self.lower) & (rho < jnp.inf))  # also where ρ is NaN
        new = jnp.where(good, lower, jnp.where(bad, raise_, damping))
        return self.clip(new, curvature)

    def clip(self, damping: Array, curvature: Array | float) -> Array:
        """Keeps λ within its limits.

        Args:
          damping: λ, `[]`.
          curvature: `Δᵀ F Δ / Δᵀ Δ`, `[]`; 0, or a value that is not finite, if it is
            not known.

        Returns:
          λ.
        """
        limits = jnp.finfo(damping.dtype)
        curvature = jnp.asarray(curvature, damping.dtype)
        known = jnp.isfinite(curvature) & (curvature > 0)
        unit = jnp.where(known, curvature, 1.0)
        lowest, highest = max(self.minimum, float(limits.tiny)), float(limits.max)
        least = jnp.where(known, self.relative_minimum * unit, 0.0)
        most = jnp.where(known, self.relative_maximum * unit, highest)
        damping = jnp.clip(damping, least, jnp.minimum(most, highest))
        return jnp.clip(damping, lowest, min(self.maximum, highest))
