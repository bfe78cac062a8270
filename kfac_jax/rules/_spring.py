"""The momentum of SPRING."""

import dataclasses

from kfac_jax._utils import arguments


@dataclasses.dataclass(frozen=True)
class Spring:
    """The momentum of SPRING: the direction stays near a decayed last one.

    `φ = μ φ' + (F + λ I)⁻¹ (g - μ F φ')`, where φ' is the last direction: of all
    directions that solve the damped problem, the one that is nearest to `μ φ'`.

    Attributes:
      decay: μ, in [0, 1). 0 is MinSR, the plain natural gradient.

    References:
      Goldshlager, Abrahamsen, Lin 2024, arXiv:2401.10190.

    >>> Spring()
    Spring(decay=0.99)
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        """Checks the range."""
        arguments.number("decay (μ)", self.decay)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay (μ) must be in [0, 1); got {self.decay!r}.")
