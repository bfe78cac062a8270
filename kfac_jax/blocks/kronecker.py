"""The Kronecker-factored block of Martens & Grosse (2015)."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._dtypes import wide_dtype
from kfac_jax.blocks._block import Block, BlockShape, Damped, Factors, Spectrum


def _second_moment(x: Array) -> Array:
    """`Σ_rows x xᵀ` over batch and positions, in float32 or wider."""
    dtype = wide_dtype(x.dtype)
    rows = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    return jnp.einsum("...ri,...rj->...ij", rows, rows, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kronecker(Block):
    """`F ≈ A ⊗ G`, with `A = E[x xᵀ]` and `G = E[dy dyᵀ]`.

    A layer used at R rows per case (weight sharing) has `A` averaged over rows and `G`
    summed over them (the "expand" setting). Weight and bias share the block: the bias
    is the weight of a homogeneous coordinate. As a matrix, `V ↦ A V G`.

    Factored damping replaces the factors by `A + π √λ I` and `G + √λ / π I`, π from
    the trace norm.

    References:
      Martens & Grosse 2015, sections 3, 4.2 and 6.3. Eschenhagen et al. 2023 for
      "expand".

    >>> Kronecker()
    Kronecker()
    """

    row_statistics = frozenset({"input", "count"})

    def statistics_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """Sums for both factors, and the number of rows that count.

        With a homogeneous coordinate that is the last entry of the inputs' sum.
        """
        count = {} if shape.homogeneous else {"count": shape.lead}
        return self.factor_shapes(shape) | count

    def factor_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """`input: [*e, i, i]` and `output: [*e, o, o]`."""
        i, o = shape.inputs, shape.outputs
        return {"input": (*shape.lead, i, i), "output": (*shape.lead, o, o)}

    def statistics(self, x: Array, dy: Array) -> Factors:
        """Both sums; rows without a gradient do not count."""
        count = (dy != 0).any(-1).sum((-2, -1))
        return {
            "input": _second_moment(x),
            "output": _second_moment(dy),
            "count": count,
        }

    def factors(self, statistics: Factors, weight: Array) -> Factors:
        """Divides inputs by the number of rows, outputs by that of batches."""
        rows = statistics.get("count", statistics["input"][..., -1, -1])
        count = jnp.maximum(rows, 1.0)[..., None, None]
        return {
            "input": statistics["input"] / count,
            "output": statistics["output"] / weight,
        }

    def damp(self, factors: Factors, damping: Array) -> dict[str, Damped]:
        """Factored Tikhonov damping (section 6.3)."""
        a, g = factors["input"], factors["output"]
        pi = linalg.trace_pi(a, g)
        gamma = jnp.sqrt(jnp.asarray(damping, a.dtype))
        return {"input": Damped(a, pi * gamma), "output": Damped(g, gamma / pi)}

    def solve(self, inverses: Factors, v: Array) -> Array:
        """`A⁻¹ V G⁻¹`."""
        return inverses["input"] @ v @ inverses["output"]

    def matvec(self, factors: Factors, v: Array) -> Array:
        """`A V G`."""
        return factors["input"] @ v @ factors["output"]

    def diagonal(self, factors: Factors, shape: BlockShape) -> Array:
        """The outer product of both diagonals."""
        a = jnp.diagonal(factors["input"], axis1=-2, axis2=-1)
        g = jnp.diagonal(factors["output"], axis1=-2, axis2=-1)
        return a[..., :, None] * g[..., None, :]

    def spectrum(self, factors: Factors, shape: BlockShape) -> Spectrum:
        """The joint eigenbasis `U_A ⊗ U_G`; exact damping adds λ to the products."""
        a, g = factors["input"], factors["output"]
        (wa, ua), (wg, ug) = linalg.eigh(a), linalg.eigh(g)
        pi = linalg.trace_pi(a, g)[..., None]

        def eigenvalues(damping: Array, mode: str) -> Array:
            damping = jnp.asarray(damping, wa.dtype)
            if mode == "exact":
                return wa[..., :, None] * wg[..., None, :] + damping
            gamma = jnp.sqrt(damping)
            return (wa + pi * gamma)[..., :, None] * (wg + gamma / pi)[..., None, :]

        return Spectrum(
            eigenvalues,
            to_basis=lambda v: jnp.swapaxes(ua, -1, -2) @ v @ ug,
            from_basis=lambda v: ua @ v @ jnp.swapaxes(ug, -1, -2),
        )
