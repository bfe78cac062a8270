"""The inversion of a matrix by several devices, each of which computes some columns."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.linalg._psd import inverse_root, join_quarters, quarters, transpose

LEAVES = 8
"""The number of diagonal blocks of a matrix; every device computes all their roots."""


class Columns(NamedTuple):
    """How devices divide columns.

    Attributes:
      me: the index of this device.
      devices: the number of devices.
      join: joins all devices' `[..., c]` to `[..., devices · c]`.
    """

    me: Array
    devices: int
    join: Callable[[Array], Array]

    def compute(self, function: Callable[[Array], Array], x: Array) -> Array:
        """`f(x)` for an f that acts on each column; each device computes some."""
        count = -(-x.shape[-1] // self.devices)
        more = count * self.devices - x.shape[-1]
        padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, more)])
        own = jax.lax.dynamic_slice_in_dim(padded, self.me * count, count, -1)
        return self.join(function(own))[..., : x.shape[-1]]


def shared_inverse(x: Array, columns: Columns) -> Array:
    """Inverts symmetric `[k, d, d]`; NaN where x is not positive definite.

    With the root R of the inverse, upper triangular `[[a, b], [0, c]]`, the inverse is
    `[[a aᵀ + b bᵀ, b cᵀ], [c bᵀ, c cᵀ]]`.

    Args:
      x: the matrices, the same on all devices.
      columns: how the devices divide the work.

    Returns:
      The inverses, the same on all devices.
    """
    root = _shared_root(x, columns, x.shape[-1] // LEAVES)
    half = x.shape[-1] // 2
    top, c = root[:, :half], root[:, half:, half:]
    right = columns.compute(lambda s: root[:, :, half:] @ s, transpose(c))
    left = columns.compute(lambda s: top @ s, transpose(top))
    upper, lower = right[:, :half], right[:, half:]
    return join_quarters(left, upper, transpose(upper), lower)


def _shared_root(x: Array, columns: Columns, smallest: int) -> Array:
    """R, upper triangular, with `R Rᵀ x = I`.

    Of `x = Uᵀ U` with `U = [[u, v], [0, w]]` everyone has `u⁻¹`; they share `v = u⁻ᵀ b`
    and `c - vᵀ v = wᵀ w`, and `-u⁻¹ v w⁻¹` of the root. As stable as a factorisation
    by one device: nothing is multiplied by an inverse that is not a root's.
    """
    d = x.shape[-1]
    if d <= max(smallest, 1) or d % 2:
        return inverse_root(x)
    a, b, _, c = quarters(x)
    first = _shared_root(a, columns, smallest)
    v = columns.compute(lambda s: transpose(first) @ s, b)
    rest = columns.compute(
        lambda s: s[:, : d // 2] - transpose(v) @ s[:, d // 2 :],
        jnp.concatenate([c, v], axis=1),
    )
    second = _shared_root(rest, columns, smallest)
    across = columns.compute(lambda s: -(first @ (v @ s)), second)
    return join_quarters(first, across, jnp.zeros_like(b), second)
