"""A damping of the approximate Fisher of its own, apart from λ."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.rules._adaptation import check_adaptation


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
        if self.initial is not None:
            arguments.number("initial (γ0)", self.initial)
            if not 0.0 < self.initial < float("inf"):
                raise ValueError(
                    "SeparateDamping needs as initial a finite positive γ0, or None "
                    f"for √(λ0 + η); got {self.initial}."
                )
        check_adaptation(self, "T2", "ω2")

    @property
    def omega(self) -> float:
        """ω2."""
        return (19.0 / 20.0) ** (self.every / 2) if self.factor is None else self.factor

    def candidates(self, gamma: Array | float) -> Array:
        """Returns γ, ω2 γ and γ/ω2 within the limits, `[3]`."""
        gamma = arguments.real("gamma (γ)", gamma).astype(float)
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

        Raises:
          ValueError: if they are not three each.
        """
        gammas = arguments.real("gammas", gammas)
        changes = arguments.real("changes", changes)
        if not gammas.shape == changes.shape == (3,):
            raise ValueError(
                "gammas and changes must have shape (3,), from candidates; got "
                f"{gammas.shape} and {changes.shape}."
            )
        changes = jnp.where(jnp.isfinite(changes), changes, jnp.inf)
        return gammas[jnp.argmin(changes)]  # the first of equals
