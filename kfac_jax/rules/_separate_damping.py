"""A damping of the approximate Fisher of its own, apart from λ."""

import dataclasses

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class SeparateDamping:
    """Adapts γ, the damping of the approximate Fisher, apart from λ (section 6.6).

    Blocks are then damped with γ² in place of λ + η: `A + π γ I` and `G + γ/π I`. The
    quadratic model keeps λ + η. Every `every` steps γ, ω2 γ and γ/ω2 each propose a
    step with the best α (and μ), and the one with the lowest M(δ) stays.

    λ says how far the quadratic model is trusted, γ how much of the approximate Fisher
    is believed: how good that is does not show in λ.

    Attributes:
      initial: γ0; None means `√(λ0 + η)`.
      every: T2, in steps; a multiple of T3, `inverse_every`.
      factor: ω2 in (0, 1); None means `√(19/20) ** every`.
      minimum: γ never falls below it, nor to zero, which it could not leave.
      maximum: γ never rises above it, nor to infinity.

    References:
      Martens & Grosse 2015, section 6.6.

    >>> SeparateDamping(factor=0.5).candidates(1.0)
    Array([1. , 0.5, 2. ], dtype=float32...)
    """

    initial: float | None = None
    _: dataclasses.KW_ONLY
    every: int = 20
    factor: float | None = None
    minimum: float = 0.0
    maximum: float = float("inf")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.initial is not None and not 0.0 < self.initial < float("inf"):
            raise ValueError(
                "SeparateDamping needs a finite positive γ0, or None for √(λ0 + η); "
                f"got {self.initial}."
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every (T2) must be an integer ≥ 1; got {self.every!r}.")
        if self.factor is not None and not 0.0 < self.factor < 1.0:
            raise ValueError(f"factor (ω2) must be in (0, 1); got {self.factor}.")
        if not 0.0 <= self.minimum <= self.maximum:
            raise ValueError(
                f"Need 0 ≤ minimum ≤ maximum; got {self.minimum} and {self.maximum}."
            )

    @property
    def omega(self) -> float:
        """ω2."""
        return (19.0 / 20.0) ** (self.every / 2) if self.factor is None else self.factor

    def candidates(self, gamma: Array | float) -> Array:
        """Returns γ, ω2 γ and γ/ω2 within the limits, `[3]`."""
        gamma = jnp.asarray(gamma, float)
        limits = jnp.finfo(gamma.dtype)
        lowest = max(self.minimum, float(limits.tiny))
        lower = jnp.maximum(gamma * self.omega, lowest)
        highest = min(self.maximum, float(limits.max))
        upper = jnp.minimum(gamma / self.omega, highest)
        return jnp.stack([gamma, lower, upper])

    def select(self, gammas: Array, changes: Array) -> Array:
        """Returns the candidate with the lowest model.

        Args:
          gammas: `[3]`, from `candidates`.
          changes: `[3]`, M(δ) - M(0) for each; one that is not finite loses.

        Returns:
          The best of them; γ as it was if none is better.
        """
        changes = jnp.where(jnp.isfinite(changes), changes, jnp.inf)
        return gammas[jnp.argmin(changes)]  # the first of equals
