"""Products with the exact curvature, whose matrix is never formed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.differentiation import check_forward_mode, reverse_mode
from kfac_jax._jaxpr.graph import Graph, build
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._utils.trees import TreeSpec
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.plan.programs import outputs_program
from kfac_jax.plan.tracing import trace

Params = Any


@dataclasses.dataclass(frozen=True, eq=False)
class ExactProducts:
    """The exact curvature at one point: parameters and a batch.

    Attributes:
      loss_fn: the loss function.
      has_aux: whether it returns `(loss, aux)`.
      tree: describes the parameters.
      params: the parameters.
      leaves: their leaves.
      args: the loss function's further arguments.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    tree: TreeSpec
    params: Params
    leaves: tuple[Array, ...]
    args: Any

    def hessian_product(self, params: Params, v: Params) -> Params:
        """`H v`, forward over reverse."""
        grad = jax.grad(self.loss_fn, has_aux=self.has_aux)

        def gradient(params: Params) -> Params:
            result = grad(params, *self.args)
            return result[0] if self.has_aux else result

        def slope(params: Params, v: Params) -> Params:
            return jax.jvp(gradient, (params,), (v,))[1]

        traced = jax.make_jaxpr(self.loss_fn)(params, *self.args)
        check_forward_mode(build(traced), slope, params, v)
        return slope(params, v)

    def fisher_product(self, tangents: Sequence[Array]) -> list[Array]:
        """`F v = Jᵀ B Bᵀ J v`, by leaves."""
        outputs, graph = self._outputs()
        _, push, losses = jax.linearize(outputs, list(self.leaves), has_aux=True)
        moved = push(list(tangents))

        def roots(losses: Sequence[RegisteredLoss], moved: list[Array]) -> list[Array]:
            return [
                loss.multiply_root(loss.multiply_root_transpose(dz))
                for loss, dz in zip(losses, moved, strict=True)
            ]

        pulled = axis_types.auto(roots, moved)(losses, moved)
        with reverse_mode(graph, len(self.leaves)):
            (product,) = jax.linear_transpose(push, list(self.leaves))(pulled)
        return product

    def quadratic_form(self, vectors: Sequence[Any]) -> Array:
        """`Vᵀ F V`, `[n, n]`, with V by leaves.

        Args:
          vectors: n lists of leaves, or one list of leaves with a leading axis n.

        Returns:
          The matrix.
        """
        outputs = axis_types.explicit(lambda _: self._outputs()[0], self.leaves)(
            self.leaves
        )

        def forward(tangents: list[Array]) -> Any:
            return jax.jvp(outputs, (list(self.leaves),), (tangents,), has_aux=True)[1:]

        def push(tangents: list[Array]) -> Array:
            moved, losses = axis_types.explicit(forward, list(self.leaves))(tangents)
            rooted = [
                loss.multiply_root_transpose(dz).reshape(-1)
                for loss, dz in zip(losses, moved, strict=True)
            ]
            return jnp.concatenate(rooted)

        def product(vectors: Sequence[Any]) -> Array:
            if isinstance(vectors[0], list):
                # Unrolled, XLA computes the primal values that the pushes share once.
                # `vmap` would have to stack the vectors first, a copy of each.
                pushed = jnp.stack([push(v) for v in vectors])
            else:
                pushed = jax.vmap(push)(list(vectors))
            return pushed @ pushed.T

        return axis_types.auto(product)(vectors)

    def _outputs(self) -> tuple[Callable[[list[Array]], Any], Graph]:
        """The registered outputs as a function of the parameters, and its program."""
        traced = trace(
            self.loss_fn,
            self.has_aux,
            self.tree,
            self.params,
            self.args,
            None,
            agreements=(),  # layers are of no interest here: all rules stay
        )
        program = outputs_program(traced)
        data = jax.tree.leaves(self.args)

        def outputs(leaves: list[Array]) -> tuple[list[Array], list[RegisteredLoss]]:
            _, losses = run(program, [*leaves, *data], None)
            return [loss.z for loss in losses], losses

        def push(leaves: list[Array], tangents: list[Array]) -> Any:
            return jax.jvp(outputs, (leaves,), (tangents,), has_aux=True)[1]

        own = list(self.leaves)
        check_forward_mode(program.graph, push, own, own)
        return outputs, program.graph
