"""The loss around the parameters, on a step's own batch."""

import dataclasses
from typing import Any

import jax
import optax
from jax import Array

from kfac_jax._jaxpr import _compat, axis_types
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices
from kfac_jax.optimization.loss import loss_at
from kfac_jax.plan import batch as batch_lib


@dataclasses.dataclass(frozen=True, eq=False)
class LocalModel:
    """The quadratic model `M(δ) = ½ δᵀ (F + (λ+η) I) δ + ∇hᵀ δ + h`, and h itself.

    Attributes:
      curvature: the plan.
      params: θ; None if no rule needs it.
      args: the loss function's further arguments, or None.
      gradient: ∇h, by leaves, without leaves that a mask hides.
      damping: λ.
      devices: the devices that the batch is spread over.
    """

    curvature: Curvature
    params: optax.Params | None
    args: Any
    gradient: list[Array]
    damping: Array
    devices: Devices

    def fisher(self, vectors: Any, fraction: float) -> Array:
        """The matrix `Vᵀ F V`, see `Curvature.quadratic_form`.

        Args:
          vectors: V.
          fraction: τ2, the part of the batch that F is computed on.

        Returns:
          `[n, n]`, averaged over all devices' batches.
        """
        args = batch_lib.take(self.args, fraction, self.curvature.in_batch)
        matrix = self.curvature.quadratic_form(self.params, vectors, *args)
        return self.devices.mean(matrix)

    def product(self, vector: list[Array], fraction: float) -> list[Array]:
        """`(F + (λ+η) I) v`.

        Args:
          vector: v, by leaves, in float32 or wider.
          fraction: τ2, the part of the batch that F is computed on.

        Returns:
          Leaves of the same types, averaged over all devices' batches.
        """
        args = batch_lib.take(self.args, fraction, self.curvature.in_batch)
        pairs = zip(vector, self.gradient, strict=True)
        tree = jax.tree.unflatten(
            self.curvature.tree.treedef, [v.astype(g.dtype) for v, g in pairs]
        )
        # inside of shard_map JAX sums what it pulls back to what is the same everywhere
        data = jax.tree.leaves(args)
        params, tree = (
            jax.tree.map(lambda x: _compat.vary_like(x, *data), part)
            for part in (self.params, tree)
        )

        def multiplied(tree: Any) -> Any:
            return self.curvature.matvec(params, tree, *args)

        product = axis_types.explicit(multiplied, self.params)(tree)
        images = self.devices.mean(jax.tree.leaves(product))
        return [
            x.astype(v.dtype) + self.total_damping(v) * v
            for x, v in zip(images, vector, strict=True)
        ]

    def total_damping(self, like: Array) -> Array:
        """λ + η, in the type of a matrix."""
        return (self.damping + self.curvature.l2).astype(like.dtype)

    def moved(self, delta: list[Array]) -> optax.Params:
        """θ + δ."""
        tree = jax.tree.unflatten(self.curvature.tree.treedef, delta)
        return optax.apply_updates(axis_types.here(self.params), tree)

    def loss(self, params: optax.Params) -> Array:
        """The batch's loss at other parameters."""

        def own(params: optax.Params) -> Array:
            return loss_at(self.curvature, params, self.args)

        return self.devices.mean(axis_types.explicit(own, self.params)(params))
