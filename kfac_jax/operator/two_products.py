"""Layers whose curvature is a sum of two Kronecker products."""

import dataclasses
import functools
import numbers
from collections.abc import Mapping

import jax.numpy as jnp
from chex import Numeric
from jax import Array

from kfac_jax._utils import fresh
from kfac_jax.blocks.kronecker_sum import (
    BASIS,
    KroneckerSum,
    from_basis,
    log_determinant_of_bases,
    total,
)
from kfac_jax.devices import Devices, Task
from kfac_jax.linalg import Inverted
from kfac_jax.operator.inverses import compute
from kfac_jax.operator.single import Single
from kfac_jax.plan.group import Arrays, Factors, FactorShapes, Name, Vectors


@dataclasses.dataclass(frozen=True)
class TwoProducts(Single):
    """A layer under `KroneckerSum`, with K and s of both sides in place of inverses."""

    wants_roots = True

    @property
    def block(self) -> KroneckerSum:
        """The layer's block."""
        assert isinstance(self.layer.block, KroneckerSum)
        return self.layer.block

    @property
    def inverse_shapes(self) -> FactorShapes:
        """The shapes of K and s."""
        return {self.name: self.block.decomposed_shapes(self.layer.shape)}

    def init_inverses(self) -> Factors:
        """The inverse of the identity: K = I and s = 0."""
        dtype = self.layer.dtype
        found: Arrays = {}
        for name, shape in self.inverse_shapes[self.name].items():
            if not name.endswith(BASIS):
                found[name] = fresh.full(shape, 0.0, dtype)
            elif name.removesuffix(BASIS) in self.block.elementwise:
                found[name] = fresh.full(shape, 1.0, dtype)
            else:
                found[name] = fresh.identities(shape, dtype)
        return {self.name: found}

    def inverses(
        self,
        found: Mapping[Name, Inverted],
        factors: Factors,
        damping: Numeric,
        devices: Devices,
    ) -> tuple[Factors, Array]:
        """K and s, from roots of the first product's inverses."""
        elementwise = self.block.elementwise
        roots = {
            name: jnp.sqrt(x.inverse) if name in elementwise else x.inverse
            for (_, name), x in found.items()
        }
        names = [*self.inverse_shapes[self.name]]

        def decompose(operand: tuple[Arrays, Arrays, Array]) -> list[Array]:
            arrays = self.block.decompose(*operand)
            return [arrays[name] for name in names]

        damping = jnp.asarray(damping, self.layer.dtype)
        operand = (roots, dict(factors[self.name]), damping)
        task = Task(float(self.inversion_cost), decompose, operand)
        arrays = devices.each({self.name: task})[self.name]
        flags = [jnp.isfinite(x).all() for x in arrays]
        result = {self.name: dict(zip(names, arrays, strict=True))}
        return result, functools.reduce(jnp.logical_and, flags)

    # ----------------------------------------------------------------------- operator

    def check_mode(self, damping: Numeric, mode: str) -> None:
        """Refuses exact damping."""
        if mode == "exact" and not (isinstance(damping, numbers.Real) and damping == 0):
            self.block.spectrum({}, self.layer.shape)

    @property
    def has_spectrum(self) -> bool:
        """False: the eigenvectors have no closed form."""
        return False

    def logdet(self, factors: Factors, damping: Numeric, mode: str) -> Array:
        """`Σ log(1 + s_A s_Gᵀ) - 2 log |det (K_A ⊗ K_G)|`."""
        own = compute([self], factors, damping)[0][self.name]
        return jnp.log(total(own)).sum() - 2 * log_determinant_of_bases(own)

    def sample(
        self, factors: Factors, noise: Vectors, damping: Numeric, mode: str
    ) -> Vectors:
        """Multiplies the noise by a root of the inverse."""
        own = compute([self], factors, damping)[0][self.name]
        return {self.name: from_basis(own, noise[self.name] / jnp.sqrt(total(own)))}
