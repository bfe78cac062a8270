"""Damping adapted by the Levenberg-Marquardt rule."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax import _arguments
from kfac_jax.rules._adaptation import check_adaptation


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapts λ to how well the quadratic model predicts the loss (section 6.5).

    Every `every` steps `ρ = (h(θ + δ) - h(θ)) / (M(δ) - M(0))` is measured on the
    step's own batch. `λ *= ω1` if ρ > 3/4, `λ /= ω1` if ρ < 1/4 or not finite. Where
    h(θ) or its gradient is not finite, the batch is to blame, not the step: λ stays.

    Start too large rather than too small. 150 suits the paper's autoencoders; for
    classifiers 1 is more usual. With small batches ρ is noisy: keep λ above `minimum`.

    Attributes:
      initial: λ0.
      every: T1, in steps.
      factor: ω1 in (0, 1); None means `(19/20) ** every`.
      minimum: λ never falls below it, nor to zero, which it could not leave.
      maximum: λ never rises above it, nor to infinity.
      lower: λ rises where ρ is below.
      upper: λ falls where ρ is above.

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
    maximum: float = float("inf")
    lower: float = 0.25
    upper: float = 0.75

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _arguments.number("initial (λ0)", self.initial)
        if not 0.0 < self.initial < float("inf"):
            raise ValueError(
                "LevenbergMarquardt needs as initial a finite positive damping λ0; got "
                f"{self.initial}."
            )
        check_adaptation(self, "T1", "ω1")
        for name in ("lower", "upper"):
            _arguments.number(name, getattr(self, name))
        if not 0.0 < self.lower < self.upper < float("inf"):
            raise ValueError(
                f"Need 0 < lower < upper (thresholds of ρ); got {self.lower} and "
                f"{self.upper}."
            )

    @property
    def omega(self) -> float:
        """ω1."""
        return (19.0 / 20.0) ** self.every if self.factor is None else self.factor

    def update(self, damping: Array | float, rho: Array | float) -> Array:
        """Returns the next λ from this one and a measured ρ."""
        damping = _arguments.real("damping (λ)", damping).astype(float)
        rho = _arguments.real("rho (ρ)", rho).astype(float)
        lower, raise_ = damping * self.omega, damping / self.omega
        good = (rho > self.upper) & (rho < jnp.inf)
        bad = ~((rho >= self.lower) & (rho < jnp.inf))  # also where ρ is NaN
        new = jnp.where(good, lower, jnp.where(bad, raise_, damping))
        limits = jnp.finfo(new.dtype)
        lowest = max(self.minimum, float(limits.tiny))
        return jnp.clip(new, lowest, min(self.maximum, float(limits.max)))
