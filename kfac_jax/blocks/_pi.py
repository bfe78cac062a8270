"""π, which divides factored damping between the two factors, for several norms."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kfac_jax._utils.arguments import choice
from kfac_jax.blocks._sides import Sides
from kfac_jax.linalg._psd import eigh, mean_rows, trace_pi


def pi(norm: str, factors: Sides) -> Float[Array, " 2 *e"]:
    """`π = √(‖A ⊗ I‖ / ‖I ⊗ G‖)` and `1/π`, 1 where a norm is 0 or not finite.

    With A `[i, i]` and G `[o, o]`, up to a factor that both norms share,

    - trace: `tr A / i` and `tr G / o`, the means of the eigenvalues,
    - frobenius: `‖A‖_F / √i` and `‖G‖_F / √o`, their root mean squares, since
      `‖A ⊗ I‖_F = ‖A‖_F √o`,
    - spectral: the largest eigenvalues, since those of I are 1,
    - one: 1 and 1.

    Args:
      norm: one of these.
      factors: A and G.

    Returns:
      π and 1/π, stacked.

    References:
      Martens & Grosse 2015, section 6.3.
    """
    norms = _NORMS[norm](factors)
    # both at once: on scalars, compiling costs more than computing
    return trace_pi(norms, norms[::-1])


def check_pi(norm: object) -> None:
    """Raises ValueError unless it is one of the norms."""
    choice("pi", norm, tuple(_NORMS))


def _trace(factors: Sides) -> Float[Array, " 2 *e"]:
    return mean_rows([side.diagonal for side in factors])


def _frobenius(factors: Sides) -> Float[Array, " 2 *e"]:
    return jnp.stack(
        [side.frobenius_norm / side.array.shape[-1] ** 0.5 for side in factors]
    )


def _spectral(factors: Sides) -> Float[Array, " 2 *e"]:
    return jnp.stack([(eigh(x)[0] if is_full else x).max(-1) for x, is_full in factors])


def _one(factors: Sides) -> Float[Array, " 2 *e"]:
    x, is_full = factors[0]
    return jnp.ones((2, *x.shape[: -2 if is_full else -1]), x.dtype)


_NORMS: dict[str, Callable[[Sides], Array]] = {
    "trace": _trace,
    "frobenius": _frobenius,
    "spectral": _spectral,
    "one": _one,
}
