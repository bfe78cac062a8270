"""Arguments that several estimators have."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments

Powers = float | Sequence[float] | None


def powers(name: str, given: Any) -> tuple[float, ...]:
    """One power or several, as a tuple."""
    if given is None:
        return ()
    found = tuple(given) if isinstance(given, list | tuple) else (given,)
    for power in found:
        arguments.number(f"each of {name}", power)
    return found


def weight(given: Any, norm: str | None) -> Array:
    """λ as an array.

    Args:
      given: λ.
      norm: what would scale it for each block, which must be None.

    Returns:
      λ.

    Raises:
      ValueError: if it is not one number, or is to be scaled.
    """
    if norm is not None or isinstance(given, Sequence):
        raise ValueError(
            "identity_weight is expected as one number for all blocks, without "
            "norm_to_scale_identity_weight_per_block; got "
            f"{arguments.shown(given)} and {arguments.shown(norm)}. "
            "kfac_jax adds the same λ I to each."
        )
    arguments.number("identity_weight", given, arrays=True)
    arguments.within("identity_weight", given, 0.0, float("inf"))
    return jnp.asarray(given, float)
