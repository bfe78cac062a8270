"""What the published Optimizer tells about the vectors of a step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax import Array

from kfac_jax._utils.vectors import inner_product
from kfac_jax.curvature import Curvature
from kfac_jax.operator.inverses import precondition
from kfac_jax.optimization.state import KFACState


def tree_product(u: ArrayTree, v: ArrayTree) -> Array:
    """`uᵀ v` of two trees of arrays, accumulated in float32 or wider."""
    return inner_product(jax.tree.leaves(u), jax.tree.leaves(v))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms:
    """Which of them to tell.

    Attributes:
      constraint: the norm constraint, with which the scaled norm is told; or None.
      total: whether to tell the norms of parameters, gradient and so on.
      each: whether to tell those of each parameter.
    """

    constraint: float | None
    total: bool
    each: bool

    def __call__(
        self,
        curvature: Curvature,
        state: KFACState,
        learning_rate: Array | None,
        params: ArrayTree,
        grads: ArrayTree,
        updates: ArrayTree,
    ) -> dict[str, Any]:
        """Returns the norms by their published names.

        Args:
          curvature: the plan.
          state: the state after the step, with the inverses that it used.
          learning_rate: α, where it is given.
          params: the parameters after the step.
          grads: the gradient.
          updates: the update.
        """
        found: dict[str, Any] = {"scaled_grad_norm_sq": None}
        if self.constraint is None and not self.total and not self.each:
            return found
        # the update has computed this of the same arrays, downhill: XLA does it once
        down = jax.tree.map(jnp.negative, grads)
        leaves = curvature.tree.masked_leaves(down, "grads")
        factors, inverses = state.factors, state.inverses
        scaled, _ = precondition(curvature.groups, factors, inverses, leaves, {})
        direction = curvature.tree.restore(scaled, grads)
        if self.constraint is not None:
            assert learning_rate is not None
            square = -tree_product(direction, grads) * learning_rate**2
            found["scaled_grad_norm_sq"] = square
            within = jnp.sqrt(self.constraint / jnp.maximum(square, self.constraint))
            direction = jax.tree.map(lambda x: x * within.astype(x.dtype), direction)
        trees = {
            "param_norm": params,
            "grad_norm": grads,
            "precon_grad_norm": direction,
            "update_norm": updates,
        }
        for name, tree in trees.items():
            if self.total:
                found[name] = jnp.sqrt(tree_product(tree, tree))
            for path, leaf in jax.tree.leaves_with_path(tree) if self.each else ():
                key = jax.tree_util.keystr(path, simple=True, separator="/")
                found[f"{name}({key})"] = jnp.sqrt(tree_product(leaf, leaf))
        return found
