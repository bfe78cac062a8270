"""Second moments `xᵀ x`; on CPUs a quarter of the symmetric result is copied."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Real

_SMALLEST = 192
"""The smallest side for which halving pays."""

_SQUAREST = 0.75
_TALLEST = 100
"""Halving pays between these numbers of rows for each column. With fewer rows, the
saved arithmetic is little beside the memory traffic; with more, narrow products are
slow."""


def gram(rows: Real[Array, "*e r d"], dtype: DTypeLike) -> Float[Array, "*e d d"]:
    """`Σ_r x_r x_rᵀ` of rows, accumulated in a type that may be wider.

    The result is symmetric, so on CPUs, where this is faster, a quarter is copied from
    another. (Finer divisions need less arithmetic, but more compilation and memory
    traffic, and were not faster within a step.)

    Args:
      rows: real numbers.
      dtype: the type to accumulate in.

    Returns:
      The second moments.

    >>> import jax.numpy as jnp
    >>> gram(jnp.asarray([[1.0, 2.0], [0.0, 1.0]]), jnp.float32)
    Array([[1., 2.],
           [2., 5.]], dtype=float32)
    """
    r, d = rows.shape[-2:]
    if d < _SMALLEST or not _SQUAREST * d <= r <= _TALLEST * d:
        return _product(rows, rows, dtype)
    return jax.lax.platform_dependent(
        rows,
        cpu=lambda x: _by_halves(x, dtype),
        default=lambda x: _product(x, x, dtype),
    )


def _by_halves(x: Real[Array, "*e r d"], dtype: DTypeLike) -> Float[Array, "*e d d"]:
    half = 16 * -(-x.shape[-1] // 32)  # whole vectors of the CPU
    first, second = x[..., :half], x[..., half:]
    corner = _product(first, second, dtype)
    top = [_product(first, first, dtype), corner]
    bottom = [jnp.swapaxes(corner, -1, -2), _product(second, second, dtype)]
    return jnp.concatenate([jnp.concatenate(row, -1) for row in (top, bottom)], -2)


def _product(
    x: Real[Array, "*e r i"], y: Real[Array, "*e r o"], dtype: DTypeLike
) -> Float[Array, "*e i o"]:
    return jnp.einsum("...ri,...rj->...ij", x, y, preferred_element_type=dtype)
